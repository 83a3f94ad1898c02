"""A proved mask reaches the kernel in closed form: nothing of q_len x kv_len is left in the graph.

Checked on what the graph computes for its results, at lengths at which a mask of all pairs is larger than all else.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.fx as fx
from mask_cases import MASKS, positions
from pipeline_harness import SCALE, B, D, H, Pipeline, rand, reports, sites

LENGTH = 160


def masked_fill(scores, keep):
    return scores.masked_fill(~keep, -math.inf)


def where(scores, keep):
    return torch.where(keep, scores, torch.finfo(scores.dtype).min)


def additive(scores, keep):
    return scores + torch.zeros(keep.shape, dtype=scores.dtype).masked_fill(~keep, torch.finfo(scores.dtype).min)


def computed(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that a result depends on."""
    todo = [node for node in graph.nodes if node.op == "output"]
    seen: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(node.all_input_nodes)
    return seen


def largest(graph: fx.Graph) -> int:
    """Elements in memory of the largest tensor over all pairs (what is expanded is not in memory)."""
    sizes = [0]
    for node in computed(graph):
        example = node.meta.get("example_value")
        if isinstance(example, torch.Tensor) and node.op != "placeholder":
            sizes.append(math.prod(int(s) for s, step in zip(example.shape, example.stride()) if step != 0))
    return max(sizes)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", MASKS)
def test_closed_form(name, dynamic):
    keep, make = MASKS[name]
    apply = {0: masked_fill, 1: where, 2: additive}[list(MASKS).index(name) % 3]
    extra = None if make is None else make(LENGTH)

    def attention(q, k, v, extra):
        return apply(q @ k.mT * SCALE, keep(q, k, extra)).softmax(-1) @ v

    kv_len = LENGTH + 32 if extra is None else LENGTH
    inputs = (rand(B, H, LENGTH, D), rand(B, H, kv_len, D), rand(B, H, kv_len, D), extra)
    pipeline = Pipeline("eager")
    got = torch.compile(attention, backend=pipeline, fullgraph=True, dynamic=dynamic)(*inputs)
    torch.testing.assert_close(got, attention(*inputs))
    (site,) = sites()
    assert site.replaced and not site.data["mask"]["has_attn_mask"], "\n".join(map(str, reports()))
    assert largest(pipeline.graphs[0].graph) <= B * H * kv_len * D < LENGTH * LENGTH * 4


def test_relative_bias_is_not_expanded_over_the_batch():
    def attention(q, k, v, table):
        i, j = positions(q, k)
        bias = table[(j - i).clamp(-8, 8) + 8].permute(2, 0, 1)[None]
        keep = (j <= i)[None, None].expand(q.shape[0], 1, -1, -1)
        return masked_fill(q @ k.mT * SCALE + bias.expand(q.shape[0], -1, -1, -1), keep).softmax(-1) @ v

    batch = 5
    inputs = (*(rand(batch, H, LENGTH, D) for _ in range(3)), rand(17, H))
    pipeline = Pipeline("eager")
    got = torch.compile(attention, backend=pipeline, fullgraph=True)(*inputs)
    torch.testing.assert_close(got, attention(*inputs))
    (site,) = sites()
    assert site.data["mask"]["band_upper"] == 0 and not site.data["mask"]["has_attn_mask"]
    assert largest(pipeline.graphs[0].graph) == H * LENGTH * LENGTH


def test_an_opaque_mask_is_not_expanded_over_the_heads():
    def attention(q, k, v, keep):
        return where(q @ k.mT * SCALE, keep[:, None].expand(-1, H, -1, -1)).softmax(-1) @ v

    keep = torch.rand(B, LENGTH, LENGTH) > 0.3
    inputs = (*(rand(B, H, LENGTH, D) for _ in range(3)), keep)
    pipeline = Pipeline("eager")
    torch.testing.assert_close(torch.compile(attention, backend=pipeline)(*inputs), attention(*inputs))
    assert pipeline.calls == 1
    assert largest(pipeline.graphs[0].graph) <= B * LENGTH * LENGTH
