"""What PyTorch reads out of our Triton kernels when Inductor is to launch them: exactly which tensors they write.

No GPU is needed for that, only a driver that says what the target is. Without the right answer Inductor would compile a
wrong program, so a call that is misread must not be traced.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from rocm_attn_compile import _torch_private
from rocm_attn_compile.kernels.triton import aot_launches, traced

TARGETS = {
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
    "sm90": GPUTarget("cuda", 90, 32),
}
WRITTEN = {
    "attention_forward_kernel": {"out", "lse"},
    "attention_combine_kernel": {"out", "lse"},
    "backward_rows_kernel": {"shift", "delta"},
    "backward_dkdv_kernel": {"grad_k", "grad_v"},
    "backward_dq_kernel": {"grad_q"},
    "backward_bias_kernel": {"grad_bias"},
}
EVERYTHING = {
    "attn_bias": True, "attn_mask": True, "key_mask": True, "kv_start": True, "kv_end": True,
    "soft_cap": 30.0, "dropout_p": 0.1, "band_lower": -9, "empty_rows": "mean_added",
}  # fmt: skip


@pytest.fixture
def launches_for(monkeypatch):
    def make(arch, **features):
        driver = SimpleNamespace(get_current_target=lambda: TARGETS[arch], get_current_device=lambda: 0)
        monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
        return aot_launches.launches(arch, torch.bfloat16, 64, q_len=128, kv_len=128, **features).values()

    return make


def read(launch):
    kernel = traced._with_options(launch.kernel, tuple(sorted(launch.options.items())))
    return _torch_private.triton_writes(kernel, launch.arguments)


@pytest.mark.parametrize("arch", TARGETS)
def test_training(launches_for, arch):
    found = {launch.kernel.__name__: read(launch) for launch in launches_for(arch)}
    assert found == {name: WRITTEN[name] for name in found} and len(found) == 4


def test_every_feature(launches_for):
    found = {launch.kernel.__name__: read(launch) for launch in launches_for("gfx942", **EVERYTHING)}
    extra = {"backward_rows_kernel": {"correction", "any_empty"}}
    assert found == {name: WRITTEN[name] | extra.get(name, set()) for name in found} and len(found) == 5


def test_split_decode(launches_for):
    found = {
        launch.kernel.__name__: read(launch)
        for launch in launches_for("gfx942", num_splits=4, kv_end=True, backward=False, causal=False)
    }
    assert found["attention_forward_kernel"] == {"partial", "partial_stats"}
    assert found["attention_combine_kernel"] == WRITTEN["attention_combine_kernel"]


def test_a_kernel_that_pytorch_misreads_is_not_traced(launches_for, caplog):
    (launch,) = launches_for("gfx942", backward=False)
    kernel = traced._with_options(launch.kernel, tuple(sorted(launch.options.items())))
    given = {id(launch.arguments["q"])}
    assert traced._is_understood(kernel, launch, given, _torch_private.triton_writes)
    traced._understood.clear()
    assert not traced._is_understood(kernel, launch, given, lambda *_: {"q", "out"})
    assert "attention_forward_kernel is not inlined" in caplog.text
    traced._understood.clear()
    assert not traced._is_understood(kernel, launch, given, lambda *_: set())
    traced._understood.clear()


def test_without_a_driver_every_tensor_counts_as_written():
    """As on a machine without a GPU; what PyTorch logs then says so."""
    (launch,) = aot_launches.launches("gfx942", torch.bfloat16, 64, backward=False).values()
    assert {"q", "k", "v", "out", "lse"} <= read(launch)
