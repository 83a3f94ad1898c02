"""Weights as a second result on a real GPU: our kernel, in graphs that Inductor compiled, also as CUDA graphs."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F

import rocm_attn_compile
from rocm_attn_compile.ops import returned_weights
from rocm_attn_compile.testing import assert_as_accurate_as_eager

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("default_gpu")]


def attend(q, k, v, keep):
    """Grouped heads, causal and padded, as Hugging Face writes it."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.matmul(q, k.mT) * q.shape[-1] ** -0.5
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril() & keep[:, None, None]
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32 if q.dtype != torch.float64 else None).to(q.dtype)
    return (weights @ v).transpose(1, 2).contiguous(), weights


@pytest.fixture(params=[False, True], ids=["kernel", "short"])
def is_short(request, monkeypatch):
    """Whether the call counts as short; no cache knows, which takes the kernels' sources for all that there is."""
    monkeypatch.setattr(returned_weights, "MIN_SCORES", 2**62 if request.param else 0)
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)


@pytest.mark.usefixtures("is_short")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("length", "head_dim"), [(200, 64), (256, 80)])
def test_output_and_weights(length, head_dim, dtype, mode):
    torch.manual_seed(0)
    shapes = ((2, 4, length, head_dim), (2, 2, length, head_dim), (2, 2, length, head_dim))
    q, k, v = (torch.randn(*shape, device="cuda").to(dtype) for shape in shapes)
    keep = torch.arange(length, device="cuda") >= torch.tensor([[0], [37]], device="cuda")
    compiled = torch.compile(attend, backend="rocm_attn", mode=mode, fullgraph=True)
    with torch.no_grad():
        want = attend(q, k, v, keep)
        exact = attend(q.double(), k.double(), v.double(), keep)
        for _ in range(3):
            actual = tuple(t.clone() for t in compiled(q, k, v, keep))
            assert_as_accurate_as_eager(actual, want, exact, factor=4.0)
    (site,) = [site for report in rocm_attn_compile.reports() for site in report.sites]
    assert site.replaced
    assert site.data["returned_weights"] == "mean"


@pytest.mark.usefixtures("is_short")
def test_an_opaque_call_waits_for_nothing():
    """Sizes that Inductor does not know, so that the op itself is called."""
    q, k, v = (torch.randn(1, 2, 70, 32, device="cuda") for _ in range(3))
    keep = torch.ones(1, 70, dtype=torch.bool, device="cuda")
    compiled = torch.compile(attend, backend="rocm_attn", dynamic=True)
    with torch.no_grad():
        want = attend(q, k, v, keep)
        exact = attend(q.double(), k.double(), v.double(), keep)
        assert_as_accurate_as_eager(compiled(q, k, v, keep), want, exact, factor=4.0)
