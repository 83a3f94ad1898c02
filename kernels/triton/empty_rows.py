"""The mean of all values for rows that keep no key, where eager has a uniform softmax."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .launch import Launch
from .tiles import load_tile

BLOCK_M, BLOCK_N = 128, 64


@triton.jit(do_not_specialize=["q_len", "kv_len"])
def empty_rows_kernel(
    v, out, lse, stride_vb, stride_vh, stride_vn, stride_ve, stride_ob, stride_oh, stride_om, stride_oe,
    num_heads, gqa_group_size, q_len, kv_len,
    V_HEAD_DIM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write to the rows of `out` `(B, H, M, E)` with an `lse` `(B, H, M)` of -inf the mean of `v` `(B, K, N, E)`."""
    pid = tl.program_id(0)
    row_blocks = tl.cdiv(q_len, BLOCK_M)
    head_index = pid // row_blocks
    batch = (head_index // num_heads).to(tl.int64)
    head = (head_index % num_heads).to(tl.int64)
    row = pid % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    is_empty = tl.load(lse + head_index.to(tl.int64) * q_len + row, mask=row < q_len, other=0.0) == float("-inf")
    if tl.max(tl.where(is_empty, 1, 0)) != 0:
        v += batch * stride_vb + head // gqa_group_size * stride_vh
        total = tl.zeros((BLOCK_E,), tl.float32)
        for start_n in range(0, kv_len, BLOCK_N):
            tile = load_tile(v, start_n, stride_vn, stride_ve, kv_len, 0, V_HEAD_DIM, BLOCK_N, BLOCK_E, True, WIDE)
            total += tl.sum(tile.to(tl.float32), 0)
        mean = (total / kv_len).to(out.dtype.element_ty)
        column = tl.arange(0, BLOCK_E)
        out += batch * stride_ob + head * stride_oh
        pointers = out + (row.to(tl.int64) * stride_om)[:, None] + (column * stride_oe)[None, :]
        keep = is_empty[:, None] & (column < V_HEAD_DIM)[None, :]
        tl.store(pointers, tl.broadcast_to(mean[None, :], (BLOCK_M, BLOCK_E)), mask=keep)


_ARGUMENTS = (
    "stride_vb", "stride_vh", "stride_vn", "stride_ve", "stride_ob", "stride_oh", "stride_om", "stride_oe",
    "num_heads", "gqa_group_size", "q_len", "kv_len", "V_HEAD_DIM", "BLOCK_E", "WIDE",
)  # fmt: skip


def empty_rows_launch(arguments: dict[str, Any], tensors: dict[str, Any]) -> Launch:
    """The launch, given those arguments of the forward kernel that are not tensors, and v, out and lse."""
    given = {name: arguments[name] for name in _ARGUMENTS} | {name: tensors[name] for name in ("v", "out", "lse")}
    programs = tensors["lse"].shape[0] * tensors["lse"].shape[1] * triton.cdiv(arguments["q_len"], BLOCK_M)
    return Launch(
        empty_rows_kernel,
        programs,
        {**given, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N},
        {"num_warps": 4, "num_stages": 2},
    )
