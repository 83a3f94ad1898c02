"""When the backward of large heads for Hopper takes a call, and its launches."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import configs
from .backward_hopper_launch import (
    gradient_boxes,
    is_short,
    mask_refusal,
    of_rows,
    row_statistics,
    tables_of_ranges,
)
from .backward_large_dq import backward_large_dq_kernel
from .launch import Launch, Rope, descriptor, swizzled

KEYS, TILE_M = 64, 128
"""As in backward_large.py."""

MAX_BYTES = 2**29
"""Of ds at a time, so that this does not grow with the call: that of a few heads. Where the ds of one does not fit, it
may be as large as dq in float32, and a launch has some of the queries."""

MIN_PROGRAMS = 64
"""With fewer tiles of ds at a time the second kernel would leave most of the device idle."""

PART_PROGRAMS = 1024
"""Of the first kernel, where a launch has some of the queries. Under a causal mask many have nothing to do then."""


@dataclass(frozen=True)
class Tile:
    """Queries of a step, blocks of queries and of gradients in flight, and slots for weights and ds."""

    block_m: int
    stages: int
    slots: int


TILES = {(256, 0, 256): Tile(64, 2, 2), (128, 64, 128): Tile(128, 2, 1)}
"""By the extents of head_blocks, what fits 227 KiB of shared memory."""


def tiles_of_row(arguments: dict[str, Any], last_tile: int) -> int:
    """Blocks of keys for which 128 queries before tile `last_tile` keep ds: as many as the band leaves them at most."""
    keys = arguments["k"].shape[2]
    if arguments["HAS_UPPER"]:
        keys = min(keys, TILE_M * last_tile + arguments["band_upper"])
    blocks = triton.cdiv(max(keys, 1), KEYS)
    if arguments["HAS_LOWER"] and arguments["HAS_UPPER"]:
        seen = TILE_M - 1 + KEYS - 1 + arguments["band_upper"] - arguments["band_lower"]
        blocks = min(blocks, max(1, seen // KEYS + 1))
    return blocks


def plan(arguments: dict[str, Any]) -> tuple[int, list[tuple[int, int, int]]]:
    """How many key/value heads have ds in memory at a time, and the tiles of 128 queries of each launch.

    Returns:
        The number of heads, and `(first_tile, last_tile, row_tiles)` of the launches for them, the last queries first.
    """
    batch, num_heads, q_len, head_dim = arguments["q"].shape
    tiles, heads, kv_len = triton.cdiv(q_len, TILE_M), batch * arguments["k"].shape[1], arguments["k"].shape[2]
    tile_bytes = arguments["gqa_group_size"] * TILE_M * KEYS * 2
    row_tiles = tiles_of_row(arguments, tiles)
    fitting = MAX_BYTES // (tile_bytes * row_tiles * tiles)
    if fitting:
        return triton.cdiv(heads, triton.cdiv(heads, fitting)), [(0, tiles, row_tiles)]
    most = max(MAX_BYTES, batch * num_heads * q_len * head_dim * 4)
    count = max(1, min(heads, most // (tile_bytes * row_tiles), triton.cdiv(PART_PROGRAMS * KEYS, kv_len)))
    parts = []
    while tiles:
        row_tiles = tiles_of_row(arguments, tiles)
        first = max(0, tiles - max(1, most // (tile_bytes * row_tiles * count)))
        parts.append((first, tiles, row_tiles))
        tiles = first
    return count, parts


def refusal(
    arch: str, itemsize: int, blocks: tuple[int, int, int], arguments: dict[str, Any], any_size: bool = False
) -> str:
    """Why the kernels cannot, or should not, compute a call's gradients; "" where they should.

    Arguments as of backward_hopper_launch.refusal.
    """
    if not configs.has_hopper_kernels(arch):
        return "written for Hopper, in Gluon, which is experimental, as two releases of Triton have it"
    if itemsize != 2 or blocks not in TILES:
        return "its accumulators are those of 16-bit heads of 256 numbers, or of 192 beside values of 128"
    if is_short(blocks, arguments) and not any_size:
        return "short, so that the host's time counts"
    heads, parts = plan(arguments)
    programs = heads * arguments["gqa_group_size"] * (parts[0][1] - parts[0][0])
    if len(parts) > 1 and programs < MIN_PROGRAMS and not any_size:
        return "so long that memory holds ds of too few queries"
    return mask_refusal(arguments)


def large_launches(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope, blocks: tuple[int, int, int],
    arguments: dict[str, Any], tensors: dict[str, Any], num_units: int,
) -> list[Launch]:  # fmt: skip
    """The launches that fill "dq", "dk" and "dv" of `tensors`, with `rope` also "dq_pe" and "dk_pe".

    They need up to MAX_BYTES of memory, or the size of dq in float32 if that is more.

    Args:
        grad_out, q, k, v, rope: Tensors that descriptors can be made of.
        blocks: From configs.head_blocks or rope_blocks.
        arguments: As for `refusal`.
        tensors: The gradients, and "shift" and "delta", which backward_rows_kernel fills before.
        num_units: Multiprocessors.
    """
    # Here, since Gluon is experimental, and only Hopper needs it.
    from .backward_large import backward_large_kernel

    tile = TILES[blocks]
    batch, num_heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    kv_blocks, q_tiles = triton.cdiv(kv_len, KEYS), triton.cdiv(q_len, TILE_M)
    group, heads = num_heads // kv_heads, batch * kv_heads
    at_once, parts = plan(arguments)
    rows = KEYS * at_once * group * max((last - first) * row_tiles for first, last, row_tiles in parts)
    ds = torch.empty((rows, TILE_M), dtype=q.dtype, device=q.device)
    part = torch.empty(at_once * kv_len * sum(blocks) * (len(parts) > 1), dtype=torch.float32, device=q.device)
    dq, dk, dv = (tensors[name] for name in ("dq", "dk", "dv"))
    first, rest, _ = blocks
    q_rest, k_rest = (rope[0], rope[1].unsqueeze(1)) if rope else (q, k)
    dk_rest = tensors["dk_pe"] if rope else dk[..., first:]
    dq_rest = tensors.get("dq_pe")
    dq_rest_strides = dq_rest.stride()[:3] if rope else (None,) * 3
    launches, tables = tables_of_ranges(arguments, TILE_M, KEYS)
    given = {
        **arguments,
        **tables,
        "RANGED": bool(launches),
        "ROPE": rope[1].shape[2] if rope else 0,
        "part": part,
        "grad_k": dk, "grad_k_rest": dk_rest if rest else None, "grad_v": dv,
        "grad_q": dq, "grad_q_rest": dq_rest,
        **dict(zip(("stride_dkb", "stride_dkh", "stride_dkn", "stride_dkd"), dk.stride())),
        **dict(zip(("stride_dkpb", "stride_dkph", "stride_dkpn", "stride_dkpd"), dk_rest.stride())),
        **dict(zip(("stride_dvb", "stride_dvh", "stride_dvn", "stride_dve"), dv.stride())),
        **dict(zip(("stride_dqb", "stride_dqh", "stride_dqm", "stride_dqd"), dq.stride())),
        **dict(zip(("stride_dqpb", "stride_dqph", "stride_dqpm"), dq_rest_strides)),
    }  # fmt: skip
    main = {
        **given,
        "q": swizzled(q, tile.block_m, first),
        "k": swizzled(k, KEYS, first),
        "v": swizzled(v, KEYS, blocks[2]),
        "q_rest": swizzled(q_rest, tile.block_m, rest) if rest else None,
        "k_rest": swizzled(k_rest, KEYS, rest) if rest else None,
        "grad_out": swizzled(grad_out, tile.block_m, blocks[2]),
        "shift": row_statistics(tensors["shift"], tile.block_m),
        "delta": row_statistics(tensors["delta"], tile.block_m),
        "ds": of_rows(ds, KEYS, tile.block_m, 128),
        **gradient_boxes(
            {"k_boxes": (dk, first), "k_rest_boxes": (dk_rest if rest else None, rest), "v_boxes": (dv, blocks[2])},
            KEYS,
        ),
        "heads_at_once": configs.backward_heads_at_once(at_once, kv_blocks, num_units),
        "BLOCK_M": tile.block_m, "STAGES": tile.stages, "SLOTS": tile.slots,
    }  # fmt: skip
    final = {
        **given,
        "k": descriptor(k, KEYS, first),
        "k_rest": descriptor(k_rest, KEYS, rest) if rest else None,
        "ds": of_rows(ds, KEYS, TILE_M, 0),
        "heads_at_once": configs.backward_heads_at_once(at_once, q_tiles // len(parts) * group, num_units),
    }
    for first_head, (first_tile, last_tile, row_tiles) in itertools.product(range(0, heads, at_once), parts):
        count = min(at_once, heads - first_head)
        which = {"first_head": first_head, "head_count": count, "first_tile": first_tile, "last_tile": last_tile,
                 "row_tiles": row_tiles}  # fmt: skip
        ends = {"IS_FIRST": last_tile == q_tiles, "IS_LAST": first_tile == 0}
        tiles = count * group * (last_tile - first_tile)
        launches += [
            _launch(backward_large_kernel, count * kv_blocks, main | which | ends, 4, 1),
            _launch(backward_large_dq_kernel, tiles, final | which, 8, 4),
        ]
    return launches


def _launch(kernel: Any, grid: int, given: dict[str, Any], num_warps: int, num_stages: int) -> Launch:
    arguments = {parameter.name: given[parameter.name] for parameter in kernel.params}
    return Launch(kernel, grid, arguments, {"num_warps": num_warps, "num_stages": num_stages})
