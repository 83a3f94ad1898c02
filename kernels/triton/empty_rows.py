"""The mean of all values for rows that keep no key, where eager has a uniform softmax, behind a long call's kernel.

Which rows are empty follows from masks that are the same for all heads, so that a batch entry's first head tells.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .configs import power_of_two
from .launch import MEANS, Launch, Tuning
from .mask_ranges_launch import is_long
from .sizes import Hint
from .tiles import load_tile

SCANNED, BLOCK_M, BLOCK_N = 1024, 128, 64
"""Rows of which a program asks at once whether one is empty, rows that one writes, values that one adds up at once."""
PROGRAMS, MOST_SHARES = 512, 64
"""How many programs may add up values, and how many of them those of one head."""


@triton.jit(do_not_specialize=["q_len", "kv_len"])
def values_sum_kernel(
    v, lse, sums, stride_vb, stride_vh, stride_vn, stride_ve, num_heads, gqa_group_size, q_len, kv_len,
    V_HEAD_DIM: tl.constexpr, BLOCK_E: tl.constexpr, SCANNED: tl.constexpr, BLOCK_N: tl.constexpr,
    SHARES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the sums of SHARES shares of the values to `sums` `(B * K * SHARES, BLOCK_E)`, float32.

    NaN, and nothing read, where `lse` `(B, H, M)` says that no row is empty: nobody should read it then.
    """
    pid = tl.program_id(0)
    share = pid % SHARES
    num_kv_heads = num_heads // gqa_group_size
    batch = (pid // SHARES // num_kv_heads).to(tl.int64)
    kv_head = (pid // SHARES % num_kv_heads).to(tl.int64)
    lse += batch * num_heads * q_len
    some = tl.zeros((SCANNED,), tl.int32)
    for start_m in range(0, q_len, SCANNED):
        row = start_m + tl.arange(0, SCANNED)
        some |= (tl.load(lse + row, mask=row < q_len, other=0.0) == float("-inf")).to(tl.int32)
    total = tl.full((BLOCK_E,), float("nan"), tl.float32)
    if tl.max(some, 0) != 0:
        v += batch * stride_vb + kv_head * stride_vh
        step = tl.cdiv(kv_len, SHARES)
        first = share * step
        end = tl.minimum(first + step, kv_len)
        # By element: to add up rows for each tile would wait for all threads each time.
        parts = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        for done in range(0, step, BLOCK_N):
            tile = load_tile(v, first + done, stride_vn, stride_ve, end, 0, V_HEAD_DIM, BLOCK_N, BLOCK_E, True, WIDE)
            parts += tile.to(tl.float32)
        total = tl.sum(parts, 0)
    tl.store(sums + pid.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E), total)


@triton.jit(do_not_specialize=["q_len", "kv_len"])
def empty_rows_kernel(
    sums, out, lse, stride_ob, stride_oh, stride_om, stride_oe, num_heads, gqa_group_size, q_len, kv_len,
    V_HEAD_DIM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Write to the rows of `out` `(B, H, M, E)` with an `lse` of -inf the mean of the values; `sums` as above."""
    pid = tl.program_id(0)
    row_blocks = tl.cdiv(q_len, BLOCK_M)
    head_index = pid // row_blocks
    batch = (head_index // num_heads).to(tl.int64)
    head = (head_index % num_heads).to(tl.int64)
    row = pid % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    is_empty = tl.load(lse + head_index.to(tl.int64) * q_len + row, mask=row < q_len, other=0.0) == float("-inf")
    if tl.max(tl.where(is_empty, 1, 0)) != 0:
        column = tl.arange(0, BLOCK_E)
        # Of the group's key/value head; heads of a group are neighbours.
        first = head_index.to(tl.int64) // gqa_group_size * SHARES
        shares = tl.load(sums + (first + tl.arange(0, SHARES))[:, None] * BLOCK_E + column[None, :])
        mean = (tl.sum(shares, 0) / kv_len).to(out.dtype.element_ty)
        out += batch * stride_ob + head * stride_oh
        pointers = out + (row.to(tl.int64) * stride_om)[:, None] + (column * stride_oe)[None, :]
        keep = is_empty[:, None] & (column < V_HEAD_DIM)[None, :]
        tl.store(pointers, tl.broadcast_to(mean[None, :], (BLOCK_M, BLOCK_E)), mask=keep)


_SHARED = ("num_heads", "gqa_group_size", "q_len", "kv_len", "V_HEAD_DIM", "BLOCK_E")
_OF_VALUES = ("stride_vb", "stride_vh", "stride_vn", "stride_ve", "WIDE", *_SHARED)
_OF_RESULT = ("stride_ob", "stride_oh", "stride_om", "stride_oe", *_SHARED)


def means_apart(arguments: dict[str, Any], empty_rows: int, scores: int, tuning: Tuning) -> bool:
    """Whether the forward kernel had better leave the means of empty rows to kernels of their own.

    It would read all values again for each of its tiles that has such a row: with padding on the left, which is how
    prompts of unequal length come, a quarter of the tiles may have nothing else.

    Args:
        arguments: From launch.static_arguments: long calls with a mask by position, padding or ids.
        empty_rows: The kernel's EMPTY_ROWS.
        scores: B * H * M * N.
        tuning: Overrides.
    """
    masks = ("HAS_KEY_MASK", "HAS_IDS", "HAS_START", "HAS_END")
    # These may differ from head to head; and dropout takes part in the mean.
    others = ("HAS_ATTN_MASK", "HAS_BIAS", "HAS_DROPOUT")
    fits = any(arguments[name] for name in masks) and not any(arguments[name] for name in others)
    return empty_rows in MEANS and fits and is_long(scores, tuning)


def mean_launches(arguments: dict[str, Any], tensors: dict[str, Any], hint: Hint = int) -> list[Launch]:
    """The launches that write the means, behind that of the forward kernel.

    Args:
        arguments: Those of attention_forward_kernel, as planned.
        tensors: v, out and lse.
        hint: As Tuning.hint.
    """
    v, out, lse = (tensors[name] for name in ("v", "out", "lse"))
    heads = v.shape[0] * v.shape[1]
    shares = max(1, min(power_of_two(PROGRAMS // hint(heads) + 1) // 2, MOST_SHARES))
    sums = torch.empty((heads * shares, arguments["BLOCK_E"]), dtype=torch.float32, device=out.device)
    first = {name: arguments[name] for name in _OF_VALUES} | {"v": v, "lse": lse, "sums": sums}
    first.update(SHARES=shares, SCANNED=SCANNED, BLOCK_N=BLOCK_N)
    second = {name: arguments[name] for name in _OF_RESULT} | {"sums": sums, "out": out, "lse": lse}
    second.update(SHARES=shares, BLOCK_M=BLOCK_M)
    rows = lse.shape[0] * lse.shape[1] * triton.cdiv(arguments["q_len"], BLOCK_M)
    return [
        Launch(values_sum_kernel, heads * shares, first, {"num_warps": 4, "num_stages": 2}),
        Launch(empty_rows_kernel, rows, second, {"num_warps": 4, "num_stages": 1}),
    ]
