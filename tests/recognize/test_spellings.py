"""Every spelling of `spellings.py` is replaced by the op, and is as accurate as eager: forward and gradients."""

from __future__ import annotations

import pytest
import torch
from recorder import Recorder
from spellings import SPELLINGS, Spelling, inputs_of, results_of

import rocm_attn_compile
from rocm_attn_compile.testing import Float64Everywhere, assert_as_accurate_as_eager, assert_same_computation

CASES = [
    pytest.param(torch.float32, True, None, id="fp32-train-static"),
    pytest.param(torch.bfloat16, False, None, id="bf16-infer-static"),
    pytest.param(torch.float32, False, True, id="fp32-infer-dynamic"),
    pytest.param(torch.bfloat16, True, None, id="bf16-train-static", marks=pytest.mark.slow),
    pytest.param(torch.float32, True, True, id="fp32-train-dynamic", marks=pytest.mark.slow),
    pytest.param(torch.bfloat16, True, True, id="bf16-train-dynamic", marks=pytest.mark.slow),
    pytest.param(torch.bfloat16, False, True, id="bf16-infer-dynamic", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("dtype", "trains", "dynamic"), CASES)
@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=lambda s: s.name)
def test_spelling_is_replaced_and_right(spelling: Spelling, dtype, trains, dynamic):
    with Float64Everywhere():  # spellings with a float32 island
        exact = results_of(spelling.function, inputs_of(spelling, torch.float64, dtype, trains), trains)
    eager = results_of(spelling.function, inputs_of(spelling, dtype, dtype, trains), trains)
    recorder = Recorder(lowering="aot_eager" if trains else "eager")
    compiled = torch.compile(spelling.function, backend=recorder, fullgraph=True, dynamic=dynamic)
    actual = results_of(compiled, inputs_of(spelling, dtype, dtype, trains), trains)

    reports = rocm_attn_compile.reports()
    if dynamic and not spelling.dynamic:
        assert recorder.calls == 0
        codes = {reason.code for report in reports for site in report.sites for reason in site.reasons}
        assert codes <= {"axis_split", "axis_mismatch"}
        assert codes
        return
    assert recorder.calls == 1, "\n".join(map(str, reports))
    (site,) = [site for report in reports for site in report.sites]
    assert (site.kind, site.replaced, site.backend, site.reasons) == ("attention", True, "TRITON_ATTN", [])
    assert site.source.startswith(__file__.replace("test_spellings", "spellings") + ":")
    exact = tuple(t.double() for t in exact)
    assert_same_computation(eager[0], exact[0])
    assert_as_accurate_as_eager(actual, eager, exact, factor=8.0 if dtype is torch.float32 else 3.0)


def test_there_are_enough_spellings():
    assert len(SPELLINGS) >= 60


def test_float32_products_under_autocast_stay_float32():
    """mul and sum are not autocast, so eager computes this attention in float32; the op must not round to bfloat16."""
    spelling = SPELLINGS["products_by_mul_and_sum"]
    inputs = inputs_of(spelling, torch.float32, torch.float32, False)

    def under_autocast(*tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return spelling.function(*tensors)

    exact = spelling.function(*(t.double() for t in inputs))
    recorder = Recorder(lowering="aot_eager")
    actual = torch.compile(under_autocast, backend=recorder, fullgraph=True)(*inputs)
    assert recorder.calls == 1
    assert_as_accurate_as_eager(actual, under_autocast(*inputs), exact)


@pytest.mark.parametrize("name", ["textbook_div", "llama_repeat_kv", "gemma2_soft_cap", "key_padding", "sdpa_plain"])
def test_autocast_region(name: str):
    """Implicit casts of autocast are seen: the op runs in bfloat16, as eager does."""
    spelling = SPELLINGS[name]
    inputs = inputs_of(spelling, torch.float32, torch.float32, True)

    def under_autocast(*tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return spelling.function(*tensors)

    with Float64Everywhere():
        exact = results_of(spelling.function, inputs_of(spelling, torch.float64, torch.float32, True), True)
    eager = results_of(under_autocast, inputs, True)
    recorder = Recorder(lowering="aot_eager")
    actual = results_of(torch.compile(under_autocast, backend=recorder, fullgraph=True), inputs, True)
    (site,) = rocm_attn_compile.reports()[0].sites
    assert site.replaced
    assert "bf16" in site.spec
    assert_as_accurate_as_eager(actual, eager, tuple(t.double() for t in exact))
