"""The decode kernel of latent attention for Hopper, in Gluon: as mla_decode.py, with warps of different roles.

A program owns 64 rows and takes two blocks of 64 tokens at a time. One warp group multiplies the queries with block 0,
the other with block 1, and makes their probabilities; the two exchange them through shared memory, and each owns half
of the columns of the accumulator. A warp of its own copies the next blocks in as soon as a group has let go of half of
one. So while one group computes exponentials, the other keeps the matrix units busy, and a block of tokens lies in
shared memory once.

    group 0:  s0 = q k0^T   m0, p0 ------.    o_left  += p0 v0_left    (p1) o_left  += p1 v1_left
    group 1:  s1 = q k1^T                '--> o_right += p0 v0_right   m1, p1   o_right += p1 v1_right

Queries come in, and shares go out, through tensor descriptors where a tile's rows are heads of one position. Shares may
be float16 under a power of two for each row, half of the bytes: their error is an eighth of bfloat16's.

Triton itself waits for a product where its result is first used, and has no roles for warps on Hopper.

Programs that share the keys of a tile take pairs of blocks in turn.

Letters as in mla_decode.py. kv_lora_rank is 257 to 512: what is missing is read as 0. The scale is positive.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_parts import (
    LN2,
    LOG2E,
    NEVER,
    barrier,
    clear_tokens,
    finite,
    launch_dependents,
    opaque_zero,
    row_limits,
    signal,
)
from .mla_hopper_parts import (
    BLOCK_N,
    HALF,
    copy_half,
    copy_queries,
    load_queries,
    places,
    row_of,
)

BLOCK_M = gl.constexpr(64)


@gluon.jit
def copy_blocks(
    kv, k_pe, block_table, left_smem, right_smem, pe_smem, full, free, batch, begin, end, step, used_start, used_end,
    BOX: gl.constexpr, BLOCK_R: gl.constexpr, PAGE: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """The copying warp: two blocks at a time, each half when its group has let go of the one before.

    With EARLY (1, not 0) behind the first two.
    """
    phase = 1 - EARLY
    begin += EARLY * step
    for first in range(begin, end, step):
        for side in gl.static_range(2):
            # Past the end the last block again; its scores are masked.
            block = gl.minimum(first + side, end - 1)
            found = places(block_table, block, batch, used_start, used_end, BOX, PAGE)
            mbarrier.wait(free.index(2 * side), phase)
            copy_half(
                kv, k_pe, found, left_smem.index(side), pe_smem.index(side), full.index(2 * side), 0, BOX, BLOCK_R
            )
            mbarrier.wait(free.index(2 * side + 1), phase)
            copy_half(kv, k_pe, found, right_smem.index(side), pe_smem.index(side), full.index(2 * side + 1), 1, BOX,
                      BLOCK_R)  # fmt: skip
        phase ^= 1


@gluon.jit
def attend(
    share_boxes, q, q_pe, out, lse, partial, partial_stats, key_mask, kv_start, kv_end, q_smem, left_smem, right_smem,
    pe_smem, p_smem, row_smem, full, free, ready, done, stride_qb, stride_qh, stride_qm, stride_pb, stride_ph,
    stride_pm, stride_ob, stride_oh, stride_om, stride_key_n, stride_start_m, stride_end_m, tile, split, batch,
    num_heads, q_len, kv_len, num_splits, scale_log2, band_lower, band_upper, begin, end, step, full_begin, full_end,
    used_start, used_end, SIDE: gl.constexpr, QUERY_TMA: gl.constexpr, LATENT: gl.constexpr, ROPE: gl.constexpr,
    BLOCK_R: gl.constexpr, EARLY: gl.constexpr, SPLIT: gl.constexpr, HAS_KEY_MASK: gl.constexpr,
    HAS_START: gl.constexpr, HAS_END: gl.constexpr, HAS_LOWER: gl.constexpr, HAS_UPPER: gl.constexpr,
    NAN_ROWS: gl.constexpr,
):  # fmt: skip
    """One warp group; SIDE says which block of a pair and which half of the columns are its own."""
    dtype: gl.constexpr = q_smem.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    query: gl.constexpr = gl.DotOperandLayout(0, scores, 2)
    weight: gl.constexpr = gl.DotOperandLayout(0, result, 2)
    out_row: gl.constexpr = gl.SliceLayout(1, result)
    own_smem = right_smem if SIDE == 1 else left_smem
    by_row: gl.constexpr = gl.SliceLayout(1, scores)
    batch_long = batch.to(gl.int64)
    row_ok, q_pos, head = row_of(tile, num_heads, q_len * num_heads, BLOCK_M, by_row)
    q_row = q_pos.to(gl.int64)
    lower, upper = row_limits(q_pos, kv_len, kv_start, kv_end, stride_start_m, stride_end_m, band_lower, band_upper,
                              HAS_START, HAS_END, HAS_LOWER, HAS_UPPER)  # fmt: skip
    if QUERY_TMA:
        mbarrier.wait(done.index(0), 0)
        if BLOCK_R > 0:
            q_pe_tile = pe_queries(p_smem.index(SIDE), BLOCK_R).load(query)
    else:
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
        mbarrier.wait(done.index(0), 0)

    m_i = gl.full([BLOCK_M], NEVER, gl.float32, layout=by_row)
    l_i = gl.full([BLOCK_M], 0.0, gl.float32, layout=by_row)
    acc = gl.full([BLOCK_M, HALF], 0.0, gl.float32, layout=result)
    nothing = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, layout=scores)
    phase = 0
    for first in range(begin, end, step):
        block = first + SIDE
        # Opaque, and of this round: else LLVM makes the descriptors of all products before the loop, 60 registers, and
        # what is spilled for them is loaded again in each round.
        zero = opaque_zero()
        at = zero + SIDE
        mbarrier.wait(full.index(2 * SIDE), phase)
        start_n = block * BLOCK_N
        if (used_end < start_n + BLOCK_N) | (used_start > start_n):
            # What lies outside may be anything, also not a number.
            mbarrier.wait(full.index(2 * SIDE + 1), phase)
            clear_tokens(left_smem.index(SIDE), used_start - start_n, used_end - start_n, BLOCK_N, 1)
            clear_tokens(right_smem.index(SIDE), used_start - start_n, used_end - start_n, BLOCK_N, 1)
            fence_async_shared()
            barrier()
        s = warpgroup_mma(q_smem.index(zero), left_smem.index(at).permute((1, 0)), nothing, use_acc=False,
                          is_async=True)  # fmt: skip
        mbarrier.wait(full.index(2 * SIDE + 1), phase)
        s = warpgroup_mma(q_smem.index(zero + 1), right_smem.index(at).permute((1, 0)), s, is_async=True)
        if BLOCK_R > 0:
            s = warpgroup_mma(q_pe_tile, pe_smem.index(at).permute((1, 0)), s, is_async=True)
        m_old = m_i
        if SIDE == 0:
            s = warpgroup_mma_wait(0, deps=[s])
        else:
            # The other group's weights are multiplied while the scores are on their way.
            mbarrier.wait(ready.index(0), phase)
            m_old = row_smem.index(0).load(by_row)
            alpha = gl.exp2(m_i - finite(m_old))
            l_i = l_i * alpha
            acc = acc * gl.convert_layout(alpha, out_row)[:, None]
            acc = warpgroup_mma(p_smem.index(0), right_smem.index(zero), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
        if (block < full_begin) | (block >= full_end):
            kv_pos = block * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, scores))
            keep = (kv_pos[None, :] >= lower[:, None]) & (kv_pos[None, :] < upper[:, None])
            s = gl.where(keep, s, NEVER)
        if HAS_KEY_MASK:
            kv_pos = block * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, scores))
            kept = gl.load(key_mask + kv_pos.to(gl.int64) * stride_key_n, mask=kv_pos < kv_len, other=0) != 0
            s = gl.where(kept[None, :], s, NEVER)
        m_i = gl.maximum(m_old, gl.max(s, 1) * scale_log2)
        p = gl.exp2(s * scale_log2 - finite(m_i)[:, None])
        alpha = gl.exp2(m_old - finite(m_i))
        mine = p.to(dtype)
        p_smem.index(SIDE).store(mine)
        row_smem.index(SIDE).store(m_i)
        fence_async_shared()
        signal(ready.index(SIDE))
        l_i = l_i * alpha + gl.sum(p, 1)
        if SIDE == 1:
            # ptxas moves a wait for a product up to the start of its block of instructions: this wait, which is over
            # at once, starts one behind the exponentials.
            mbarrier.wait(ready.index(0), phase)
            acc = warpgroup_mma_wait(0, deps=[acc])
            signal(free.index(1))
        acc = acc * gl.convert_layout(alpha, out_row)[:, None]
        acc = warpgroup_mma(gl.convert_layout(mine, weight), own_smem.index(at), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        signal(free.index(3 * SIDE))
        if SIDE == 0:
            mbarrier.wait(ready.index(1), phase)
            m_old = m_i
            m_i = row_smem.index(1).load(by_row)
            alpha = gl.exp2(m_old - finite(m_i))
            l_i = l_i * alpha
            acc = acc * gl.convert_layout(alpha, out_row)[:, None]
            acc = warpgroup_mma(p_smem.index(1), left_smem.index(zero + 1), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            signal(free.index(2))
        phase ^= 1

    if EARLY > 0:
        if begin >= end:
            # Nothing of it is used, but it must be here before this program ends.
            mbarrier.wait(full.index(2 * SIDE), 0)
            mbarrier.wait(full.index(2 * SIDE + 1), 0)
    if SPLIT:
        SCALED: gl.constexpr = partial.dtype.element_ty == gl.float16
        if SCALED:
            size = gl.max(gl.abs(acc), 1)
            row_smem.index(4 + SIDE).store(size)
    row_smem.index(2 + SIDE).store(l_i)
    signal(done.index(1))
    mbarrier.wait(done.index(1), 0)
    l_i += row_smem.index(3 - SIDE).load(by_row)
    row_flat = (batch_long * num_heads + head) * q_len + q_row
    if SPLIT:
        launch_dependents()
        share_flat = row_flat * num_splits + split
        STATS: gl.constexpr = 3 if SCALED else 2
        if SCALED:
            scale = power_below(gl.maximum(size, row_smem.index(5 - SIDE).load(out_row)))
            acc = acc * (1.0 / scale)[:, None]
            if SIDE == 1:
                scale = gl.convert_layout(scale, by_row)
                gl.store(partial_stats + share_flat * STATS + 2, scale, mask=row_ok)
        if QUERY_TMA:
            copy_share(share_boxes, tile, batch, split, num_heads, acc, own_smem, SIDE * HALF)
        else:
            store_half(partial, share_flat * LATENT, row_ok, acc, own_smem, SIDE * HALF, LATENT)
        if SIDE == 0:
            gl.store(partial_stats + share_flat * STATS, m_i, mask=row_ok)
            gl.store(partial_stats + share_flat * STATS + 1, l_i, mask=row_ok)
    else:
        empty = l_i == 0.0
        total = gl.where(empty, 1.0, l_i)
        if NAN_ROWS:
            total = gl.where(empty, float("nan"), total)
        acc = acc / gl.convert_layout(total, out_row)[:, None]
        offset = batch_long * stride_ob + head * stride_oh + q_row * stride_om
        store_half(out, offset, row_ok, acc, own_smem, SIDE * HALF, LATENT)
        if SIDE == 0:
            gl.store(lse + row_flat, gl.where(empty, NEVER, m_i * LN2 + gl.log2(total) * LN2), mask=row_ok)


@gluon.jit
def pe_queries(p_smem, BLOCK_R: gl.constexpr):
    """A group's room for weights as room for the rotated queries, which are in registers before there are weights."""
    layout: gl.constexpr = gl.NVMMASharedLayout(min(2 * BLOCK_R, 128), 16, rank=2)
    return p_smem._reinterpret(p_smem.dtype, [BLOCK_M, BLOCK_R], layout)


@gluon.jit
def power_below(size):
    """The power of two that divides numbers up to `size` so that they fill float16: to less than 2 ** 15.

    Numbers that are 2 ** 28 times as small as `size` lose bits. Bounded below; zeros and infinities stay what they are.
    """
    exponent = gl.maximum(size.to(gl.int32, bitcast=True) & 0x7F800000, 15 << 23)
    return (exponent - (14 << 23)).to(gl.float32, bitcast=True)


@gluon.jit
def copy_share(share_boxes, tile, batch, split, num_heads, acc, room, COLUMN: gl.constexpr):
    """Store a group's half of a share through a descriptor, by way of shared memory, `room`."""
    dtype: gl.constexpr = share_boxes.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, dtype.primitive_bitwidth, rank=2)
    staged = room._reinterpret(dtype, [BLOCK_M, HALF], layout)
    staged.store(acc.to(dtype))
    fence_async_shared()
    barrier()
    row = tile * BLOCK_M
    q_pos = row // num_heads
    tma.async_copy_shared_to_global(share_boxes, [batch, q_pos, row - q_pos * num_heads, split, COLUMN], staged)
    tma.store_wait(0)


@gluon.jit
def store_half(base, offset, row_ok, tile, room, COLUMN: gl.constexpr, LATENT: gl.constexpr):
    """Store a group's half of the result, from COLUMN on; `offset` of each row.

    It goes through shared memory, `room`, so that a warp writes whole rows: a thread's numbers are two here, two there.
    """
    dtype: gl.constexpr = base.dtype.element_ty
    BITS: gl.constexpr = dtype.primitive_bitwidth
    layout: gl.constexpr = gl.BlockedLayout([1, 128 // BITS], [1, 32], [4, 1], [1, 0])
    rows = gl.convert_layout(offset, gl.SliceLayout(1, layout))
    ok = gl.convert_layout(row_ok.to(gl.int32), gl.SliceLayout(1, layout)) != 0
    columns = COLUMN + gl.arange(0, HALF, layout=gl.SliceLayout(0, layout))
    shared: gl.constexpr = gl.NVMMASharedLayout(128, BITS, rank=2)
    staged = room._reinterpret(dtype, [BLOCK_M, HALF], shared)
    staged.store(tile.to(dtype))
    barrier()
    gl.store(
        base + rows[:, None] + columns[None, :], staged.load(layout), mask=ok[:, None] & (columns < LATENT)[None, :]
    )


@gluon.jit(do_not_specialize=["q_len", "kv_len", "num_splits", "band_lower", "band_upper"])
def mla_decode_hopper_kernel(
    q, q_pe, q_boxes, q_pe_boxes, share_boxes, kv, k_pe, block_table, out, lse, partial, partial_stats, key_mask,
    kv_start, kv_end, stride_qb, stride_qh, stride_qm, stride_pb, stride_ph, stride_pm, stride_tb, stride_ob, stride_oh,
    stride_om, stride_key_b, stride_key_n, stride_start_b, stride_start_m, stride_end_b, stride_end_m, num_heads, q_len,
    kv_len, num_splits, softmax_scale, band_lower, band_upper, QUERY_TMA: gl.constexpr, LATENT: gl.constexpr,
    ROPE: gl.constexpr, BLOCK_R: gl.constexpr, BOX: gl.constexpr, PAGE: gl.constexpr, SPLIT: gl.constexpr,
    HAS_KEY_MASK: gl.constexpr, HAS_START: gl.constexpr, HAS_END: gl.constexpr, HAS_LOWER: gl.constexpr,
    HAS_UPPER: gl.constexpr, NAN_ROWS: gl.constexpr,
):  # fmt: skip
    """As mla_decode_kernel with TMA. NAN_ROWS: a row without keys gives NaN, not 0.

    kv and k_pe are tensor descriptors of BOX tokens, and of HALF and BLOCK_R columns. BOX divides PAGE and BLOCK_N.
    With QUERY_TMA q_boxes, q_pe_boxes and share_boxes are such of queries and shares, see mla_descriptors.py.
    """
    dtype: gl.constexpr = q.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    WIDTH_R: gl.constexpr = BLOCK_R if BLOCK_R > 0 else 16
    shared_pe: gl.constexpr = gl.NVMMASharedLayout(min(2 * WIDTH_R, 128), 16, rank=2)
    simple: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_M, HALF], shared)
    left_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_N, HALF], shared)
    right_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_N, HALF], shared)
    pe_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_N, WIDTH_R], shared_pe)
    p_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_M, BLOCK_N], shared)
    row_smem = gl.allocate_shared_memory(gl.float32, [6, BLOCK_M], simple)
    full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
    mbarrier.init(done.index(0), count=1 if QUERY_TMA else 2)
    mbarrier.init(done.index(1), count=2)

    rows_len = q_len * num_heads
    num_tiles = gl.cdiv(rows_len, BLOCK_M)
    pid = gl.program_id(0)
    tile = pid % num_tiles
    split = pid // num_tiles % num_splits
    batch = pid // num_tiles // num_splits
    barrier()
    if QUERY_TMA:
        # They are on their way before anything is known of the keys.
        rooms = p_smem.index(0), p_smem.index(1)
        if BLOCK_R > 0:
            rooms = pe_queries(rooms[0], BLOCK_R), pe_queries(rooms[1], BLOCK_R)
        copy_queries(q_boxes, q_pe_boxes, tile, batch, num_heads, q_smem, rooms, done.index(0), BLOCK_R)
    # So are the first blocks, where their place does not depend on that either.
    EARLY: gl.constexpr = 1 if PAGE == 0 and not HAS_START and not HAS_LOWER else 0
    if EARLY > 0:
        for side in gl.static_range(2):
            found = places(block_table, 2 * split + side, batch, 0, 0, BOX, PAGE)
            copy_half(kv, k_pe, found, left_smem.index(side), pe_smem.index(side), full.index(2 * side), 0, BOX,
                      BLOCK_R)  # fmt: skip
            copy_half(kv, k_pe, found, right_smem.index(side), pe_smem.index(side), full.index(2 * side + 1), 1, BOX,
                      BLOCK_R)  # fmt: skip
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
                share_boxes, q, q_pe, out, lse, partial, partial_stats, key_mask, kv_start, kv_end, q_smem, left_smem,
                right_smem, pe_smem, p_smem, row_smem, full, free, ready, done, stride_qb, stride_qh, stride_qm,
                stride_pb, stride_ph, stride_pm, stride_ob, stride_oh, stride_om, stride_key_n, stride_start_m,
                stride_end_m, tile, split, batch, num_heads, q_len, kv_len, num_splits, scale_log2, band_lower,
                band_upper, begin, end, 2 * num_splits, full_begin, full_end, used_start, used_end, 0, QUERY_TMA,
                LATENT, ROPE, BLOCK_R, EARLY, SPLIT, HAS_KEY_MASK, HAS_START, HAS_END, HAS_LOWER, HAS_UPPER, NAN_ROWS,
            )),
            (attend, (
                share_boxes, q, q_pe, out, lse, partial, partial_stats, key_mask, kv_start, kv_end, q_smem, left_smem,
                right_smem, pe_smem, p_smem, row_smem, full, free, ready, done, stride_qb, stride_qh, stride_qm,
                stride_pb, stride_ph, stride_pm, stride_ob, stride_oh, stride_om, stride_key_n, stride_start_m,
                stride_end_m, tile, split, batch, num_heads, q_len, kv_len, num_splits, scale_log2, band_lower,
                band_upper, begin, end, 2 * num_splits, full_begin, full_end, used_start, used_end, 1, QUERY_TMA,
                LATENT, ROPE, BLOCK_R, EARLY, SPLIT, HAS_KEY_MASK, HAS_START, HAS_END, HAS_LOWER, HAS_UPPER, NAN_ROWS,
            )),
            (copy_blocks, (
                kv, k_pe, block_table, left_smem, right_smem, pe_smem, full, free, batch, begin, end, 2 * num_splits,
                used_start, used_end, BOX, BLOCK_R, PAGE, EARLY,
            )),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
