"""ALiBi is recognised however it is written, and is handed on as one number per head and key where that is exact."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from recorder import Recorder

import rocm_attn_compile
from rocm_attn_compile.testing import Float64Everywhere, assert_as_accurate_as_eager

B, H, M, N, D = 2, 6, 23, 37, 16
SCALE = D**-0.5


def positions(q, k):
    return torch.arange(q.shape[-2])[:, None] + k.shape[-2] - q.shape[-2], torch.arange(k.shape[-2])[None, :]


def causal(q, k):
    i, j = positions(q, k)
    return j <= i


def distance(q, k, v, slopes):
    i, j = positions(q, k)
    scores = q @ k.mT * SCALE + slopes[:, None, None] * (j - i)
    return scores.masked_fill(~causal(q, k), -math.inf).softmax(-1).to(v.dtype) @ v


def absolute_distance_under_a_causal_mask(q, k, v, slopes):
    i, j = positions(q, k)
    scores = q @ k.mT * SCALE - slopes.view(1, -1, 1, 1).to(q.dtype) * (i - j).abs()
    return torch.where(causal(q, k), scores, -math.inf).softmax(-1) @ v


def in_one_tensor_with_the_mask(q, k, v, slopes):
    i, j = positions(q, k)
    mask = torch.zeros(i.shape[0], j.shape[1]).masked_fill(~causal(q, k), -math.inf)
    bias = slopes[:, None, None] * (j - i).float() + mask
    return (q @ k.mT * SCALE + bias.to(q.dtype)).softmax(-1) @ v


def slopes_of_a_formula(q, k, v, slopes):
    i, j = positions(q, k)
    slopes = torch.pow(2.0, -(torch.arange(1, q.shape[1] + 1) * (8 / q.shape[1])))
    scores = q @ k.mT * SCALE + (slopes[None, :, None, None] * (j - i)[None, None]).to(q.dtype) / 2
    return scores.masked_fill(~causal(q, k), -math.inf).softmax(-1) @ v


def one_slope(q, k, v, slopes):
    i, j = positions(q, k)
    return (q @ k.mT * SCALE + ((j - i) * 0.25).to(q.dtype)).masked_fill(~causal(q, k), -math.inf).softmax(-1) @ v


def without_a_mask(q, k, v, slopes):
    i, j = positions(q, k)
    return (q @ k.mT * SCALE + slopes.neg()[:, None, None].to(q.dtype) * (i * 2 - j + 3)).softmax(-1) @ v


def sdpa_with_the_mask_in_the_bias(q, k, v, slopes):
    i, j = positions(q, k)
    bias = (slopes[:, None, None] * (j - i)).masked_fill(~causal(q, k), -math.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype))


def sdpa_with_the_mask_added(q, k, v, slopes):
    i, j = positions(q, k)
    mask = torch.zeros(i.shape[0], j.shape[1]).masked_fill(~causal(q, k), -math.inf)
    bias = (slopes[None, :, None, None] * (j - i) + mask).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(q.shape[0], -1, -1, -1), scale=0.2)


KEPT = [
    distance,
    absolute_distance_under_a_causal_mask,
    in_one_tensor_with_the_mask,
    slopes_of_a_formula,
    one_slope,
    without_a_mask,
    sdpa_with_the_mask_in_the_bias,
    sdpa_with_the_mask_added,
]


def inputs(dtype, rounded_to=None):
    torch.manual_seed(0)
    tensors = torch.randn(B, H, M, D), torch.randn(B, H, N, D), torch.randn(B, H, N, D)
    slopes = torch.pow(2.0, -(torch.arange(1, H + 1) * (8 / H)))
    return tuple(t.to(rounded_to or dtype).to(dtype) for t in tensors) + (
        slopes.to(torch.promote_types(dtype, torch.float32)),
    )


def run(function, dtype, dynamic=None, slopes_train=False):
    def call(f, *args):
        for t in args if slopes_train else args[:3]:
            t.requires_grad_()
        out = f(*args)
        torch.manual_seed(1)
        gradient = torch.randn(out.shape).to(out.dtype)
        return out.detach(), *torch.autograd.grad(
            out, [a for a in args if a.requires_grad], gradient, allow_unused=True
        )

    with Float64Everywhere():
        exact = call(function, *inputs(torch.float64, dtype))
    eager = call(function, *inputs(dtype))
    recorder = Recorder(lowering="aot_eager")
    actual = call(torch.compile(function, backend=recorder, fullgraph=True, dynamic=dynamic), *inputs(dtype))
    assert recorder.calls == 1
    assert_as_accurate_as_eager(actual, eager, tuple(t.double() for t in exact))
    (site,) = [site for report in rocm_attn_compile.reports() for site in report.sites]
    (node,) = [n for g in recorder.graphs for n in g.graph.nodes if n.target is torch.ops.rocm_attn.attention.default]
    return site, node.args[3].meta["example_value"]


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("function", KEPT)
def test_one_number_per_head_and_key(function, dynamic):
    site, bias = run(function, torch.bfloat16, dynamic)
    assert site.data["has_alibi"]
    assert "ALiBi bias" in site.spec
    assert (bias.shape[2], bias.dtype) == (1, torch.float32)


@pytest.mark.parametrize("function", [distance, without_a_mask])
def test_float32_keeps_the_distance(function):
    """slope * (k - c) is large beside the query, where eager's slope * (k - q) is small and exact."""
    site, bias = run(function, torch.float32)
    assert site.data["has_alibi"]
    assert bias.shape[2] == M


def learned(q, k, v, slopes):
    return distance(q, k, v, slopes)


def test_slopes_that_are_learned_keep_the_tensor():
    site, bias = run(learned, torch.bfloat16, slopes_train=True)
    assert not site.data["has_alibi"]
    assert bias.shape[2] == M


def absolute_distance(q, k, v, slopes):
    i, j = positions(q, k)
    return (q @ k.mT * SCALE - slopes[:, None, None].to(q.dtype) * (i - j).abs()).softmax(-1) @ v


def squared_distance(q, k, v, slopes):
    i, j = positions(q, k)
    return (q @ k.mT * SCALE - slopes[:, None, None].to(q.dtype) * (i - j) * (i - j)).softmax(-1) @ v


def slope_of_the_query(q, k, v, slopes):
    i, j = positions(q, k)
    return (q @ k.mT * SCALE + (q.mean(-1, keepdim=True).detach() * (j - i)).to(q.dtype)).softmax(-1) @ v


def distance_before_sinks(q, k, v, slopes):
    i, j = positions(q, k)
    scores = q @ k.mT * SCALE + (slopes[:, None, None] * (j - i)).to(q.dtype)
    sinks = slopes.to(q.dtype).view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v


@pytest.mark.parametrize("function", [absolute_distance, squared_distance, slope_of_the_query, distance_before_sinks])
def test_what_is_no_number_per_key_stays_a_tensor(function):
    site, bias = run(function, torch.bfloat16)
    assert not site.data["has_alibi"]
    assert bias.shape[2] == M
