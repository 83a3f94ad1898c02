"""The mask of equal layers is proved once, and only of equal ones."""

from __future__ import annotations

import math

import pytest
import torch
from recorder import Recorder

import rocm_attn_compile
from rocm_attn_compile.recognize import mask as prover

B, H, M, D = 2, 3, 13, 8


def layer(x, keep):
    return (x @ x.mT * 0.3).masked_fill(~keep, -math.inf).softmax(-1) @ x


def causal(window):
    i, j = torch.arange(M)[:, None], torch.arange(M)[None, :]
    return (j <= i) & (i - j < window)


def each_makes_its_own(x, ids):
    for _ in range(4):
        x = layer(x, causal(5))
    return x


def all_share_one(x, ids):
    keep = causal(5) & (ids < 3)[:, None, None, :]
    for _ in range(4):
        x = layer(x, keep)
    return x


def two_kinds(x, ids):
    for window in (5, 4, 5, 4):
        x = layer(x, causal(window))
    return x


def padding_of_two_tensors(x, ids):
    for one in (ids, ids + 1, ids, ids + 1):
        x = layer(x, (one > 1)[:, None, None, :])
    return x


def padding_written_in_between(x, ids):
    ids = ids.clone()
    for _ in range(2):
        x = layer(x, (ids > 1)[:, None, None, :])
        ids[:, 3] = 0
    return x


@pytest.mark.parametrize(
    ("function", "proofs", "masks"),
    [
        (each_makes_its_own, 1, 1),
        (all_share_one, 1, 1),
        (two_kinds, 2, 2),
        (padding_of_two_tensors, 2, 1),
        (padding_written_in_between, 2, 1),
    ],
)
def test_a_mask_is_proved_once(function, proofs, masks, monkeypatch):
    calls = []
    real = prover.prove_drop

    def counted(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(prover, "prove_drop", counted)
    x, ids = torch.randn(B, H, M, D), torch.arange(M).fmod(4).expand(B, M).contiguous()
    recorder = Recorder(lowering="eager")
    actual = torch.compile(function, backend=recorder, fullgraph=True)(x, ids)
    torch.testing.assert_close(actual, function(x, ids))
    sites = [site for report in rocm_attn_compile.reports() for site in report.sites]
    assert recorder.calls == len(sites) >= 2
    assert len(calls) == proofs
    assert len({site.data["mask"]["text"] for site in sites}) == masks
