"""Which decode calls Hopper's own kernel takes, and how it is launched; see decode_hopper.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from . import configs
from .common import NO_CAP
from .launch import MEANS, Launch, Tuning


class Tile(NamedTuple):
    """Warps of a program, and keys that each of them takes at once."""

    warps: int
    keys: int


TILES: dict[tuple[int, int], Tile] = {
    (64, 64): Tile(4, 32),
    (128, 128): Tile(4, 32),
}
"""By head sizes. What fits: two programs a multiprocessor, so 255 registers a thread for the result, the queries and
the words of two tiles."""

ROWS = 16
"""Rows of a tile, as decode_hopper.ROWS."""

ABSENT = ("HAS_BIAS", "HAS_ATTN_MASK", "HAS_KEY_MASK", "HAS_IDS", "HAS_DROPOUT", "HAS_ALIBI", "BLOCK_REST", "ROPE")
"""What of forward.py's features neither this kernel nor that of pages has."""
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def choose(
    arch: str, kv_dtype: torch.dtype, is_aligned: bool, arguments: dict[str, Any], tuning: Tuning
) -> Tile | None:
    """The tile if the kernel takes the call, else None.

    Args:
        arch: "sm90" is Hopper.
        kv_dtype: Of the cache.
        is_aligned: Whether q, k and v start at multiples of 16 bytes.
        arguments: Those of attention_forward_kernel, as planned.
        tuning: `in_flight` asks for the kernel wherever it can run; else only `num_splits` leaves it the choice.
    """
    sizes = arguments["HEAD_DIM"], arguments["V_HEAD_DIM"]
    unit = ("stride_kd", "stride_ve", "stride_qd", "stride_oe")
    outer = ("stride_kb", "stride_kh", "stride_kn", "stride_vb", "stride_vh", "stride_vn")
    fits = (
        sizes in TILES
        and configs.has_hopper_kernels(arch)
        and kv_dtype in _FLOAT8
        and is_aligned
        and arguments["PACK"] == arguments["gqa_group_size"]
        and arguments["PACK"] * arguments["q_len"] <= ROWS
        and arguments["SOFT_CAP"] == NO_CAP.value
        and arguments["EMPTY_ROWS"] not in MEANS
        and all(arguments[name] == 1 for name in unit)
        and all(arguments[name] % 16 == 0 for name in outer)
        and not any(arguments[name] for name in ABSENT)
    )
    is_free = not (tuning.config or tuning.pack or tuning.shift is not None or tuning.chosen)
    # Of few tiles little is on its way while another is used.
    is_long = configs.decode_feature(arguments["kv_len"], arguments["num_splits"]) in ("few", "")
    return TILES[sizes] if fits and ((is_free and is_long) or tuning.in_flight) else None


def launch(tile: Tile, grid: int, arguments: dict[str, Any]) -> Launch:
    """The launch that takes the place of attention_forward_kernel's, with these arguments."""
    # Here, since Gluon is experimental, and only Hopper needs it.
    from .decode_hopper import decode_hopper_kernel

    given = {**arguments, "WARPS": tile.warps, "KEYS": tile.keys}
    names = [parameter.name for parameter in decode_hopper_kernel.params]
    options = {"num_warps": tile.warps, "num_stages": 1}
    return Launch(decode_hopper_kernel, grid, {name: given[name] for name in names}, options)
