"""Dropout inside attention: the right distribution, one mask for forward, backward and recomputation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pipeline_harness import SCALE, Pipeline, attend, codes, rand, sites
from torch.utils.checkpoint import checkpoint

P = 0.4
LENGTH = 64


def drop_weights(q, k, v):
    return F.dropout((q @ k.mT * SCALE).softmax(-1), P) @ v


def drop_in_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=P, scale=SCALE)


def drop_recomputed(q, k, v):
    return checkpoint(drop_weights, q, k, v, use_reentrant=False)


def inputs(trains=True):
    """v is the identity, so that the result is the dropped weights."""
    q, k = (rand(2, 3, LENGTH, 8).requires_grad_(trains) for _ in range(2))
    v = torch.eye(LENGTH, dtype=q.dtype).expand(2, 3, LENGTH, LENGTH).clone().requires_grad_(trains)
    return q, k, v


@pytest.mark.parametrize("lowering", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("function", [drop_weights, drop_in_sdpa, drop_recomputed])
def test_dropout(function, lowering):
    pipeline = Pipeline(lowering)
    compiled = torch.compile(function, backend=pipeline, fullgraph=True)
    q, k, v = inputs()
    out = compiled(q, k, v)
    assert (pipeline.calls, codes()) == (1, set())
    assert sites()[0].data["dropout_p"] == P

    # Every weight is either 0 or what it is without dropout over 1 - p, and the share of zeros is p.
    weights = (q @ k.mT * SCALE).softmax(-1)
    kept = out != 0
    torch.testing.assert_close(out[kept], (weights / (1 - P))[kept])
    dropped = 1 - kept.double().mean().item()
    deviation = (P * (1 - P) / out.numel()) ** 0.5
    assert abs(dropped - P) < 5 * deviation

    # The mask of each head, row and column is its own, and the next call has another one.
    for dim in range(4):
        assert not torch.equal(kept.select(dim, 0), kept.select(dim, 1))
    assert not torch.equal(compiled(q, k, v) != 0, kept)

    # The gradient is that of the program with exactly this mask.
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    explicit = (q @ k.mT * SCALE).softmax(-1) * kept / (1 - P) @ v
    want = torch.autograd.grad((explicit * weight).sum(), (q, k, v))
    torch.testing.assert_close(out, explicit)
    for got, expected in zip(grads, want):
        assert got.isfinite().all()
        torch.testing.assert_close(got, expected)


def test_seed_decides():
    compiled = torch.compile(drop_weights, backend=Pipeline(), fullgraph=True)
    q, k, v = inputs(trains=False)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(compiled(q, k, v))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_two_attentions_drop_differently():
    pipeline = Pipeline()
    q, k, v = inputs(trains=False)
    first, second = torch.compile(lambda q, k, v: (drop_weights(q, k, v), drop_weights(q, k, v)), backend=pipeline)(
        q, k, v
    )
    assert pipeline.calls == 2
    assert not torch.equal(first != 0, second != 0)


@pytest.mark.filterwarnings("ignore:attention left as it is")
@pytest.mark.parametrize(("p", "calls"), [(0.0, 1), (1.0, 0)])
def test_nothing_and_everything_dropped(p, calls):
    def function(q, k, v):
        return F.dropout((q @ k.mT * SCALE).softmax(-1), p) @ v

    pipeline = Pipeline()
    q, k, v = inputs()
    out = torch.compile(function, backend=pipeline, fullgraph=True)(q, k, v)
    torch.testing.assert_close(out, function(q, k, v))
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    torch.testing.assert_close(grads, torch.autograd.grad(function(q, k, v).sum(), (q, k, v)))
    assert pipeline.calls == calls
    assert ("dropout_p" in codes()) == (calls == 0)


def test_dropout_of_evaluation_is_none():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return F.dropout((q @ k.mT * SCALE).softmax(-1), P, self.training) @ v

    model = Model()
    pipeline = Pipeline()
    compiled = torch.compile(model, backend=pipeline, fullgraph=True)
    q, k, v = inputs(trains=False)
    assert (compiled(q, k, v) == 0).any()
    model.eval()
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))
    assert pipeline.calls == 2
    assert [site.data["dropout_p"] for site in sites()] == [P, 0.0]
