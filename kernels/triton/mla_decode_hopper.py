"""The decode kernel of latent attention for Hopper, in Gluon: as mla_decode.py, with warps of different roles.

A program owns 64 rows and takes two blocks of 64 tokens at a time. One warp group multiplies the queries with block 0,
the other with block 1, and makes their probabilities; the two exchange them, and each owns half of the columns of the
accumulator. A warp of its own copies the next blocks in as soon as both groups have let go of one. So while one group
computes exponentials, the other keeps the matrix units busy, and a block of tokens lies in shared memory once.

    group 0:  s0 = q k0^T   m0, p0 ------.    o_left  += p0 v0_left    (p1) o_left  += p1 v1_left
    group 1:  s1 = q k1^T   waits for m0 '--> m1, p1   o_right += p0 v0_right   o_right += p1 v1_right

Triton itself waits for a product where its result is first used, and has no roles for warps on Hopper.

Programs that share the keys of a tile take pairs of blocks in turn.

Letters as in mla_decode.py. kv_lora_rank is 257 to 512: what is missing is read as 0. The scale is positive.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_parts import LN2, LOG2E, NEVER, barrier, finite, row_limits, signal
from .mla_hopper_parts import (
    BLOCK_N,
    HALF,
    clear_rows,
    copy_half,
    load_queries,
    places,
    row_of,
)

BLOCK_M = gl.constexpr(64)


@gluon.jit
def copy_blocks(
    kv, k_pe, block_table, kv_smem, pe_smem, full, free, batch, begin, end, step, used_start, used_end,
    BOX: gl.constexpr, BLOCK_R: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """The copying warp: two blocks at a time, each half when its group has let go of the one before."""
    phase = 1
    for first in range(begin, end, step):
        for side in gl.static_range(2):
            # Past the end the last block again; its scores are masked.
            block = gl.minimum(first + side, end - 1)
            found = places(block_table, block, batch, used_start, used_end, BOX, PAGE)
            for half in gl.static_range(2):
                bar = full.index(2 * side + half)
                mbarrier.wait(free.index(2 * side + half), phase)
                copy_half(kv, k_pe, found, kv_smem.index(2 * side + half), pe_smem.index(side), bar, half, BOX, BLOCK_R)
        phase ^= 1


@gluon.jit
def attend(
    q, q_pe, out, lse, partial, partial_stats, key_mask, kv_start, kv_end, q_smem, kv_smem, pe_smem, p_smem, row_smem,
    full, free, ready, done, stride_qb, stride_qh, stride_qm, stride_pb, stride_ph, stride_pm, stride_ob,
    stride_oh, stride_om, stride_key_n, stride_start_m, stride_end_m, tile, split, batch, num_heads, q_len, kv_len,
    num_splits, scale_log2, band_lower, band_upper, begin, end, step, full_begin, full_end, used_start, used_end,
    SIDE: gl.constexpr, LATENT: gl.constexpr, ROPE: gl.constexpr, BLOCK_R: gl.constexpr,
    SPLIT: gl.constexpr, HAS_KEY_MASK: gl.constexpr, HAS_START: gl.constexpr, HAS_END: gl.constexpr,
    HAS_LOWER: gl.constexpr, HAS_UPPER: gl.constexpr, NAN_ROWS: gl.constexpr,
):  # fmt: skip
    """One warp group; SIDE says which block of a pair and which half of the columns are its own."""
    dtype: gl.constexpr = q_smem.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    query: gl.constexpr = gl.DotOperandLayout(0, scores, 2)
    weight: gl.constexpr = gl.DotOperandLayout(0, result, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, scores)
    batch_long = batch.to(gl.int64)
    row_ok, q_pos, head = row_of(tile, num_heads, q_len * num_heads, BLOCK_M, by_row)
    q_row = q_pos.to(gl.int64)
    lower, upper = row_limits(q_pos, kv_len, kv_start, kv_end, stride_start_m, stride_end_m, band_lower, band_upper,
                              HAS_START, HAS_END, HAS_LOWER, HAS_UPPER)  # fmt: skip
    # Each group brings its half of the queries; both use both.
    q += batch_long * stride_qb
    load_queries(q, tile, num_heads, q_len, stride_qh, stride_qm, BLOCK_M, SIDE * HALF, HALF, LATENT,
                 q_smem.index(SIDE))  # fmt: skip
    fence_async_shared()
    signal(done.index(0))
    if BLOCK_R > 0:
        _ok, pe_pos, pe_head = row_of(tile, num_heads, q_len * num_heads, BLOCK_M, gl.SliceLayout(1, query))
        offset = batch_long * stride_pb + pe_head * stride_ph + pe_pos.to(gl.int64) * stride_pm
        columns = gl.arange(0, BLOCK_R, layout=gl.SliceLayout(0, query))
        q_pe_tile = gl.load(q_pe + offset[:, None] + columns[None, :], mask=(columns < ROPE)[None, :], other=0.0)

    m_i = gl.full([BLOCK_M], NEVER, gl.float32, layout=by_row)
    l_i = gl.full([BLOCK_M], 0.0, gl.float32, layout=by_row)
    acc = gl.full([BLOCK_M, HALF], 0.0, gl.float32, layout=result)
    nothing = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, layout=scores)
    mbarrier.wait(done.index(0), 0)
    phase = 0
    for first in range(begin, end, step):
        block = first + SIDE
        mbarrier.wait(full.index(2 * SIDE), phase)
        start_n = block * BLOCK_N
        if (used_end < start_n + BLOCK_N) | (used_start > start_n):
            # What lies outside may be anything, also not a number.
            mbarrier.wait(full.index(2 * SIDE + 1), phase)
            for half in gl.static_range(2):
                clear_rows(kv_smem.index(2 * SIDE + half), used_start - start_n, used_end - start_n)
            fence_async_shared()
            barrier()
        s = warpgroup_mma(q_smem.index(0), kv_smem.index(2 * SIDE).permute((1, 0)), nothing, use_acc=False,
                          is_async=True)  # fmt: skip
        mbarrier.wait(full.index(2 * SIDE + 1), phase)
        s = warpgroup_mma(q_smem.index(1), kv_smem.index(2 * SIDE + 1).permute((1, 0)), s, is_async=True)
        if BLOCK_R > 0:
            s = warpgroup_mma(q_pe_tile, pe_smem.index(SIDE).permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        if (block < full_begin) | (block >= full_end):
            kv_pos = block * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, scores))
            keep = (kv_pos[None, :] >= lower[:, None]) & (kv_pos[None, :] < upper[:, None])
            s = gl.where(keep, s, NEVER)
        if HAS_KEY_MASK:
            kv_pos = block * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, scores))
            kept = gl.load(key_mask + kv_pos.to(gl.int64) * stride_key_n, mask=kv_pos < kv_len, other=0) != 0
            s = gl.where(kept[None, :], s, NEVER)
        top = gl.max(s, 1) * scale_log2
        if SIDE == 0:
            m0 = gl.maximum(m_i, top)
            p = gl.exp2(s * scale_log2 - finite(m0)[:, None])
            alpha0 = gl.exp2(m_i - finite(m0))
            mine = p.to(dtype)
            p_smem.index(0).store(mine)
            row_smem.index(0).store(m0)
            signal(ready.index(0))
            mine = gl.convert_layout(mine, weight)
            acc = acc * gl.convert_layout(alpha0, gl.SliceLayout(1, result))[:, None]
            acc = warpgroup_mma(mine, kv_smem.index(0), acc, is_async=True)
            l_i = l_i * alpha0 + gl.sum(p, 1)
            mbarrier.wait(ready.index(1), phase)
            other = p_smem.index(1).load(weight)
            m_i = row_smem.index(1).load(by_row)
            alpha1 = gl.exp2(m0 - finite(m_i))
            l_i = l_i * alpha1
            acc = warpgroup_mma_wait(0, deps=[acc])
            signal(free.index(0))
            acc = acc * gl.convert_layout(alpha1, gl.SliceLayout(1, result))[:, None]
            acc = warpgroup_mma(other, kv_smem.index(2), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            signal(free.index(2))
        else:
            mbarrier.wait(ready.index(0), phase)
            m0 = row_smem.index(0).load(by_row)
            m1 = gl.maximum(m0, top)
            p = gl.exp2(s * scale_log2 - finite(m1)[:, None])
            mine = p.to(dtype)
            p_smem.index(1).store(mine)
            row_smem.index(1).store(m1)
            signal(ready.index(1))
            other = p_smem.index(0).load(weight)
            alpha0 = gl.exp2(m_i - finite(m0))
            alpha1 = gl.exp2(m0 - finite(m1))
            # Both products in a row: the first one's weights are scaled, not their result.
            shrink = gl.convert_layout(alpha1, gl.SliceLayout(1, weight))[:, None]
            other = (other.to(gl.float32) * shrink).to(dtype)
            acc = acc * gl.convert_layout(alpha0 * alpha1, gl.SliceLayout(1, result))[:, None]
            acc = warpgroup_mma(other, kv_smem.index(1), acc, is_async=True)
            acc = warpgroup_mma(gl.convert_layout(mine, weight), kv_smem.index(3), acc, is_async=True)
            l_i = l_i * (alpha0 * alpha1) + gl.sum(p, 1)
            m_i = m1
            acc = warpgroup_mma_wait(1, deps=[acc])
            signal(free.index(1))
            acc = warpgroup_mma_wait(0, deps=[acc])
            signal(free.index(3))
        phase ^= 1

    row_smem.index(2 + SIDE).store(l_i)
    signal(done.index(1))
    mbarrier.wait(done.index(1), 0)
    l_i += row_smem.index(3 - SIDE).load(by_row)
    row_flat = (batch_long * num_heads + head) * q_len + q_row
    columns = SIDE * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, result))
    if SPLIT:
        share_flat = row_flat * num_splits + split
        store_half(partial, share_flat * LATENT, row_ok, acc, columns, LATENT, result)
        if SIDE == 0:
            gl.store(partial_stats + share_flat * 2, m_i, mask=row_ok)
            gl.store(partial_stats + share_flat * 2 + 1, l_i, mask=row_ok)
    else:
        empty = l_i == 0.0
        total = gl.where(empty, 1.0, l_i)
        if NAN_ROWS:
            total = gl.where(empty, float("nan"), total)
        acc = acc / gl.convert_layout(total, gl.SliceLayout(1, result))[:, None]
        offset = batch_long * stride_ob + head * stride_oh + q_row * stride_om
        store_half(out, offset, row_ok, acc, columns, LATENT, result)
        if SIDE == 0:
            gl.store(lse + row_flat, gl.where(empty, NEVER, m_i * LN2 + gl.log2(total) * LN2), mask=row_ok)


@gluon.jit
def store_half(base, offset, row_ok, tile, columns, LATENT: gl.constexpr, layout: gl.constexpr):
    """Store a group's half of the result; `offset` of each row."""
    rows = gl.convert_layout(offset, gl.SliceLayout(1, layout))
    ok = gl.convert_layout(row_ok.to(gl.int32), gl.SliceLayout(1, layout)) != 0
    gl.store(
        base + rows[:, None] + columns[None, :],
        tile.to(base.dtype.element_ty),
        mask=ok[:, None] & (columns < LATENT)[None, :],
    )


@gluon.jit(do_not_specialize=["q_len", "kv_len", "num_splits", "band_lower", "band_upper"])
def mla_decode_hopper_kernel(
    q, q_pe, kv, k_pe, block_table, out, lse, partial, partial_stats, key_mask, kv_start, kv_end,
    stride_qb, stride_qh, stride_qm, stride_pb, stride_ph, stride_pm, stride_tb, stride_ob, stride_oh, stride_om,
    stride_key_b, stride_key_n, stride_start_b, stride_start_m, stride_end_b, stride_end_m,
    num_heads, q_len, kv_len, num_splits, softmax_scale, band_lower, band_upper,
    LATENT: gl.constexpr, ROPE: gl.constexpr, BLOCK_R: gl.constexpr, BOX: gl.constexpr, PAGE: gl.constexpr,
    SPLIT: gl.constexpr, HAS_KEY_MASK: gl.constexpr, HAS_START: gl.constexpr, HAS_END: gl.constexpr,
    HAS_LOWER: gl.constexpr, HAS_UPPER: gl.constexpr, NAN_ROWS: gl.constexpr,
):  # fmt: skip
    """As mla_decode_kernel with TMA. NAN_ROWS: a row without keys gives NaN, not 0.

    kv and k_pe are tensor descriptors of BOX tokens, and of HALF and BLOCK_R columns. BOX divides PAGE and BLOCK_N.
    """
    dtype: gl.constexpr = q.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    WIDTH_R: gl.constexpr = BLOCK_R if BLOCK_R > 0 else 16
    shared_pe: gl.constexpr = gl.NVMMASharedLayout(min(2 * WIDTH_R, 128), 16, rank=2)
    simple: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_M, HALF], shared)
    kv_smem = gl.allocate_shared_memory(dtype, [4, BLOCK_N, HALF], shared)
    pe_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_N, WIDTH_R], shared_pe)
    p_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_M, BLOCK_N], shared)
    row_smem = gl.allocate_shared_memory(gl.float32, [4, BLOCK_M], simple)
    full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(done.index(i), count=2)

    rows_len = q_len * num_heads
    num_tiles = gl.cdiv(rows_len, BLOCK_M)
    pid = gl.program_id(0)
    tile = pid % num_tiles
    split = pid // num_tiles % num_splits
    batch = pid // num_tiles // num_splits
    batch_long = batch.to(gl.int64)
    if HAS_START:
        kv_start += batch_long * stride_start_b
    if HAS_END:
        kv_end += batch_long * stride_end_b
    if HAS_KEY_MASK:
        key_mask += batch_long * stride_key_b
    if PAGE > 0:
        block_table += batch_long * stride_tb
    # All rows in each warp: what follows needs no exchange between warps.
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    _ok, q_pos, _head = row_of(tile, num_heads, rows_len, BLOCK_M, layout)
    lower, upper = row_limits(q_pos, kv_len, kv_start, kv_end, stride_start_m, stride_end_m, band_lower, band_upper,
                              HAS_START, HAS_END, HAS_LOWER, HAS_UPPER)  # fmt: skip
    used_start = gl.maximum(gl.min(lower, 0), 0)
    used_end = gl.maximum(gl.max(upper, 0), 0)
    begin = used_start // BLOCK_N + 2 * split
    end = gl.cdiv(used_end, BLOCK_N)
    full_begin = gl.cdiv(gl.max(lower, 0), BLOCK_N)
    full_end = gl.maximum(gl.min(upper, 0), 0) // BLOCK_N

    barrier()
    scale_log2 = softmax_scale * LOG2E
    # Written out twice: constants stay constants only in the call itself.
    gl.warp_specialize(
        [
            (attend, (
                q, q_pe, out, lse, partial, partial_stats, key_mask, kv_start, kv_end, q_smem, kv_smem, pe_smem, p_smem,
                row_smem, full, free, ready, done, stride_qb, stride_qh, stride_qm, stride_pb, stride_ph,
                stride_pm, stride_ob, stride_oh, stride_om, stride_key_n, stride_start_m, stride_end_m, tile, split,
                batch, num_heads, q_len, kv_len, num_splits, scale_log2, band_lower, band_upper, begin, end,
                2 * num_splits, full_begin, full_end, used_start, used_end, 0, LATENT, ROPE, BLOCK_R, SPLIT,
                HAS_KEY_MASK, HAS_START, HAS_END, HAS_LOWER, HAS_UPPER, NAN_ROWS,
            )),
            (attend, (
                q, q_pe, out, lse, partial, partial_stats, key_mask, kv_start, kv_end, q_smem, kv_smem, pe_smem, p_smem,
                row_smem, full, free, ready, done, stride_qb, stride_qh, stride_qm, stride_pb, stride_ph,
                stride_pm, stride_ob, stride_oh, stride_om, stride_key_n, stride_start_m, stride_end_m, tile, split,
                batch, num_heads, q_len, kv_len, num_splits, scale_log2, band_lower, band_upper, begin, end,
                2 * num_splits, full_begin, full_end, used_start, used_end, 1, LATENT, ROPE, BLOCK_R, SPLIT,
                HAS_KEY_MASK, HAS_START, HAS_END, HAS_LOWER, HAS_UPPER, NAN_ROWS,
            )),
            (copy_blocks, (
                kv, k_pe, block_table, kv_smem, pe_smem, full, free, batch, begin, end, 2 * num_splits, used_start,
                used_end, BOX, BLOCK_R, PAGE,
            )),
        ],
        [4, 1],
        [240, 32],
    )  # fmt: skip
