"""Rows that keep no key: NaN, uniform or 0 as in eager, forward and gradients, for every way to mask.

In batch 1 of `padded` every key is padding; in `holed` one row of the dense mask is empty. The op's modes themselves
are tested in tests/recognize/test_empty_rows.py; here are the ways real models mask.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from pipeline_harness import INF, SCALE, B, M, N, attend, causal, check, qkv, sites, square
from torch.nn.attention import SDPBackend, sdpa_kernel


def padded():
    keep = torch.ones(B, 1, 1, N, dtype=torch.bool)
    keep[0, ..., 4:] = False
    keep[1] = False
    return (*qkv(), keep)


def holed():
    keep = torch.ones(M, N, dtype=torch.bool).tril(2)
    keep[2] = False
    return (*qkv(), keep)


def scores(q, k):
    return q @ k.mT * SCALE


def lowest(x):
    return torch.finfo(x.dtype).min


def billion(x):
    """-1e9, and in float64 what absorbs a score as -1e9 does in float32."""
    return -1e9 if x.dtype == torch.float32 else -1e18


def replaced_by_inf(q, k, v, keep):
    return scores(q, k).masked_fill(~keep, -INF).softmax(-1) @ v


def where_inf(q, k, v, keep):
    return torch.where(keep, scores(q, k), -INF).softmax(-1) @ v


def replaced_by_lowest(q, k, v, keep):
    s = scores(q, k)
    return s.masked_fill(~keep, lowest(s)).softmax(-1) @ v


def where_lowest(q, k, v, keep):
    s = scores(q, k)
    return torch.where(keep, s, torch.tensor(lowest(s))).softmax(-1) @ v


def replaced_by_billion(q, k, v, keep):
    s = scores(q, k)
    return s.masked_fill(~keep, billion(s)).softmax(-1) @ v


def added_inf(q, k, v, keep):
    s = scores(q, k)
    return (s + torch.zeros(keep.shape, dtype=s.dtype).masked_fill(~keep, -INF)).softmax(-1) @ v


def added_lowest(q, k, v, keep):
    s = scores(q, k)
    return (s + (1.0 - keep.to(s.dtype)) * lowest(s)).softmax(-1) @ v


def added_billion(q, k, v, keep):
    s = scores(q, k)
    return (s + (1.0 - keep.to(s.dtype)) * billion(s)).softmax(-1) @ v


def sdpa_bool(q, k, v, keep):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def sdpa_inf(q, k, v, keep):
    return F.scaled_dot_product_attention(q, k, v, torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, -INF))


def sdpa_lowest(q, k, v, keep):
    return F.scaled_dot_product_attention(q, k, v, (1.0 - keep.to(q.dtype)) * lowest(q))


def softmax_by_hand(q, k, v, keep):
    s = scores(q, k).masked_fill(~keep, -INF)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True) @ v


def softmax_without_maximum(q, k, v, keep):
    """exp underflows to 0 everywhere: 0 / 0, also for a finite fill."""
    e = scores(q, k).masked_fill(~keep, -1e9).exp()
    return e / e.sum(-1, keepdim=True) @ v


FILLS = [
    (replaced_by_inf, "nan"),
    (where_inf, "nan"),
    (replaced_by_lowest, "mean"),
    (where_lowest, "mean"),
    (replaced_by_billion, "mean"),
    (added_inf, "nan_added"),
    (added_lowest, None),  # "mean_added" where the mask has a closed form, else it stays a bias
    (added_billion, None),
    (sdpa_bool, "zero"),
    (sdpa_inf, "zero"),
    (sdpa_lowest, None),
    (softmax_by_hand, "nan"),
    (softmax_without_maximum, "nan"),
]


@pytest.mark.parametrize("make", [padded, pytest.param(holed, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("function", "mode"), FILLS)
def test_empty_rows_are_those_of_eager(function, mode, make):
    # ATen's fused attention for the CPU gives rows of nothing but the lowest number too large a gradient.
    unfused = (lambda: sdpa_kernel(SDPBackend.MATH)) if function is sdpa_lowest else nullcontext
    check(function, make, calls=1, trains=True, around=unfused)
    (site,) = sites()
    if mode is not None:
        assert site.data["mask"]["empty_rows"] == mode


# --- masked rows set to 0 after the softmax ---


def nan_to_num(q, k, v, keep):
    return torch.nan_to_num(replaced_weights(q, k, ~keep, -INF), 0.0) @ v


def replaced_weights(q, k, drop, fill):
    return scores(q, k).masked_fill(drop, fill).softmax(-1)


def zeroed_after_inf(q, k, v, keep):
    drop = ~keep
    return replaced_weights(q, k, drop, -INF).masked_fill(drop, 0.0) @ v


def zeroed_in_place(q, k, v, keep):
    drop = ~keep
    return replaced_weights(q, k, drop, -INF).masked_fill_(drop, 0.0) @ v


def zeroed_after_lowest(q, k, v, keep):
    drop = ~keep
    return replaced_weights(q, k, drop, lowest(q)).masked_fill(drop, 0.0) @ v


def zeroed_by_a_mask_computed_again(q, k, v, keep):
    return replaced_weights(q, k, keep.eq(False), -INF).masked_fill(keep.eq(False), 0.0) @ v


def zeroed_by_where(q, k, v, keep):
    return torch.where(keep, replaced_weights(q, k, ~keep, -INF), 0.0) @ v


@pytest.mark.parametrize("make", [padded, holed])
@pytest.mark.parametrize(
    "function",
    [
        nan_to_num,
        zeroed_after_inf,
        zeroed_in_place,
        zeroed_after_lowest,
        zeroed_by_a_mask_computed_again,
        zeroed_by_where,
    ],
)
def test_zeroed_rows_are_zero(function, make):
    check(function, make, calls=1)
    (site,) = sites()
    assert site.data["mask"]["empty_rows"] == "zero"


def nan_to_num_by_logarithms(q, k, v, keep):
    return F.log_softmax(scores(q, k).masked_fill(~keep, -INF), -1).exp().nan_to_num() @ v


def zeroed_after_a_bias(q, k, v, keep):
    """As CPM-Ant does."""
    drop = ~keep
    biased = scores(q, k) + torch.arange(N, dtype=q.dtype) * 0.1
    return torch.where(drop, -INF, biased).softmax(-1).masked_fill(drop, 0.0) @ v


@pytest.mark.parametrize("make", [padded, holed])
@pytest.mark.parametrize(
    "function", [nan_to_num, nan_to_num_by_logarithms, zeroed_after_inf, zeroed_after_lowest, zeroed_after_a_bias]
)
def test_zeroed_rows_in_training(function, make):
    """The NaN gradient of the weights ends where -inf took the place of the scores."""
    check(function, make, calls=1, trains=True)
    (site,) = sites()
    assert site.data["mask"]["empty_rows"] == "zero"


def nan_to_num_after_inf_was_added(q, k, v, keep):
    return torch.nan_to_num((scores(q, k) + torch.where(keep, 0.0, -INF)).softmax(-1)) @ v


def nan_to_num_after_a_later_bias(q, k, v, keep):
    s = scores(q, k).masked_fill(~keep, -INF) + v.mean((-1, -2))[..., None, None]
    return torch.nan_to_num(s.softmax(-1)) @ v


def nan_to_num_after_a_maximum_over_all_rows(q, k, v, keep):
    s = scores(q, k).masked_fill(~keep, -INF)
    return torch.nan_to_num((s - s.amax((-1, -2), keepdim=True)).softmax(-1)) @ v


@pytest.mark.parametrize(
    "function",
    [nan_to_num_after_inf_was_added, nan_to_num_after_a_later_bias, nan_to_num_after_a_maximum_over_all_rows],
)
def test_zeroed_rows_whose_gradient_is_nan(function):
    """Eager's gradient of the NaN under the zeros is NaN, and reaches a parameter."""
    check(function, padded, calls=0, refused="masked_rows_grad", trains=True)


def nan_to_num_after_infinity_times_zero(q, k, v, keep):
    """1e9 in float16 is infinite: keys that stay get NaN, of which all weights become 0."""
    factor = torch.tensor(1e9, dtype=torch.float16)
    return torch.nan_to_num((scores(q, k) + ((keep.to(torch.int64) - 1) * factor).to(q.dtype)).softmax(-1)) @ v


def test_nan_that_is_not_a_rows_without_keys():
    check(nan_to_num_after_infinity_times_zero, padded, calls=0, refused="nan_in_bias")


def zeroed_by_another_mask(q, k, v, keep):
    return replaced_weights(q, k, ~keep, -INF).masked_fill(~keep.flip(-1), 0.0) @ v


def zeroed_by_part_of_the_masks(q, k, v, keep):
    drop = ~keep
    s = scores(q, k).masked_fill(torch.ones(M, N, dtype=torch.bool).triu(4), -INF)
    return s.masked_fill(drop, -INF).softmax(-1).masked_fill(drop, 0.0) @ v


def multiplied_by_another_mask(q, k, v, keep):
    return (replaced_weights(q, k, ~keep, lowest(q)) * keep.flip(-1)) @ v


def multiplied_by_factors(q, k, v, keep):
    return (replaced_weights(q, k, ~keep, lowest(q)) * torch.where(keep, 0.5, 0.0)) @ v


@pytest.mark.parametrize(
    "function",
    [zeroed_by_another_mask, zeroed_by_part_of_the_masks, multiplied_by_another_mask, multiplied_by_factors],
)
def test_weights_changed_by_more_than_empty_rows(function):
    check(function, padded, calls=0, refused="weights_changed")


def multiplied_by_mask(q, k, v, keep):
    return (replaced_weights(q, k, ~keep, lowest(q)) * keep.to(q.dtype)) @ v


def test_weights_multiplied_by_their_mask():
    """A proved mask, 0 or 1: rows without keys become 0."""
    check(multiplied_by_mask, padded, calls=1)
    (site,) = sites()
    assert site.data["mask"]["empty_rows"] == "zero"


# --- several masks ---


def gpt_neo_buffer_replaced_then_mask_added(q, k, v, keep):
    s = scores(q, k)
    s = torch.where(keep, s, torch.full([], lowest(s), dtype=s.dtype))
    return (s + torch.zeros(M, N, dtype=s.dtype).masked_fill(~torch.ones(M, N).tril(1).bool(), lowest(s))).softmax(
        -1
    ) @ v


@pytest.mark.parametrize("make", [padded, holed])
def test_buffer_replaced_then_mask_added(make):
    """Both go into the bias, which adds up what eager adds up; of the gradient of an empty row that is not true."""
    check(gpt_neo_buffer_replaced_then_mask_added, make, calls=1)
    check(gpt_neo_buffer_replaced_then_mask_added, make, calls=0, refused="mixed_fills", trains=True)


def causal_and_padding_replaced(q, k, v, keep):
    s = scores(q, k)
    s = s.masked_fill(~causal(M), lowest(s)).masked_fill(~keep[..., :M], lowest(s))
    return s.softmax(-1) @ v


def causal_and_padding_added(q, k, v, keep):
    s = scores(q, k)
    mask = torch.zeros(M, M, dtype=s.dtype).masked_fill(~causal(M), lowest(s))
    padding = (1.0 - keep[..., :M].to(s.dtype)) * lowest(s)
    return (s + (mask + padding).clamp(min=lowest(s))).softmax(-1) @ v


def causal_replaced_padding_added(q, k, v, keep):
    s = scores(q, k)
    s = s.masked_fill(~causal(M), lowest(s)) + (1.0 - keep[..., :M].to(s.dtype)) * lowest(s)
    return s.softmax(-1) @ v


def causal_inf_padding_lowest(q, k, v, keep):
    s = scores(q, k).masked_fill(~causal(M), -INF)
    return s.masked_fill(~keep[..., :M], lowest(s)).softmax(-1) @ v


def padded_square():
    return (*square(), padded()[3])


@pytest.mark.parametrize(
    "function",
    [
        causal_and_padding_replaced,
        causal_and_padding_added,
        causal_replaced_padding_added,
        causal_inf_padding_lowest,
    ],
)
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_two_masks_with_rows_empty_in_one(function, trains):
    """Right in any case; where a row may become uniform over part of the keys, the rewrite stops."""
    refused = {causal_inf_padding_lowest: "mixed_fills"}
    if trains:  # both masks would go into the bias, whose gradient in such a row is another one
        refused[causal_replaced_padding_added] = "bias_beside_finite_fill"
    check(function, padded_square, calls=int(function not in refused), refused=refused.get(function), trains=trains)


# --- empty rows that follow from closed forms ---


def window_before_the_keys(q, k, v):
    """Three keys, a window of two: the last rows see none."""
    i, j = torch.arange(M)[:, None], torch.arange(3)
    return attend(q, k[:, :, :3], v[:, :, :3], (j <= i) & (j > i - 2))


def bottom_right_with_more_queries(q, k, v):
    i, j = torch.arange(N)[:, None], torch.arange(M)
    return attend(q, k[:, :, :M], v[:, :, :M], j <= i + (M - N))


@pytest.mark.parametrize(
    ("function", "make"),
    [(window_before_the_keys, qkv), (bottom_right_with_more_queries, lambda: qkv(q_len=N))],
)
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_bands_that_leave_rows_empty(function, make, dynamic):
    check(function, make, calls=1, trains=True, dynamic=dynamic)
    (site,) = sites()
    assert site.data["mask"]["empty_rows"] == "nan"
    assert site.data["mask"]["band_upper"] is not None


def test_rows_that_cannot_be_empty_are_known():
    check(lambda q, k, v: attend(q, k, v, causal(M)), square, calls=1)
    (site,) = sites()
    assert site.data["mask"]["empty_rows"] == "impossible"
