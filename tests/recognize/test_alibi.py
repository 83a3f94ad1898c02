"""ALiBi is recognised however it is written, and is handed on as slopes, or as one number per head and key."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from bias_harness import site_with_bias
from recorder import Recorder

import rocm_attn_compile
from rocm_attn_compile.testing import assert_as_accurate_as_eager

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


def of_keys(q, k, v, slopes):
    """As MPT and JAIS write it."""
    bias = (slopes[:, None] * torch.arange(1 - k.shape[-2], 1))[:, None].to(q.dtype)
    return (q @ k.mT * SCALE + bias).masked_fill(~causal(q, k), -math.inf).softmax(-1) @ v


def of_both_directions(q, k, v, slopes):
    """As an encoder has it."""
    i, j = positions(q, k)
    bias = -(j - i).abs()[None].to(q.dtype) * slopes.to(q.dtype)[:, None, None]
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


def of_both_directions_in_a_window(q, k, v, slopes):
    i, j = positions(q, k)
    bias = (i - j).to(q.dtype).abs() * -slopes.to(q.dtype).view(-1, 1, 1) + 3.0
    near = (i - j).abs() < 9
    return (q @ k.mT * SCALE + bias).masked_fill(~near, torch.finfo(q.dtype).min).softmax(-1) @ v


def slopes_of_heads_that_are_no_power_of_two(q, k, v, slopes):
    """As the paper has them."""
    i, j = positions(q, k)
    slopes = 1.0 / torch.pow(2, torch.arange(1, 9).float()).view(1, 8, 1, 1)
    slopes = torch.concat([slopes[:, 1::2], slopes[:, ::2]], dim=1)[:, : q.shape[1]]
    scores = q @ k.mT * SCALE + slopes * (j - i)
    return scores.masked_fill(~causal(q, k), torch.finfo(q.dtype).min).softmax(-1) @ v


def slopes_of_a_sequence(q, k, v, slopes):
    i, j = positions(q, k)
    slopes = slopes * torch.arange(1, 1 + q.shape[0])[:, None] / 2
    scores = q @ k.mT * SCALE + (slopes[:, :, None, None] * (j - i)).to(q.dtype)
    return scores.masked_fill(~causal(q, k), -math.inf).softmax(-1) @ v


def beside_another_bias(q, k, v, slopes):
    i, j = positions(q, k)
    scores = q @ k.mT * SCALE + (slopes[:, None, None] * (j - i)).to(q.dtype) + (i * j % 5).to(q.dtype)
    return scores.masked_fill(~causal(q, k), -math.inf).softmax(-1) @ v


def last_query(q, k, v, slopes):
    return distance(q[:, :, -1:], k, v, slopes)


def before_sinks(q, k, v, slopes):
    i, j = positions(q, k)
    scores = q @ k.mT * SCALE + (slopes[:, None, None] * (j - i)).to(q.dtype)
    scores = scores.masked_fill(~causal(q, k), -math.inf)
    sinks = slopes.to(q.dtype).view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v


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


ALIBI = [
    distance,
    absolute_distance_under_a_causal_mask,
    in_one_tensor_with_the_mask,
    slopes_of_a_formula,
    one_slope,
    of_keys,
    of_both_directions,
    of_both_directions_in_a_window,
    slopes_of_heads_that_are_no_power_of_two,
    slopes_of_a_sequence,
    beside_another_bias,
    last_query,
    before_sinks,
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

    return site_with_bias(function, call, inputs, dtype, dynamic)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("function", ALIBI)
def test_slopes(function, dynamic):
    site, bias, slopes = run(function, torch.float32, dynamic)
    check_slopes(function, site, bias, slopes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("function", [distance, of_keys, of_both_directions_in_a_window])
def test_slopes_in_half_precision(function, dtype):
    site, bias, slopes = run(function, dtype)
    check_slopes(function, site, bias, slopes)


def check_slopes(function, site, bias, slopes):
    assert site.data["has_alibi"]
    assert "ALiBi" in site.spec
    assert (bias is None) == (function is not beside_another_bias) == (not site.data["has_bias"])
    assert slopes.dtype == torch.float32
    assert slopes.shape == ((B, H) if function is slopes_of_a_sequence else (H,))


def test_decoding():
    """One query at the last of ever more keys, from one program."""

    def step(q, k, v, slopes, keys, values):
        keys, values = torch.cat([keys, k], -2), torch.cat([values, v], -2)
        return distance(q, keys, values, slopes), keys, values

    recorder = Recorder(lowering="eager")
    compiled = torch.compile(step, backend=recorder, fullgraph=True, dynamic=True)
    q, k, v, slopes = inputs(torch.float32)
    exact_inputs = [t.double() for t in (q, k, v, slopes)]
    keys, values = k[:, :, :11].contiguous(), v[:, :, :11].contiguous()
    with torch.no_grad():
        for i in range(11, 15):
            new = slice(i, i + 1)
            out, keys, values = compiled(q[:, :, new], k[:, :, new], v[:, :, new], slopes, keys, values)
            eager, exact = (
                distance(a[:, :, new], b[:, :, : i + 1], c[:, :, : i + 1], d)
                for a, b, c, d in ((q, k, v, slopes), exact_inputs)
            )
            assert_as_accurate_as_eager(out, eager, exact)
    (site,) = [site for report in rocm_attn_compile.reports() for site in report.sites]
    assert (recorder.calls, site.data["has_alibi"], site.data["has_bias"]) == (1, True, False)


def from_the_first_key(q, k, v, slopes):
    """Aligned top-left: the op's distance is longer by N - M, which a softmax does not see."""
    i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None, :]
    scores = q @ k.mT * SCALE + (slopes[:, None, None] * (j - i)).to(q.dtype)
    return scores.masked_fill(j > i, -math.inf).softmax(-1) @ v


def into_a_cache_that_is_not_full(q, k, v, slopes):
    length = (q[0, 0, 0, :1].abs() < -1).long().squeeze() + 9
    keep = torch.arange(k.shape[-2]) < length
    scores = q[:, :, :1] @ k.mT * SCALE + (slopes[:, None, None] * torch.arange(k.shape[-2])).to(q.dtype)
    return scores.masked_fill(~keep, -math.inf).softmax(-1) @ v


def counted_from_the_last_key(q, k, v, slopes):
    """As MPT, with padding: the op's distance is never longer."""
    keep = causal(q, k) & (torch.arange(k.shape[-2]) >= (q[0, 0, 0, 0].abs() > -1).long() * 3)
    bias = (slopes[:, None] * torch.arange(1 - k.shape[-2], 1))[:, None].to(q.dtype)
    return (q @ k.mT * SCALE + bias).masked_fill(~keep, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_positions_from_the_last_key_beside_padding(dynamic):
    site, bias, slopes = run(counted_from_the_last_key, torch.float32, dynamic)
    assert site.data["has_alibi"] and (bias, slopes.shape) == (None, (H,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_longer_distance_in_a_cache(dtype):
    site, _, slopes = run(into_a_cache_that_is_not_full, dtype)
    assert site.data["has_alibi"] == (slopes is not None) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_longer_distance_costs_digits_only_in_half_precision(dtype):
    site, bias, slopes = run(from_the_first_key, dtype)
    assert site.data["has_alibi"] == (slopes is not None) == (bias is None) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_one_number_per_head_and_key(dynamic):
    """In both directions, but with a sign."""
    site, bias, slopes = run(without_a_mask, torch.bfloat16, dynamic)
    assert not site.data["has_alibi"] and slopes is None
    assert (bias.shape[2], bias.dtype) == (1, torch.float32)


def test_float32_keeps_the_distance_in_both_directions():
    """slope * (k - c) is large beside the query, where eager's slope * (k - q) is small and exact."""
    _, bias, slopes = run(without_a_mask, torch.float32)
    assert slopes is None and bias.shape[2] == M


def learned(q, k, v, slopes):
    return distance(q, k, v, slopes)


def test_slopes_that_are_learned_keep_the_tensor():
    site, bias, slopes = run(learned, torch.bfloat16, slopes_train=True)
    assert not site.data["has_alibi"] and slopes is None
    assert bias.shape[2] == M
    assert "alibi_learned" in [note.code for note in site.notes]


def test_a_buffer_keeps_the_tensor():
    """x-transformers computes its bias once, and keeps it."""
    module = torch.nn.Module()
    i, j = torch.arange(M)[:, None], torch.arange(N)[None, :]
    module.register_buffer("bias", -(j - i).abs() * inputs(torch.float32)[3][:, None, None])

    def in_a_buffer(q, k, v, slopes):
        return with_bias(q, k, v, module.bias[:, -q.shape[-2] :])

    recorder = Recorder(lowering="eager")
    q, k, v, slopes = inputs(torch.float32)
    actual = torch.compile(in_a_buffer, backend=recorder, fullgraph=True)(q, k, v, slopes)
    assert_as_accurate_as_eager(
        actual, in_a_buffer(q, k, v, slopes), in_a_buffer(q.double(), k.double(), v.double(), slopes)
    )
    (site,) = rocm_attn_compile.reports()[-1].sites
    assert (recorder.calls, site.data["has_alibi"], site.data["has_bias"]) == (1, False, True)
    (note,) = [note for note in site.notes if note.code == "bias_is_input"]
    assert "module_buffers_bias" in note.text


def with_bias(q, k, v, bias):
    return (q @ k.mT * SCALE + bias.to(q.dtype)).masked_fill(~causal(q, k), -math.inf).softmax(-1) @ v


def squared(q, k, v, slopes):
    i, j = positions(q, k)
    return with_bias(q, k, v, -slopes[:, None, None] * (i - j) * (i - j))


def clipped(q, k, v, slopes):
    i, j = positions(q, k)
    return with_bias(q, k, v, slopes[:, None, None] * (j - i).clamp(min=-7))


def shifted_in_both_directions(q, k, v, slopes):
    i, j = positions(q, k)
    return (q @ k.mT * SCALE - slopes[:, None, None].to(q.dtype) * (i - j + 1).abs()).softmax(-1) @ v


def slope_of_the_query(q, k, v, slopes):
    i, j = positions(q, k)
    return with_bias(q, k, v, q.mean(-1, keepdim=True).detach() * (j - i))


def slope_of_the_key(q, k, v, slopes):
    i, j = positions(q, k)
    return with_bias(q, k, v, k.mean(-1)[:, :, None].detach() * (j - i))


def distance_scaled_by_the_batch(q, k, v, slopes):
    i, j = positions(q, k)
    return with_bias(q, k, v, slopes[:, None, None] * (j - i) * q.mean((1, 2, 3), keepdim=True).detach())


def looked_up_positions(q, k, v, slopes):
    places = (k[0, 0, :, 0] > -1).cumsum(0)
    return with_bias(q, k, v, slopes[:, None, None] * (places[None, :] - places[-q.shape[-2] :, None]))


def shifted_before_sinks(q, k, v, slopes):
    """Sinks see what is added to a whole row."""
    i, j = positions(q, k)
    scores = q @ k.mT * SCALE + (slopes[:, None, None] * (j - i - 1)).to(q.dtype)
    scores = scores.masked_fill(~causal(q, k), -math.inf)
    sinks = slopes.to(q.dtype).view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v


def both_signs_before_sinks(q, k, v, slopes):
    i, j = positions(q, k)
    scores = q @ k.mT * SCALE + (slopes[:, None, None] * (j - i)).to(q.dtype)
    sinks = slopes.to(q.dtype).view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v


NEAR_MISSES = [
    squared,
    clipped,
    shifted_in_both_directions,
    slope_of_the_query,
    slope_of_the_key,
    distance_scaled_by_the_batch,
    looked_up_positions,
    shifted_before_sinks,
    both_signs_before_sinks,
]


@pytest.mark.parametrize("function", NEAR_MISSES)
def test_what_is_no_slope_times_distance_stays_a_tensor(function):
    site, bias, slopes = run(function, torch.bfloat16)
    assert not site.data["has_alibi"] and slopes is None
    assert bias.shape[2] == M
