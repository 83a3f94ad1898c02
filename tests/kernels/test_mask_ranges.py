"""Which blocks are walked over where padding, limits or ids stand in tensors: against all pairs, one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")


BLOCK_M, BLOCK_N, Q_LEN, KV_LEN = 32, 16, 300, 200


def edges_of(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    cuts = torch.sort(torch.randint(0, KV_LEN, (5,), generator=generator)).values.tolist()
    edges = torch.tensor([0, *cuts, KV_LEN])
    return edges, torch.searchsorted(edges[1:], torch.arange(max(Q_LEN, KV_LEN)).clamp(max=KV_LEN - 1), right=True)


def documents(generator: torch.Generator) -> dict[str, Tensor]:
    edges, at = edges_of(generator)
    return {"kv_start": edges[at][:Q_LEN], "kv_end": edges[at + 1][:Q_LEN]}


def starts(generator: torch.Generator) -> dict[str, Tensor]:
    return {"kv_start": documents(generator)["kv_start"]}


def ids(generator: torch.Generator) -> dict[str, Tensor]:
    """Ascending, as those of packed documents; 64 bits."""
    _, at = edges_of(generator)
    return {"q_ids": at[:Q_LEN] + 2**40, "kv_ids": at[:KV_LEN] + 2**40}


def padding(generator: torch.Generator) -> dict[str, Tensor]:
    first = int(torch.randint(0, KV_LEN // 2, (), generator=generator))
    at = torch.arange(KV_LEN)
    return {"key_mask": (at >= first) & (at < first + 70)}


def same_limits(generator: torch.Generator) -> dict[str, Tensor]:
    first = int(torch.randint(0, KV_LEN // 2, (), generator=generator))
    return {"kv_start": torch.full((Q_LEN,), first), "kv_end": torch.full((Q_LEN,), first + 70)}


def unordered(generator: torch.Generator) -> dict[str, Tensor]:
    """Everything, in any order, so that there are holes; some rows keep nothing; some limits are out of bounds."""
    start = torch.randint(-40, KV_LEN, (Q_LEN // 25,), generator=generator).repeat_interleave(25)
    length = torch.randint(-5, 120, (Q_LEN // 25,), generator=generator).repeat_interleave(25)
    return {
        "kv_start": start, "kv_end": start + length,
        "q_ids": torch.randint(0, 3, (Q_LEN // 25,), generator=generator).repeat_interleave(25),
        "kv_ids": torch.randint(0, 3, (KV_LEN // 20,), generator=generator).repeat_interleave(20),
        "key_mask": torch.rand(KV_LEN // 10, generator=generator).repeat_interleave(10) < 0.8,
    }  # fmt: skip


def kept(masks: dict[str, Tensor | None], band: tuple[int | None, int | None]) -> Tensor:
    """`(B, M, N)`."""
    i, j = torch.arange(Q_LEN)[:, None], torch.arange(KV_LEN)[None, :]
    keep = torch.ones(2, Q_LEN, KV_LEN, dtype=torch.bool)
    if masks["kv_start"] is not None:
        keep &= j >= masks["kv_start"][:, :, None]
    if masks["kv_end"] is not None:
        keep &= j < masks["kv_end"][:, :, None]
    if masks["q_ids"] is not None:
        keep &= masks["q_ids"][:, :, None] == masks["kv_ids"][:, None, :]
    if masks["key_mask"] is not None:
        keep &= masks["key_mask"][:, None, :]
    if band[0] is not None:
        keep &= j - i >= band[0]
    if band[1] is not None:
        keep &= j - i <= band[1]
    return keep


def find(worker, kind, band, by_key: bool):
    """The masks, by name, and the table, or both tables of a call that is not `by_key`."""
    generator = torch.Generator().manual_seed(0)
    rows = [kind(generator) for _ in range(2)]
    masks: dict[str, Tensor | None] = dict.fromkeys(("key_mask", "kv_start", "kv_end", "q_ids", "kv_ids"))
    masks |= {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return masks, worker.call(
        "mask_ranges", block_m=BLOCK_M, block_n=BLOCK_N, by_key=by_key, numbers_at_once=64, q_len=Q_LEN,
        kv_len=KV_LEN, band_lower=band[0], band_upper=band[1], **masks,
    )  # fmt: skip


@pytest.mark.parametrize("by_key", [False, True], ids=["of rows", "of keys"])
@pytest.mark.parametrize("band", [(None, None), (None, 0), (-90, 40)], ids=str)
@pytest.mark.parametrize("kind", [documents, starts, ids, padding, same_limits, unordered])
def test_ranges(worker, kind, band, by_key):
    masks, found = find(worker, kind, band, by_key)
    found = found if by_key else found[0]
    keep = kept(masks, band)
    own, other = (BLOCK_N, BLOCK_M) if by_key else (BLOCK_M, BLOCK_N)
    seen = 0
    for batch in range(2):
        pairs = keep[batch].T if by_key else keep[batch]
        for block, strip in enumerate(pairs.split(own, 0)):
            pieces = strip.split(other, 1)
            begin, full_begin, full_end, end = found[batch, block].tolist()
            some = [index for index, piece in enumerate(pieces) if piece.any()]
            # A last block that is not full has elements that do not exist.
            every = [index for index, piece in enumerate(pieces) if piece.all() and piece.shape[1] == other]
            assert 0 <= begin <= full_begin <= full_end <= end <= len(pieces)
            assert all(begin <= index < end for index in some)
            assert set(range(full_begin, full_end)) <= set(every)
            seen += full_end - full_begin
            if kind is not unordered:  # exact
                assert (begin, end) == (some[0], some[-1] + 1) if some else begin == end
                assert set(every) <= set(range(full_begin, full_end))
    assert seen or kind in (unordered, ids, padding) or band == (-90, 40)


@pytest.mark.parametrize("band", [(None, None), (None, 0), (-90, 40)], ids=str)
@pytest.mark.parametrize("kind", [documents, ids, padding, unordered])
def test_ranges_of_keys_hold_all_that_have_them_in_theirs(worker, kind, band):
    """So that nobody waits for a turn that is never taken."""
    _, (of_rows, of_keys) = find(worker, kind, band, False)
    blocks = torch.arange(of_keys.shape[1])
    for batch in range(2):
        begin, full_begin, full_end, end = (column[:, None] for column in of_rows[batch].unbind(1))
        meets = (begin <= blocks) & (blocks < end)
        whole = (full_begin <= blocks) & (blocks < full_end)
        for block, (begin, full_begin, full_end, end) in enumerate(of_keys[batch].tolist()):
            rows = meets[:, block].nonzero().flatten().tolist()
            assert (begin, end) == (rows[0], rows[-1] + 1) if rows else begin == end
            assert begin <= full_begin <= full_end <= end
            rows = whole[:, block].nonzero().flatten().tolist()
            assert set(range(full_begin, full_end)) <= set(rows) and bool(rows) == (full_begin < full_end)
            if kind is not unordered:
                assert len(rows) == full_end - full_begin
