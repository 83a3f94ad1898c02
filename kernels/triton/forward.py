"""The forward kernel, for prefill and split-KV decode alike; combine.py adds up the splits.

One program owns BLOCK_M rows of one batch entry and walks over blocks of BLOCK_N keys with the online softmax. A row is
one (query head, query position) pair: with PACK > 1 the PACK query heads that share a key/value head lie in one tile
(row = q * PACK + head), so that a decode step fills the matrix unit and reads K and V once per group.

The walk has two phases: first the blocks that no limit of position cuts (no comparison per element), then the rest on
both sides of them; with MERGED it is one loop with a branch, which needs fewer registers. Blocks that no row keeps are
never visited; their range comes from the band and, on the device, from kv_start and kv_end, so a static cache costs
what its valid part costs. Masks and bias are loaded before q k^T: then Triton keeps row statistics in the layout of
that product. The other way round it computed the softmax once in each layout.

What is subtracted from the scores (SHIFT) may be any number that lets float32 hold the exponentials: RUNNING_MAX, that
of the online softmax, needs every block's maximum and rescaled sums. FIRST_MAX, of the first block, is at most the
row's: nothing that matters underflows. Where it is off by more than 2^64, or weights in float16 (AMD only) overflow or
have a sum below 1, the row shows it, and the tile is computed again with RUNNING_MAX. NO_MAX is for a small soft cap.

Letters as in common.py.
"""

import triton
import triton.language as tl

from .bias import BIAS_TILES, load_bias
from .cap_series import factored_series, scale_queries, series_exponent, series_holds
from .combine import finish_rows
from .common import (
    CAP_SERIES,
    EMPTY_MEAN,
    EMPTY_MEAN_ADDED,
    FIRST_MAX,
    LARGEST_SUM,
    LN2,
    LOG2E,
    NO_CAP,
    NO_MAX,
    RUNNING_MAX,
    SMALLEST_SUM,
    TRUNCATION,
    TRUNCATION_LOG2,
    add_alibi,
    deal_programs,
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
    truncate,
)
from .float8 import WEIGHT_BITS, queries_to_half, widen
from .mask_ranges import load_range
from .pages import pages_of_tile, place_tile
from .tiles import load_head_tile, q_k_product

# These change from call to call (lengths grow while decoding); specialising on them would recompile.
_RUNTIME_SIZES = ["q_len", "kv_len", "num_blocks", "num_splits", "heads_at_once", "band_lower", "band_upper"]


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def attention_forward_kernel(
    q, k, v, q_rest, k_rest, out, lse, partial, partial_stats,
    attn_bias, attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, sinks, dropout_seed, alibi_slopes,
    block_table, k_scale, v_scale, ranges,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_ve, stride_ob, stride_oh, stride_om, stride_oe,
    stride_qpb, stride_qph, stride_qpm, stride_kpb, stride_kpn,
    stride_bb, stride_bh, stride_bm, stride_bn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_key_b, stride_key_n, stride_start_b, stride_start_m, stride_end_b, stride_end_m,
    stride_qid_b, stride_qid_m, stride_kid_b, stride_kid_n, stride_slopes_b, stride_slopes_h,
    stride_tb, stride_tn, stride_k_scale, stride_v_scale,
    batch_size, num_heads, gqa_group_size, q_len, kv_len, num_blocks, num_splits, heads_at_once,
    softmax_scale, logits_soft_cap, band_lower, band_upper, dropout_p,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, ROPE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACK: tl.constexpr, SPLIT: tl.constexpr,
    ONE_TILE: tl.constexpr, LATE_QUERIES: tl.constexpr, INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr, TMA: tl.constexpr, MERGED: tl.constexpr, SHIFT: tl.constexpr, PAGE: tl.constexpr,
    HAS_K_SCALE: tl.constexpr, HAS_V_SCALE: tl.constexpr, FLOAT8_ASM: tl.constexpr,
    HALF: tl.constexpr,
    BIAS: tl.constexpr,
    ROUND_BITS: tl.constexpr, TRANSPOSE_KEYS: tl.constexpr, RANGED: tl.constexpr,
    RAW: tl.constexpr, SOFT_CAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ATTN_MASK: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr, HAS_IDS: tl.constexpr,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_ALIBI: tl.constexpr, EMPTY_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention forward; see the module docstring and the canonical op for the meaning of every argument.

    Writes `out` and `lse`, or with SPLIT what its share of the keys gives, not normalised: `acc` into `partial`,
    float32 `(B * H * M, num_splits, E)`, and `m`, `l` into `partial_stats`, float32 `(B * H * M, num_splits, 2)`.

    With TMA q, k, v, q_rest, k_rest are tensor descriptors, see tiles.py; q_rest and k_rest differ from q and k in the
    width of their block only. Without TMA they are not used. With LATE_QUERIES, and always with PACK > 1, q is none.

    With PAGE > 0 (never with TMA or ROPE) the keys are in a paged cache, see pages.py; stride_kb and stride_vb are
    those of its blocks. k and v may be of a narrower dtype than q, and have a factor per key/value head, or one for
    all: these are given to the scores and to the result. With HALF bfloat16 queries and weights become float16 for the
    products, see float8.py.

    With ONE_TILE the rows of each key/value head lie in one tile, so that the program's number need not be divided to
    find them. With LATE_QUERIES (never with ROPE, HALF or a second piece) queries are brought into place at each
    block of keys; else no key is asked for before they are there. With INTERLEAVED (only with SPLIT and MERGED, and a
    running maximum) the programs of a tile take its blocks of keys in turn, so that what runs side by side reads what
    lies side by side; else each takes blocks that follow each other.

    With RANGED (never with PACK > 1 or SPLIT) the ranges of key blocks are read from `ranges`, see mask_ranges: blocks
    in which padding or ids leave nothing are not visited, nor masks read in those that they leave whole.

    With ROPE > 0 the second piece of the head dimension lies elsewhere: q_rest is `(B, H, M, ROPE)`, k_rest
    `(B, N, ROPE)`, shared by all heads (descriptors of 4-D tensors with one head); last strides are 1. See mla_prefill.
    """
    # Inductor hands numbers over in float64, or as constants.
    softmax_scale = tl.full((), softmax_scale, tl.float32)
    if SOFT_CAP != NO_CAP:
        logits_soft_cap = tl.full((), logits_soft_cap, tl.float32)
    if HAS_DROPOUT:
        dropout_p = tl.full((), dropout_p, tl.float32)
    rows_len = q_len * PACK
    num_row_blocks = tl.cdiv(rows_len, BLOCK_M)
    pid = tl.program_id(0)
    split = 0
    if SPLIT:
        split = pid % num_splits
        pid = pid // num_splits
    # A group's query heads run side by side and share K and V in the cache.
    tiles_of_group = gqa_group_size // PACK
    num_kv_heads = num_heads // gqa_group_size
    if ONE_TILE:
        kv_index = pid
        tile = 0
        tiles_of_group = 1
    else:
        kv_index, tile = deal_programs(pid, batch_size * num_kv_heads, tiles_of_group * num_row_blocks, heads_at_once)
    row_block = tile // tiles_of_group
    if HAS_UPPER and not ONE_TILE:
        # The last queries of a causal mask see the most keys: start them first, so that short ones fill the tail.
        row_block = num_row_blocks - 1 - row_block
    batch = (kv_index // num_kv_heads).to(tl.int64)
    kv_head = (kv_index % num_kv_heads).to(tl.int64)
    head = (kv_index % num_kv_heads) * gqa_group_size + tile % tiles_of_group * PACK

    # Rows past the end repeat the last one: every load is in bounds without a mask, only stores are masked.
    row_store = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row_store < rows_len
    row = tl.minimum(row_store, rows_len - 1)
    q_first = (row_block * BLOCK_M) // PACK
    q_last = (tl.minimum((row_block + 1) * BLOCK_M, rows_len) - 1) // PACK
    q_pos = row // PACK
    head_local = row % PACK
    q_local = q_pos - q_first
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_e = tl.arange(0, BLOCK_E)
    if WIDE:
        head_local = head_local.to(tl.int64)
        q_local = q_local.to(tl.int64)
        offs_n = offs_n.to(tl.int64)
        offs_d = offs_d.to(tl.int64)
        offs_e = offs_e.to(tl.int64)
    head_long = head.to(tl.int64)
    q_first_long = q_first.to(tl.int64)
    e_ok = offs_e < V_HEAD_DIM

    REST_COL: tl.constexpr = 0 if ROPE > 0 else BLOCK_D
    REST_SIZE: tl.constexpr = ROPE if ROPE > 0 else HEAD_DIM
    stride_rest_n = stride_kn
    stride_rest_d = stride_kd
    rest_head = kv_head
    if ROPE > 0:
        stride_rest_n = stride_kpn
        stride_rest_d = 1
        rest_head = kv_head * 0
    q_rest_tile = 0
    if TMA and not LATE_QUERIES:
        q_tile = load_head_tile(
            q, batch, head, q_first, 0, 1, q_len, 0, HEAD_DIM, BLOCK_M, BLOCK_D, True, WIDE, True
        )  # fmt: skip
        if BLOCK_REST > 0:
            q_rest_tile = load_head_tile(
                q_rest, batch, head, q_first, 0, 1, q_len, REST_COL, REST_SIZE, BLOCK_M, BLOCK_REST, True, WIDE, True
            )  # fmt: skip
    else:
        q += batch * stride_qb + head_long * stride_qh + q_first_long * stride_qm
        if not TMA:
            k += kv_head * stride_kh
            v += kv_head * stride_vh
            if PAGE == 0:
                k += batch * stride_kb
                v += batch * stride_vb
        if ROPE > 0:
            k_rest += batch * stride_kpb
            q_rest += batch * stride_qpb + head_long * stride_qph + q_first_long * stride_qpm
        else:
            k_rest = k
        q_ptrs = q + (head_local * stride_qh + q_local * stride_qm)[:, None] + offs_d[None, :] * stride_qd
        if BLOCK_D <= HEAD_DIM:
            q_tile = tl.load(q_ptrs)
        else:
            q_tile = tl.load(q_ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
        if BLOCK_REST > 0:
            offs_r = tl.arange(0, BLOCK_REST)
            if WIDE:
                offs_r = offs_r.to(tl.int64)
            if ROPE > 0:
                q_ptrs = q_rest + (head_local * stride_qph + q_local * stride_qpm)[:, None] + offs_r[None, :]
            else:
                q_ptrs = q + (head_local * stride_qh + q_local * stride_qm)[:, None]
                q_ptrs += (BLOCK_D + offs_r)[None, :] * stride_qd
            q_rest_tile = tl.load(q_ptrs, mask=(REST_COL + offs_r < REST_SIZE)[None, :], other=0.0)

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
    if HAS_BIAS:
        if BIAS != BIAS_TILES:
            attn_bias += batch * stride_bb + head_long * stride_bh + q_first_long * stride_bm
        bias_row = head_local * stride_bh + q_local * stride_bm
    if HAS_ATTN_MASK:
        attn_mask += batch * stride_mb + head_long * stride_mh + q_first_long * stride_mm
        mask_row = head_local * stride_mh + q_local * stride_mm
    if HAS_DROPOUT:
        seed = tl.load(dropout_seed)
        row_index = ((batch * num_heads + head) + (row % PACK)) * q_len + q_pos

    alibi = load_alibi(
        alibi_slopes, batch, (head + row % PACK)[:, None] if PACK > 1 else head, stride_slopes_b, stride_slopes_h,
        HAS_ALIBI, HAS_BIAS,
    )  # fmt: skip

    if RANGED:
        begin, full_begin, full_end, end = load_range(ranges, batch * num_row_blocks + row_block)
    else:
        begin, full_begin, full_end, end = kv_block_range(
            q_first, q_last, kv_len, starts, ends, band_lower, band_upper, BLOCK_N, HAS_LOWER, HAS_UPPER, HAS_START,
            HAS_END,
        )  # fmt: skip
    if INTERLEAVED:
        first_block = begin + split
        end = tl.cdiv(end - first_block, num_splits)
        begin = 0
    elif SPLIT:
        share = tl.cdiv(end - begin, num_splits)
        begin = tl.minimum(begin + split * share, end)
        end = tl.minimum(begin + share, end)
        full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
        full_end = tl.minimum(tl.maximum(full_end, full_begin), end)

    last_page = 0
    used_end = kv_len
    if PAGE > 0:
        block_table += batch * stride_tb
        if HAS_END:
            used_end = tl.max(ends)
        last_page = tl.maximum(used_end - 1, 0) // PAGE
    if HAS_K_SCALE:
        softmax_scale *= tl.load(k_scale + kv_head * stride_k_scale).to(tl.float32)
    if HALF:
        q_tile, q_rest_tile, row_factor = queries_to_half(q_tile, q_rest_tile, BLOCK_REST > 0)
        softmax_scale = softmax_scale * row_factor[:, None]
    if SHIFT == CAP_SERIES:
        query_factor, constant, linear = factored_series(logits_soft_cap * LOG2E, softmax_scale / logits_soft_cap)
        q_tile = scale_queries(q_tile, query_factor)
        if BLOCK_REST > 0:
            q_rest_tile = scale_queries(q_rest_tile, query_factor)
        # Of the products, also where the polynomial does not hold.
        softmax_scale = softmax_scale / query_factor
    WEIGHT_SHIFT: tl.constexpr = WEIGHT_BITS / LOG2E if HAS_BIAS else WEIGHT_BITS
    SCATTERED: tl.constexpr = PAGE > 0 and PAGE % BLOCK_N != 0
    scale_log2 = score_factor(softmax_scale, logits_soft_cap, SOFT_CAP) * LOG2E
    offset = score_offset(logits_soft_cap, SOFT_CAP, HAS_BIAS)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if SHIFT == NO_MAX or SHIFT == CAP_SERIES:
        m_i = tl.zeros((BLOCK_M,), tl.float32) - offset
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    TRUNCATE: tl.constexpr = ROUND_BITS and q_tile.dtype == tl.bfloat16
    LARGER: tl.constexpr = TRUNCATION_LOG2 if TRUNCATE else 0.0
    if SHIFT == FIRST_MAX:
        m_i = scale_log2 * tl.max(
            q_k_product(
                q_tile, q_rest_tile, k, k_rest, batch, kv_head, rest_head, begin * BLOCK_N, stride_kn, stride_kd,
                stride_rest_n, stride_rest_d, kv_len, HEAD_DIM, REST_COL, REST_SIZE, BLOCK_N, BLOCK_D, BLOCK_REST,
                True, WIDE, TMA, TRANSPOSE_KEYS, PRECISION,
            ),
            1,
        )  # fmt: skip
    for attempt in tl.static_range(2 if SHIFT == FIRST_MAX or SHIFT == CAP_SERIES else 1):
        if attempt == 1:
            # Not a number is out of bounds, too.
            if SHIFT == CAP_SERIES:
                holds = series_holds(l_i, (end - begin) * BLOCK_N, logits_soft_cap * LOG2E) | (begin >= end)
            else:
                holds = (l_i > SMALLEST_SUM) & (l_i < LARGEST_SUM)
            if q_tile.dtype == tl.float16:
                # Small weights lose no more than with the running maximum, whose sum is at least 1; a weight that has
                # overflowed leaves no finite number in its row.
                holds &= (l_i >= 1.0) & (tl.sum(acc * 0.0, 1) == 0.0)
            again = tl.max(tl.where(holds, 0, 1)) != 0
            if SHIFT == FIRST_MAX:
                m_i = tl.where(again, float("-inf"), m_i)
            l_i = tl.where(again, 0.0, l_i)
            acc = tl.where(again, 0.0, acc)
            end = tl.where(again, end, begin)
        # Phases: 0 blocks that no limit of position cuts, 1 the other blocks, or instead of both 2 all blocks.
        for phase in tl.static_range(2 if MERGED or attempt == 1 else 0, 3 if MERGED or attempt == 1 else 2):
            first = begin
            last = end
            if phase == 0:
                first = full_begin
                last = full_end
            if phase == 1:
                last = end - (full_end - full_begin)
            # Prefetched tiles take registers on AMD, which has no MERGED: there the second attempt does without.
            for i in tl.range(first, last, num_stages=1 if attempt == 1 and not MERGED else None):
                block = i
                if INTERLEAVED:
                    block = first_block + i * num_splits
                if phase == 1:
                    block = tl.where(i < full_begin, i, i + (full_end - full_begin))
                start_n = block * BLOCK_N
                start_long = start_n.to(tl.int64)
                kv_pos = start_n + tl.arange(0, BLOCK_N)
                n_ok = kv_pos < kv_len
                cut = (block < full_begin) | (block >= full_end)
                bias = 0.0
                mask_keep = 0
                if HAS_BIAS:
                    bias = load_bias(
                        attn_bias, batch, head, q_first, start_n, bias_row[:, None], offs_n[None, :],
                        (n_ok | (phase == 0))[None, :], stride_bb, stride_bh, stride_bn, BLOCK_M, BLOCK_N, BIAS, False,
                    )  # fmt: skip
                if HAS_ATTN_MASK:
                    mask_ptrs = attn_mask + start_long * stride_mn + mask_row[:, None] + offs_n[None, :] * stride_mn
                    mask_keep = tl.load(mask_ptrs, mask=(n_ok | (phase == 0))[None, :], other=0) != 0
                key_keep, kv_id = load_key_masks(
                    key_mask, kv_ids, stride_key_n, stride_kid_n, kv_pos, kv_len,
                    HAS_KEY_MASK and (phase > 0 or not RANGED), HAS_IDS and (phase > 0 or not RANGED),
                )  # fmt: skip
                page = start_n
                if PAGE > 0:
                    page = pages_of_tile(block_table, start_n, last_page, num_blocks, stride_tn, PAGE, BLOCK_N)
                k_source, k_at, k_first, k_end = place_tile(
                    k, page, start_n, used_end, stride_kb, stride_kn, PAGE, BLOCK_N
                )
                rest_source = k_rest
                if not TMA and ROPE == 0:
                    rest_source = k_source
                queries = q_tile
                if LATE_QUERIES:
                    # i is never negative, which no compiler pass knows: so this stays behind the first copies of keys,
                    # which Triton's pipeline puts before its loop.
                    queries = tl.where(i >= 0, q_tile, 0.0)
                qk = q_k_product(
                    queries, q_rest_tile, k_source, rest_source, batch, kv_head, rest_head,
                    k_first, stride_kn, stride_kd, stride_rest_n, stride_rest_d, k_end, HEAD_DIM, REST_COL,
                    REST_SIZE, BLOCK_N, BLOCK_D, BLOCK_REST, phase > 0, WIDE, TMA, TRANSPOSE_KEYS, PRECISION, k_at,
                    SCATTERED, FLOAT8_ASM,
                )  # fmt: skip
                if SHIFT == CAP_SERIES and attempt == 0:
                    s = series_exponent(qk, constant, linear)
                else:
                    s, _slope = score_tile(qk, softmax_scale, logits_soft_cap, bias, RAW, SOFT_CAP, HAS_BIAS)
                s = add_alibi(s, alibi, q_pos[:, None], kv_pos[None, :], start_n, q_len, kv_len, HAS_ALIBI)
                s = mask_scores(
                    s, q_pos[:, None], kv_pos[None, :], kv_len, starts[:, None], ends[:, None], q_id[:, None],
                    kv_id[None, :], key_keep[None, :], mask_keep, band_lower, band_upper, cut, phase, HAS_LOWER,
                    HAS_UPPER, HAS_START, HAS_END, HAS_IDS and (phase > 0 or not RANGED),
                    HAS_KEY_MASK and (phase > 0 or not RANGED), HAS_ATTN_MASK,
                )  # fmt: skip

                if SHIFT == RUNNING_MAX or (SHIFT == FIRST_MAX and attempt == 1):
                    top = tl.max(s, 1)
                    if RAW:
                        top = top * scale_log2
                    m_new = tl.maximum(m_i, top)
                    # A row that has seen no key yet: subtract 0 instead of -inf, which would give NaN.
                    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
                    alpha = tl.exp2((m_i - m_safe) * LOG2E) if HAS_BIAS else tl.exp2(m_i - m_safe)
                    l_i = l_i * alpha
                    acc = acc * alpha[:, None]
                    m_i = m_new
                    if HALF:
                        m_safe = m_safe - WEIGHT_SHIFT
                else:
                    m_safe = m_i
                if SHIFT == CAP_SERIES and attempt == 0:
                    p = tl.exp2(s + LARGER)
                else:
                    p = tl.exp2(exponent(s, m_safe[:, None], scale_log2, RAW, HAS_BIAS, LARGER))
                l_i += tl.sum(p, 1)
                if HAS_DROPOUT:
                    p = tl.where(dropout_keep(seed, row_index[:, None], kv_pos[None, :], kv_len, dropout_p), p, 0.0)
                v_source, v_at, v_first, v_end = place_tile(
                    v, page, start_n, used_end, stride_vb, stride_vn, PAGE, BLOCK_N
                )
                v_tile = load_head_tile(
                    v_source, batch, kv_head, v_first, stride_vn, stride_ve, v_end, 0, V_HEAD_DIM, BLOCK_N, BLOCK_E,
                    phase > 0, WIDE, TMA, v_at, SCATTERED,
                )  # fmt: skip
                v_tile = widen(v_tile, q_tile.dtype, FLOAT8_ASM)
                weights = truncate(p) if TRUNCATE else p.to(v_tile.dtype)
                acc = tl.dot(weights, v_tile, acc, input_precision=PRECISION)

    m_i += offset
    if TRUNCATE:
        m_i -= LARGER * LN2 if HAS_BIAS else LARGER
        acc = acc * (1.0 + TRUNCATION)
    if HALF:
        m_i = m_i - WEIGHT_SHIFT
    row_flat = (batch * num_heads + head + (row % PACK)) * q_len + q_pos
    v_factor = 1.0
    if HAS_V_SCALE:
        v_factor *= tl.load(v_scale + kv_head * stride_v_scale).to(tl.float32)
    if SPLIT:
        share_flat = row_flat * num_splits + split
        if HAS_V_SCALE:
            acc = acc * v_factor
        tl.store(
            (partial + share_flat * V_HEAD_DIM)[:, None] + offs_e[None, :], acc, mask=row_ok[:, None] & e_ok[None, :]
        )
        tl.store(partial_stats + share_flat * 2, m_i, mask=row_ok)
        tl.store(partial_stats + share_flat * 2 + 1, l_i, mask=row_ok)
    else:
        # A float, not a bool, so that what Triton moves between register layouts is a 32-bit value.
        hole = tl.where(l_i == 0.0, 1.0, 0.0)
        if EMPTY_ROWS == EMPTY_MEAN or EMPTY_ROWS == EMPTY_MEAN_ADDED:
            # Every key, also those outside the visited range, with equal weight. Rows with a key have weight 0 here.
            if tl.max(hole) != 0.0:
                for i in range(tl.cdiv(kv_len, BLOCK_N)):
                    start_n = i * BLOCK_N
                    kv_pos = start_n + tl.arange(0, BLOCK_N)
                    page = start_n
                    if PAGE > 0:
                        last_page = kv_len // PAGE - 1
                        page = pages_of_tile(block_table, start_n, last_page, num_blocks, stride_tn, PAGE, BLOCK_N)
                    v_source, v_at, v_first, v_end = place_tile(
                        v, page, start_n, kv_len, stride_vb, stride_vn, PAGE, BLOCK_N
                    )
                    v_tile = load_head_tile(
                        v_source, batch, kv_head, v_first, stride_vn, stride_ve, v_end, 0, V_HEAD_DIM, BLOCK_N,
                        BLOCK_E, True, WIDE, TMA, v_at, SCATTERED,
                    )  # fmt: skip
                    v_tile = widen(v_tile, q_tile.dtype, FLOAT8_ASM)
                    one = (hole[:, None] != 0.0) & (kv_pos < kv_len)[None, :]
                    if HAS_DROPOUT:
                        one &= dropout_keep(seed, row_index[:, None], kv_pos[None, :], kv_len, dropout_p)
                    acc = tl.dot(tl.where(one, 1.0, 0.0).to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
                acc = tl.where(hole[:, None] != 0.0, acc / kv_len, acc)
        if HAS_V_SCALE:
            acc = acc * v_factor
        sink = m_i
        if HAS_SINKS:
            sink = tl.load(sinks + head + (row % PACK)).to(tl.float32)
        result, row_lse = finish_rows(acc, m_i, l_i, sink, HAS_SINKS, HAS_BIAS, EMPTY_ROWS)
        if HAS_DROPOUT:
            result = result / (1.0 - dropout_p)
        out += batch * stride_ob + head_long * stride_oh + q_first_long * stride_om
        out_ptrs = out + (head_local * stride_oh + q_local * stride_om)[:, None] + offs_e[None, :] * stride_oe
        tl.store(out_ptrs, result.to(out.dtype.element_ty), mask=row_ok[:, None] & e_ok[None, :])
        tl.store(lse + row_flat, row_lse, mask=row_ok)
