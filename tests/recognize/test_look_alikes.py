"""What looks like attention and is not is left alone: the result is eager's, and a reason names the obstacle."""

from __future__ import annotations

import pytest
import torch
from look_alikes import LOOK_ALIKES, LookAlike
from recorder import Recorder

import rocm_attn_compile


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("look_alike", LOOK_ALIKES.values(), ids=lambda x: x.name)
def test_look_alike_is_left_alone(look_alike: LookAlike, dynamic):
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in look_alike.make()]
    want = look_alike.function(*inputs)
    recorder = Recorder(lowering="eager")
    got = torch.compile(look_alike.function, backend=recorder, fullgraph=True, dynamic=dynamic)(*inputs)

    assert recorder.calls == 0
    reports = rocm_attn_compile.reports()
    seen = [site for report in reports for site in (*report.sites, *report.look_alikes)]
    assert not any(site.replaced for site in seen)
    codes = {reason.code for site in seen for reason in site.reasons}
    assert codes == ({look_alike.code} if look_alike.code else set()), "\n".join(map(str, reports))
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)  # the very same graph ran


def test_there_are_enough_look_alikes():
    assert len(LOOK_ALIKES) >= 25
