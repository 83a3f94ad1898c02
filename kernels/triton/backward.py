"""The backward kernels: row statistics, dq, dk/dv and the gradient of the bias.

With p the weights after the softmax, dp = grad_out v^T and delta = rowsum(grad_out * out):

    dv = p^T grad_out      ds = p (dp - delta) [* slope of the soft cap]      dq = scale ds k      dk = scale ds^T q

Dropout multiplies p in dv, and dp, by keep / (1 - p). Nothing is accumulated atomically: each output tile has one
program and a fixed order, so gradients are deterministic. dk/dv loops over the query heads of its group.

Rows without a key have lse = -inf. The main loops give them p = 0; where eager gives them a gradient (every mode but
zero) a second pass adds it, entered only for heads in which the first kernel has seen such a row, and a gradient there
where it is a mean.

Letters as in common.py.
"""

import triton
import triton.language as tl

from .bias import BIAS_ELEMENTS, load_bias
from .common import (
    EMPTY_MEAN,
    EMPTY_MEAN_ADDED,
    EMPTY_NAN,
    EMPTY_NAN_ADDED,
    EMPTY_ZERO,
    LOG2E,
    NO_CAP,
    add_alibi,
    dropout_keep,
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
from .tiles import load_tile, tile_ptrs

_RUNTIME_SIZES = ["q_len", "kv_len", "band_lower", "band_upper"]


@triton.jit
def load_row_statistics(shift, delta, correction, first_row, row_ok, HAS_BIAS: tl.constexpr, CHECK_ROWS: tl.constexpr,
                        BLOCK_M: tl.constexpr):  # fmt: skip
    """`(shift, delta, correction)` of the rows from the flat index `first_row` on, as backward_rows_kernel wrote them.

    Absent rows (row_ok is False; only with CHECK_ROWS) get +inf, 0, 0: their weights are 0.
    """
    offs_m = tl.arange(0, BLOCK_M)
    if CHECK_ROWS:
        m = tl.load(shift + first_row + offs_m, mask=row_ok, other=float("inf"))
        d = tl.load(delta + first_row + offs_m, mask=row_ok, other=0.0)
    else:
        m = tl.load(shift + first_row + offs_m)
        d = tl.load(delta + first_row + offs_m)
    fix = d
    if HAS_BIAS:
        fix = tl.load(correction + first_row + offs_m, mask=row_ok, other=0.0)
    return m, d, fix


@triton.jit
def load_empty(lse, row_base, q_pos, row_ok):
    """Which rows have no key."""
    return (tl.load(lse + row_base + q_pos) == float("-inf")) & row_ok


@triton.jit
def tile_gradients(
    qk, dp, q_pos, kv_pos, kv_first, row_ok, kv_len, m, delta, fix, empty, starts, ends, q_id, kv_id, key_keep, bias,
    mask_ptrs, seed, row_index, alibi, q_len, softmax_scale, logits_soft_cap, band_lower, band_upper, dropout_p,
    cut, BOUNDED: tl.constexpr, EMPTY_PASS: tl.constexpr, RAW: tl.constexpr, SOFT_CAP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ATTN_MASK: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_START: tl.constexpr,
    HAS_END: tl.constexpr, HAS_IDS: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_ALIBI: tl.constexpr, EMPTY_ROWS: tl.constexpr,
):  # fmt: skip
    """From the products of one tile to `(weights, ds_bias, ds)`, in either orientation.

    `weights` are p after dropout (for dv), `ds_bias` the gradient of the capped scores, `ds` that of `scale * q k^T`.
    EMPTY_PASS replaces p: 1/N or NaN on every key of an empty row, 0 on all other rows.
    """
    mask_keep = 0
    if HAS_ATTN_MASK:
        mask_keep = tl.load(mask_ptrs, mask=(kv_pos < kv_len) & row_ok, other=0) != 0
    s, slope = score_tile(qk, softmax_scale, logits_soft_cap, bias, RAW, SOFT_CAP, HAS_BIAS)
    s = add_alibi(s, alibi, q_pos, kv_pos, kv_first, q_len, kv_len, HAS_ALIBI)
    if EMPTY_PASS:
        here = empty & (kv_pos < kv_len)
        if EMPTY_ROWS == EMPTY_NAN or EMPTY_ROWS == EMPTY_NAN_ADDED:
            p = tl.where(here, float("nan"), 0.0)
        else:
            p = tl.where(here, 1.0 / kv_len, 0.0)
    else:
        s = mask_scores(
            s, q_pos, kv_pos, kv_len, starts, ends, q_id, kv_id, key_keep, mask_keep, band_lower, band_upper, cut,
            BOUNDED, HAS_LOWER, HAS_UPPER, HAS_START, HAS_END, HAS_IDS, HAS_KEY_MASK, HAS_ATTN_MASK,
        )  # fmt: skip
        p = exponent(s, m, score_factor(softmax_scale, logits_soft_cap, SOFT_CAP) * LOG2E, RAW, HAS_BIAS)
        if HAS_BIAS:
            p -= fix
        p = tl.exp2(p)
    weights = p
    if HAS_DROPOUT:
        factor = tl.where(dropout_keep(seed, row_index, kv_pos, kv_len, dropout_p), 1.0 / (1.0 - dropout_p), 0.0)
        weights = p * factor
        dp = dp * factor
    ds_bias = p * (dp - delta)
    if EMPTY_PASS:
        if EMPTY_ROWS == EMPTY_MEAN or EMPTY_ROWS == EMPTY_NAN:
            # The fill took the place of the scores: they have no gradient.
            ds_bias = tl.zeros_like(ds_bias)
    ds = ds_bias
    if SOFT_CAP != NO_CAP:
        ds = ds_bias * slope
    return weights, ds_bias, ds


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def backward_rows_kernel(
    q, k, v, out, grad_out, lse, shift, delta, correction, any_empty,
    attn_bias, attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, sinks, dropout_seed, alibi_slopes,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_ve, stride_ob, stride_oh, stride_om, stride_oe,
    stride_gb, stride_gh, stride_gm, stride_ge,
    stride_bb, stride_bh, stride_bm, stride_bn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_key_b, stride_key_n, stride_start_b, stride_start_m, stride_end_b, stride_end_m,
    stride_qid_b, stride_qid_m, stride_kid_b, stride_kid_n, stride_slopes_b, stride_slopes_h,
    num_heads, gqa_group_size, q_len, kv_len, softmax_scale, logits_soft_cap, band_lower, band_upper, dropout_p,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr, RAW: tl.constexpr, SOFT_CAP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ATTN_MASK: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_START: tl.constexpr,
    HAS_END: tl.constexpr, HAS_IDS: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_ALIBI: tl.constexpr, EMPTY_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Row statistics, float32 `(B, H, M)`: shift, delta and the correction of lse; and which heads have empty rows.

    `shift` is lse in the units of the scores' domain and without their offset, +inf for a row without a key.

    lse is one float32. With a bias of -1e9 or finfo.min on a whole row it rounds away log(number of keys), and exp(s -
    lse) sums to N instead of 1. For such rows this kernel sums exp(s - lse) again and stores its log2 as `correction`;
    for all others 0. Only with a bias can scores be that large and still be meant.
    """
    # Inductor hands numbers over in float64, or as constants.
    softmax_scale = tl.full((), softmax_scale, tl.float32)
    if SOFT_CAP != NO_CAP:
        logits_soft_cap = tl.full((), logits_soft_cap, tl.float32)
    if HAS_DROPOUT:
        dropout_p = tl.full((), dropout_p, tl.float32)
    num_row_blocks = tl.cdiv(q_len, BLOCK_M)
    pid = tl.program_id(0)
    row_block = pid % num_row_blocks
    head_index = pid // num_row_blocks
    batch = (head_index // num_heads).to(tl.int64)
    head = (head_index % num_heads).to(tl.int64)
    row_base = head_index.to(tl.int64) * q_len
    q_first = row_block * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    row_store = q_first + offs_m
    row_ok = row_store < q_len
    q_pos = tl.minimum(row_store, q_len - 1)

    out += batch * stride_ob + head * stride_oh
    grad_out += batch * stride_gb + head * stride_gh
    o_tile = load_tile(out, q_first, stride_om, stride_oe, q_len, 0, V_HEAD_DIM, BLOCK_M, BLOCK_E, True, WIDE)
    g_tile = load_tile(grad_out, q_first, stride_gm, stride_ge, q_len, 0, V_HEAD_DIM, BLOCK_M, BLOCK_E, True, WIDE)
    row_lse = tl.load(lse + row_base + q_pos)
    empty = row_lse == float("-inf")
    d = tl.sum(o_tile.to(tl.float32) * g_tile.to(tl.float32), 1)
    if EMPTY_ROWS != EMPTY_MEAN_ADDED:
        d = tl.where(empty, 0.0, d)
    tl.store(delta + row_base + row_store, d, mask=row_ok)
    m = tl.where(empty, float("inf"), row_lse)
    if not HAS_BIAS:
        m = m * LOG2E - score_offset(logits_soft_cap, SOFT_CAP, HAS_BIAS)
    tl.store(shift + row_base + row_store, m, mask=row_ok)
    if EMPTY_ROWS != EMPTY_ZERO:
        if EMPTY_ROWS == EMPTY_MEAN or EMPTY_ROWS == EMPTY_MEAN_ADDED:
            # Rows of padding get none in training, where the loss leaves them out: then they give none.
            empty &= tl.max(tl.where(g_tile != 0, 1, 0), 1) != 0
        if tl.max(tl.where(empty, 1, 0)) != 0:
            tl.atomic_max(any_empty + head_index, 1)

    if HAS_BIAS:
        inexact = (tl.abs(row_lse) > 256.0) & (tl.abs(row_lse) < float("inf"))
        total = tl.full((BLOCK_M,), 1.0, tl.float32)
        if tl.max(tl.where(inexact, 1, 0)) != 0:
            total = tl.zeros((BLOCK_M,), tl.float32)
            offs_n = tl.arange(0, BLOCK_N)
            row_local = q_pos - q_first
            col_local = offs_n
            if WIDE:
                row_local = row_local.to(tl.int64)
                col_local = col_local.to(tl.int64)
            q += batch * stride_qb + head * stride_qh
            k += batch * stride_kb + (head // gqa_group_size) * stride_kh
            attn_bias += batch * stride_bb + head * stride_bh + q_first.to(tl.int64) * stride_bm
            if HAS_ATTN_MASK:
                attn_mask += batch * stride_mb + head * stride_mh + q_first.to(tl.int64) * stride_mm
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
                kv_start, kv_end, q_ids, stride_start_m, stride_end_m, stride_qid_m, q_pos, kv_len,
                HAS_START, HAS_END, HAS_IDS,
            )  # fmt: skip
            q_last = tl.minimum(q_first + BLOCK_M, q_len) - 1
            begin, _full_begin, _full_end, end = kv_block_range(
                q_first, q_last, kv_len, starts, ends, band_lower, band_upper, BLOCK_N, HAS_LOWER, HAS_UPPER,
                HAS_START, HAS_END,
            )  # fmt: skip
            q_tile = load_tile(q, q_first, stride_qm, stride_qd, q_len, 0, HEAD_DIM, BLOCK_M, BLOCK_D, True, WIDE)
            alibi = load_alibi(alibi_slopes, batch, head, stride_slopes_b, stride_slopes_h, HAS_ALIBI, HAS_BIAS)
            for i in range(begin, end):
                start_n = i * BLOCK_N
                kv_pos = start_n + offs_n
                k_tile = load_tile(k, start_n, stride_kn, stride_kd, kv_len, 0, HEAD_DIM, BLOCK_N, BLOCK_D, True, WIDE)
                qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
                ok = (kv_pos < kv_len)[None, :]
                start_long = start_n.to(tl.int64)
                bias = load_bias(
                    attn_bias, batch, head, q_first, start_n, (row_local * stride_bm)[:, None], col_local[None, :], ok,
                    stride_bb, stride_bh, stride_bn, BLOCK_M, BLOCK_N, BIAS_ELEMENTS, False,
                )  # fmt: skip
                mask_keep = 0
                if HAS_ATTN_MASK:
                    mask_ptrs = tile_ptrs(attn_mask + start_long * stride_mn, row_local[:, None], col_local[None, :],
                                          stride_mm, stride_mn)  # fmt: skip
                    mask_keep = tl.load(mask_ptrs, mask=ok, other=0) != 0
                key_keep, kv_id = load_key_masks(
                    key_mask, kv_ids, stride_key_n, stride_kid_n, kv_pos, kv_len, HAS_KEY_MASK, HAS_IDS
                )
                s, _slope = score_tile(qk, softmax_scale, logits_soft_cap, bias, RAW, SOFT_CAP, HAS_BIAS)
                s = add_alibi(s, alibi, q_pos[:, None], kv_pos[None, :], start_n, q_len, kv_len, HAS_ALIBI)
                s = mask_scores(
                    s, q_pos[:, None], kv_pos[None, :], kv_len, starts[:, None], ends[:, None], q_id[:, None],
                    kv_id[None, :], key_keep[None, :], mask_keep, band_lower, band_upper, True, 1, HAS_LOWER, HAS_UPPER,
                    HAS_START, HAS_END, HAS_IDS, HAS_KEY_MASK, HAS_ATTN_MASK,
                )  # fmt: skip
                m = tl.where(inexact, row_lse, 0.0)
                total += tl.sum(tl.exp2((s - m[:, None]) * LOG2E), 1)
            if HAS_SINKS:
                total += tl.exp2((tl.load(sinks + head).to(tl.float32) - row_lse) * LOG2E)
            total = tl.where(inexact & (total > 0.0), total, 1.0)
        tl.store(correction + row_base + row_store, tl.log2(total), mask=row_ok)
