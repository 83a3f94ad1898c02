"""Programs that look like attention and must be left alone, each with the code of the reason.

`code` is that of the refusal. None means there is no softmax to refuse: nothing may be reported as replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from spellings import SCALE, B, D, H, M, N, bhsd, rand, square
from torch import Tensor

S = 10  # all axes equal, so that only the proof can tell them apart


def cube():
    return tuple(rand(S, S, S, S) for _ in range(3))


@dataclass(frozen=True)
class LookAlike:
    name: str
    function: Callable[..., Tensor]
    make: Callable[[], tuple]
    code: str | None


LOOK_ALIKES: dict[str, LookAlike] = {}


def look_alike(code: str | None, make: Callable[[], tuple] = square):
    def register(function):
        LOOK_ALIKES[function.__name__] = LookAlike(function.__name__, function, make, code)
        return function

    return register


# --- the wrong axis ---


@look_alike("softmax_axis")
def softmax_over_queries(q, k, v):
    return (q @ k.mT * SCALE).softmax(-2) @ v


@look_alike("softmax_axis", cube)
def softmax_over_queries_equal_sizes(q, k, v):
    return (q @ k.mT).softmax(2) @ v


@look_alike("softmax_axis", cube)
def softmax_over_heads(q, k, v):
    return (q @ k.mT).softmax(1) @ v


@look_alike("softmax_axis", cube)
def softmax_over_batch(q, k, v):
    return (q @ k.mT).softmax(0) @ v


@look_alike("softmax_axis", cube)
def value_contracted_over_queries(q, k, v):
    return (q @ k.mT).softmax(-1).mT @ v


@look_alike("scores_used_elsewhere", lambda: tuple(rand(B, H, S, S) for _ in range(3)))
def scores_symmetrised(q, k, v):
    s = q @ k.mT
    return (s + s.mT).softmax(-1) @ v


@look_alike("softmax_axis", cube)
def key_permuted_straight(q, k, v):
    # a miscompile of the peer: K lies as (b, d, h, s) here; only labels can tell, all sizes are equal
    s = torch.einsum("bhqd,bhkd->bhqk", q, k.permute(0, 3, 1, 2))
    return torch.einsum("bhqk,bhqd->bhkd", s.softmax(-1), v)


@look_alike("scores_used_elsewhere")
def talking_heads(q, k, v):
    s = q @ k.mT * SCALE
    s = s + s.flip(1)
    return s.softmax(-1) @ v


@look_alike("score_op")
def heads_rolled(q, k, v):
    return (q @ k.mT * SCALE).roll(1, 1).softmax(-1) @ v


@look_alike("softmax_axis", lambda: (*square(), rand(H, H)))
def talking_heads_mixed_weights(q, k, v, mix):
    p = (q @ k.mT * SCALE).softmax(-1)
    return torch.einsum("gh,bhqk->bgqk", mix, p).relu() @ v


# --- not a softmax ---


@look_alike(None)
def linear_attention(q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ (k.mT @ v)) / (q @ k.sum(-2, keepdim=True).mT)


@look_alike("no_contraction")
def efficient_attention_two_softmaxes(q, k, v):
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


@look_alike(None)
def sigmoid_attention(q, k, v):
    return torch.sigmoid(q @ k.mT * SCALE) @ v


@look_alike(None)
def relu_squared_attention(q, k, v):
    return torch.relu(q @ k.mT * SCALE).square() @ v


@look_alike("no_softmax")
def softmax_plus_one(q, k, v):
    e = (q @ k.mT * SCALE).exp()
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


@look_alike("no_softmax")
def exponentials_masked_after(q, k, v):
    e = (q @ k.mT * SCALE).exp() * torch.ones(M, M).tril()
    return (e * e.sum(-1, keepdim=True).add(1e-6).reciprocal()) @ v


@look_alike("no_softmax")
def normalised_over_another_axis(q, k, v):
    e = (q @ k.mT * SCALE).exp()
    return (e / e.sum((-1, -2), keepdim=True)) @ v


@look_alike(None, cube)
def logsumexp_of_another_axis(q, k, v):
    s = q @ k.mT
    return torch.exp(s - torch.logsumexp(s, -1)[:, :, None]) @ v


@look_alike(None, cube)
def logsumexp_without_its_dimension(q, k, v):
    s = q @ k.mT
    return torch.exp(s - torch.logsumexp(s, -1)) @ v


@look_alike("fill_unknown", lambda: (*(rand(S, S) for _ in range(3)),))
def fills_wider_than_the_scores(q, k, v):
    s = q @ k.mT
    keep = torch.ones(S, S, dtype=torch.bool).tril()
    return torch.where(keep, s, torch.full((S, S, S), -1e9)).softmax(-1) @ v


@look_alike("no_contraction")
def cosine_of_scores(q, k, v):
    return torch.cos(q @ k.mT * SCALE).softmax(-1) @ v


@look_alike("score_op")
def clamped_scores(q, k, v):
    return (q @ k.mT * SCALE).clamp(-1, 1).softmax(-1) @ v


@look_alike("scores_used_elsewhere")
def top_k_attention(q, k, v):
    s = q @ k.mT * SCALE
    threshold = s.topk(3, -1).values[..., -1:]
    return (s - F.relu(s - threshold) * 0.5).softmax(-1) @ v


@look_alike("weights_used_elsewhere")
def sparsified_weights(q, k, v):
    p = (q @ k.mT * SCALE).softmax(-1)
    return torch.where(p > 0.05, p, 0.0) @ v


@look_alike("weights_changed", lambda: (*square(), rand(H, 1, 1)))
def head_mask_after_softmax(q, k, v, head_mask):
    return ((q @ k.mT * SCALE).softmax(-1) * head_mask) @ v


@look_alike("weights_changed")
def squared_weights(q, k, v):
    return (q @ k.mT * SCALE).softmax(-1).square() @ v


# --- axes that only equal sizes confuse, found by the fuzzer ---


@look_alike("shift_axis", cube)
def maximum_without_its_dimension(q, k, v):
    # amax(-1) is aligned with (heads, queries, keys) here: another number is subtracted from each key
    s = q @ k.mT
    e = (s - s.amax(-1)).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


@look_alike("shift_axis", cube)
def maximum_of_another_row(q, k, v):
    s = q @ k.mT
    e = (s - s.amax(-1).unsqueeze(-2)).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


@look_alike("shift_axis", cube)
def maximum_of_a_column_subtracted_from_a_row(q, k, v):
    # one number per row, but -inf, and the row NaN, where no query sees the key of that number
    s = (q @ k.mT).masked_fill(torch.arange(S) < 2, -math.inf)
    return (s - s.amax(2).unsqueeze(3)).softmax(-1) @ v


@look_alike("shift_axis", cube)
def maximum_of_the_same_rows_of_another_head(q, k, v):
    # (batch, queries, 1) is aligned with (heads, queries, keys)
    s = (q @ k.mT).masked_fill(torch.arange(S).view(-1, 1, 1, 1) < 2, torch.finfo(q.dtype).min)
    return (s - s.amax([1, 3]).unsqueeze(-1)).softmax(-1) @ v


@look_alike("weights_changed")
def weights_zeroed_along_other_axes(q, k, v):
    drop = torch.ones(M, M, dtype=torch.bool).triu(-1)
    p = (q @ k.mT).masked_fill(drop, -math.inf).softmax(-1)
    return p.mT.masked_fill(drop, 0).mT @ v


@look_alike("weights_changed")
def weights_zeroed_by_another_mask(q, k, v):
    keep = torch.ones(M, M, dtype=torch.bool).tril()  # no row is empty, and yet this is no attention
    p = (q @ k.mT).masked_fill(~keep, -math.inf).softmax(-1)
    return p.masked_fill(torch.ones(M, M, dtype=torch.bool).triu(), 0) @ v


@look_alike("sink_axis", lambda: (*square(), rand(H, 1, 1)))
def sinks_joined_to_the_queries(q, k, v, sinks):
    s = torch.cat([k @ q.mT * SCALE, sinks.expand(B, H, M, 1)], -1)
    return (v.mT @ s.softmax(-2)[..., :-1]).mT


@look_alike("cap_not_finite")
def soft_cap_of_zero(q, k, v):
    return (0.0 * torch.tanh(q @ k.mT)).softmax(-1) @ v


@look_alike("logsumexp_of_fills", lambda: (*square(), torch.tensor([0, 4])))
def logsumexp_of_nothing_but_fills(q, k, v, lengths):
    # in a row of N equal fills, the logarithm of N is lost: every weight is 1, not 1/N
    drop = torch.arange(M) >= lengths[:, None, None, None]
    s = (q @ k.mT).masked_fill(drop, torch.finfo(q.dtype).min)
    return (s - s.logsumexp(-1, keepdim=True)).exp() @ v


# --- the weights or scores are needed elsewhere ---


@look_alike("weights_used_elsewhere")
def weights_returned(q, k, v):
    p = (q @ k.mT * SCALE).softmax(-1)
    return torch.cat([p @ v, p], -1)


@look_alike("weights_used_elsewhere")
def weights_with_two_values(q, k, v):
    p = (q @ k.mT * SCALE).softmax(-1)
    return p @ v + p @ (v * 2)


@look_alike("scores_used_elsewhere")
def scores_reused(q, k, v):
    s = q @ k.mT * SCALE
    return s.softmax(-1) @ v + s.mean()


@look_alike("weights_detached", lambda: square())
def detached_weights(q, k, v):
    return (q @ k.mT * SCALE).softmax(-1).detach() @ v


# --- masks that are not what they seem ---


@look_alike("finite_fill")
def finite_fill_zero(q, k, v):
    keep = torch.ones(M, M, dtype=torch.bool).tril()
    return (q @ k.mT * SCALE).masked_fill(~keep, 0.0).softmax(-1) @ v


@look_alike("finite_fill")
def finite_fill_small(q, k, v):
    keep = torch.ones(M, M, dtype=torch.bool).tril()
    return torch.where(keep, q @ k.mT * SCALE, -5.0).softmax(-1) @ v


@look_alike("finite_fill")
def finite_fill_ten_thousand(q, k, v):
    keep = torch.ones(M, M, dtype=torch.bool).tril()
    return (q @ k.mT * 1e6).masked_fill(~keep, -1e4).softmax(-1) @ v


@look_alike("integer_bias")
def integers_added(q, k, v):
    return (q @ k.mT * SCALE + torch.arange(M)).softmax(-1) @ v


@look_alike("no_contraction", lambda: (*square(), rand(H, H)))
def scores_mixed_by_a_linear_layer(q, k, v, mix):
    """Talking heads, as CaiT writes them."""
    s = F.linear((q @ k.mT).permute(0, 2, 3, 1), mix).permute(0, 3, 1, 2)
    return s.softmax(-1) @ v


@look_alike("score_op")
def multiplied_by_mask(q, k, v):
    keep = torch.ones(M, M).tril()
    return (torch.relu(q @ k.mT) * keep).softmax(-1) @ v


@look_alike("scale_after_bias", lambda: (*square(), rand(M, M), rand(H, 1, 1)))
def biased_scores_scaled_per_head(q, k, v, bias, scale):
    return ((q @ k.mT + bias) * scale).softmax(-1) @ v


@look_alike("scale_tensor")
def scores_times_mask(q, k, v):  # masked scores become 0, not -inf
    return ((q @ k.mT) * torch.ones(M, M).tril()).softmax(-1) @ v


@look_alike("bias_before_cap", lambda: (*bhsd(), rand(M, N)))
def bias_inside_soft_cap(q, k, v, bias):
    return (5.0 * torch.tanh((q @ k.mT * SCALE + bias) / 5.0)).softmax(-1) @ v


@look_alike("shift_axis")
def column_maximum_subtracted(q, k, v):
    s = q @ k.mT * SCALE
    return (s - s.amax(-2, keepdim=True)).softmax(-1) @ v


@look_alike("fill_unknown", lambda: (*square(), rand(1)))
def fill_from_tensor(q, k, v, fill):
    keep = torch.ones(M, M, dtype=torch.bool).tril()
    return torch.where(keep, q @ k.mT * SCALE, fill).softmax(-1) @ v


@look_alike("weights_changed")
def weights_summed(q, k, v):
    return (q @ k.mT / math.sqrt(D)).softmax(-1).sum(-1) + v.sum(-1)


@look_alike("softmax_axis", lambda: (rand(S, S), rand(S, S), rand(S, S)))
def gram_matrix_softmax(q, k, v):  # the softmaxed axis is free in the product with v
    return ((q @ k.T).softmax(0)) @ v


@look_alike("single_key", lambda: (rand(B, H, M, D), rand(B, H, 1, D), rand(B, H, 1, D)))
def one_key(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


@look_alike("weights_changed", lambda: (rand(B, M, D), rand(B, N, D), rand(B, M, N), rand(B, N, D)))
def product_added_to_residual(q, k, residual, v):
    return torch.bmm((q @ k.mT).softmax(-1) + residual, v)


@look_alike("scale_after_mask")
def negated_after_mask(q, k, v):
    s = (q @ k.mT).masked_fill(torch.ones(M, M, dtype=torch.bool).triu(1), float("-inf"))
    return (s * -1.0).softmax(-1) @ v


@look_alike("scale_after_shift", lambda: (*square(), rand(B, 1, 1, M)))
def shifted_then_scaled_per_key(q, k, v, per_key):  # 1.5 * per_key differs from key to key
    return ((q @ k.mT + 1.5) * per_key).softmax(-1) @ v


# --- weights changed where no row is empty ---


@look_alike("weights_changed", lambda: (*square(), torch.rand(M, M) < 0.5))
def weights_masked_after_causal_softmax(q, k, v, drop):  # no row is empty, so only the mask itself tells
    s = (q @ k.mT * SCALE).masked_fill(torch.ones(M, M, dtype=torch.bool).triu(1), -math.inf)
    return s.softmax(-1).masked_fill(drop, 0.0) @ v


@look_alike("weights_changed", lambda: (*square(), torch.rand(M, M) < 0.5))
def weights_masked_after_plain_softmax(q, k, v, drop):
    return (q @ k.mT * SCALE).softmax(-1).masked_fill(drop, 0.0) @ v


@look_alike("weights_changed")
def weights_causally_zeroed_not_renormalised(q, k, v):
    return (q @ k.mT * SCALE).softmax(-1).masked_fill(torch.ones(M, M, dtype=torch.bool).triu(1), 0.0) @ v


@look_alike("weights_changed")
def weights_multiplied_by_narrower_mask(q, k, v):
    s = (q @ k.mT * SCALE).masked_fill(torch.ones(M, M, dtype=torch.bool).triu(1), -math.inf)
    return (s.softmax(-1) * torch.ones(M, M).tril(-1)) @ v


@look_alike("weights_changed", lambda: (*square(), torch.rand(M, M) < 0.5))
def mask_after_softmax_on_other_axes(q, k, v, drop):  # the same tensor, but transposed weights
    s = (q @ k.mT * SCALE).masked_fill(drop, torch.finfo(q.dtype).min)
    return s.softmax(-1).mT.masked_fill(drop, 0.0).mT @ v


@look_alike("weights_changed", lambda: (*square(), torch.rand(M, M) < 0.5))
def nan_to_num_before_another_mask(q, k, v, drop):
    s = (q @ k.mT * SCALE).masked_fill(torch.ones(M, M, dtype=torch.bool).triu(1), -math.inf)
    return torch.nan_to_num(s.softmax(-1)).masked_fill(drop, 0.0) @ v


@look_alike("weights_changed", lambda: (*square(), rand(H)))
def gated_heads(q, k, v, gate):
    return ((q @ k.mT * SCALE).softmax(-1) * gate[:, None, None]) @ v


@look_alike("sink_axis", lambda: (*square(), rand(B, H, M, 1)))
def sinks_per_query_beside_a_mask_that_replaces_scores(q, k, v, sinks):
    s = (q @ k.mT * SCALE).masked_fill(torch.ones(M, M, dtype=torch.bool).triu(1), -math.inf)
    return torch.cat([s, sinks], -1).softmax(-1)[..., :-1] @ v


@look_alike("sink_axis", lambda: (*square(), rand(H)))
def other_column_than_the_sinks_cut_off(q, k, v, sinks):
    s = torch.cat([sinks.reshape(1, -1, 1, 1).expand(B, -1, M, -1), q @ k.mT * SCALE], dim=-1)
    return s.softmax(-1)[..., :-1] @ v


@look_alike("weights_changed", lambda: (*square(), rand(H)))
def weights_masked_before_sinks_are_cut_off(q, k, v, sinks):
    drop = torch.ones(M, M + 1, dtype=torch.bool).triu(1)
    s = torch.cat([sinks.reshape(1, -1, 1, 1).expand(B, -1, M, -1), q @ k.mT * SCALE], dim=-1)
    return s.softmax(-1).masked_fill(drop, 0.0)[..., 1:] @ v


# --- the logsumexp of the scores ---


def rescaled(q, k, v, rescale: Callable[[Tensor], Tensor]):
    s = q @ k.mT * SCALE
    return (s.softmax(-1) @ v) * rescale(s)


@look_alike("scores_used_elsewhere", lambda: (*cube(), rand(S)))
def rescaled_along_the_values(q, k, v, sinks):  # lse of query i scales channel i
    return rescaled(q, k, v, lambda s: (s.logsumexp(-1) - sinks.view(1, -1, 1)).sigmoid().unsqueeze(-2))


@look_alike("scores_used_elsewhere", lambda: (*cube(), rand(S)))
def rescaled_by_sums_over_queries(q, k, v, sinks):
    return rescaled(q, k, v, lambda s: (s.logsumexp(-2) - sinks.view(1, -1, 1)).sigmoid().unsqueeze(-1))


@look_alike("sink_axis", lambda: (*cube(), rand(S)))
def rescaled_by_sinks_per_query(q, k, v, sinks):
    return rescaled(q, k, v, lambda s: (s.logsumexp(-1) - sinks.view(1, 1, -1)).sigmoid().unsqueeze(-1))


@look_alike("scores_used_elsewhere", lambda: (*cube(), rand(S)))
def rescaled_by_the_complement(q, k, v, sinks):
    return rescaled(q, k, v, lambda s: (sinks.view(1, -1, 1) - s.logsumexp(-1)).sigmoid().unsqueeze(-1))


@look_alike("scores_used_elsewhere", lambda: (*cube(), rand(S)))
def rescaled_twice_by_the_logsumexp(q, k, v, sinks):
    def factor(s):
        lse = s.logsumexp(-1)
        return ((lse - sinks.view(1, -1, 1)).sigmoid() * lse).unsqueeze(-1)

    return rescaled(q, k, v, factor)


@look_alike("sinks_after_nan", lambda: (*square(), rand(H), torch.rand(B, 1, 1, M) < 0.5))
def nan_rows_rescaled_by_sinks(q, k, v, sinks, drop):
    s = (q @ k.mT * SCALE).masked_fill(drop, -math.inf)
    return (s.softmax(-1) @ v) * (s.logsumexp(-1) - sinks.view(1, -1, 1)).sigmoid().unsqueeze(-1)


@look_alike("weights_used_elsewhere", lambda: (*square(), rand(B, H, M, M)))
def weights_written_to_memory_of_the_caller(q, k, v, kept):
    p = (q @ k.mT * SCALE).softmax(-1)
    kept.detach().copy_(p.detach())
    return p @ v


@look_alike("reshaped_in_place")
def weights_reshaped_in_place(q, k, v):
    p = (q @ k.mT * SCALE).softmax(-1)
    p.unsqueeze_(0)
    return (p @ v)[0]


@look_alike("weights_used_elsewhere")
def unread_draw_over_the_weights(q, k, v):
    # the generator moves on, so what is drawn after it is another number
    p = (q @ k.mT * SCALE).softmax(-1)
    torch.bernoulli(p)
    return p @ v


# --- scores raised to a number ---


@look_alike("score_op")
def scores_raised_to_a_number(q, k, v):
    return (q @ k.mT).clamp(min=-1.0).softmax(-1) @ v


@look_alike("score_op")
def scores_clamped_to_a_range(q, k, v):
    return (q @ k.mT).clamp(torch.finfo(q.dtype).min, 1.0).softmax(-1) @ v


@look_alike("score_op")
def larger_of_two_scores(q, k, v):
    return torch.maximum(q @ k.mT, k @ q.mT).softmax(-1) @ v


@look_alike("score_op")
def low_scores_of_float32_raised_to_the_lowest_of_float16(q, k, v):
    s = (q @ k.mT).masked_fill(torch.ones(M, M, dtype=torch.bool).triu(1), torch.finfo(q.dtype).min)
    return s.clamp(min=torch.finfo(torch.float16).min).softmax(-1) @ v


@look_alike("cast_after_shift", lambda: (*square(), rand(B, 1, M, M).float().log()))
def float32_mask_cast_after_the_maximum_is_subtracted(q, k, v, mask):
    """-inf in float16, but 0 in a row of nothing but fills."""
    s = (q @ k.mT).float() + mask.clamp(min=torch.finfo(torch.float32).min)
    return (s - s.amax(-1, keepdim=True)).half().softmax(-1).to(v.dtype) @ v


@look_alike("cast_after_bias", lambda: (*square(), rand(B, 1, M, M).double().log()))
def float64_mask_cast_after_the_maximum_is_subtracted(q, k, v, mask):
    """-inf in float32, but 0 in a row of nothing but fills."""
    s = (q @ k.mT).double() + mask.clamp(min=torch.finfo(torch.float64).min)
    return (s - s.amax(-1, keepdim=True)).float().softmax(-1) @ v


@look_alike("cast_after_shift", lambda: (*square(), torch.tensor([0, 4])))
def float64_fill_cast_after_the_maximum_is_subtracted(q, k, v, lengths):
    drop = torch.arange(M) >= lengths[:, None, None, None]
    s = (q @ k.mT).double().masked_fill(drop, torch.finfo(torch.float64).min)
    return (s - s.amax(-1, keepdim=True)).float().softmax(-1) @ v


@look_alike("floor_of_bias", lambda: (*square(), rand(B, 1, M, M).log()))
def float_mask_raised_to_the_lowest_number(q, k, v, mask):
    return torch.clamp(q @ k.mT + mask, min=torch.finfo(q.dtype).min).softmax(-1) @ v


@look_alike("floor_of_bias", lambda: (*square(), rand(B, 1, M, M).log()))
def float_mask_beside_a_finite_fill_raised_to_the_lowest_number(q, k, v, mask):
    lowest = torch.finfo(q.dtype).min
    s = (q @ k.mT).masked_fill(torch.ones(M, M, dtype=torch.bool).triu(1), lowest)
    return torch.clamp(s + mask, min=lowest).softmax(-1) @ v


@look_alike("floor_of_fills", lambda: (*square(), torch.tensor([0, 4])))
def infinite_fills_raised_in_rows_that_may_be_empty(q, k, v, lengths):
    drop = torch.arange(M) >= lengths[:, None, None, None]
    s = (q @ k.mT).masked_fill(drop, -math.inf)
    return s.clamp(min=torch.finfo(q.dtype).min).softmax(-1) @ v


@look_alike("floor_grad", lambda: (*square(), torch.tensor([0, 4])))
def maximum_shares_the_gradient_of_empty_rows(q, k, v, lengths):
    drop = torch.arange(M) >= lengths[:, None, None, None]
    s = (q @ k.mT).masked_fill(drop, torch.finfo(q.dtype).min)
    return torch.maximum(s, torch.tensor(torch.finfo(q.dtype).min)).softmax(-1) @ v


@look_alike("after_floor")
def scores_masked_after_they_were_raised(q, k, v):
    s = (q @ k.mT).clamp(min=torch.finfo(q.dtype).min)
    return s.masked_fill(torch.ones(M, M, dtype=torch.bool).triu(1), -math.inf).softmax(-1) @ v


@look_alike("cast_after_bias", lambda: (*square(), rand(B, 1, M, M)))
def float64_scores_with_a_bias_in_a_softmax_of_float32(q, k, v, mask):
    """Rows of nothing but -1e9 keep their scores in float64, in which the op would run, and lose them in the cast."""
    s = (q @ k.mT).double() + torch.where(mask < 0, -1e9, 0.0)
    return s.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


@look_alike("bias_after_cast", lambda: (*(x.double() for x in square()), rand(B, 1, M, M)))
def mask_added_in_float32_to_scores_of_float64(q, k, v, mask):
    """Rows of nothing but -1e9 lose their scores in float32, and the op would run in float64."""
    s = (q @ k.mT).float() + torch.where(mask < 0, -1e9, 0.0) - torch.where(mask > 1, 1e9, 0.0)
    return s.softmax(-1).to(v.dtype) @ v


@look_alike("scale_up_and_down", lambda: (*square(), rand(B, 1, M, M)))
def bias_that_overflows_on_the_way(q, k, v, mask):
    """The lowest number doubled is -inf, and stays so when it is halved; a row of nothing else is NaN."""
    s = q @ k.mT + torch.where(mask < 0, torch.finfo(q.dtype).min, 0.0).to(q.dtype)
    return (s * 2 / 2).softmax(-1) @ v
