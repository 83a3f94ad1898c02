"""A decode loop through a compiled function: eager's tokens, two compilations, and a length instead of a mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pipeline_harness import SCALE, D, H, Pipeline, rand, sites

STEPS, VOCABULARY = 200, 50


def project(x, weight):
    """(q, k, v) of one token, (1, heads, 1, head_dim) each."""
    return (x @ weight).view(1, 1, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)


def attend_to_valid(q, keys, values, position):
    scores = q @ keys.mT * SCALE
    drop = torch.arange(keys.shape[2]) > position[:, None]
    return scores.masked_fill(drop, float("-inf")).softmax(-1) @ values


def by_index_copy(q, k, v, keys, values, position):
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v)
    return attend_to_valid(q, keys, values, position)


def by_slice_assignment(q, k, v, keys, values, position):
    keys[:, :, position] = k
    values[:, :, position] = v
    return attend_to_valid(q, keys, values, position)


def by_scatter(q, k, v, keys, values, position):
    index = position.view(1, 1, 1, 1).expand_as(k)
    keys.scatter_(2, index, k)
    values.scatter_(2, index, v)
    return attend_to_valid(q, keys, values, position)


def by_functional_copy(q, k, v, keys, values, position):
    keys.copy_(keys.index_copy(2, position, k))
    values.copy_(torch.where((torch.arange(values.shape[2]) == position)[:, None], v, values))
    keep = torch.arange(keys.shape[2])[None, None, None, :] <= position
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=keep, scale=SCALE)


def decode(step, weights) -> torch.Tensor:
    """Greedy tokens and both caches."""
    embedding, weight, out = weights
    keys, values = torch.zeros(1, H, STEPS + 8, D), torch.zeros(1, H, STEPS + 8, D)
    token, tokens = torch.tensor([7]), []
    for i in range(STEPS):
        y = step(*project(embedding[token], weight), keys, values, torch.tensor([i]))
        token = (y.reshape(1, H * D) @ out).argmax(-1)
        tokens.append(token)
    return torch.cat([*tokens, keys.flatten(), values.flatten()])


LOWERINGS = pytest.mark.parametrize("lowering", ["eager", "inductor"])


@LOWERINGS
@pytest.mark.parametrize("step", [by_index_copy, by_slice_assignment, by_scatter, by_functional_copy])
def test_static_cache_of_200_steps(step, lowering):
    weights = rand(VOCABULARY, H * D), rand(H * D, 3 * H * D) * 0.3, rand(H * D, VOCABULARY)
    pipeline = Pipeline(lowering)
    with torch.no_grad():
        want = decode(step, weights)
        got = decode(torch.compile(step, backend=pipeline, fullgraph=True), weights)
    assert want[:STEPS].unique().numel() > 5  # a loop that sticks to one token shows nothing
    torch.testing.assert_close(got, want)
    assert pipeline.calls == len(pipeline.graphs) <= 2
    for site in sites():
        mask = site.data["mask"]
        assert mask["has_kv_end"] and not (mask["has_attn_mask"] or mask["has_key_mask"]), site.mask


@LOWERINGS
def test_growing_cache_of_200_steps(lowering):
    embedding, weight, out = rand(VOCABULARY, H * D), rand(H * D, 3 * H * D) * 0.3, rand(H * D, VOCABULARY)

    def step(q, k, v, keys, values):
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        return (q @ keys.mT * SCALE).softmax(-1) @ values, keys, values

    def loop(step):
        keys, values = torch.zeros(1, H, 2, D), torch.zeros(1, H, 2, D)
        token, tokens = torch.tensor([7]), []
        for _ in range(STEPS):
            y, keys, values = step(*project(embedding[token], weight), keys, values)
            token = (y.reshape(1, H * D) @ out).argmax(-1)
            tokens.append(token)
        return torch.cat([*tokens, keys.flatten()])

    pipeline = Pipeline(lowering)
    with torch.no_grad():
        torch.testing.assert_close(loop(torch.compile(step, backend=pipeline, fullgraph=True)), loop(step))
    assert pipeline.calls == len(pipeline.graphs) <= 2
    assert all(site.data["mask"]["text"] == "none" for site in sites())


@pytest.mark.parametrize("masked", [False, True])
def test_what_sdpa_relies_on_is_guarded(masked):
    """The keys and the values of a growing cache have lengths of their own, which nothing in PyTorch compares."""

    def step(q, k, v, keys, values, mask):
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask if masked else None)
        return y, keys, values

    pipeline = Pipeline()
    compiled = torch.compile(step, backend=pipeline, fullgraph=True, dynamic=True)
    keys, values = rand(2, 3, 11, 8), rand(2, 3, 11, 8)
    for length in (12, 13, 14, 15):
        q, k, v, mask = (rand(2, 3, 1, 8), rand(2, 3, 1, 8), rand(2, 3, 1, 8), rand(2, 1, 1, length))
        want = step(q, k, v, keys, values, mask)
        got = compiled(q, k, v, keys, values, mask)
        torch.testing.assert_close(got, want)
        _, keys, values = got
    assert pipeline.calls == len(pipeline.graphs) == 1
