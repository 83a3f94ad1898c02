"""dq: one program owns a block of queries and walks over the keys, exactly as the forward kernel does."""

import triton
import triton.language as tl

from .backward import load_empty, load_row_statistics, tile_gradients
from .bias import BIAS_TILES, load_bias
from .common import (
    EMPTY_MEAN_ADDED,
    EMPTY_NAN_ADDED,
    NO_CAP,
    deal_programs,
    kv_block_range,
    load_alibi,
    load_key_masks,
    load_row_masks,
    narrow,
)
from .mask_ranges import load_range
from .tiles import load_head_tile, load_tile, store_tile, tile_ptrs


@triton.jit(do_not_specialize=["q_len", "kv_len", "heads_at_once", "band_lower", "band_upper"])
def backward_dq_kernel(
    q, k, v, grad_out, q_rest, k_rest, grad_q, grad_q_rest, lse, shift, delta, correction, any_empty, ranges,
    attn_bias, attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, dropout_seed, alibi_slopes,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_ve, stride_gb, stride_gh, stride_gm, stride_ge,
    stride_dqb, stride_dqh, stride_dqm, stride_dqd,
    stride_qpb, stride_qph, stride_qpm, stride_kpb, stride_kpn, stride_dqpb, stride_dqph, stride_dqpm,
    stride_bb, stride_bh, stride_bm, stride_bn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_key_b, stride_key_n, stride_start_b, stride_start_m, stride_end_b, stride_end_m,
    stride_qid_b, stride_qid_m, stride_kid_b, stride_kid_n, stride_slopes_b, stride_slopes_h,
    batch_size, num_heads, gqa_group_size, q_len, kv_len, heads_at_once,
    softmax_scale, logits_soft_cap, band_lower, band_upper, dropout_p,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, ROPE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr, TMA: tl.constexpr,
    MERGED: tl.constexpr, RANGED: tl.constexpr, ONLY_EMPTY: tl.constexpr, ROUND_BITS: tl.constexpr, BIAS: tl.constexpr,
    RAW: tl.constexpr, SOFT_CAP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ATTN_MASK: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_START: tl.constexpr,
    HAS_END: tl.constexpr, HAS_IDS: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_ALIBI: tl.constexpr, EMPTY_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `grad_q` `(B, H, M, D)`. Phases: blocks that no limit of position cuts, cut blocks, empty rows.

    TMA, RANGED and ROPE as in attention_forward_kernel; with ROPE > 0 the second piece goes to `grad_q_rest`
    `(B, H, M, ROPE)`. ONLY_EMPTY as in dk/dv.
    """
    # Inductor hands numbers over in float64, or as constants.
    softmax_scale = tl.full((), softmax_scale, tl.float32)
    if SOFT_CAP != NO_CAP:
        logits_soft_cap = tl.full((), logits_soft_cap, tl.float32)
    if HAS_DROPOUT:
        dropout_p = tl.full((), dropout_p, tl.float32)
    EMPTY_HAS_DS: tl.constexpr = (EMPTY_ROWS == EMPTY_NAN_ADDED) or (EMPTY_ROWS == EMPTY_MEAN_ADDED)
    num_row_blocks = tl.cdiv(q_len, BLOCK_M)
    pid = tl.program_id(0)
    num_kv_heads = num_heads // gqa_group_size
    kv_index, tile = deal_programs(pid, batch_size * num_kv_heads, gqa_group_size * num_row_blocks, heads_at_once)
    row_block = tile // gqa_group_size
    if HAS_UPPER:
        row_block = num_row_blocks - 1 - row_block
    batch = (kv_index // num_kv_heads).to(tl.int64)
    kv_head = (kv_index % num_kv_heads).to(tl.int64)
    head = kv_head * gqa_group_size + tile % gqa_group_size
    head_index = batch * num_heads + head
    row_base = head_index * q_len
    if ONLY_EMPTY:
        if tl.load(any_empty + head_index) == 0:
            return
    q_first = row_block * BLOCK_M
    q_last = tl.minimum(q_first + BLOCK_M, q_len) - 1
    q_first_long = q_first.to(tl.int64)
    row_store = q_first + tl.arange(0, BLOCK_M)
    row_ok = row_store < q_len
    q_pos = tl.minimum(row_store, q_len - 1)
    row_local = q_pos - q_first
    col_local = tl.arange(0, BLOCK_N)
    if WIDE:
        row_local = row_local.to(tl.int64)
        col_local = col_local.to(tl.int64)

    if not TMA:
        q += batch * stride_qb + head * stride_qh
        k += batch * stride_kb + kv_head * stride_kh
        v += batch * stride_vb + kv_head * stride_vh
        grad_out += batch * stride_gb + head * stride_gh
        if ROPE > 0:
            q_rest += batch * stride_qpb + head * stride_qph
            k_rest += batch * stride_kpb
        else:
            q_rest = q
            k_rest = k
    REST_COL: tl.constexpr = 0 if ROPE > 0 else BLOCK_D
    REST_SIZE: tl.constexpr = ROPE if ROPE > 0 else HEAD_DIM
    stride_q_rest, stride_k_rest, stride_q_rest_d, stride_k_rest_d = stride_qm, stride_kn, stride_qd, stride_kd
    rest_head = kv_head
    if ROPE > 0:
        stride_q_rest, stride_k_rest, stride_q_rest_d, stride_k_rest_d = stride_qpm, stride_kpn, 1, 1
        rest_head = kv_head * 0
    if HAS_BIAS and BIAS != BIAS_TILES:
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
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(dropout_seed)
    alibi = load_alibi(alibi_slopes, batch, head, stride_slopes_b, stride_slopes_h, HAS_ALIBI, HAS_BIAS)
    m, d, fix = load_row_statistics(shift, delta, correction, row_base + q_first, row_ok, HAS_BIAS, True, BLOCK_M)
    empty = row_ok
    if EMPTY_HAS_DS:
        empty = load_empty(lse, row_base, q_pos, row_ok) & (tl.load(any_empty + head_index) != 0)
    q_tile = load_head_tile(q, batch, head, q_first, stride_qm, stride_qd, q_len, 0, HEAD_DIM, BLOCK_M, BLOCK_D, True,
                            WIDE, TMA)  # fmt: skip
    g_tile = load_head_tile(grad_out, batch, head, q_first, stride_gm, stride_ge, q_len, 0, V_HEAD_DIM, BLOCK_M,
                            BLOCK_E, True, WIDE, TMA)  # fmt: skip
    if BLOCK_REST > 0:
        q_rest_tile = load_head_tile(q_rest, batch, head, q_first, stride_q_rest, stride_q_rest_d, q_len, REST_COL,
                                     REST_SIZE, BLOCK_M, BLOCK_REST, True, WIDE, TMA)  # fmt: skip
        acc_rest = tl.zeros((BLOCK_M, BLOCK_REST), tl.float32)
    if RANGED:
        begin, full_begin, full_end, end = load_range(ranges, batch * num_row_blocks + row_block)
    else:
        begin, full_begin, full_end, end = kv_block_range(
            q_first, q_last, kv_len, starts, ends, band_lower, band_upper, BLOCK_N, HAS_LOWER, HAS_UPPER, HAS_START,
            HAS_END,
        )  # fmt: skip

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for phase in tl.static_range(3):
        if phase == 0 and MERGED:
            first = begin
            last = end
        elif phase == 0:
            first = full_begin
            last = full_end
        elif phase == 1:
            first = begin
            last = end - (full_end - full_begin)
        else:
            first = 0
            last = 0
            if EMPTY_HAS_DS:
                last = tl.where(tl.max(tl.where(empty, 1, 0)) != 0, tl.cdiv(kv_len, BLOCK_N), 0)
        if (
            (phase == 0 and not ONLY_EMPTY)
            or (phase == 1 and not MERGED and not ONLY_EMPTY)
            or (phase == 2 and EMPTY_HAS_DS)
        ):
            for i in range(first, last):
                block = i
                if phase == 1:
                    block = tl.where(i < full_begin, i, i + (full_end - full_begin))
                cut = (block < full_begin) | (block >= full_end)
                start_n = block * BLOCK_N
                start_long = start_n.to(tl.int64)
                kv_pos = start_n + tl.arange(0, BLOCK_N)
                k_tile = load_head_tile(
                    k, batch, kv_head, start_n, stride_kn, stride_kd, kv_len, 0, HEAD_DIM, BLOCK_N, BLOCK_D,
                    MERGED or phase > 0, WIDE, TMA,
                )  # fmt: skip
                v_tile = load_head_tile(
                    v, batch, kv_head, start_n, stride_vn, stride_ve, kv_len, 0, V_HEAD_DIM, BLOCK_N, BLOCK_E,
                    MERGED or phase > 0, WIDE, TMA,
                )  # fmt: skip
                qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
                if BLOCK_REST > 0:
                    k_rest_tile = load_head_tile(
                        k_rest, batch, rest_head, start_n, stride_k_rest, stride_k_rest_d, kv_len, REST_COL, REST_SIZE,
                        BLOCK_N, BLOCK_REST, MERGED or phase > 0, WIDE, TMA,
                    )  # fmt: skip
                    qk = tl.dot(q_rest_tile, tl.trans(k_rest_tile), qk, input_precision=PRECISION)
                dp = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
                key_keep, kv_id = load_key_masks(
                    key_mask, kv_ids, stride_key_n, stride_kid_n, kv_pos, kv_len,
                    HAS_KEY_MASK and (phase > 0 or MERGED or not RANGED),
                    HAS_IDS and (phase > 0 or MERGED or not RANGED),
                )  # fmt: skip
                bias = 0.0
                mask_ptrs = attn_mask
                if HAS_BIAS:
                    bias = load_bias(
                        attn_bias, batch, head, q_first, start_n, (row_local * stride_bm)[:, None], col_local[None, :],
                        (kv_pos < kv_len)[None, :], stride_bb, stride_bh, stride_bn, BLOCK_M, BLOCK_N, BIAS, False,
                    )  # fmt: skip
                if HAS_ATTN_MASK:
                    mask_ptrs = tile_ptrs(attn_mask + start_long * stride_mn, row_local[:, None], col_local[None, :],
                                          stride_mm, stride_mn)  # fmt: skip
                _weights, _ds_bias, ds = tile_gradients(
                    qk, dp, q_pos[:, None], kv_pos[None, :], start_n, row_ok[:, None], kv_len, m[:, None], d[:, None],
                    fix[:, None], empty[:, None], starts[:, None], ends[:, None], q_id[:, None], kv_id[None, :],
                    key_keep[None, :], bias, mask_ptrs, seed, (row_base + q_pos)[:, None],
                    alibi, q_len, softmax_scale, logits_soft_cap, band_lower, band_upper, dropout_p,
                    cut, 2 if MERGED and phase == 0 else phase > 0, phase == 2, RAW, SOFT_CAP, HAS_BIAS,
                    HAS_ATTN_MASK, HAS_KEY_MASK and (phase > 0 or MERGED or not RANGED), HAS_START, HAS_END,
                    HAS_IDS and (phase > 0 or MERGED or not RANGED), HAS_LOWER, HAS_UPPER, HAS_DROPOUT,
                    HAS_ALIBI, EMPTY_ROWS,
                )  # fmt: skip
                ds = narrow(ds, k_tile.dtype, ROUND_BITS)
                acc = tl.dot(ds, k_tile, acc, input_precision=PRECISION)
                if BLOCK_REST > 0:
                    acc_rest = tl.dot(ds, k_rest_tile, acc_rest, input_precision=PRECISION)
    acc *= softmax_scale
    grad_q += batch * stride_dqb + head * stride_dqh
    if ONLY_EMPTY:
        acc += load_tile(grad_q, q_first, stride_dqm, stride_dqd, q_len, 0, HEAD_DIM, BLOCK_M, BLOCK_D, True, WIDE)
    store_tile(grad_q, acc, q_first, stride_dqm, stride_dqd, q_len, 0, HEAD_DIM, BLOCK_M, BLOCK_D, WIDE)
    if BLOCK_REST > 0:
        acc_rest *= softmax_scale
        stride_rest_m, stride_rest_d = stride_dqm, stride_dqd
        if ROPE > 0:
            grad_q = grad_q_rest + batch * stride_dqpb + head * stride_dqph
            stride_rest_m, stride_rest_d = stride_dqpm, 1
        if ONLY_EMPTY:
            acc_rest += load_tile(grad_q, q_first, stride_rest_m, stride_rest_d, q_len, REST_COL, REST_SIZE, BLOCK_M,
                                  BLOCK_REST, True, WIDE)  # fmt: skip
        store_tile(grad_q, acc_rest, q_first, stride_rest_m, stride_rest_d, q_len, REST_COL, REST_SIZE, BLOCK_M,
                   BLOCK_REST, WIDE)  # fmt: skip
