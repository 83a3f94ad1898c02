"""Legal programs that PyTorch 2.13's own matcher (`fuse_attention`) compiles to something else: one test per class.

All sizes that can be are equal, so that shapes say nothing.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pipeline_harness import check, codes, rand, sites

S = 6


def cube():
    return tuple(rand(S, S, S, S) for _ in range(3))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_softmax_over_another_axis_than_the_last(axis):
    check(lambda q, k, v: (q @ k.mT / 2.0).softmax(axis) @ v, cube, calls=0, refused="softmax_axis", trains=True)


def test_softmax_over_the_queries_of_transposed_scores_is_attention():
    check(lambda q, k, v: (v.mT @ (k @ q.mT / 2.0).softmax(-2)).mT, cube, calls=1, trains=True)


def test_keys_permuted_straight_to_b_h_d_s():
    """(b, s, h, d) permuted (0, 2, 3, 1) is the transposed key already; with (0, 2, 1, 3) it is not."""

    def straight(q, k, v):
        q, v = q.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
        return (q @ k.permute(0, 2, 3, 1) / 2.0).softmax(-1) @ v

    def not_transposed(q, k, v):  # q k, where channels stand in for keys: their axis is contracted with v's length
        q, k, v = (t.permute(0, 2, 1, 3) for t in (q, k, v))
        return (q @ k / 2.0).softmax(-1) @ v

    check(straight, cube, calls=1, trains=True)
    check(not_transposed, cube, calls=1, trains=True)  # an attention with k transposed: its numbers are the test


@pytest.mark.parametrize("pad", [0, 1, 2])
def test_padding_id_that_is_one(pad):
    ids = torch.full((S, S), 3)
    ids[:, 4:] = pad
    ids[0, 1] = 1 - pad  # a token with the other small number

    def distilbert(q, k, v, ids):
        drop = (ids == pad).view(S, 1, 1, S).expand(S, S, S, S)
        return (q @ k.mT / 2.0).masked_fill(drop, -math.inf).softmax(-1) @ v

    check(distilbert, lambda: (*cube(), ids), calls=1)


def test_padding_mask_compared_with_one_is_not_inverted():
    mask = torch.ones(S, S, dtype=torch.long)
    mask[:, 4:] = 0

    def function(q, k, v, mask):
        drop = (mask == 1).view(S, 1, 1, S).expand(S, S, S, S)  # the ones are dropped here
        return (q @ k.mT / 2.0).masked_fill(drop, -math.inf).softmax(-1) @ v

    check(function, lambda: (*cube(), mask), calls=1)


@pytest.mark.parametrize("spelling", ["bool", "not_zero", "float", "product"])
def test_segment_mask_whose_kept_values_are_two(spelling):
    mask = torch.tensor([[1, 1, 2, 2, 0, 0], [2, 2, 2, 2, 2, 2], *[[1, 2, 1, 2, 0, 1]] * (S - 2)])

    def function(q, k, v, mask):
        mask = mask[:, None, None, :]
        scores = q @ k.mT / 2.0
        if spelling == "bool":
            return scores.masked_fill(~mask.bool(), -math.inf).softmax(-1) @ v
        if spelling == "not_zero":
            return torch.where(mask != 0, scores, -math.inf).softmax(-1) @ v
        if spelling == "float":  # a two is +10000 here, no mask at all
            return (scores + (1.0 - mask.to(q.dtype)) * -10000.0).softmax(-1) @ v
        return (scores + (1.0 - (mask > 0).to(q.dtype)) * torch.finfo(q.dtype).min).softmax(-1) @ v

    check(function, lambda: (*cube(), mask), calls=1)


@pytest.mark.parametrize("fill", [0.0, -3.0, -100.0, -1e4])
def test_finite_fill_is_not_a_hard_mask(fill):
    """A key that is filled with -100 keeps a weight where the other scores are as low."""

    def function(q, k, v):
        keep = torch.ones(S, S, dtype=torch.bool).tril()
        return (q @ k.mT * 40.0).masked_fill(~keep, fill).softmax(-1) @ v

    check(function, cube, calls=0, refused="finite_fill")


@pytest.mark.parametrize("fill", [-3.0, -100.0, -1e4])
def test_finite_fill_that_is_added_stays_a_number(fill):
    def function(q, k, v):
        bias = torch.full((S, S), fill, dtype=q.dtype).triu(1)
        return (q @ k.mT * 40.0 + bias).softmax(-1) @ v

    check(function, cube, calls=1)
    assert sites()[0].data["has_bias"]


LEFT_PADDED = torch.tensor([[0, 0, 0, 1, 1, 1], *[[1] * S] * (S - 1)])


@pytest.mark.parametrize("spelling", ["one_mask", "two_masks", "where_then_add", "sdpa"])
def test_left_padded_rows_that_are_masked_everywhere(spelling):
    """The first rows of the first sequence keep nothing: eager's mean over all keys, or over what is lowest."""

    def function(q, k, v, padding):
        lowest = torch.finfo(q.dtype).min
        causal = torch.ones(S, S, dtype=torch.bool).tril()
        keep = padding[:, None, None, :].bool()
        scores = q @ k.mT / 2.0
        if spelling == "one_mask":
            mask = torch.zeros(S, 1, S, S, dtype=q.dtype).masked_fill(~(causal & keep), lowest)
            return (scores + mask).softmax(-1) @ v
        if spelling == "two_masks":
            return scores.masked_fill(~causal, lowest).masked_fill(~keep, lowest).softmax(-1) @ v
        if spelling == "where_then_add":
            bias = (1.0 - padding[:, None, None, :].to(q.dtype)) * lowest
            return (torch.where(causal, scores, lowest) + bias).softmax(-1) @ v
        mask = torch.zeros(S, 1, S, S, dtype=q.dtype).masked_fill(~(causal & keep), lowest)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    check(function, lambda: (*cube(), LEFT_PADDED), calls=1)
    assert not codes()


def test_causal_with_a_negative_scale_is_not_nan():
    """ATen's fused attention for the CPU scales its fills of -inf, too: eager is NaN from the second query on."""

    def fused(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=-0.5, is_causal=True)

    q, k, v = cube()
    compiled = torch.compile(fused, backend="rocm_attn", fullgraph=True)
    drop = torch.ones(S, S, dtype=torch.bool).triu(1)
    torch.testing.assert_close(compiled(q, k, v), (q @ k.mT * -0.5).masked_fill(drop, -math.inf).softmax(-1) @ v)
    assert [site.replaced for site in sites()] == [True]
