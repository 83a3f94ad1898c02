"""A proved mask reaches the kernel in closed form: nothing of q_len x kv_len is left in the graph.

Checked on what the graph computes for its results, at lengths at which a mask of all pairs is larger than all else.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.fx as fx
from pipeline_harness import SCALE, B, D, H, Pipeline, rand, reports, sites

from rocm_attn_compile.testing import peak_memory

LENGTH = 160
WINDOW = 16


def positions(q, k, bottom_right=False):
    rows, columns = q.shape[-2], k.shape[-2]
    offset = columns - rows if bottom_right else 0
    return torch.arange(rows)[:, None] + offset, torch.arange(columns)[None, :]


def top_left(q, k, extra):
    i, j = positions(q, k)
    return j <= i


def bottom_right(q, k, extra):
    i, j = positions(q, k, bottom_right=True)
    return j <= i


def window(size):
    def keep(q, k, extra):
        i, j = positions(q, k)
        return (j <= i) & (i - j < size)

    return keep


def window_by_distance(q, k, extra):
    i, j = positions(q, k)
    return (i - j).abs() <= WINDOW


def chunked(q, k, extra):
    i, j = positions(q, k)
    return (i // WINDOW == j // WINDOW) & (j <= i)


def prefix(q, k, lengths):
    i, j = positions(q, k)
    return ((j <= i) | (j < lengths[:, None, None]))[:, None]


def documents(q, k, ids):
    i, j = positions(q, k)
    return ((ids[:, :, None] == ids[:, None, :]) & (j <= i))[:, None]


def padding_bool(q, k, mask):
    return mask.bool()[:, None, None, :]


def padding_int_and_window(q, k, mask):
    return (mask[:, None, None, :] != 0) & window(WINDOW)(q, k, None)


def padding_float(q, k, mask):
    return mask.float()[:, None, None, :] > 0.5


def lengths_and_causal(q, k, lengths):
    i, j = positions(q, k)
    return ((j < lengths[:, None, None]) & (j <= i))[:, None]


def of_length(value):
    return lambda n: torch.full((B,), value)


def ones(n):
    return torch.ones(B, n, dtype=torch.long)


CASES = {
    "causal_top_left": (top_left, None),
    "causal_bottom_right": (bottom_right, None),
    "window_smaller": (window(WINDOW - 1), None),
    "window": (window(WINDOW), None),
    "window_larger": (window(WINDOW + 1), None),
    "window_by_distance": (window_by_distance, None),
    "chunked": (chunked, None),
    "prefix": (prefix, of_length(7)),
    "documents": (documents, lambda n: torch.arange(n).div(50, rounding_mode="floor").expand(B, n).contiguous()),
    "padding_bool": (padding_bool, ones),
    "padding_int_and_window": (padding_int_and_window, ones),
    "padding_float": (padding_float, ones),
    "lengths_and_causal": (lengths_and_causal, of_length(100)),
}
"""Name -> what is kept, and a maker of the tensor that it reads."""


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
@pytest.mark.parametrize("name", CASES)
def test_closed_form(name, dynamic):
    keep, make = CASES[name]
    apply = {0: masked_fill, 1: where, 2: additive}[list(CASES).index(name) % 3]
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


@pytest.mark.parametrize(("name", "heads"), [("window", 3), ("padding_bool", 1)])
def test_a_call_needs_less_memory_than_the_scores(name, heads):
    """Less than the scores of `heads` of the B * H heads.

    On the CPU ATen's kernel is given a window as one float mask, for all heads; Triton's kernels are not.
    """
    keep, make = CASES[name]
    length = 512

    def attention(q, k, v, extra):
        return masked_fill(q @ k.mT * SCALE, keep(q, k, extra)).softmax(-1) @ v

    inputs = (*(rand(B, H, length, D) for _ in range(3)), None if make is None else make(length))
    pipeline = Pipeline("eager")
    compiled = torch.compile(attention, backend=pipeline, fullgraph=True)
    with torch.no_grad():
        compiled(*inputs)
        peak = peak_memory(lambda: compiled(*inputs))
        scores = length * length * inputs[0].element_size()  # of one head of one sequence
        assert peak_memory(lambda: attention(*inputs)) > B * H * scores
    assert pipeline.calls == 1
    assert peak < heads * scores
