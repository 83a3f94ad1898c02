"""The decode kernel of latent attention (MLA) in its absorbed form: one key/value head, whose values are its keys.

Keys are `[kv_c | k_pe]`, values are `kv_c` itself: a tile of kv_c is loaded once and multiplied twice, by the queries
and by the probabilities. One program owns BLOCK_M rows of one batch entry and a share of the keys; a row is one
(query position, head) pair, row = q * num_heads + head, so that all heads that fit in a tile share what is read.
combine.py adds up the shares. Blocks that no row keeps are never visited, as in forward.py.

The cache is contiguous, `(B, N, C)`, or paged: `(num_blocks, PAGE, C)` with a block table `(B, max_blocks)`.

Letters: B batch, H query heads, M q_len, N kv_len, C kv_lora_rank, R qk_rope_head_dim.
"""

import triton
import triton.language as tl

from .combine import finish_rows
from .common import LOG2E, kv_block_range, load_key_masks, load_row_masks, mask_scores, narrow

# As in forward.py; the batch changes while serving, too.
_RUNTIME_SIZES = ["batch_size", "q_len", "kv_len", "num_splits", "band_lower", "band_upper"]


@triton.jit
def load_rows(
    source, offset, row_ok, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr, AGAIN: tl.constexpr = False,
    TRANSPOSED: tl.constexpr = False,
):  # fmt: skip
    """Rows of SIZE adjacent elements that start at the offsets, BLOCK wide, 0 outside; CHECK: obey `row_ok`.

    AGAIN: In each round of a loop, although they stay the same. TRANSPOSED: As columns, by the pointers.
    """
    offs = tl.arange(0, BLOCK)
    if TRANSPOSED:
        ptrs = source + offset[None, :] + offs[:, None]
        row_ok = row_ok[None, :]
        size_ok = (offs < SIZE)[:, None]
    else:
        ptrs = source + offset[:, None] + offs[None, :]
        row_ok = row_ok[:, None]
        size_ok = (offs < SIZE)[None, :]
    if CHECK and BLOCK > SIZE:
        tile = tl.load(ptrs, mask=row_ok & size_ok, other=0.0, volatile=AGAIN)
    elif CHECK:
        tile = tl.load(ptrs, mask=row_ok, other=0.0, volatile=AGAIN)
    elif BLOCK > SIZE:
        tile = tl.load(ptrs, mask=size_ok, other=0.0, volatile=AGAIN)
    else:
        tile = tl.load(ptrs, volatile=AGAIN)
    return tile


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def mla_decode_kernel(
    q, q_pe, kv, k_pe, kv_blocks, pe_blocks, block_table, out, lse, partial, partial_stats, key_mask, kv_start, kv_end,
    stride_qb, stride_qh, stride_qm, stride_pb, stride_ph, stride_pm, stride_cb, stride_cn, stride_kb, stride_kn,
    stride_tb, stride_ob, stride_oh, stride_om,
    stride_key_b, stride_key_n, stride_start_b, stride_start_m, stride_end_b, stride_end_m,
    batch_size, num_heads, q_len, kv_len, num_splits, softmax_scale, band_lower, band_upper,
    LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr, TMA: tl.constexpr,
    MERGED: tl.constexpr, TILES_LAST: tl.constexpr, ROUND_BITS: tl.constexpr, TRANSPOSE_KEYS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr, HAS_LOWER: tl.constexpr,
    HAS_UPPER: tl.constexpr, EMPTY_ROWS: tl.constexpr, PRECISION: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """Absorbed latent attention; see the module docstring and the op `rocm_attn::mla_decode` for the arguments.

    Writes `out` and `lse`, or with SPLIT the shares as forward.py's kernel does. Every row's last stride is 1.

    PAGE is the block size of a paged cache, 0 for a contiguous one. With TMA, kv_blocks and pe_blocks are tensor
    descriptors of kv and k_pe, in blocks of one page or batch entry and BLOCK_N tokens, and BLOCK_N divides PAGE. Then
    MERGED is False for pages: a descriptor has no mask, and what lies behind the last token of a page may be not a
    number, so blocks that are cut are read through pointers.

    With PIECE < BLOCK_C (without TMA) the scores are added up from pieces of so many columns. Queries and keys of each
    are loaded for it: the registers do not hold all of the queries.
    """
    softmax_scale = tl.full((), softmax_scale, tl.float32)
    rows_len = q_len * num_heads
    num_tiles = tl.cdiv(rows_len, BLOCK_M)
    pid = tl.program_id(0)
    if TILES_LAST:
        entry = pid % (batch_size * num_splits)
        tile = pid // (batch_size * num_splits)
    else:
        entry = pid // num_tiles
        tile = pid % num_tiles
    split = entry % num_splits
    batch = (entry // num_splits).to(tl.int64)

    # Rows past the end repeat the last one: every load is in bounds without a mask, only stores are masked.
    row_store = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row_store < rows_len
    row = tl.minimum(row_store, rows_len - 1)
    q_first = tile * BLOCK_M // num_heads
    q_last = (tl.minimum((tile + 1) * BLOCK_M, rows_len) - 1) // num_heads
    q_pos = row // num_heads
    head = (row % num_heads).to(tl.int64)
    q_row = q_pos.to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    if HAS_START:
        kv_start += batch * stride_start_b
    if HAS_END:
        kv_end += batch * stride_end_b
    if HAS_KEY_MASK:
        key_mask += batch * stride_key_b
    starts, ends, _ids = load_row_masks(
        kv_start, kv_end, kv_end, stride_start_m, stride_end_m, stride_end_m, q_pos, kv_len, HAS_START, HAS_END, False
    )
    q_at = batch * stride_qb + head * stride_qh + q_row * stride_qm
    if PIECE == BLOCK_C:
        q_tile = load_rows(q, q_at, row_ok, LATENT, BLOCK_C, False)
    if BLOCK_R > 0:
        pe_at = batch * stride_pb + head * stride_ph + q_row * stride_pm
        if PIECE == BLOCK_C:
            q_pe_tile = load_rows(q_pe, pe_at, row_ok, ROPE, BLOCK_R, False)
    begin, full_begin, full_end, end = kv_block_range(
        q_first, q_last, kv_len, starts, ends, band_lower, band_upper, BLOCK_N, HAS_LOWER, HAS_UPPER, HAS_START, HAS_END
    )
    # No row needs a key outside: there a block table may hold anything.
    used_end = kv_len
    used_start = 0
    if HAS_END:
        used_end = tl.max(ends)
    if HAS_START:
        used_start = tl.min(starts)
    if SPLIT:
        share = tl.cdiv(end - begin, num_splits)
        begin = tl.minimum(begin + split * share, end)
        end = tl.minimum(begin + share, end)
        full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
        full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
    if PAGE > 0:
        block_table += batch * stride_tb

    scale_log2 = softmax_scale * LOG2E
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    slab = batch.to(tl.int32)
    for phase in tl.static_range(1 if MERGED else 2):
        if MERGED:
            first = begin
            last = end
        elif phase == 0:
            first = full_begin
            last = full_end
        else:
            first = begin
            last = end - (full_end - full_begin)
        if TMA and PAGE > 0 and phase == 0:
            # One block ahead: a load that waits for another one gets fewer stages of the pipeline.
            slab = tl.load(block_table + first * BLOCK_N // PAGE, mask=first < last, other=0)
        for i in range(first, last):
            block = i
            if phase == 1:
                block = tl.where(i < full_begin, i, i + (full_end - full_begin))
            start_n = block * BLOCK_N
            kv_pos = start_n + tl.arange(0, BLOCK_N)
            cut = (block < full_begin) | (block >= full_end)
            if TMA and (PAGE == 0 or phase == 0):
                at = start_n
                if PAGE > 0:
                    at = start_n % PAGE
                kv_tile = kv_blocks.load([slab, at, 0]).reshape(BLOCK_N, BLOCK_C)
                if BLOCK_R > 0:
                    pe_tile = pe_blocks.load([slab, at, 0]).reshape(BLOCK_N, BLOCK_R)
                if PAGE > 0:
                    slab = tl.load(block_table + (start_n + BLOCK_N) // PAGE, mask=i + 1 < last, other=0)
            else:
                used = (kv_pos >= used_start) & (kv_pos < used_end)
                if PAGE > 0:
                    if MERGED or phase > 0:
                        owner = tl.load(block_table + kv_pos // PAGE, mask=used, other=0).to(tl.int64)
                    else:
                        owner = tl.load(block_table + kv_pos // PAGE).to(tl.int64)
                    token = (kv_pos % PAGE).to(tl.int64)
                else:
                    owner = batch
                    token = kv_pos.to(tl.int64)
                kv_tile = load_rows(
                    kv, owner * stride_cb + token * stride_cn, used, LATENT, BLOCK_C, MERGED or phase > 0
                )
                if BLOCK_R > 0:
                    pe_tile = load_rows(
                        k_pe, owner * stride_kb + token * stride_kn, used, ROPE, BLOCK_R, MERGED or phase > 0, False,
                        TRANSPOSE_KEYS,
                    )  # fmt: skip
            # In units of log2. Scaled before they are added: Triton would make one chain of the two products, and give
            # the first of a chain warps along the rows only, so that on Hopper both warp groups compute the same rows.
            if TRANSPOSE_KEYS:
                k_tile = load_rows(
                    kv, owner * stride_cb + token * stride_cn, used, LATENT, BLOCK_C, MERGED or phase > 0, False, True
                )
                s = tl.dot(q_tile, k_tile, input_precision=PRECISION) * scale_log2
            elif PIECE == BLOCK_C:
                s = tl.dot(q_tile, tl.trans(kv_tile), input_precision=PRECISION) * scale_log2
            else:
                s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for column in tl.static_range(0, BLOCK_C, PIECE):
                    q_piece = load_rows(q + column, q_at, row_ok, LATENT - column, PIECE, False, True)
                    k_piece = load_rows(
                        kv + column, owner * stride_cb + token * stride_cn, used, LATENT - column, PIECE,
                        MERGED or phase > 0,
                    )  # fmt: skip
                    s += tl.dot(q_piece, tl.trans(k_piece), input_precision=PRECISION) * scale_log2
            if BLOCK_R > 0:
                if PIECE < BLOCK_C:
                    q_pe_tile = load_rows(q_pe, pe_at, row_ok, ROPE, BLOCK_R, False, True)
                if not TRANSPOSE_KEYS:
                    pe_tile = tl.trans(pe_tile)
                s += tl.dot(q_pe_tile, pe_tile, input_precision=PRECISION) * scale_log2
            key_keep, _id = load_key_masks(key_mask, key_mask, stride_key_n, stride_key_n, kv_pos, kv_len,
                                           HAS_KEY_MASK, False)  # fmt: skip
            s = mask_scores(
                s, q_pos[:, None], kv_pos[None, :], kv_len, starts[:, None], ends[:, None], 0, 0, key_keep[None, :], 0,
                band_lower, band_upper, cut, 2 if MERGED else phase, HAS_LOWER, HAS_UPPER, HAS_START, HAS_END, False,
                HAS_KEY_MASK, False,
            )  # fmt: skip
            m_new = tl.maximum(m_i, tl.max(s, 1))
            # A row that has seen no key yet: subtract 0 instead of -inf, which would give NaN.
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s - m_safe[:, None])
            alpha = tl.exp2(m_i - m_safe)
            l_i = l_i * alpha + tl.sum(p, 1)
            acc = acc * alpha[:, None]
            acc = tl.dot(narrow(p, kv_tile.dtype, ROUND_BITS), kv_tile, acc, input_precision=PRECISION)
            m_i = m_new

    c_ok = offs_c < LATENT
    row_flat = (batch * num_heads + head) * q_len + q_pos
    if SPLIT:
        share_flat = row_flat * num_splits + split
        tl.store((partial + share_flat * LATENT)[:, None] + offs_c[None, :], acc, mask=row_ok[:, None] & c_ok[None, :])
        tl.store(partial_stats + share_flat * 2, m_i, mask=row_ok)
        tl.store(partial_stats + share_flat * 2 + 1, l_i, mask=row_ok)
    else:
        result, row_lse = finish_rows(acc, m_i, l_i, m_i, False, False, EMPTY_ROWS)
        out_ptrs = (out + batch * stride_ob + head * stride_oh + q_row * stride_om)[:, None] + offs_c[None, :]
        tl.store(out_ptrs, result.to(out.dtype.element_ty), mask=row_ok[:, None] & c_ok[None, :])
        tl.store(lse + row_flat, row_lse, mask=row_ok)
