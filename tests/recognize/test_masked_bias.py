"""A bias that has a fill where a mask drops: as Falcon writes ALiBi. It is a bias and a mask, if that is the same."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from bias_harness import site_with_bias

B, H, M, N, D = 2, 6, 13, 17, 8
SCALE = D**-0.5


def lowest(q):
    return torch.finfo(q.dtype).min


def causal(q, k):
    return torch.arange(N)[None, :] <= torch.arange(M)[:, None] + N - M


def alibi(k):
    """One number per head and key, rounded as Falcon does it."""
    slopes = torch.pow(torch.full((), 0.5), torch.arange(1, H + 1, dtype=torch.int32))
    return (slopes[:, None, None].bfloat16() * torch.arange(N)).to(k.dtype)


def falcon(q, k, v, bias, tokens):
    bias = torch.masked_fill(alibi(k) / math.sqrt(D), ~causal(q, k), lowest(q))
    return (q @ k.mT * SCALE + bias).softmax(-1).to(v.dtype) @ v


def falcon_with_sdpa(q, k, v, bias, tokens):
    bias = torch.masked_fill(alibi(k) / math.sqrt(D), ~causal(q, k), lowest(q))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(B, H, M, N))


def where(q, k, v, bias, tokens):
    bias = torch.where(causal(q, k) & (tokens != 0)[:, None, None, :], alibi(k), -math.inf)
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


def where_dropped(q, k, v, bias, tokens):
    bias = torch.where((tokens == 0)[:, None, None, :], lowest(q), torch.tanh(bias.detach()))
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


def learned(q, k, v, bias, tokens):
    """Every row keeps a key, so that the bias gets no gradient elsewhere."""
    bias = torch.tanh(bias).masked_fill(~causal(q, k), lowest(q))
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


def in_place(q, k, v, bias, tokens):
    bias = alibi(k).expand(H, M, N).clone()
    bias.masked_fill_(~causal(q, k), lowest(q))
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


def empty_rows(q, k, v, bias, tokens):
    """The first two queries see padding only; they are the mean of v, and their scores get a gradient."""
    keep = torch.arange(N)[None, :] <= torch.arange(M)[:, None]
    bias = alibi(k).masked_fill(~(keep & (tokens != 0)[:, None, None, :]), lowest(q))
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


APART = [falcon, falcon_with_sdpa, where, where_dropped, learned, in_place, empty_rows]


def learned_and_empty_rows(q, k, v, bias, tokens):
    """In an empty row the bias gets no gradient, and what is added to a mask would."""
    bias = torch.tanh(bias).masked_fill((tokens == 0)[:, None, None, :], lowest(q))
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


def learned_beside_a_window(q, k, v, bias, tokens):
    """Two masks may leave a row without a key that neither empties."""
    bias = torch.tanh(bias).masked_fill(~causal(q, k), -math.inf)
    near = torch.arange(N)[None, :] > torch.arange(M)[:, None] - 3
    return ((q @ k.mT * SCALE).masked_fill(~near, -math.inf) + bias).softmax(-1) @ v


def low_bias(q, k, v, bias, tokens):
    """It may be lower than the fill."""
    bias = (bias * 2.0**125).masked_fill(~causal(q, k), lowest(q))
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


def fill_that_does_not_absorb(q, k, v, bias, tokens):
    bias = alibi(k).masked_fill((tokens == 0)[:, None, None, :], -1e9)
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


def small_fill(q, k, v, bias, tokens):
    bias = alibi(k).masked_fill(~causal(q, k), -30.0)
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


def scaled(q, k, v, bias, tokens):
    bias = alibi(k).masked_fill(~causal(q, k), lowest(q))
    return ((q @ k.mT + bias) * SCALE).softmax(-1) @ v


def detached(q, k, v, bias, tokens):
    """What is masked under no_grad has no gradient, what is not masked yet has one."""
    bias = torch.tanh(bias)
    with torch.no_grad():
        masked = bias.masked_fill(~causal(q, k), lowest(q))
    return (q @ k.mT * SCALE + masked).softmax(-1) @ v


def beside_a_finite_fill(q, k, v, bias, tokens):
    """Two masks whose rows may be empty together: all is put into the bias."""
    bias = torch.tanh(bias).masked_fill((tokens == 0)[:, None, None, :], lowest(q))
    return (q @ k.mT * SCALE).masked_fill(~causal(q, k), lowest(q)).add(bias).softmax(-1) @ v


WHOLE = [
    learned_and_empty_rows,
    low_bias,
    fill_that_does_not_absorb,
    small_fill,
    scaled,
    detached,
]


def inputs(dtype, rounded_to=None):
    torch.manual_seed(0)
    floats = torch.randn(B, H, M, D), torch.randn(B, H, N, D), torch.randn(B, H, N, D), torch.randn(H, M, N)
    tokens = torch.ones(B, N, dtype=torch.long)
    tokens[0, :2] = 0
    tokens[1] = 0
    return tuple(t.to(rounded_to or dtype).to(dtype).requires_grad_() for t in floats) + (tokens,)


def run(function, dtype=torch.float32, dynamic=None, trains=True):
    def call(f, *args):
        if not trains:
            with torch.no_grad():
                return (f(*args),)
        out = f(*args)
        torch.manual_seed(1)
        gradient = torch.randn(out.shape).to(out.dtype)
        found = torch.autograd.grad(out, args[:4], gradient, allow_unused=True)
        return out.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(args, found))

    site, *tensors = site_with_bias(function, call, inputs, dtype, dynamic)
    return site, *(None if tensor is None else tuple(tensor.shape) for tensor in tensors)


@pytest.mark.parametrize(
    ("function", "dynamic"), [*((f, None) for f in APART), *((f, True) for f in (falcon, learned, empty_rows))]
)
def test_a_bias_and_a_mask(function, dynamic):
    site, bias, slopes = run(function, dynamic=dynamic)
    assert site.data["mask"]["text"] != "none" and not site.data["mask"]["has_attn_mask"], site.mask
    if function in (where_dropped, learned, in_place):
        assert len(bias) == 4 and slopes is None
    else:  # c is far before the query, where keys may be masked; or the float32 program rounds it to bfloat16
        assert (bias[-2:], slopes) == ((1, N), None)


@pytest.mark.parametrize("function", [falcon, falcon_with_sdpa, where, in_place])
def test_in_bfloat16(function):
    site, bias, slopes = run(function, torch.bfloat16)
    assert (bias, slopes) == (None, (H,)), str(site)


@pytest.mark.parametrize("function", WHOLE)
def test_what_is_not_the_same_stays_a_tensor(function):
    site, bias, _ = run(function)
    assert site.data["has_bias"] and site.data["mask"]["text"] == "none"
    assert bias[-2:] == ((1, N) if function is fill_that_does_not_absorb else (M, N))


def test_a_learned_bias_beside_another_mask_stays_a_tensor():
    site, bias, _ = run(learned_beside_a_window)
    assert site.data["mask"]["band_upper"] is None and bias[-2:] == (M, N)


def test_beside_another_fill_in_inference():
    site, bias, _ = run(beside_a_finite_fill, trains=False)
    assert site.data["mask"]["text"] == "none" and bias[-2:] == (M, N)
