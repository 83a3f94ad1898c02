"""Sizes that no node of the graph holds are computed from those that some node does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pipeline_harness import INF, SCALE, B, D, H, Pipeline, check, rand, reports


def test_a_power_of_a_size():
    """As many queries per group as groups: with one symbol for both, the number of heads is its square."""

    def grouped(q, k, v, lengths):
        keep = torch.arange(k.shape[-2]) < lengths[:, None]
        scores = (q * SCALE) @ k[:, :, None].mT
        return scores.masked_fill(~keep[:, None, None, None], -float("inf")).softmax(-1) @ v[:, :, None]

    size, length = 3, 6
    inputs = (rand(2, size, size, length, D), *(rand(2, size, length, D) for _ in range(2)), torch.tensor([2, 6]))
    pipeline = Pipeline("eager")
    compiled = torch.compile(grouped, backend=pipeline, dynamic=True, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), grouped(*inputs))
    assert pipeline.calls == 1, "\n".join(map(str, reports()))
    assert "**2" in reports()[0].sites[0].spec


def test_a_position_is_not_guarded():
    """A cache written with `narrow` at a dynamic position: one graph for all, where the first position was 0, too."""

    def step(q, cache, values, new, start):
        rows = torch.arange(start, start + q.shape[2])
        cache.narrow(2, start, q.shape[2]).copy_(new)
        keep = torch.arange(cache.shape[2]) <= rows[:, None]
        return F.scaled_dot_product_attention(q, cache, values, attn_mask=keep)

    pipeline = Pipeline("eager")
    compiled = torch.compile(step, backend=pipeline, dynamic=True, fullgraph=True)
    cache, values = rand(2, 3, 11, D), rand(2, 3, 11, D)
    for start in (0, 3, 6):
        inputs = rand(2, 3, 3, D), values, rand(2, 3, 3, D), start
        mine, theirs = cache.clone(), cache.clone()
        torch.testing.assert_close(compiled(inputs[0], mine, *inputs[1:]), step(inputs[0], theirs, *inputs[1:]))
        assert torch.equal(mine, theirs)
    assert len(reports()) == pipeline.calls == 1, "\n".join(map(str, reports()))


def relative_shift(q, k, v, positions):
    """Conformers: scores of 2 M - 1 positions, of which M are left of each query."""
    scores = q @ positions.mT
    padded = torch.cat([torch.zeros_like(scores[..., :1]), scores], -1)
    shifted = padded.view(*padded.shape[:2], padded.shape[3], padded.shape[2])[:, :, 1:].view_as(scores)
    return ((q @ k.mT + shifted[..., : scores.shape[-1] // 2 + 1]) * SCALE).softmax(-1) @ v


def windows_of_an_image(q, k, v, mask):
    """Swin: the mask has one entry per window, the scores one per image and window."""
    num_windows, length = mask.shape[0], mask.shape[-1]
    scores = (q @ k.mT * SCALE).view(q.shape[0] // num_windows, num_windows, 3, length, length)
    return (scores + mask[None, :, None]).view(-1, 3, length, length).softmax(-1) @ v


def mask_per_head(q, k, v, mask):
    """`nn.MultiheadAttention`, whose mask may be (batch * heads, q_len, kv_len)."""
    assert mask.shape[0] == q.shape[0] * 3
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.view(q.shape[0], 3, *mask.shape[1:]))


@pytest.mark.parametrize(
    ("function", "make"),
    [
        (relative_shift, lambda: (*(rand(2, 3, 7, D) for _ in range(3)), rand(1, 3, 13, D))),
        (windows_of_an_image, lambda: (*(rand(10, 3, 6, D) for _ in range(3)), rand(5, 6, 6))),
        (mask_per_head, lambda: (*(rand(4, 3, 6, D) for _ in range(3)), rand(12, 6, 6))),
    ],
)
def test_sizes_that_a_guard_makes_equal(function, make):
    check(function, make, calls=1, dynamic=True, trains=True)


def keys_of_the_first_block(q, k, v, per_block):
    """A fraction of the keys is fewer than all: s0 / s1, as a real number, was taken for at least s0."""
    length = k.shape[2] // per_block.shape[0]
    bias = per_block[:, None].expand(-1, length).reshape(-1)
    keep = torch.arange(k.shape[2]) < length
    return (q @ k.mT * SCALE + bias).masked_fill(~keep, -INF).softmax(-1) @ v


def keys_by_a_sum_of_sizes(q, k, v, first, second):
    """(a + b) // 4 without a rest is not a // 4 + b // 4."""
    length = (first.shape[0] + second.shape[0]) // 4
    bias = torch.cat([first, second]).view(4, length).sum()
    keep = torch.arange(q.shape[2])[:, None] * length >= torch.arange(k.shape[2])
    return (q @ k.mT * SCALE + bias).masked_fill(~keep, -INF).softmax(-1) @ v


def keys_by_a_remainder(q, k, v, per_block):
    assert k.shape[2] % per_block.shape[0] == 0
    keep = torch.arange(k.shape[2]) < k.shape[2] // per_block.shape[0]
    return (q @ k.mT * SCALE).masked_fill(~keep, -INF).softmax(-1) @ v


def attention_in_blocks(q, k, v, per_block):
    blocks = [x.unflatten(2, (per_block.shape[0], x.shape[2] // per_block.shape[0])) for x in (q, k, v)]
    drop = torch.ones(blocks[0].shape[3], blocks[1].shape[3], dtype=torch.bool).triu(1)
    scores = (blocks[0] @ blocks[1].mT * SCALE + per_block[:, None, None]).masked_fill(drop, -INF)
    return (scores.softmax(-1) @ blocks[2]).flatten(2, 3)


def same_block(q, k, v, per_block):
    length = k.shape[2] // per_block.shape[0]
    assert length * per_block.shape[0] == k.shape[2]
    keep = torch.arange(q.shape[2])[:, None] // length == torch.arange(k.shape[2]) // length
    return (q @ k.mT * SCALE).masked_fill(~keep, -INF).softmax(-1) @ v


def inputs_of(q_len, kv_len, *lengths):
    return rand(B, H, q_len, D), rand(B, H, kv_len, D), rand(B, H, kv_len, D), *map(rand, lengths)


@pytest.mark.parametrize(
    ("function", "sizes"),
    [
        (keys_of_the_first_block, [(6, 12, 4), (5, 15, 3)]),
        (keys_by_a_sum_of_sizes, [(6, 19, 7, 9), (5, 20, 11, 17)]),
        (keys_by_a_remainder, [(6, 12, 4), (5, 15, 3)]),
        (attention_in_blocks, [(12, 12, 4), (21, 21, 3)]),
        (same_block, [(12, 12, 4), (21, 21, 3)]),
    ],
)
def test_a_size_that_is_a_multiple_of_another(function, sizes):
    """Right at other sizes than those it was compiled with, too, without compiling again."""
    pipeline = Pipeline("eager")
    compiled = torch.compile(function, backend=pipeline, dynamic=True, fullgraph=True)
    for size in sizes:
        inputs = inputs_of(*size)
        torch.testing.assert_close(compiled(*inputs), function(*inputs), equal_nan=True)
    assert len(reports()) == pipeline.calls == 1, "\n".join(map(str, reports()))
