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
