"""The softmax weights, written once, from q, k and the lse that the forward kernel left.

    p = exp(scores - lse)        0 where a mask drops the pair; rows without a key: 0, NaN or 1/N, as the mode says

One program owns a block of queries and walks over a range of the blocks of keys. Blocks that the limits of position
leave out of the mask's range are stored without a product. Nothing of size q_len x kv_len is read but a bias or a mask
that is a tensor, and nothing is written but the weights: the time that this must take is that of writing them.
"""

import triton
import triton.language as tl

from .bias import BIAS_ELEMENTS, load_bias
from .common import (
    EMPTY_MEAN,
    EMPTY_MEAN_ADDED,
    EMPTY_NAN,
    EMPTY_NAN_ADDED,
    LOG2E,
    NO_CAP,
    add_alibi,
    deal_programs,
    exponent,
    kv_block_range,
    load_alibi,
    load_key_masks,
    load_row_masks,
    mask_scores,
    score_factor,
    score_offset,
    score_tile,
)
from .tiles import load_head_tile, load_tile, q_k_product, tile_ptrs


@triton.jit
def masked_scores(
    q_tile, q_rest_tile, k, batch, head, kv_head, block, q_first, q_pos, row_local, starts, ends, q_id, alibi,
    attn_bias, attn_mask, key_mask, kv_ids, stride_kn, stride_kd, stride_bb, stride_bh, stride_bm, stride_bn,
    stride_mm, stride_mn, stride_key_n, stride_kid_n, q_len, kv_len, softmax_scale, logits_soft_cap, band_lower,
    band_upper, cut, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDE: tl.constexpr, RAW: tl.constexpr, SOFT_CAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ATTN_MASK: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, HAS_ALIBI: tl.constexpr,
    TRANSPOSE_KEYS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores of one tile, -inf where a mask drops the pair. The pointers are at the head, or at the first query."""
    start_n = block * BLOCK_N
    kv_pos = start_n + tl.arange(0, BLOCK_N)
    col_local = tl.arange(0, BLOCK_N)
    if WIDE:
        col_local = col_local.to(tl.int64)
    ok = (kv_pos < kv_len)[None, :]
    qk = q_k_product(
        q_tile, q_rest_tile, k, k, batch, kv_head, kv_head, start_n, stride_kn, stride_kd, stride_kn, stride_kd, kv_len,
        HEAD_DIM, BLOCK_D, HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_REST, True, WIDE, TMA, TRANSPOSE_KEYS, PRECISION,
    )  # fmt: skip
    bias = 0.0
    if HAS_BIAS:
        bias = load_bias(
            attn_bias, batch, head, q_first, start_n, (row_local * stride_bm)[:, None], col_local[None, :], ok,
            stride_bb, stride_bh, stride_bn, BLOCK_M, BLOCK_N, BIAS_ELEMENTS, False,
        )  # fmt: skip
    mask_keep = 0
    if HAS_ATTN_MASK:
        mask_ptrs = tile_ptrs(attn_mask + start_n.to(tl.int64) * stride_mn, row_local[:, None], col_local[None, :],
                              stride_mm, stride_mn)  # fmt: skip
        mask_keep = tl.load(mask_ptrs, mask=ok, other=0) != 0
    key_keep, kv_id = load_key_masks(
        key_mask, kv_ids, stride_key_n, stride_kid_n, kv_pos, kv_len, HAS_KEY_MASK, HAS_IDS
    )
    s, _slope = score_tile(qk, softmax_scale, logits_soft_cap, bias, RAW, SOFT_CAP, HAS_BIAS)
    s = add_alibi(s, alibi, q_pos[:, None], kv_pos[None, :], start_n, q_len, kv_len, HAS_ALIBI)
    return mask_scores(
        s, q_pos[:, None], kv_pos[None, :], kv_len, starts[:, None], ends[:, None], q_id[:, None], kv_id[None, :],
        key_keep[None, :], mask_keep, band_lower, band_upper, cut, 2, HAS_LOWER, HAS_UPPER, HAS_START, HAS_END,
        HAS_IDS, HAS_KEY_MASK, HAS_ATTN_MASK,
    )  # fmt: skip


@triton.jit
def store_weights(weights, tile, q_first, block, q_len, stride_wm, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  WIDE: tl.constexpr):  # fmt: skip
    """Store a tile; `stride_wm`, the number of keys, says by its type whether rows start at multiples of 16."""
    rows = tl.arange(0, BLOCK_M)
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = (q_first + rows < q_len)[:, None] & (keys < stride_wm)[None, :]
    if WIDE:
        rows = rows.to(tl.int64)
    ptrs = weights + q_first.to(tl.int64) * stride_wm + rows[:, None] * stride_wm + keys[None, :]
    tl.store(ptrs, tile.to(weights.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["q_len", "kv_len", "heads_at_once", "blocks_each", "band_lower", "band_upper"])
def attention_weights_kernel(
    q, k, lse, weights, attn_bias, attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, sinks, alibi_slopes,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_bb, stride_bh, stride_bm, stride_bn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_key_b, stride_key_n, stride_start_b, stride_start_m, stride_end_b, stride_end_m,
    stride_qid_b, stride_qid_m, stride_kid_b, stride_kid_n, stride_slopes_b, stride_slopes_h, stride_wm,
    batch_size, num_heads, gqa_group_size, q_len, kv_len, heads_at_once, blocks_each,
    softmax_scale, logits_soft_cap, band_lower, band_upper,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDE: tl.constexpr, RAW: tl.constexpr, SOFT_CAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ATTN_MASK: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, EMPTY_ROWS: tl.constexpr, TRANSPOSE_KEYS: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `weights` `(B, H, M, N)`, contiguous: `stride_wm` is kv_len.

    A program takes `blocks_each` of the blocks of keys of a tile of queries. With TMA (never with a second piece of the
    head dimension) q and k are tensor descriptors.

    With a bias or ALiBi a whole row may have scores so large (-1e9, finfo.min) that lse, one float32, has lost
    log(number of keys), and exp(s - lse) sums to N: such rows are summed up here first, and divided by that.
    """
    # Inductor hands numbers over in float64, or as constants.
    softmax_scale = tl.full((), softmax_scale, tl.float32)
    if SOFT_CAP != NO_CAP:
        logits_soft_cap = tl.full((), logits_soft_cap, tl.float32)
    num_row_blocks = tl.cdiv(q_len, BLOCK_M)
    num_blocks = tl.cdiv(kv_len, BLOCK_N)
    num_ranges = tl.cdiv(num_blocks, blocks_each)
    pid = tl.program_id(0)
    num_kv_heads = num_heads // gqa_group_size
    kv_index, tile = deal_programs(
        pid, batch_size * num_kv_heads, gqa_group_size * num_row_blocks * num_ranges, heads_at_once
    )
    first = tile % num_ranges * blocks_each
    last = tl.minimum(first + blocks_each, num_blocks)
    tile = tile // num_ranges
    row_block = tile // gqa_group_size
    if HAS_UPPER:
        row_block = num_row_blocks - 1 - row_block
    batch = (kv_index // num_kv_heads).to(tl.int64)
    kv_head = (kv_index % num_kv_heads).to(tl.int64)
    head = kv_head * gqa_group_size + tile % gqa_group_size
    row_base = (batch * num_heads + head) * q_len
    q_first = row_block * BLOCK_M
    q_last = tl.minimum(q_first + BLOCK_M, q_len) - 1
    q_first_long = q_first.to(tl.int64)
    row_store = q_first + tl.arange(0, BLOCK_M)
    q_pos = tl.minimum(row_store, q_len - 1)
    row_local = q_pos - q_first
    if WIDE:
        row_local = row_local.to(tl.int64)

    if not TMA:
        q += batch * stride_qb + head * stride_qh
        k += batch * stride_kb + kv_head * stride_kh
    weights += row_base * stride_wm
    if HAS_BIAS:
        attn_bias += batch * stride_bb + head * stride_bh + q_first_long * stride_bm
    if HAS_ATTN_MASK:
        attn_mask += batch * stride_mb + head * stride_mh + q_first_long * stride_mm
    if HAS_START:
        kv_start += batch * stride_start_b
    if HAS_END:
        kv_end += batch * stride_end_b
    if HAS_IDS:
        q_ids += batch * stride_qid_b
        kv_ids += batch * stride_kid_b
    if HAS_KEY_MASK:
        key_mask += batch * stride_key_b
    starts, ends, q_id = load_row_masks(
        kv_start, kv_end, q_ids, stride_start_m, stride_end_m, stride_qid_m, q_pos, kv_len, HAS_START, HAS_END, HAS_IDS
    )
    alibi = load_alibi(alibi_slopes, batch, head, stride_slopes_b, stride_slopes_h, HAS_ALIBI, HAS_BIAS)
    row_lse = tl.load(lse + row_base + q_pos)
    empty = row_lse == float("-inf")
    m = tl.where(empty, float("inf"), row_lse)
    if not HAS_BIAS:
        m = m * LOG2E - score_offset(logits_soft_cap, SOFT_CAP, HAS_BIAS)
    fill = tl.zeros((BLOCK_M,), tl.float32)
    if EMPTY_ROWS == EMPTY_NAN or EMPTY_ROWS == EMPTY_NAN_ADDED:
        fill = tl.where(empty, float("nan"), 0.0)
    if EMPTY_ROWS == EMPTY_MEAN or EMPTY_ROWS == EMPTY_MEAN_ADDED:
        fill = tl.where(empty, 1.0 / kv_len, 0.0)
    q_tile = load_head_tile(q, batch, head, q_first, stride_qm, stride_qd, q_len, 0, HEAD_DIM, BLOCK_M, BLOCK_D, True,
                            WIDE, TMA)  # fmt: skip
    q_rest_tile = 0
    if BLOCK_REST > 0:
        q_rest_tile = load_tile(
            q, q_first, stride_qm, stride_qd, q_len, BLOCK_D, HEAD_DIM, BLOCK_M, BLOCK_REST, True, WIDE
        )  # fmt: skip
    begin, full_begin, full_end, end = kv_block_range(
        q_first, q_last, kv_len, starts, ends, band_lower, band_upper, BLOCK_N, HAS_LOWER, HAS_UPPER, HAS_START, HAS_END
    )
    end = tl.minimum(end, num_blocks)
    factor = score_factor(softmax_scale, logits_soft_cap, SOFT_CAP) * LOG2E

    share = tl.full((BLOCK_M,), 1.0, tl.float32)
    if HAS_BIAS or HAS_ALIBI:
        inexact = (tl.abs(row_lse) > 256.0) & (tl.abs(row_lse) < float("inf"))
        if tl.max(tl.where(inexact, 1, 0)) != 0:
            total = tl.zeros((BLOCK_M,), tl.float32)
            for block in range(begin, end):
                s = masked_scores(
                    q_tile, q_rest_tile, k, batch, head, kv_head, block, q_first, q_pos, row_local, starts, ends, q_id,
                    alibi, attn_bias, attn_mask, key_mask, kv_ids, stride_kn, stride_kd, stride_bb, stride_bh,
                    stride_bm, stride_bn, stride_mm, stride_mn, stride_key_n, stride_kid_n, q_len, kv_len,
                    softmax_scale, logits_soft_cap, band_lower, band_upper, True, HEAD_DIM, BLOCK_D, BLOCK_REST,
                    BLOCK_M, BLOCK_N, WIDE, RAW, SOFT_CAP, HAS_BIAS, HAS_ATTN_MASK, HAS_KEY_MASK, HAS_START, HAS_END,
                    HAS_IDS, HAS_LOWER, HAS_UPPER, HAS_ALIBI, TRANSPOSE_KEYS, TMA, PRECISION,
                )  # fmt: skip
                total += tl.sum(tl.exp2(exponent(s, m[:, None], factor, RAW, HAS_BIAS)), 1)
            if HAS_SINKS:
                total += tl.exp2((tl.load(sinks + head).to(tl.float32) - row_lse) * LOG2E)
            share = tl.where(inexact & (total > 0.0), 1.0 / total, 1.0)

    blank = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + fill[:, None]
    for block in range(first, tl.minimum(begin, last)):
        store_weights(weights, blank, q_first, block, q_len, stride_wm, BLOCK_M, BLOCK_N, WIDE)
    for block in range(tl.maximum(first, begin), tl.minimum(end, last)):
        cut = (block < full_begin) | (block >= full_end)
        s = masked_scores(
            q_tile, q_rest_tile, k, batch, head, kv_head, block, q_first, q_pos, row_local, starts, ends, q_id, alibi,
            attn_bias, attn_mask, key_mask, kv_ids, stride_kn, stride_kd, stride_bb, stride_bh, stride_bm, stride_bn,
            stride_mm, stride_mn, stride_key_n, stride_kid_n, q_len, kv_len, softmax_scale, logits_soft_cap,
            band_lower, band_upper, cut, HEAD_DIM, BLOCK_D, BLOCK_REST, BLOCK_M, BLOCK_N, WIDE, RAW, SOFT_CAP, HAS_BIAS,
            HAS_ATTN_MASK, HAS_KEY_MASK, HAS_START, HAS_END, HAS_IDS, HAS_LOWER, HAS_UPPER, HAS_ALIBI, TRANSPOSE_KEYS,
            TMA, PRECISION,
        )  # fmt: skip
        p = tl.exp2(exponent(s, m[:, None], factor, RAW, HAS_BIAS))
        if HAS_BIAS or HAS_ALIBI:
            p *= share[:, None]
        p += fill[:, None]
        store_weights(weights, p, q_first, block, q_len, stride_wm, BLOCK_M, BLOCK_N, WIDE)
    for block in range(tl.maximum(first, end), last):
        store_weights(weights, blank, q_first, block, q_len, stride_wm, BLOCK_M, BLOCK_N, WIDE)
