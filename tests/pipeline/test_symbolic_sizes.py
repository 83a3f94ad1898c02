"""Sizes that no node of the graph holds are computed from those that some node does."""

from __future__ import annotations

import torch
from pipeline_harness import SCALE, D, Pipeline, rand, reports


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
        return torch.nn.functional.scaled_dot_product_attention(q, cache, values, attn_mask=keep)

    pipeline = Pipeline("eager")
    compiled = torch.compile(step, backend=pipeline, dynamic=True, fullgraph=True)
    cache, values = rand(2, 3, 11, D), rand(2, 3, 11, D)
    for start in (0, 3, 6):
        inputs = rand(2, 3, 3, D), values, rand(2, 3, 3, D), start
        mine, theirs = cache.clone(), cache.clone()
        torch.testing.assert_close(compiled(inputs[0], mine, *inputs[1:]), step(inputs[0], theirs, *inputs[1:]))
        assert torch.equal(mine, theirs)
    assert len(reports()) == pipeline.calls == 1, "\n".join(map(str, reports()))
