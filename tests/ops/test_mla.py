"""The ops of latent attention on CPU tensors against a naive model in float64: numbers, gradients, masks, pages."""

from __future__ import annotations

import pytest
import torch
from latent_cases import EMPTY, MASKS, SIZES, Latent, attend, expand, keep_of, paged, seeded
from torch import Tensor

import rocm_attn_compile.ops as ops
from rocm_attn_compile.ops import mla_dispatch
from rocm_attn_compile.testing.compare import assert_as_accurate_as_eager

CASES = {**MASKS, **SIZES}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MODES = ["nan", "nan_added", "zero", "mean", "mean_added"]
FORMS = {
    "prefill": lambda call, **s: ops.mla_prefill(*call.prefill, **call.kwargs, **s),
    "decode": lambda call, **s: through_decode(call, **s),
    "whole": lambda call, **s: ops.mla(*call.whole, **call.kwargs, **s),
}


def through_decode(call: Latent, **settings) -> tuple[Tensor, Tensor]:
    latent, lse = ops.mla_decode(*call.decode, **call.kwargs, **settings)
    return torch.einsum("bhmc,hec->bhme", latent, call.w_uv), lse


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, equal_nan=True)


def by_dtype(values):
    return [pytest.param(value, id=str(value)[6:]) for value in values]


@pytest.mark.parametrize("dtype", by_dtype(DTYPES))
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_forward(form, name, dtype):
    call = seeded(CASES[name]).to(dtype)
    call.settings["empty_rows"] = "impossible"
    assert bool(keep_of(call).any(-1).all()), "this case is to have no empty row"
    eager_out, eager_lse = attend(call)
    exact_out, exact_lse = attend(call.to(torch.float64))
    for impl in ("", "TRITON_MLA@12", "REFERENCE"):
        out, lse = FORMS[form](call, impl=impl)
        assert out.dtype == dtype
        assert out.shape == eager_out.shape
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        if dtype == torch.float64:
            close((out, lse), (exact_out, exact_lse))
            continue
        # Of few numbers eager's own error is a matter of luck.
        assert_as_accurate_as_eager(out, eager_out, exact_out, factor=8.0)
        assert_as_accurate_as_eager(lse, eager_lse, exact_lse, factor=8.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("form", FORMS)
def test_empty_rows(form, name, mode):
    call = seeded(EMPTY[name], empty_rows=mode)
    assert not bool(keep_of(call).any(-1).all())
    for impl in ("", "REFERENCE"):
        close(FORMS[form](call, impl=impl), attend(call))


def gradients(call: Latent, out: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(out, tuple(call.tensors.values()), torch.randn(out.shape, dtype=out.dtype))


@pytest.mark.parametrize("form", ["prefill", "whole"])
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, form):
    call = seeded(CASES[name]).to(torch.float64, requires_grad=True)
    for impl in ("", "REFERENCE"):
        out, lse = FORMS[form](call, impl=impl, out_layout="bshd")
        assert not lse.requires_grad
        close(gradients(call, out), gradients(call, attend(call)[0]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EMPTY)
def test_gradients_of_empty_rows(name, mode):
    call = seeded(EMPTY[name], empty_rows=mode).to(torch.float64, requires_grad=True)
    close(gradients(call, FORMS["whole"](call)[0]), gradients(call, attend(call)[0]))


@pytest.mark.parametrize("dtype", by_dtype([torch.float16, torch.bfloat16, torch.float32]))
@pytest.mark.parametrize("name", ["causal", "key-mask", "no-rope", "128-heads"])
def test_gradients_are_as_exact_as_eager(name, dtype):
    call = seeded(CASES[name]).to(dtype, requires_grad=True)
    exact = call.to(torch.float64, requires_grad=True)
    torch.manual_seed(1)
    grad_out = torch.randn(attend(call)[0].shape, dtype=torch.float64).to(dtype)

    def grads(run, c):
        return torch.autograd.grad(run(c)[0], tuple(c.tensors.values()), grad_out.to(c.q_nope.dtype))

    assert_as_accurate_as_eager(grads(FORMS["whole"], call), grads(attend, call), grads(attend, exact), factor=8.0)


def test_gradients_are_the_same_each_time():
    call = seeded(MASKS["causal"]).to(torch.float32, requires_grad=True)
    first, second = (gradients(call, FORMS["prefill"](call)[0]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_only_wanted_gradients_are_computed():
    call = seeded(MASKS["causal"])
    call.tensors["k_pe"].requires_grad_()
    exact = torch.autograd.grad(attend(call)[0].sum(), call.k_pe)
    close(torch.autograd.grad(FORMS["whole"](call)[0].sum(), call.k_pe), exact)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("name", ["kv-end", "kv-range", "decode", "no-rope-decode"])
def test_pages(name, block_size):
    """A block table in any order, NaN in what no row reads, and block numbers beyond the cache there."""
    call = seeded(CASES[name])
    call.masks.setdefault("kv_end", torch.full((1, 1), call.kv_c.shape[1]))
    kv_c, k_pe, table = paged(call, block_size)
    table[:, -(-int(call.masks["kv_end"].max()) // block_size) :] = 10**6
    exact = attend(call)
    for impl in ("", "REFERENCE"):
        settings = {**call.kwargs, "impl": impl}
        close(ops.mla(call.q_nope, call.q_pe, kv_c, k_pe, call.w_uk, call.w_uv, table, **settings), exact)
        q_latent, q_pe = call.decode[:2]
        latent, lse = ops.mla_decode(q_latent, q_pe, kv_c, k_pe, table, **settings)
        close((torch.einsum("bhmc,hec->bhme", latent, call.w_uv), lse), exact)


def test_gradients_through_pages():
    call = seeded(MASKS["kv-end"])
    kv_c, k_pe, table = paged(call, 4)
    kv_c, k_pe = (t.nan_to_num().requires_grad_() for t in (kv_c, k_pe))
    out, _ = ops.mla(call.q_nope, call.q_pe, kv_c, k_pe, call.w_uk, call.w_uv, table, **call.kwargs)
    got = torch.autograd.grad(out.sum(), (kv_c, k_pe))
    leaves = call.to(torch.float64, requires_grad=True)
    want = torch.autograd.grad(attend(leaves)[0].sum(), (leaves.kv_c, leaves.k_pe))
    gathered = [grad[table].flatten(1, 2)[:, :9] for grad in got]
    close(gathered, list(want))


def test_views_of_one_buffer():
    """Latent and rotary key side by side in one cache, as engines keep them, and a cache with heads in between."""
    call = seeded(MASKS["kv-end"])
    both = torch.cat([call.kv_c, call.k_pe], -1)
    kv_c, k_pe = both.split([call.kv_c.shape[2], call.k_pe.shape[2]], -1)
    wide = torch.zeros(2, 9, 3, both.shape[2], dtype=torch.float64)
    wide[:, :, 1] = both
    for latent, rope in ((kv_c, k_pe), wide[:, :, 1].split([call.kv_c.shape[2], call.k_pe.shape[2]], -1)):
        got = ops.mla(call.q_nope, call.q_pe, latent, rope, call.w_uk, call.w_uv, **call.kwargs)
        close(got, attend(call))


@pytest.mark.parametrize("out_layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("form", FORMS)
def test_strides_are_as_promised(form, out_layout):
    call = seeded(MASKS["causal"])
    out, _ = FORMS[form](call, out_layout=out_layout) if form != "decode" else ops.mla_decode(
        *call.decode, **call.kwargs, out_layout=out_layout
    )  # fmt: skip
    B, H, M, X = out.shape
    assert out.stride() == ((H * M * X, M * X, X, 1) if out_layout == "bhsd" else (M * H * X, X, H * X, 1))


@pytest.mark.parametrize("absorbed", [True, False])
def test_both_forms_of_the_whole(absorbed, monkeypatch):
    """Whatever the rule says, the result is the same; and it is asked once, with the sizes of the call."""
    asked = []
    monkeypatch.setattr(mla_dispatch, "prefers_absorbed", lambda *a, **k: asked.append((a, k)) or absorbed)
    for name in ("causal-bottomright", "no-rope"):
        call = seeded(CASES[name])
        close(ops.mla(*call.whole, **call.kwargs), attend(call))
    assert asked[0] == ((5, 9, 3, 8, 6, 12, 10), {"itemsize": 8, "band_lower": None, "band_upper": 4})
    assert asked[1][0] == (5, 9, 3, 8, 0, 12, 10)


def test_decode_has_no_gradient():
    call = seeded(MASKS["causal"]).to(torch.float64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="use rocm_attn::mla or"):
        ops.mla_decode(*call.decode, **call.kwargs)


def test_no_keys_and_no_queries():
    call = seeded(MASKS["none"])
    empty = call.kv_c[:, :0], call.k_pe[:, :0]
    out, lse = ops.mla(call.q_nope, call.q_pe, *empty, call.w_uk, call.w_uv, softmax_scale=0.3)
    assert bool((out == 0).all())
    assert bool((lse == -torch.inf).all())
    none = ops.mla(call.q_nope[:, :, :0], call.q_pe[:, :, :0], *call.whole[2:], softmax_scale=0.3)
    assert none[0].shape == (2, 3, 0, 10)


def test_expand_of_the_oracle():
    """The oracle itself, by a loop."""
    kv_c, weight = torch.randn(1, 2, 3), torch.randn(2, 4, 3)
    close(expand(kv_c, weight)[0, 1, 1], weight[1] @ kv_c[0, 1])
