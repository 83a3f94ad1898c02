"""The op written out in AOTAutograd's trace computes what the op computes, and stays a call where it cannot be."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, EMPTY_CASES, make, randn, seeded
from functorch.compile import make_boxed_func
from oracle import Call, attend, grads_of, keep_of
from torch._dynamo.backends.common import aot_autograd

import rocm_attn_compile.ops as ops
from rocm_attn_compile.ops import cpu_inline
from rocm_attn_compile.testing import assert_as_accurate_as_eager, count_calls

MODES = ["nan", "nan_added", "zero", "mean", "mean_added"]
FUSED = "aten._scaled_dot_product_flash_attention_for_cpu"


class Traced:
    """The op under AOTAutograd, and what its forward and backward graphs call."""

    def __init__(self, dynamic: bool = False) -> None:
        self.forward: dict[str, int] = {}
        self.backward: dict[str, int] = {}
        keep = lambda name: lambda gm, _: (setattr(self, name, count_calls(gm)), make_boxed_func(gm.forward))[1]  # noqa: E731
        backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
        self.run = torch.compile(self._attention, backend=backend, fullgraph=True, dynamic=dynamic)

    @staticmethod
    def _attention(q, k, v, kwargs):
        return ops.attention(q, k, v, **kwargs, impl="TRITON_ATTN@0+inline")

    def __call__(self, call: Call, **settings):
        return self.run(call.q, call.k, call.v, {**call.kwargs, **settings})

    @property
    def is_forward_inlined(self) -> bool:
        return "rocm_attn.attention" not in self.forward

    @property
    def is_backward_inlined(self) -> bool:
        return "rocm_attn.attention_backward" not in self.backward


def check(call: Call, dtype: torch.dtype, out_layout: str = "bhsd") -> Traced:
    rounded = call.to(dtype)
    exact = rounded.to(torch.float64)
    traced = Traced()
    out, lse = traced(rounded, out_layout=out_layout)
    grad_out = torch.randn(out.shape).to(dtype)
    got = (out, lse, *grads_of(out, rounded, grad_out))
    eager, eager_lse = attend(rounded)
    truth, truth_lse = attend(exact)
    want = (truth, truth_lse, *grads_of(truth, exact, grad_out.double()))
    if dtype == torch.float64:
        torch.testing.assert_close(got, want, equal_nan=True)
    else:
        in_eager = (eager, eager_lse, *grads_of(eager, rounded, grad_out))
        assert_as_accurate_as_eager(got, in_eager, want, factor=8.0 if dtype == torch.float32 else 3.0)
    op_out, _ = ops.attention(rounded.q, rounded.k, rounded.v, **rounded.kwargs, out_layout=out_layout)
    assert out.stride() == op_out.stride() and lse.is_contiguous()
    return traced


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name):
    call = seeded(CASES[name])
    call.settings["empty_rows"] = "impossible"
    traced = check(call, torch.float64, "bshd")
    is_unfused_decode = call.q.shape[2] == 1 and call.q.shape[3] != call.v.shape[3]
    has_groups = call.q.shape[1] != call.k.shape[1] and "logits_soft_cap" not in call.settings
    right = cpu_inline.lse_is_traced_in_float64()
    assert traced.is_forward_inlined == (right and not (has_groups and is_unfused_decode))
    # The unfused code, in which groups cost nothing, computes the gradients of a bias and of a single query.
    is_unfused = "attn_bias" in call.tensors or call.q.shape[2] == 1
    # The fused backward of ALiBi looks at lse, which a trace cannot.
    looks_at_lse = "alibi_slopes" in call.tensors and "logits_soft_cap" not in call.settings
    assert traced.is_backward_inlined == (right and (is_unfused or not looks_at_lse))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["causal-square", "key-mask-causal", "soft-cap-gqa-window", "bias", "sinks"])
def test_half_precision_and_float32(name, dtype):
    call = seeded(CASES[name])
    call.settings["empty_rows"] = "impossible"
    traced = check(call, dtype)
    assert traced.is_forward_inlined and traced.is_backward_inlined


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EMPTY_CASES)
def test_empty_rows(name, mode):
    call = seeded(EMPTY_CASES[name], empty_rows=mode)
    assert bool((~keep_of(call).any(-1)).any())
    traced = check(call, torch.float64)
    right = cpu_inline.lse_is_traced_in_float64()
    assert traced.is_forward_inlined == right
    is_unfused = "logits_soft_cap" in call.settings or call.q.shape[2] == 1
    assert traced.is_backward_inlined == (right and (is_unfused or mode != "mean_added"))


def test_a_length_that_depends_on_data_stays_a_call():
    """And is asked nothing: PyTorch cannot say whether there is a key at all."""

    def attention(q, k, v, chosen):
        kept = chosen.nonzero()[:, 0]
        k, v = k[:, :, kept], v[:, :, kept]
        return ops.attention(q, k, v, softmax_scale=0.3, empty_rows="zero", impl="TRITON_ATTN@0+inline")[0]

    traced = Traced()
    backend = aot_autograd(fw_compiler=lambda gm, _: (setattr(traced, "forward", count_calls(gm)), gm.forward)[1])
    q, k, v, chosen = torch.randn(2, 4, 5, 16), *torch.randn(2, 2, 4, 9, 16), torch.arange(9) % 2 == 0
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        got = torch.compile(attention, backend=backend, fullgraph=True)(q, k, v, chosen)
    assert not traced.is_forward_inlined
    torch.testing.assert_close(got, attention(q, k, v, chosen))


def test_groups_whose_copies_cost_more_than_a_call_stay_one(monkeypatch):
    """The fused kernel has heads share k and v by a stride of 0, which Inductor writes out in memory."""
    call = seeded(lambda: make(H=4, K=2, M=9, band_upper=0, empty_rows="impossible")).to(torch.float32)
    copied = (call.k.numel() + call.v.numel()) * 2 * 4
    for limit, is_inlined in ((copied, True), (copied - 1, False)):
        monkeypatch.setattr(cpu_inline, "_SMALL_COPY", limit)
        traced = check(call, torch.float32)
        assert traced.is_forward_inlined == traced.is_backward_inlined == is_inlined


def test_float64_stays_a_call_where_a_trace_takes_lse_for_float32(monkeypatch):
    """As PyTorch 2.11 does."""
    monkeypatch.setattr(cpu_inline, "lse_is_traced_in_float64", lambda: False)
    call = seeded(lambda: make(M=9, band_upper=0, empty_rows="impossible"))
    traced = check(call, torch.float64)
    assert not traced.is_forward_inlined and not traced.is_backward_inlined
    traced = check(call, torch.float32)
    assert traced.is_forward_inlined and traced.is_backward_inlined


def test_what_is_called_instead():
    traced = Traced()
    call = seeded(lambda: make(M=9, band_upper=0, empty_rows="impossible")).to(torch.float32)
    out, _ = traced(call)
    assert traced.forward[FUSED] == 1
    torch.autograd.grad(out.sum(), call.q)
    assert traced.backward[f"{FUSED}_backward"] == 1
    assert not [name for name in (*traced.forward, *traced.backward) if name.startswith("rocm_attn")]


def test_gradients_that_depend_on_values_stay_a_call():
    """A bias without a gradient: ATen's backward is exact unless lse has lost its logarithm."""
    call = seeded(lambda: make({"attn_bias": randn(2, 2, 7, 9)}, empty_rows="impossible")).to(torch.float32)
    call.tensors["attn_bias"] = call.tensors["attn_bias"].detach()
    traced = Traced()
    out, _ = traced(call)
    got = torch.autograd.grad(out.sum(), (call.q, call.k, call.v))
    exact = call.to(torch.float64)
    want = torch.autograd.grad(attend(exact)[0].sum(), (exact.q, exact.k, exact.v))
    eager = torch.autograd.grad(attend(call)[0].sum(), (call.q, call.k, call.v))
    assert_as_accurate_as_eager(got, eager, want, factor=8.0)
    assert traced.is_forward_inlined and not traced.is_backward_inlined


@pytest.mark.parametrize(
    ("impl", "dynamic"), [("TRITON_ATTN@0", False), ("REFERENCE@0+inline", False), ("TRITON_ATTN@0+inline", True)]
)
def test_stays_a_call(impl, dynamic):
    """Where it is not asked for, has to be the reference, or has sizes that are not numbers."""
    graphs = []

    def keep(gm, _):
        graphs.append(count_calls(gm))
        return make_boxed_func(gm.forward)

    def function(q, k, v):
        return ops.attention(q, k, v, softmax_scale=0.37, empty_rows="impossible", impl=impl)[0]

    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=keep), fullgraph=True, dynamic=dynamic)
    call = seeded(make).to(torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(call.q, call.k, call.v), attend(call)[0])
    assert [graph["rocm_attn.attention"] for graph in graphs] == [1]
