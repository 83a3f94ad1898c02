"""When the ranges of blocks that a mask keeps are read from a table, and the launch that makes it."""

from __future__ import annotations

from typing import Any

import torch
import triton

from .launch import Launch, Tuning
from .mask_ranges import key_ranges_kernel, mask_ranges_kernel

MIN_SCORES = 2**26
"""From so many scores (B * H * M * N) on, padding and ids are read beforehand. Below, attention takes less than 30 us
on an H200, and a launch more, a few."""
NUMBERS_AT_ONCE = 1024
"""Rows or keys that a program reads in one go: two to eight loads a thread."""
_ARGUMENTS = (
    "key_mask", "kv_start", "kv_end", "q_ids", "kv_ids", "stride_key_b", "stride_key_n", "stride_start_b",
    "stride_start_m", "stride_end_b", "stride_end_m", "stride_qid_b", "stride_qid_m", "stride_kid_b", "stride_kid_n",
    "q_len", "kv_len", "band_lower", "band_upper", "HAS_KEY_MASK", "HAS_START", "HAS_END", "HAS_IDS", "HAS_LOWER",
    "HAS_UPPER",
)  # fmt: skip


def is_long(scores: int, tuning: Tuning) -> bool:
    """Whether a call of so many scores pays for one more launch; `tuning.ranged` overrides."""
    return scores >= MIN_SCORES if tuning.ranged is None else tuning.ranged


def is_ranged(arguments: dict[str, Any], scores: int, tuning: Tuning, by_key: bool = False) -> bool:
    """Whether a kernel reads its ranges from a table.

    Args:
        arguments: From launch.static_arguments.
        scores: B * H * M * N.
        tuning: Overrides.
        by_key: Of blocks of keys. These cannot tell by themselves which rows' limits let them in; a block of queries
            reads the limits of its own rows.
    """
    if by_key and (arguments["HAS_START"] or arguments["HAS_END"]):
        return True
    masks = arguments["HAS_KEY_MASK"] or arguments["HAS_IDS"]
    return masks and is_long(scores, tuning)


def ranges_launch(arguments: dict[str, Any], block_m: int, block_n: int, by_key: bool = False) -> Launch:
    """The launch that fills `ranges`, one of its arguments.

    Args:
        arguments: Of the kernel that reads them, with "batch_size" and the masks.
        block_m, block_n, by_key: As mask_ranges_kernel has them.
    """
    own, other = (block_n, block_m) if by_key else (block_m, block_n)
    programs = arguments["batch_size"] * triton.cdiv(arguments["kv_len" if by_key else "q_len"], own)
    masks = (arguments[name] for name in ("key_mask", "kv_start", "kv_end", "kv_ids"))
    device = next(mask.device for mask in masks if mask is not None)
    given = {name: arguments[name] for name in _ARGUMENTS}
    given["ranges"] = torch.empty((programs, 4), dtype=torch.int32, device=device)
    given.update(BLOCK_M=block_m, BLOCK_N=block_n, BLOCKS=max(1, NUMBERS_AT_ONCE // other), BY_KEY=by_key)
    return Launch(mask_ranges_kernel, programs, given, {"num_warps": 4, "num_stages": 1})


def key_ranges_launch(found: Launch) -> Launch:
    """The launch that fills `key_ranges` by blocks of keys, behind `found`, which does so by blocks of queries."""
    given = found.arguments
    row_blocks = triton.cdiv(given["q_len"], given["BLOCK_M"])
    kv_blocks = triton.cdiv(given["kv_len"], given["BLOCK_N"])
    programs = given["ranges"].shape[0] // row_blocks * kv_blocks
    arguments = {
        "ranges": given["ranges"], "key_ranges": given["ranges"].new_empty((programs, 4)),
        "num_row_blocks": row_blocks, "num_kv_blocks": kv_blocks, "BLOCKS": max(1, NUMBERS_AT_ONCE // 4),
    }  # fmt: skip
    return Launch(key_ranges_kernel, programs, arguments, {"num_warps": 4, "num_stages": 1})
