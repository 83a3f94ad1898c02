"""When the backward of large heads for Hopper takes a call, and its launches."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import configs
from .backward_hopper_launch import MIN_SCORES, mask_refusal, of_rows, row_statistics
from .backward_large_dq import backward_large_dq_kernel
from .launch import Launch, Rope, descriptor, swizzled

KEYS, TILE_M = 64, 128
"""As in backward_large.py."""

MAX_BYTES = 2**29
"""Of ds at a time, so that this does not grow with the call: a few heads, or some queries of one."""

MIN_PROGRAMS = 128
"""With fewer tiles of ds at a time the second kernel would leave much of the device idle."""


@dataclass(frozen=True)
class Tile:
    """Queries of a step, blocks of queries and of gradients in flight, and slots for weights and ds."""

    block_m: int
    stages: int
    slots: int


TILES = {(256, 0, 256): Tile(64, 2, 2), (128, 64, 128): Tile(128, 2, 1)}
"""By the extents of head_blocks, what fits 227 KiB of shared memory."""


def tiles_of_row(arguments: dict[str, Any]) -> int:
    """Blocks of keys for which 128 queries keep ds: as many as the band leaves them at most."""
    blocks = triton.cdiv(arguments["k"].shape[2], KEYS)
    if arguments["HAS_LOWER"] and arguments["HAS_UPPER"]:
        seen = TILE_M - 1 + KEYS - 1 + arguments["band_upper"] - arguments["band_lower"]
        blocks = min(blocks, max(1, seen // KEYS + 1))
    return blocks


def plan(arguments: dict[str, Any]) -> tuple[int, int]:
    """How many key/value heads, and how many tiles of 128 queries of each, have ds in memory at a time."""
    tiles = triton.cdiv(arguments["q"].shape[2], TILE_M)
    heads = arguments["q"].shape[0] * arguments["k"].shape[1]
    at_once = MAX_BYTES // (arguments["gqa_group_size"] * tiles_of_row(arguments) * TILE_M * KEYS * 2)
    if at_once >= tiles:
        return _evenly(heads, at_once // tiles), tiles
    return 1, _evenly(tiles, max(1, at_once))


def _evenly(count: int, at_most: int) -> int:
    return triton.cdiv(count, triton.cdiv(count, at_most))


def refusal(
    arch: str, itemsize: int, blocks: tuple[int, int, int], arguments: dict[str, Any], any_size: bool = False
) -> str:
    """Why the kernels cannot, or should not, compute a call's gradients; "" where they should.

    Arguments as of backward_hopper_launch.refusal.
    """
    batch, num_heads, q_len, _ = arguments["q"].shape
    if not configs.has_hopper_kernels(arch):
        return "written for Hopper, in Gluon, which is experimental, as two releases of Triton have it"
    if itemsize != 2 or blocks not in TILES:
        return "its accumulators are those of 16-bit heads of 256 numbers, or of 192 beside values of 128"
    if batch * num_heads * q_len * arguments["k"].shape[2] < MIN_SCORES and not any_size:
        return "short, so that the host's time counts"
    tiles = plan(arguments)[1]
    if tiles < triton.cdiv(q_len, TILE_M) and tiles * arguments["gqa_group_size"] < MIN_PROGRAMS and not any_size:
        return f"so long that {MAX_BYTES >> 20} MiB hold ds of too few queries"
    return mask_refusal(arguments)


def large_launches(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope, blocks: tuple[int, int, int],
    arguments: dict[str, Any], tensors: dict[str, Any], num_units: int,
) -> list[Launch]:  # fmt: skip
    """The launches that fill "dq", "dk" and "dv" of `tensors`, with `rope` also "dq_pe" and "dk_pe".

    They need up to MAX_BYTES of memory.

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
    group, row_tiles, heads = num_heads // kv_heads, tiles_of_row(arguments), batch * kv_heads
    at_once, tiles_at_once = plan(arguments)
    ds = torch.empty((at_once * group * tiles_at_once * row_tiles * KEYS, TILE_M), dtype=q.dtype, device=q.device)
    part = torch.empty((kv_len * (tiles_at_once < q_tiles), sum(blocks)), dtype=torch.float32, device=q.device)
    dq, dk, dv = (tensors[name] for name in ("dq", "dk", "dv"))
    first, rest, _ = blocks
    q_rest, k_rest = (rope[0], rope[1].unsqueeze(1)) if rope else (q, k)
    dk_rest = tensors["dk_pe"] if rope else dk[..., first:]
    dq_rest = tensors.get("dq_pe")
    dq_rest_strides = dq_rest.stride()[:3] if rope else (None,) * 3
    given = {
        **arguments,
        "ROPE": rope[1].shape[2] if rope else 0,
        "row_tiles": row_tiles,
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
        "heads_at_once": configs.backward_heads_at_once(at_once, kv_blocks, num_units),
        "BLOCK_M": tile.block_m, "STAGES": tile.stages, "SLOTS": tile.slots,
    }  # fmt: skip
    final = {
        **given,
        "k": descriptor(k, KEYS, first),
        "k_rest": descriptor(k_rest, KEYS, rest) if rest else None,
        "ds": of_rows(ds, KEYS, TILE_M, 0),
        "heads_at_once": configs.backward_heads_at_once(at_once, tiles_at_once * group, num_units),
    }
    launches = []
    for first_head, first_tile in itertools.product(range(0, heads, at_once), range(0, q_tiles, tiles_at_once)):
        count, last_tile = min(at_once, heads - first_head), min(first_tile + tiles_at_once, q_tiles)
        which = {"first_head": first_head, "head_count": count, "first_tile": first_tile, "last_tile": last_tile}
        ends = {"IS_FIRST": first_tile == 0, "IS_LAST": last_tile == q_tiles}
        tiles = count * group * (last_tile - first_tile)
        launches += [
            _launch(backward_large_kernel, count * kv_blocks, main | which | ends, 4, 1),
            _launch(backward_large_dq_kernel, tiles, final | which, 8, 4),
        ]
    return launches


def _launch(kernel: Any, grid: int, given: dict[str, Any], num_warps: int, num_stages: int) -> Launch:
    arguments = {parameter.name: given[parameter.name] for parameter in kernel.params}
    return Launch(kernel, grid, arguments, {"num_warps": num_warps, "num_stages": num_stages})
