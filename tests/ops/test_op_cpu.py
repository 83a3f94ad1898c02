"""The op on CPU tensors against eager code: numbers, gradients, empty rows, strides."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, EMPTY_CASES, LOWEST, make, randn, seeded
from oracle import INF, Call, attend, grads_of, keep_of

import rocm_attn_compile.ops as ops
from rocm_attn_compile.ops.schemas import OPTIONAL_TENSORS
from rocm_attn_compile.testing.compare import assert_as_accurate_as_eager

IMPLS = ["", "REFERENCE"]
MODES = ["nan", "nan_added", "zero", "mean", "mean_added"]


def run(call: Call, impl: str = "", **settings):
    return ops.attention(call.q, call.k, call.v, **{**call.kwargs, **settings, "impl": impl})


# ATen's fused kernel computes exponentials to 20 bits, for F.scaled_dot_product_attention, too; and of a sum over few
# numbers, such as a sink's gradient here, eager's error is a matter of luck.
FACTORS = {torch.float32: 8.0}


def check(call: Call, dtype: torch.dtype, impl: str, dropout_keep=None, **settings) -> None:
    """Forward and all gradients as exact as eager, strides as promised."""
    rounded = call.to(dtype)
    exact = rounded.to(torch.float64)
    grad_out = torch.randn(*call.q.shape[:3], call.v.shape[3]).to(dtype)
    out, lse = run(rounded, impl, **settings)
    grads = grads_of(out, rounded, grad_out)
    eager_out, eager_lse = attend(rounded, dropout_keep)
    exact_out, exact_lse = attend(exact, dropout_keep)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not lse.requires_grad
    if dtype == torch.float64:
        torch.testing.assert_close((out, lse), (exact_out, exact_lse), equal_nan=True)
        torch.testing.assert_close(grads, grads_of(exact_out, exact, grad_out), equal_nan=True)
        return
    factor = FACTORS.get(dtype, 3.0)
    assert_as_accurate_as_eager(out, eager_out, exact_out, factor=factor)
    assert_as_accurate_as_eager(lse, eager_lse, exact_lse, factor=factor)
    eager_grads, exact_grads = grads_of(eager_out, rounded, grad_out), grads_of(exact_out, exact, grad_out.double())
    if int(keep_of(call).sum(-1).max()) == 1:
        # A lone key has weight 1, and scores have no gradient: eager is exact there, by luck and not by merit.
        torch.testing.assert_close(grads, eager_grads)
    else:
        assert_as_accurate_as_eager(grads, eager_grads, exact_grads, factor=factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", IMPLS, ids=["cpu", "reference"])
def test_forward_and_gradients(name, dtype, impl):
    call = seeded(CASES[name])
    call.settings["empty_rows"] = "impossible"
    assert bool(keep_of(call).any(-1).all()), "this case is to have no empty row"
    check(call, dtype, impl)


@pytest.mark.parametrize("name", ["gqa-causal", "bias-heads", "soft-cap", "sinks", "large-v-heads"])
def test_float16(name):
    check(seeded(CASES[name]), torch.float16, "")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EMPTY_CASES)
@pytest.mark.parametrize("impl", IMPLS, ids=["cpu", "reference"])
def test_empty_rows(name, mode, impl):
    call = seeded(EMPTY_CASES[name], empty_rows=mode)
    empty = ~keep_of(call).any(-1)
    assert bool(empty.any()) and not bool(empty.all())
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        check(call, dtype, impl)
    out, lse = run(call.to(torch.float32), impl)
    assert bool((lse[empty] == -INF).all())
    assert bool(lse[~empty].isfinite().all())
    rows = out[empty]
    expected = {
        "nan": torch.full_like(rows, torch.nan),
        "nan_added": torch.full_like(rows, torch.nan),
        "zero": torch.zeros_like(rows),
    }.get(mode)
    if expected is not None:
        torch.testing.assert_close(rows, expected, equal_nan=True)
    else:
        means = call.v.float().repeat_interleave(call.q.shape[1] // call.v.shape[1], 1).mean(2, keepdim=True)
        torch.testing.assert_close(rows, means.expand_as(out)[empty])


@pytest.mark.parametrize("impl", IMPLS, ids=["cpu", "reference"])
@pytest.mark.parametrize("mode", ["nan_added", "zero"])
def test_empty_rows_by_an_infinite_bias(mode, impl):
    call = seeded(lambda: make({"attn_bias": randn(2, 1, 7, 9)}, empty_rows=mode))
    call.tensors["attn_bias"][:, :, 2] = -INF
    for dtype in (torch.float32, torch.bfloat16):
        rounded = call.to(dtype)
        exact = rounded.to(torch.float64)
        out, lse = run(rounded, impl)
        want, want_lse = attend(exact)
        assert_as_accurate_as_eager(out, attend(rounded)[0], want)
        assert bool((lse[:, :, 2] == -INF).all()) and bool((want_lse[:, :, 2] == -INF).all())


@pytest.mark.parametrize("impl", IMPLS, ids=["cpu", "reference"])
@pytest.mark.parametrize("fill", [LOWEST, -1e9, -1e4])
def test_rows_of_a_huge_finite_bias_are_softmaxed_as_in_eager(fill, impl):
    """lse has lost log N there; gradients must not be computed from it."""
    call = seeded(lambda: make({"attn_bias": torch.zeros(2, 1, 7, 9, dtype=torch.float64)}, empty_rows="impossible"))
    call.tensors["attn_bias"][:, :, 2:4] = fill
    call.tensors["attn_bias"][:, :, 5, :4] = fill
    rounded = call.to(torch.float32)
    out, _ = run(rounded, impl)
    eager, _ = attend(rounded)
    torch.testing.assert_close(out, eager)
    grad_out = torch.randn_like(out)
    for wants_bias in (True, False):
        inputs = (rounded.q, rounded.k, rounded.v, *([rounded.tensors["attn_bias"]] if wants_bias else []))
        rounded.tensors["attn_bias"].requires_grad_(wants_bias)
        got = torch.autograd.grad(run(rounded, impl)[0], inputs, grad_out)
        torch.testing.assert_close(got, torch.autograd.grad(attend(rounded)[0], inputs, grad_out))


@pytest.mark.parametrize("impl", IMPLS, ids=["cpu", "reference"])
def test_an_empty_row_with_sinks_is_zero_and_its_lse_is_the_sink(impl):
    for mode in MODES:
        for sink in (0.7, -INF):
            sinks = torch.full((4,), sink, dtype=torch.float64)
            call = seeded(lambda s=sinks: make({"sinks": s, "kv_end": torch.tensor([[0], [9]])}, H=4))
            call = call.to(torch.float32)
            out, lse = run(call, impl, empty_rows=mode)
            torch.testing.assert_close(out[0], torch.zeros_like(out[0]), rtol=0, atol=0)
            torch.testing.assert_close(lse[0], torch.full_like(lse[0], sink))
            grads = torch.autograd.grad(out[0].sum(), (call.q, call.k, call.v, call.tensors["sinks"]))
            assert all(bool((g == 0).all()) for g in grads)


@pytest.mark.parametrize("impl", IMPLS, ids=["cpu", "reference"])
@pytest.mark.parametrize("sizes", [{"N": 0}, {"M": 0}, {"B": 0}, {"M": 0, "N": 0}], ids=str)
def test_empty_inputs(sizes, impl):
    call = make(**sizes, H=4).to(torch.float32)
    out, lse = run(call, impl)
    assert out.shape == (*call.q.shape[:3], 8)
    assert bool((out == 0).all()) and bool((lse == -INF).all())
    grads = grads_of(out, call, torch.ones_like(out))
    assert [g.shape for g in grads] == [t.shape for t in (call.q, call.k, call.v)]
    assert all(bool((g == 0).all()) for g in grads)


def test_no_keys_but_sinks():
    call = make({"sinks": randn(2)}, N=0).to(torch.float32)
    out, lse = run(call)
    assert bool((out == 0).all())
    torch.testing.assert_close(lse, call.tensors["sinks"].detach()[None, :, None].expand_as(lse))


@pytest.mark.parametrize("impl", IMPLS, ids=["cpu", "reference"])
@pytest.mark.parametrize("out_layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", ["plain", "gqa-causal", "soft-cap", "key-mask", "small-v-heads", "decode", "sinks"])
def test_strides_are_what_the_fake_says(name, out_layout, impl):
    for layout in ("contiguous", "bshd", "sliced"):
        call = seeded(CASES[name]).to(torch.float32)
        if layout == "bshd":
            call.q, call.k, call.v = (
                t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
                for t in (call.q, call.k, call.v)
            )
        elif layout == "sliced":
            call.q, call.k, call.v = (
                torch.cat([t.detach()] * 2, 2)[:, :, : t.shape[2]].requires_grad_() for t in (call.q, call.k, call.v)
            )
        out, lse = run(call, impl, out_layout=out_layout)
        plain = out if out_layout == "bhsd" else out.transpose(1, 2)
        assert plain.is_contiguous()
        assert lse.is_contiguous()
        dq, dk, dv, _, _ = ops.attention_backward(
            torch.randn_like(out), call.q, call.k, call.v,
            *(call.tensors.get(n) for n in OPTIONAL_TENSORS), out, lse, call.settings["softmax_scale"],
            call.settings.get("logits_soft_cap"), call.settings.get("band_lower"), call.settings.get("band_upper"),
            0.0, "nan", impl, [True, True, True, False, False],
        )  # fmt: skip
        for grad, tensor in ((dq, call.q), (dk, call.k), (dv, call.v)):
            expected = tensor if layout != "sliced" else torch.empty(tensor.shape)
            significant = [s for s, n in zip(expected.stride(), expected.shape) if n > 1]
            assert [s for s, n in zip(grad.stride(), grad.shape) if n > 1] == significant


def test_results_are_not_views_of_something_hidden():
    """Else changing them in place would fail in training, or go through slow paths."""
    for name in CASES:
        for out_layout in ("bhsd", "bshd"):
            call = seeded(CASES[name]).to(torch.float32)
            with torch.no_grad():
                out, lse = run(call, out_layout=out_layout)
            assert not out._is_view() and not lse._is_view(), name
            out.mul_(torch.ones(1, requires_grad=True))
            out, lse = run(call, out_layout=out_layout)
            assert not out._is_view() and not lse._is_view(), name


def test_masks_without_effect_take_the_kernel_not_the_reference(monkeypatch):
    """The intended path: ATen's fused kernel for all that it can do, with k and v of grouped heads not expanded."""
    from rocm_attn_compile.ops import cpu

    seen = []

    def spy(q, k, v, *args, **kwargs):
        seen.append((k.untyped_storage().nbytes(), kwargs.get("attn_mask")))
        return fused(q, k, v, *args, **kwargs)

    fused = cpu._fused
    monkeypatch.setattr(cpu, "_fused", spy)
    for name in CASES:
        call = seeded(CASES[name]).to(torch.float32)
        seen.clear()
        with torch.no_grad():
            run(call)
        unfused = call.settings.get("logits_soft_cap") is not None or name == "small-v-heads-decode"
        assert len(seen) == (0 if unfused else 1), name
        if seen and "v-heads" not in name:
            assert seen[0][0] <= max(call.k.untyped_storage().nbytes(), call.k.numel() * 4), f"{name}: k was expanded"
        if name in (
            "plain",
            "causal-square",
            "causal-topleft-wide",
            "gqa-causal",
            "bands-without-effect",
            "gqa-decode",
        ):
            mask = seen[0][1]  # one zero, where the keys are few: see test_a_query_of_nan_gives_nan_beside_few_keys
            assert mask is None or (mask.numel() == 1 and call.k.shape[2] < 16), f"{name}: a mask was made"


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_dropout(fraction):
    torch.manual_seed(0)
    call = make(B=2, H=4, K=2, M=65, N=129, D=8, dropout_p=fraction, band_upper=64)
    seed = torch.tensor(1234)
    call.tensors["dropout_seed"] = seed
    keep = torch.ops.rocm_attn.dropout_keep_mask(seed, fraction, (2, 4, 65, 129))
    count = keep.numel()
    deviation = (count * fraction * (1 - fraction)) ** 0.5
    assert abs(int(keep.sum()) - count * (1 - fraction)) < 5 * deviation
    for impl in IMPLS:
        # Forward and backward with the very mask: they agree with each other, and lse is that without dropout.
        check(call, torch.float32, impl, keep)
        check(call, torch.float64, impl, keep)
    rounded = call.to(torch.float32)
    first, second = run(rounded)[0], run(rounded)[0]
    assert torch.equal(first, second)
    rounded.tensors["dropout_seed"] = torch.tensor(1235)
    assert not torch.equal(first, run(rounded)[0])


def test_dropout_keeps_nan_rows_and_means():
    call = seeded(EMPTY_CASES["kv-end"], dropout_p=0.4)
    call.tensors["dropout_seed"] = torch.tensor([7])
    keep = torch.ops.rocm_attn.dropout_keep_mask(torch.tensor(7), 0.4, (*call.q.shape[:3], call.k.shape[2]))
    for mode in MODES:
        call.settings["empty_rows"] = mode
        for impl in IMPLS:
            check(call, torch.float64, impl, keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kv_len", [1, 7, 15, 17])
@pytest.mark.parametrize("band_upper", [None, 0])
def test_a_query_of_nan_gives_nan_beside_few_keys(dtype, kv_len, band_upper):
    """ATen's kernel alone gives 0 there, with lse 0, if the keys do not fill a vector register."""
    q, k, v = randn(1, 2, 5, 8).to(dtype), randn(1, 2, kv_len, 8).to(dtype), randn(1, 2, kv_len, 8).to(dtype)
    plain = ops.attention(q, k, v, softmax_scale=0.3, band_upper=band_upper, empty_rows="impossible")[0]
    q[:, :, 3] = float("nan")
    out, lse = ops.attention(q, k, v, softmax_scale=0.3, band_upper=band_upper, empty_rows="impossible")
    assert out[:, :, 3].isnan().all() and lse[:, :, 3].isnan().all()
    torch.testing.assert_close(out[:, :, [0, 1, 2, 4]], plain[:, :, [0, 1, 2, 4]])
