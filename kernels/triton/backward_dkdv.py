"""dk and dv: one program owns a block of keys of one key/value head and walks over the queries of its whole group.

Tiles are transposed, (key, query), so that the weights are at once the left operand of `dv = p^T grad_out`. Looping
over the group inside one program keeps grouped-query attention free of atomics and of copies of K and V.
"""

import triton
import triton.language as tl

from .backward import load_empty, load_row_statistics, tile_gradients
from .bias import BIAS_TILES, load_bias
from .common import (
    EMPTY_MEAN_ADDED,
    EMPTY_NAN_ADDED,
    EMPTY_ZERO,
    NO_CAP,
    deal_programs,
    load_alibi,
    load_key_masks,
    load_row_masks,
    narrow,
)
from .mask_ranges import load_range, q_block_range
from .tiles import load_head_tile, load_tile, store_tile, tile_ptrs


@triton.jit(do_not_specialize=["q_len", "kv_len", "heads_at_once", "band_lower", "band_upper"])
def backward_dkdv_kernel(
    q, k, v, grad_out, q_rest, k_rest, grad_k, grad_v, grad_k_rest, lse, shift, delta, correction, any_empty, ranges,
    attn_bias, attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, dropout_seed, alibi_slopes,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_ve, stride_gb, stride_gh, stride_gm, stride_ge,
    stride_dkb, stride_dkh, stride_dkn, stride_dkd, stride_dvb, stride_dvh, stride_dvn, stride_dve,
    stride_qpb, stride_qph, stride_qpm, stride_kpb, stride_kpn, stride_dkpb, stride_dkph, stride_dkpn,
    stride_bb, stride_bh, stride_bm, stride_bn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_key_b, stride_key_n, stride_start_b, stride_start_m, stride_end_b, stride_end_m,
    stride_qid_b, stride_qid_m, stride_kid_b, stride_kid_n, stride_slopes_b, stride_slopes_h,
    batch_size, num_heads, gqa_group_size, q_len, kv_len, heads_at_once,
    softmax_scale, logits_soft_cap, band_lower, band_upper, dropout_p,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, ROPE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr, TMA: tl.constexpr,
    MERGED: tl.constexpr, RANGED: tl.constexpr, ONLY_EMPTY: tl.constexpr,
    WANT_DK: tl.constexpr, WANT_DV: tl.constexpr, ROUND_BITS: tl.constexpr, BIAS: tl.constexpr,
    RAW: tl.constexpr, SOFT_CAP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ATTN_MASK: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_START: tl.constexpr,
    HAS_END: tl.constexpr, HAS_IDS: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_ALIBI: tl.constexpr, EMPTY_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `grad_k` `(B, K, N, D)` (WANT_DK) and `grad_v` `(B, K, N, E)` (WANT_DV). Phases and TMA as in dq.

    With RANGED, which must be where rows have limits, the queries to walk over are read from `ranges`, see mask_ranges.

    ONLY_EMPTY: add to what is there what rows without a key give, and nothing else.

    With ROPE > 0, the part of every head in the gradient of the shared piece goes to `grad_k_rest` `(B, K, N, ROPE)`.
    """
    # Inductor hands numbers over in float64, or as constants.
    softmax_scale = tl.full((), softmax_scale, tl.float32)
    if SOFT_CAP != NO_CAP:
        logits_soft_cap = tl.full((), logits_soft_cap, tl.float32)
    if HAS_DROPOUT:
        dropout_p = tl.full((), dropout_p, tl.float32)
    EMPTY_MATTERS: tl.constexpr = EMPTY_ROWS != EMPTY_ZERO
    EMPTY_HAS_DS: tl.constexpr = (EMPTY_ROWS == EMPTY_NAN_ADDED) or (EMPTY_ROWS == EMPTY_MEAN_ADDED)
    num_kv_blocks = tl.cdiv(kv_len, BLOCK_N)
    num_row_blocks = tl.cdiv(q_len, BLOCK_M)
    num_kv_heads = num_heads // gqa_group_size
    pid = tl.program_id(0)
    kv_head_index, kv_block = deal_programs(pid, batch_size * num_kv_heads, num_kv_blocks, heads_at_once)
    batch = (kv_head_index // num_kv_heads).to(tl.int64)
    kv_head = (kv_head_index % num_kv_heads).to(tl.int64)
    seen = 0
    if EMPTY_MATTERS:
        for member in range(gqa_group_size):
            seen |= tl.load(any_empty + batch * num_heads + kv_head * gqa_group_size + member)
    if ONLY_EMPTY:
        if seen == 0:
            return
    n_first = kv_block * BLOCK_N
    n_last = tl.minimum(n_first + BLOCK_N, kv_len) - 1
    n_first_long = n_first.to(tl.int64)
    kv_pos = n_first + tl.arange(0, BLOCK_N)
    col_local = tl.arange(0, BLOCK_N)
    if WIDE:
        col_local = col_local.to(tl.int64)

    if not TMA:
        k += batch * stride_kb + kv_head * stride_kh
        v += batch * stride_vb + kv_head * stride_vh
        q += batch * stride_qb
        grad_out += batch * stride_gb
        if ROPE > 0:
            k_rest += batch * stride_kpb
            q_rest += batch * stride_qpb
        else:
            k_rest = k
    REST_COL: tl.constexpr = 0 if ROPE > 0 else BLOCK_D
    REST_SIZE: tl.constexpr = ROPE if ROPE > 0 else HEAD_DIM
    stride_q_rest, stride_k_rest, stride_q_rest_d, stride_k_rest_d = stride_qm, stride_kn, stride_qd, stride_kd
    rest_head = kv_head
    if ROPE > 0:
        stride_q_rest, stride_k_rest, stride_q_rest_d, stride_k_rest_d = stride_qpm, stride_kpn, 1, 1
        rest_head = kv_head * 0
    if HAS_BIAS and BIAS != BIAS_TILES:
        attn_bias += batch * stride_bb
    if HAS_ATTN_MASK:
        attn_mask += batch * stride_mb + n_first_long * stride_mn
    if HAS_START:
        kv_start += batch * stride_start_b
    if HAS_END:
        kv_end += batch * stride_end_b
    if HAS_IDS:
        q_ids += batch * stride_qid_b
        kv_ids += batch * stride_kid_b
    if HAS_KEY_MASK:
        key_mask += batch * stride_key_b
    key_keep, kv_id = load_key_masks(
        key_mask, kv_ids, stride_key_n, stride_kid_n, kv_pos, kv_len, HAS_KEY_MASK, HAS_IDS
    )
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(dropout_seed)
    k_tile = load_head_tile(k, batch, kv_head, n_first, stride_kn, stride_kd, kv_len, 0, HEAD_DIM, BLOCK_N, BLOCK_D,
                            True, WIDE, TMA)  # fmt: skip
    v_tile = load_head_tile(v, batch, kv_head, n_first, stride_vn, stride_ve, kv_len, 0, V_HEAD_DIM, BLOCK_N, BLOCK_E,
                            True, WIDE, TMA)  # fmt: skip
    if BLOCK_REST > 0:
        k_rest_tile = load_head_tile(k_rest, batch, rest_head, n_first, stride_k_rest, stride_k_rest_d, kv_len,
                                     REST_COL, REST_SIZE, BLOCK_N, BLOCK_REST, True, WIDE, TMA)  # fmt: skip
        dk_rest = tl.zeros((BLOCK_N, BLOCK_REST), tl.float32)
    if RANGED:
        begin, full_begin, full_end, end = load_range(ranges, batch * num_kv_blocks + kv_block)
    else:
        begin, full_begin, full_end, end = q_block_range(
            n_first, n_last, q_len, band_lower, band_upper, BLOCK_M, HAS_LOWER, HAS_UPPER
        )

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for phase in tl.static_range(3):
        if phase == 0 and MERGED:
            first = begin
            count = end - begin
        elif phase == 0:
            first = full_begin
            count = full_end - full_begin
        elif phase == 1:
            first = begin
            count = (end - begin) - (full_end - full_begin)
        else:
            first = 0
            count = tl.where(seen != 0, num_row_blocks, 0)
        if (
            (phase == 0 and not ONLY_EMPTY)
            or (phase == 1 and not MERGED and not ONLY_EMPTY)
            or (phase == 2 and EMPTY_MATTERS)
        ):
            head = kv_head * gqa_group_size
            at = first
            for _ in range(count * gqa_group_size):
                block = at
                if phase == 1:
                    block = tl.where(at < full_begin, at, at + (full_end - full_begin))
                cut = (block < full_begin) | (block >= full_end)
                q_first = block * BLOCK_M
                row_base = (batch * num_heads + head) * q_len
                row_store = q_first + tl.arange(0, BLOCK_M)
                row_ok = row_store < q_len
                q_pos = tl.minimum(row_store, q_len - 1)
                starts, ends, q_id = load_row_masks(
                    kv_start, kv_end, q_ids, stride_start_m, stride_end_m, stride_qid_m, q_pos, kv_len,
                    HAS_START, HAS_END, HAS_IDS,
                )  # fmt: skip
                visit = True
                empty = row_ok
                if phase == 2:
                    visit = tl.load(any_empty + batch * num_heads + head) != 0
                    if visit:
                        empty = load_empty(lse, row_base, q_pos, row_ok)
                        visit = tl.max(tl.where(empty, 1, 0)) != 0
                if visit:
                    m, d, fix = load_row_statistics(
                        shift, delta, correction, row_base + q_first, row_ok, HAS_BIAS, MERGED or phase > 0, BLOCK_M
                    )
                    alibi = load_alibi(alibi_slopes, batch, head, stride_slopes_b, stride_slopes_h, HAS_ALIBI, HAS_BIAS)
                    q_head = q
                    g_head = grad_out
                    q_rest_head = q_rest
                    if not TMA:
                        q_head = q + head * stride_qh
                        g_head = grad_out + head * stride_gh
                        if ROPE > 0:
                            q_rest_head = q_rest + head * stride_qph
                        else:
                            q_rest_head = q_head
                    q_tile = load_head_tile(
                        q_head, batch, head, q_first, stride_qm, stride_qd, q_len, 0, HEAD_DIM, BLOCK_M, BLOCK_D,
                        MERGED or phase > 0, WIDE, TMA,
                    )  # fmt: skip
                    g_tile = load_head_tile(
                        g_head, batch, head, q_first, stride_gm, stride_ge, q_len, 0, V_HEAD_DIM, BLOCK_M, BLOCK_E,
                        MERGED or phase > 0, WIDE, TMA,
                    )  # fmt: skip
                    qk = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
                    if BLOCK_REST > 0:
                        q_rest_tile = load_head_tile(
                            q_rest_head, batch, head, q_first, stride_q_rest, stride_q_rest_d, q_len, REST_COL,
                            REST_SIZE, BLOCK_M, BLOCK_REST, MERGED or phase > 0, WIDE, TMA,
                        )  # fmt: skip
                        qk = tl.dot(k_rest_tile, tl.trans(q_rest_tile), qk, input_precision=PRECISION)
                    dp = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION)
                    row_local = q_pos - q_first
                    if WIDE:
                        row_local = row_local.to(tl.int64)
                    bias = 0.0
                    mask_ptrs = attn_mask
                    if HAS_BIAS:
                        bias_head = attn_bias
                        if BIAS != BIAS_TILES:
                            bias_head += head * stride_bh + q_first.to(tl.int64) * stride_bm
                        bias = load_bias(
                            bias_head, batch, head, q_first, n_first, (row_local * stride_bm)[None, :],
                            col_local[:, None], (kv_pos < kv_len)[:, None], stride_bb, stride_bh, stride_bn, BLOCK_M,
                            BLOCK_N, BIAS, True,
                        )  # fmt: skip
                    if HAS_ATTN_MASK:
                        mask_ptrs = tile_ptrs(
                            attn_mask + head * stride_mh + q_first.to(tl.int64) * stride_mm,
                            row_local[None, :], col_local[:, None], stride_mm, stride_mn,
                        )  # fmt: skip
                    weights, _ds_bias, ds = tile_gradients(
                        qk, dp, q_pos[None, :], kv_pos[:, None], n_first, row_ok[None, :], kv_len, m[None, :],
                        d[None, :], fix[None, :], empty[None, :], starts[None, :], ends[None, :], q_id[None, :],
                        kv_id[:, None], key_keep[:, None], bias, mask_ptrs, seed, (row_base + q_pos)[None, :], alibi,
                        q_len, softmax_scale, logits_soft_cap, band_lower, band_upper, dropout_p, cut,
                        2 if MERGED and phase == 0 else phase > 0, phase == 2, RAW, SOFT_CAP, HAS_BIAS, HAS_ATTN_MASK,
                        HAS_KEY_MASK and (phase > 0 or MERGED or not RANGED), HAS_START, HAS_END,
                        HAS_IDS and (phase > 0 or MERGED or not RANGED), HAS_LOWER, HAS_UPPER, HAS_DROPOUT, HAS_ALIBI,
                        EMPTY_ROWS,
                    )  # fmt: skip
                    if WANT_DV:
                        dv = tl.dot(narrow(weights, g_tile.dtype, ROUND_BITS), g_tile, dv, input_precision=PRECISION)
                    if WANT_DK and (phase < 2 or EMPTY_HAS_DS):
                        ds = narrow(ds, q_tile.dtype, ROUND_BITS)
                        dk = tl.dot(ds, q_tile, dk, input_precision=PRECISION)
                        if BLOCK_REST > 0:
                            dk_rest = tl.dot(ds, q_rest_tile, dk_rest, input_precision=PRECISION)
                # Counters, not i // count and i % count: divisions would delay the loads of the next block.
                at += 1
                done = at == first + count
                head = tl.where(done, head + 1, head)
                at = tl.where(done, first, at)
    if WANT_DK:
        dk *= softmax_scale
        grad_k += batch * stride_dkb + kv_head * stride_dkh
        if ONLY_EMPTY:
            dk += load_tile(grad_k, n_first, stride_dkn, stride_dkd, kv_len, 0, HEAD_DIM, BLOCK_N, BLOCK_D, True, WIDE)
        store_tile(grad_k, dk, n_first, stride_dkn, stride_dkd, kv_len, 0, HEAD_DIM, BLOCK_N, BLOCK_D, WIDE)
        if BLOCK_REST > 0:
            dk_rest *= softmax_scale
            stride_rest_n, stride_rest_d = stride_dkn, stride_dkd
            if ROPE > 0:
                grad_k = grad_k_rest + batch * stride_dkpb + kv_head * stride_dkph
                stride_rest_n, stride_rest_d = stride_dkpn, 1
            if ONLY_EMPTY:
                dk_rest += load_tile(grad_k, n_first, stride_rest_n, stride_rest_d, kv_len, REST_COL, REST_SIZE,
                                     BLOCK_N, BLOCK_REST, True, WIDE)  # fmt: skip
            store_tile(grad_k, dk_rest, n_first, stride_rest_n, stride_rest_d, kv_len, REST_COL, REST_SIZE, BLOCK_N,
                       BLOCK_REST, WIDE)  # fmt: skip
    if WANT_DV:
        grad_v += batch * stride_dvb + kv_head * stride_dvh
        if ONLY_EMPTY:
            dv += load_tile(grad_v, n_first, stride_dvn, stride_dve, kv_len, 0, V_HEAD_DIM, BLOCK_N, BLOCK_E, True,
                            WIDE)  # fmt: skip
        store_tile(grad_v, dv, n_first, stride_dvn, stride_dve, kv_len, 0, V_HEAD_DIM, BLOCK_N, BLOCK_E, WIDE)
