"""The gradient of attn_bias, reduced over its broadcast dimensions in one pass: no (B, H, M, N) tensor is made.

One program owns one tile of the bias gradient and walks over everything that was broadcast into it (batch entries,
heads, query blocks, key blocks), recomputing the scores. No atomics.
"""

import triton
import triton.language as tl

from .backward import load_empty, load_row_statistics, tile_gradients
from .bias import BIAS_ELEMENTS, load_bias
from .common import EMPTY_MEAN_ADDED, EMPTY_NAN_ADDED, NO_CAP, load_alibi, load_key_masks, load_row_masks
from .tiles import load_tile, tile_ptrs


@triton.jit(do_not_specialize=["q_len", "kv_len", "band_lower", "band_upper", "repeat_batch", "repeat_heads"])
def backward_bias_kernel(
    q, k, v, grad_out, grad_bias, lse, shift, delta, correction, any_empty,
    attn_bias, attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, dropout_seed, alibi_slopes,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_ve, stride_gb, stride_gh, stride_gm, stride_ge,
    stride_dbb, stride_dbh, stride_dbm, stride_dbn,
    stride_bb, stride_bh, stride_bm, stride_bn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_key_b, stride_key_n, stride_start_b, stride_start_m, stride_end_b, stride_end_m,
    stride_qid_b, stride_qid_m, stride_kid_b, stride_kid_n, stride_slopes_b, stride_slopes_h,
    bias_heads, repeat_batch, repeat_heads,
    num_heads, gqa_group_size, q_len, kv_len, softmax_scale, logits_soft_cap, band_lower, band_upper, dropout_p,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REDUCE_M: tl.constexpr, REDUCE_N: tl.constexpr, WIDE: tl.constexpr,
    RAW: tl.constexpr, SOFT_CAP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ATTN_MASK: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_START: tl.constexpr,
    HAS_END: tl.constexpr, HAS_IDS: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_ALIBI: tl.constexpr, EMPTY_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `grad_bias`, of the bias's own shape `(B|1, H|1, M|1, N|1)`.

    REDUCE_M, REDUCE_N: the bias has size 1 there. repeat_batch, repeat_heads: B or H where it has size 1, else 1.
    """
    # Inductor hands numbers over in float64, or as constants.
    softmax_scale = tl.full((), softmax_scale, tl.float32)
    if SOFT_CAP != NO_CAP:
        logits_soft_cap = tl.full((), logits_soft_cap, tl.float32)
    if HAS_DROPOUT:
        dropout_p = tl.full((), dropout_p, tl.float32)
    EMPTY_HAS_DS: tl.constexpr = (EMPTY_ROWS == EMPTY_NAN_ADDED) or (EMPTY_ROWS == EMPTY_MEAN_ADDED)
    num_row_blocks = tl.cdiv(q_len, BLOCK_M)
    num_kv_blocks = tl.cdiv(kv_len, BLOCK_N)
    tiles_m = num_row_blocks
    tiles_n = num_kv_blocks
    walk_m = 1
    walk_n = 1
    if REDUCE_M:
        tiles_m = 1
        walk_m = num_row_blocks
    if REDUCE_N:
        tiles_n = 1
        walk_n = num_kv_blocks
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    tile_m = (pid // tiles_n) % tiles_m
    bias_head = (pid // tiles_n // tiles_m) % bias_heads
    bias_batch = pid // tiles_n // tiles_m // bias_heads
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(dropout_seed)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(repeat_batch * repeat_heads * walk_m * walk_n):
        kv_block = tile_n + i % walk_n
        row_block = tile_m + (i // walk_n) % walk_m
        head = (bias_head + (i // walk_n // walk_m) % repeat_heads).to(tl.int64)
        batch = (bias_batch + i // walk_n // walk_m // repeat_heads).to(tl.int64)
        kv_head = head // gqa_group_size
        q_first = row_block * BLOCK_M
        q_last = tl.minimum(q_first + BLOCK_M, q_len) - 1
        n_first = kv_block * BLOCK_N
        n_last = tl.minimum(n_first + BLOCK_N, kv_len) - 1
        row_base = (batch * num_heads + head) * q_len
        row_store = q_first + tl.arange(0, BLOCK_M)
        row_ok = row_store < q_len
        q_pos = tl.minimum(row_store, q_len - 1)
        kv_pos = n_first + tl.arange(0, BLOCK_N)
        row_local = q_pos - q_first
        col_local = tl.arange(0, BLOCK_N)
        if WIDE:
            row_local = row_local.to(tl.int64)
            col_local = col_local.to(tl.int64)
        starts, ends, q_id = load_row_masks(
            kv_start + batch * stride_start_b if HAS_START else kv_start,
            kv_end + batch * stride_end_b if HAS_END else kv_end,
            q_ids + batch * stride_qid_b if HAS_IDS else q_ids,
            stride_start_m, stride_end_m, stride_qid_m, q_pos, kv_len, HAS_START, HAS_END, HAS_IDS,
        )  # fmt: skip
        m, d, fix = load_row_statistics(shift, delta, correction, row_base + q_first, row_ok, HAS_BIAS, True, BLOCK_M)
        empty = row_ok
        if EMPTY_HAS_DS:
            empty = load_empty(lse, row_base, q_pos, row_ok)
        meets = row_block_meets(starts, ends, n_first, n_last, HAS_START, HAS_END)
        if HAS_UPPER:
            meets &= n_first - q_last <= band_upper
        if HAS_LOWER:
            meets &= n_last - q_first >= band_lower
        holes = False
        if EMPTY_HAS_DS:
            holes = tl.max(tl.where(empty, 1, 0)) != 0
            meets |= holes
        if meets:
            key_keep, kv_id = load_key_masks(
                key_mask + batch * stride_key_b if HAS_KEY_MASK else key_mask,
                kv_ids + batch * stride_kid_b if HAS_IDS else kv_ids,
                stride_key_n, stride_kid_n, kv_pos, kv_len, HAS_KEY_MASK, HAS_IDS,
            )  # fmt: skip
            q_tile = load_tile(
                q + batch * stride_qb + head * stride_qh, q_first, stride_qm, stride_qd, q_len, 0, HEAD_DIM, BLOCK_M,
                BLOCK_D, True, WIDE,
            )  # fmt: skip
            g_tile = load_tile(
                grad_out + batch * stride_gb + head * stride_gh, q_first, stride_gm, stride_ge, q_len, 0, V_HEAD_DIM,
                BLOCK_M, BLOCK_E, True, WIDE,
            )  # fmt: skip
            k_tile = load_tile(
                k + batch * stride_kb + kv_head * stride_kh, n_first, stride_kn, stride_kd, kv_len, 0, HEAD_DIM,
                BLOCK_N, BLOCK_D, True, WIDE,
            )  # fmt: skip
            v_tile = load_tile(
                v + batch * stride_vb + kv_head * stride_vh, n_first, stride_vn, stride_ve, kv_len, 0, V_HEAD_DIM,
                BLOCK_N, BLOCK_E, True, WIDE,
            )  # fmt: skip
            qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            dp = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
            q_first_long = q_first.to(tl.int64)
            n_first_long = n_first.to(tl.int64)
            bias = load_bias(
                attn_bias + batch * stride_bb + head * stride_bh + q_first_long * stride_bm, batch, head, q_first,
                n_first, (row_local * stride_bm)[:, None], col_local[None, :], (kv_pos < kv_len)[None, :], stride_bb,
                stride_bh, stride_bn, BLOCK_M, BLOCK_N, BIAS_ELEMENTS, False,
            )  # fmt: skip
            alibi = load_alibi(alibi_slopes, batch, head, stride_slopes_b, stride_slopes_h, HAS_ALIBI, HAS_BIAS)
            mask_ptrs = attn_mask
            if HAS_ATTN_MASK:
                mask_ptrs = tile_ptrs(
                    attn_mask + batch * stride_mb + head * stride_mh + q_first_long * stride_mm
                    + n_first_long * stride_mn,
                    row_local[:, None], col_local[None, :], stride_mm, stride_mn,
                )  # fmt: skip
            for empty_pass in tl.static_range(2):
                if empty_pass == 0 or EMPTY_HAS_DS:
                    _weights, ds_bias, _ds = tile_gradients(
                        qk, dp, q_pos[:, None], kv_pos[None, :], n_first, row_ok[:, None], kv_len, m[:, None],
                        d[:, None], fix[:, None], empty[:, None], starts[:, None], ends[:, None], q_id[:, None],
                        kv_id[None, :], key_keep[None, :], bias, mask_ptrs, seed, (row_base + q_pos)[:, None], alibi,
                        q_len, softmax_scale, logits_soft_cap, band_lower, band_upper, dropout_p, True, 1,
                        empty_pass == 1, RAW, SOFT_CAP, HAS_BIAS, HAS_ATTN_MASK, HAS_KEY_MASK, HAS_START, HAS_END,
                        HAS_IDS, HAS_LOWER, HAS_UPPER, HAS_DROPOUT, HAS_ALIBI, EMPTY_ROWS,
                    )  # fmt: skip
                    acc += ds_bias

    grad_bias += bias_batch.to(tl.int64) * stride_dbb + bias_head.to(tl.int64) * stride_dbh
    m_out = tile_m * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    n_out = tile_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    if REDUCE_M and REDUCE_N:
        tl.store(grad_bias, tl.sum(acc).to(grad_bias.dtype.element_ty))
    elif REDUCE_M:
        tl.store(grad_bias + n_out * stride_dbn, tl.sum(acc, 0).to(grad_bias.dtype.element_ty), mask=n_out < kv_len)
    elif REDUCE_N:
        tl.store(grad_bias + m_out * stride_dbm, tl.sum(acc, 1).to(grad_bias.dtype.element_ty), mask=m_out < q_len)
    else:
        tl.store(
            grad_bias + m_out[:, None] * stride_dbm + n_out[None, :] * stride_dbn,
            acc.to(grad_bias.dtype.element_ty), mask=(m_out < q_len)[:, None] & (n_out < kv_len)[None, :],
        )  # fmt: skip


@triton.jit
def row_block_meets(starts, ends, n_first, n_last, HAS_START: tl.constexpr, HAS_END: tl.constexpr):
    """Whether some row's [kv_start, kv_end) may touch the keys n_first..n_last."""
    meets = n_first <= n_last
    if HAS_START:
        meets &= tl.min(starts) <= n_last
    if HAS_END:
        meets &= tl.max(ends) > n_first
    return meets
