"""Rows that keep no key in float16, whose lowest number is only -65504: added to a score it absorbs it, as in eager.

The op adds in float32, where it would not: weights of such rows would follow the scores instead of being uniform.
"""

from __future__ import annotations

import pytest
import torch
from pipeline_harness import SCALE, B, M, N, qkv, sites

import rocm_attn_compile
from rocm_attn_compile.testing import assert_as_accurate_as_eager


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
