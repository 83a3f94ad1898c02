"""Rows that keep no key in float16, whose lowest number is only -65504: added to a score it absorbs it, as in eager.

The op adds in float32, where it would not: weights of such rows would follow the scores instead of being uniform.
"""

from __future__ import annotations

import pytest
import torch
from pipeline_harness import SCALE, B, M, N, causal, qkv, sites, square

import rocm_attn_compile
from rocm_attn_compile.testing import Float64Everywhere, assert_as_accurate_as_eager


def of_booleans(mask, dtype):
    return (1.0 - mask.bool().to(dtype)) * torch.finfo(dtype).min


def of_integers(mask, dtype):
    """As in Hugging Face's models."""
    return (1.0 - mask.to(dtype)) * torch.finfo(dtype).min


def of_differences(mask, dtype):
    return (mask.to(dtype) - 1.0) * -torch.finfo(dtype).min


def filled(mask, dtype):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask == 0, torch.finfo(dtype).min)


def subtracted_fill(mask, dtype):
    return -torch.zeros(mask.shape, dtype=dtype).masked_fill(mask != 1, -torch.finfo(dtype).min)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("beside", ["alone", "a bias", "a mask"])
@pytest.mark.parametrize("additive", [of_booleans, of_integers, of_differences, filled, subtracted_fill])
def test_the_lowest_number_absorbs_scores(additive, beside, dynamic):
    def attend(q, k, v, bias, mask):
        scores = q @ k.mT * SCALE
        if beside == "a bias":
            scores = scores + bias.tanh()
        if beside == "a mask":  # what both drop is -inf
            scores = scores + of_integers(torch.ones(M, N, dtype=torch.int64).tril(2), q.dtype)
        return (scores + additive(mask, q.dtype)).softmax(-1) @ v

    mask = torch.ones(B, 1, 1, N, dtype=torch.int64)
    mask[0, ..., 4:] = 0
    mask[1] = 0
    half = [x.half().requires_grad_() for x in (*qkv(), torch.randn(N))]
    wide = [x.detach().double().requires_grad_() for x in half]
    torch._dynamo.reset()
    rocm_attn_compile.reset_reports()
    compiled = torch.compile(attend, backend="rocm_attn", fullgraph=True, dynamic=dynamic)
    results = []
    for function, inputs in ((compiled, half), (attend, half), (attend, wide)):
        out = function(*inputs, mask)
        gradients = torch.autograd.grad(out.square().sum(), inputs if beside == "a bias" else inputs[:3])
        results.append((out, *gradients))
    assert_as_accurate_as_eager(*results, factor=4.0)
    (site,) = sites()
    assert site.replaced, site


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("softmax_dtype", [None, torch.float32])
def test_what_a_fill_takes_the_place_of_does_not_count(softmax_dtype, dynamic):
    """A finite fill becomes a number in the bias here, beside a mask that nobody knows."""

    def attend(q, k, v, mask):
        scores = (q @ k.mT * SCALE).masked_fill(~causal(M), torch.finfo(q.dtype).min) + of_integers(mask, q.dtype)
        return scores.softmax(-1, dtype=softmax_dtype).to(v.dtype) @ v

    mask = torch.ones(B, 1, 1, M, dtype=torch.int64)
    mask[0, ..., :3] = 0
    mask[1] = 0
    half = [x.half() for x in square()]
    torch._dynamo.reset()
    rocm_attn_compile.reset_reports()
    compiled = torch.compile(attend, backend="rocm_attn", fullgraph=True, dynamic=dynamic)
    with Float64Everywhere():
        exact = attend(*(x.double() for x in half), mask)
    assert_as_accurate_as_eager(compiled(*half, mask), attend(*half, mask), exact, factor=4.0)
    (site,) = sites()
    assert site.replaced, site


def test_a_bias_after_a_cast_is_refused():
    """What is added in float32 counts, also beside float16's lowest number."""

    def attend(q, k, v, bias, mask):
        scores = (q @ k.mT * SCALE + of_integers(mask, q.dtype)).float() + bias
        return scores.softmax(-1).to(v.dtype) @ v

    mask = torch.ones(B, 1, 1, N, dtype=torch.int64)
    half, bias = [x.half() for x in qkv()], torch.randn(N)
    torch._dynamo.reset()
    rocm_attn_compile.reset_reports()
    compiled = torch.compile(attend, backend="rocm_attn", fullgraph=True)
    torch.testing.assert_close(compiled(*half, bias, mask), attend(*half, bias, mask), rtol=1e-2, atol=5e-3)
    (site,) = sites()
    assert not site.replaced and "bias_after_cast" in [reason.code for reason in site.reasons]
