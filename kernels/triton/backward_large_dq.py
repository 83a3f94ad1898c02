"""dq of large heads for Hopper: the product of ds, which backward_large.py has left in memory, and the keys."""

import triton
import triton.language as tl

from .common import deal_programs
from .mask_ranges import load_range
from .tiles import store_tile

KEYS = tl.constexpr(64)
TILE_M = tl.constexpr(128)
"""As in backward_large.py."""


@triton.jit
def key_range(q_first, kv_len, band_lower, band_upper, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr):
    """The blocks of keys `[begin, end)` that one of the 128 queries from `q_first` on sees, were they all there."""
    lo = 0
    hi = kv_len
    if HAS_LOWER:
        lo = tl.maximum(lo, q_first + band_lower)
    if HAS_UPPER:
        hi = tl.minimum(hi, q_first + TILE_M + band_upper)
    return lo // KEYS, tl.cdiv(tl.maximum(hi, 0), KEYS)


_SIZES = [
    "num_heads", "gqa_group_size", "q_len", "kv_len", "first_head", "head_count", "heads_at_once", "first_tile",
    "last_tile", "row_tiles", "band_lower", "band_upper",
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def backward_large_dq_kernel(
    ds, k, k_rest, grad_q, grad_q_rest, ranges, stride_dqb, stride_dqh, stride_dqm, stride_dqd,
    stride_dqpb, stride_dqph, stride_dqpm,
    num_heads, gqa_group_size, q_len, kv_len, first_head, head_count, heads_at_once, first_tile, last_tile, row_tiles,
    softmax_scale, band_lower, band_upper, HEAD_DIM: tl.constexpr, ROPE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, RANGED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Write `grad_q` `(B, H, M, D)` of the query heads of `head_count` key/value heads, 128 queries a program.

    ds, k and k_rest are tensor descriptors of 64 x 128 and of 64 rows; the other arguments are as in backward_large.py.
    RANGED: the blocks of keys stand in `ranges`, see mask_ranges_kernel, of which the first kernel's table is made.
    With ROPE the second piece goes to `grad_q_rest` `(B, H, M, ROPE)`.
    """
    softmax_scale = tl.full((), softmax_scale, tl.float32)
    num_tiles = last_tile - first_tile
    num_kv_heads = num_heads // gqa_group_size
    index, rest = deal_programs(tl.program_id(0), head_count, gqa_group_size * num_tiles, heads_at_once)
    tile = rest // gqa_group_size
    if HAS_UPPER:
        tile = num_tiles - 1 - tile
    batch = (first_head + index) // num_kv_heads
    kv_head = (first_head + index) % num_kv_heads
    member = rest % gqa_group_size
    q_first = (first_tile + tile) * TILE_M
    rest_head = kv_head
    if ROPE > 0:
        rest_head = kv_head * 0
    REST_COL: tl.constexpr = 0 if ROPE > 0 else BLOCK_D
    row = ((index * gqa_group_size + member) * num_tiles + tile) * row_tiles
    if RANGED:
        begin, _full_begin, _full_end, end = load_range(ranges, batch * tl.cdiv(q_len, TILE_M) + first_tile + tile)
    else:
        begin, end = key_range(q_first, kv_len, band_lower, band_upper, HAS_LOWER, HAS_UPPER)
    acc = tl.zeros((TILE_M, BLOCK_D), tl.float32)
    if BLOCK_REST > 0:
        acc_rest = tl.zeros((TILE_M, BLOCK_REST), tl.float32)
    for block in range(begin, end):
        ds_tile = tl.trans(ds.load([(row + block % row_tiles) * KEYS, 0]))
        acc = tl.dot(ds_tile, k.load([batch, kv_head, block * KEYS, 0]).reshape(KEYS, BLOCK_D), acc)
        if BLOCK_REST > 0:
            k_rest_tile = k_rest.load([batch, rest_head, block * KEYS, REST_COL]).reshape(KEYS, BLOCK_REST)
            acc_rest = tl.dot(ds_tile, k_rest_tile, acc_rest)
    head = (kv_head * gqa_group_size + member).to(tl.int64)
    batch = batch.to(tl.int64)
    grad_q += batch * stride_dqb + head * stride_dqh
    store_tile(grad_q, acc * softmax_scale, q_first, stride_dqm, stride_dqd, q_len, 0, HEAD_DIM, TILE_M, BLOCK_D, WIDE)
    if BLOCK_REST > 0 and ROPE > 0:
        grad_q_rest += batch * stride_dqpb + head * stride_dqph
        store_tile(grad_q_rest, acc_rest * softmax_scale, q_first, stride_dqpm, 1, q_len, 0, ROPE, TILE_M, BLOCK_REST,
                   WIDE)  # fmt: skip
    elif BLOCK_REST > 0:
        store_tile(grad_q, acc_rest * softmax_scale, q_first, stride_dqm, stride_dqd, q_len, BLOCK_D, HEAD_DIM, TILE_M,
                   BLOCK_REST, False)  # fmt: skip
