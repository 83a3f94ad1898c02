"""Which blocks of queries a block of keys is told to walk over, where rows have limits: against all pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from interpreter_worker import InterpreterWorker

BLOCK_M, BLOCK_N, Q_LEN, KV_LEN = 32, 16, 300, 200


@pytest.fixture(scope="module")
def worker():
    found = InterpreterWorker()
    yield found
    found.close()


def documents(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    cuts = torch.sort(torch.randint(0, KV_LEN, (5,), generator=generator)).values.tolist()
    edges = [0, *cuts, KV_LEN]
    at = torch.searchsorted(torch.tensor(edges[1:]), torch.arange(Q_LEN).clamp(max=KV_LEN - 1), right=True)
    return torch.tensor(edges)[at], torch.tensor(edges)[at + 1]


def padding(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    first = int(torch.randint(0, KV_LEN // 2, (), generator=generator))
    return torch.full((Q_LEN,), first), torch.full((Q_LEN,), first + 70)


def unordered(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of blocks in any order, so that whole blocks are met; some rows keep nothing; some limits are out of bounds."""
    start = torch.randint(-40, KV_LEN, (Q_LEN // 25,), generator=generator).repeat_interleave(25)
    length = torch.randint(-5, 120, (Q_LEN // 25,), generator=generator).repeat_interleave(25)
    return start, start + length


@pytest.mark.parametrize("band", [(None, None), (None, 0), (-90, 40)], ids=str)
@pytest.mark.parametrize("which", ["both", "start", "end"])
@pytest.mark.parametrize("limits", [documents, padding, unordered])
def test_ranges(worker, limits, which, band):
    generator = torch.Generator().manual_seed(0)
    rows = [limits(generator) for _ in range(2)]
    start, end = (torch.stack(column).int() for column in zip(*rows))
    found = worker.call(
        "backward_ranges", block_m=BLOCK_M, block_n=BLOCK_N, rows_at_once=4 * BLOCK_M, q_len=Q_LEN, kv_len=KV_LEN,
        kv_start=start if which != "end" else None, kv_end=end if which != "start" else None,
        band_lower=band[0], band_upper=band[1],
    )  # fmt: skip
    i, j = torch.arange(Q_LEN)[:, None], torch.arange(KV_LEN)[None, :]
    keep = torch.ones(2, Q_LEN, KV_LEN, dtype=torch.bool)
    if which != "end":
        keep &= j >= start[:, :, None]
    if which != "start":
        keep &= j < end[:, :, None]
    if band[0] is not None:
        keep &= j - i >= band[0]
    if band[1] is not None:
        keep &= j - i <= band[1]
    for batch in range(2):
        for block, columns in enumerate(keep[batch].split(BLOCK_N, 1)):
            pieces = columns.split(BLOCK_M, 0)
            begin, full_begin, full_end, stop = found[batch, block].tolist()
            some = [index for index, piece in enumerate(pieces) if piece.any()]
            every = [index for index, piece in enumerate(pieces) if piece.all() and len(piece) == BLOCK_M]
            assert 0 <= begin <= full_begin <= full_end <= stop <= len(pieces)
            assert all(begin <= index < stop for index in some)
            assert all(pieces[index].all() for index in range(full_begin, full_end))
            if limits is not unordered:  # exact
                assert (begin, stop) == (some[0], some[-1] + 1) if some else begin == stop
                assert [index for index in every if not full_begin <= index < full_end] == []
