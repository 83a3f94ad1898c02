"""Which decode calls over pages Hopper's own kernel takes, and how it is launched; see decode_hopper_pages.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import configs
from .decode_hopper_launch import ABSENT
from .launch import Launch, Layout, Tuning, swizzled, takes_tma


class Tile(NamedTuple):
    """What a program takes at once.

    Attributes:
        block_n: Rows of a tile of keys, and of one of values: tokens times heads.
        stages: Tiles of keys, and as many of values, in shared memory.
        rows: Rows of queries, at most.
        heads: Key/value heads.
        num_splits: Programs that share the keys of a tile.
    """

    block_n: int
    stages: int
    rows: int
    heads: int
    num_splits: int


STAGED: dict[tuple[int, int], tuple[int, int]] = {
    (64, 16): (256, 2), (64, 32): (128, 4), (64, 64): (64, 8),
    (128, 16): (128, 2), (128, 32): (128, 2), (128, 64): (64, 4),
    (256, 16): (64, 2), (256, 32): (64, 2),
}  # fmt: skip
"""By head size and most rows: block_n and stages. They are 128 KiB of shared memory: with 192 the kernel was slower,
up to 2 %. And 255 registers a thread hold block_n x rows scores, as many sums, and head size x rows of each head's
result."""

FEW_ROWS = 16
"""Rows up to which several heads share a tile."""
MOST_NUMBERS = 512
"""Numbers of a token that a program reads side by side, at most."""
MIN_SHARED_KEYS = 2048
"""Keys of a share from which on heads are read together although there are more shares to add up then."""
MIN_BOX_NUMBERS = 2048
"""Of a copy: with smaller ones the copying warp is what bounds."""
MIN_SCORES = 2**16
"""From how many scores (B H M N) on the kernel was measured."""

_ABSENT = (*ABSENT, "HAS_K_SCALE", "HAS_V_SCALE")


def choose(
    arch: str,
    dtypes: tuple[torch.dtype, torch.dtype | None],
    caches: tuple[Layout, ...],
    arguments: dict[str, Any],
    sizes: tuple[int, int],
    out_strides: tuple[int, ...],
    means: bool,
    is_aligned: bool,
    tuning: Tuning,
    splits: Callable[[int], int],
) -> Tile | None:
    """The tile if the kernel takes the call, else None.

    Args:
        arch: "sm90" is Hopper.
        dtypes: Of the queries and of the cache.
        caches: Layouts of k and v as they are stored.
        arguments: Those of attention_forward_kernel that do not depend on a configuration.
        sizes: B, and query heads of a group that lie in one tile.
        out_strides: Of the result.
        means: Whether a row without keys is a mean.
        is_aligned: Whether q, k and v start at multiples of 16 bytes.
        tuning: `in_flight` asks for the kernel wherever it can run, `num_splits` for as many shares.
        splits: From a number of tiles to that of the programs that share each.
    """
    (dtype, kv_dtype), (batch, pack) = dtypes, sizes
    width, q_len, kv_len, page = (arguments[name] for name in ("HEAD_DIM", "q_len", "kv_len", "PAGE"))
    fits = (
        page > 0
        and configs.has_hopper_kernels(arch)
        and kv_dtype == dtype
        and dtype.itemsize == 2
        and (width, max(FEW_ROWS, configs.power_of_two(pack * q_len))) in STAGED
        and width == arguments["V_HEAD_DIM"]
        and pack == arguments["gqa_group_size"]
        and arguments["RAW"]
        and arguments["logits_soft_cap"] is None
        and not means
        and is_aligned
        and (arguments["stride_qd"], out_strides[3]) == (1, 1)
        and all(takes_tma(cache, dtype.itemsize) for cache in caches)
        and not any(arguments[name] for name in _ABSENT)
    )
    if not fits:
        return None
    tile = _tile(batch, arguments["num_heads"] // pack, pack * q_len, width, kv_len, page, tuning.num_splits, splits)
    if tuning.in_flight:
        return tile
    is_free = not (tuning.config or tuning.pack or tuning.shift is not None or tuning.chosen or tuning.tma is False)
    # Inductor cannot launch a kernel in Gluon, and an opaque call costs more than is gained here, but in a CUDA graph.
    is_cheap = tuning.replayed or not tuning.traced
    is_long = batch * arguments["num_heads"] * q_len * kv_len >= MIN_SCORES
    return tile if is_free and is_cheap and is_long and _box_numbers(tile, page, width) >= MIN_BOX_NUMBERS else None


def _tile(
    batch: int, kv_heads: int, rows: int, width: int, kv_len: int, page: int, num_splits: int | None,
    splits: Callable[[int], int],
) -> Tile:  # fmt: skip
    """The tile with as many heads as there are programs enough for; with a given `num_splits` as many as fit.

    Args:
        batch, kv_heads, rows, width, kv_len, page: B, K, rows of one key/value head, D, N, keys of a page.
        num_splits, splits: As of `choose`.
    """

    def with_heads(heads: int) -> Tile:
        in_tile = max(FEW_ROWS, configs.power_of_two(heads * rows))
        block_n, stages = STAGED[width, in_tile]
        shares = num_splits or min(splits(batch * kv_heads // heads), -(-kv_len * heads // block_n))
        return Tile(block_n, stages, in_tile, heads, shares)

    alone = with_heads(1)
    together = [
        with_heads(heads)
        for heads in (8, 4, 2)
        if kv_heads % heads == 0 and heads * rows <= FEW_ROWS and heads * width <= MOST_NUMBERS
    ]
    for tile in together:
        # A second kernel to add up shares costs more than is gained, but where it is there already.
        shared = alone.num_splits > 1 and kv_len // tile.num_splits >= MIN_SHARED_KEYS
        if num_splits or tile.num_splits == 1 or shared:
            return tile
    by_heads = (alone, *reversed(together))
    return next((tile for tile in by_heads if _box_numbers(tile, page, width) >= MIN_BOX_NUMBERS), alone)


def _box_numbers(tile: Tile, page: int, width: int) -> int:
    return _box(tile, page) * tile.heads * width


def _box(tile: Tile, page: int) -> int:
    return math.gcd(page, tile.block_n // tile.heads)


def launch(tile: Tile, num_units: int, arguments: dict[str, Any]) -> Launch:
    """The launch that takes the place of attention_forward_kernel's, with these arguments.

    Args:
        tile: From `choose`.
        num_units: Multiprocessors of the device.
    """
    # Here, since Gluon is experimental, and only Hopper needs it.
    from .decode_hopper_pages import decode_hopper_pages_kernel

    pack = arguments["PACK"] * tile.heads
    num_tiles = arguments["num_heads"] // pack
    num_items = arguments["batch_size"] * num_tiles * tile.num_splits
    box = _box(tile, arguments["PAGE"])
    given = {
        **arguments, "BLOCK_N": tile.block_n, "STAGES": tile.stages, "ROWS": tile.rows, "HEADS": tile.heads,
        "PACK": pack, "BOX": box, "num_tiles": num_tiles, "num_items": num_items,
        "num_programs": min(num_items, num_units),
        **{name: swizzled(arguments[name], box, arguments["HEAD_DIM"], tile.heads) for name in ("k", "v")},
    }  # fmt: skip
    names = [parameter.name for parameter in decode_hopper_pages_kernel.params]
    options = {"num_warps": 4, "num_stages": 1}
    return Launch(decode_hopper_pages_kernel, given["num_programs"], {name: given[name] for name in names}, options)
