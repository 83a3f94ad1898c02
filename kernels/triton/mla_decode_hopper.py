"""The decode kernel of latent attention for Hopper, in Gluon: as mla_decode.py, but with products in flight.

Two warp groups own 64 rows. A block of 128 tokens lies in shared memory once, in four pieces of 128 columns of kv_c and
one of k_pe, each with its own barrier. Each group multiplies the queries with 64 of the tokens and owns half of the
columns of every piece of the accumulator. While the products p v of the later pieces run, the next block's copy into
the first pieces is under way, so no second buffer is needed, for which there would be no room.

Triton itself waits for a product where its result is first used and starts a copy only at the end of an iteration.

Letters as in mla_decode.py. kv_lora_rank is 257 to 512: what is missing is read as 0.
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

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
BLOCK_M = gl.constexpr(64)
BLOCK_N = gl.constexpr(128)
PIECE = gl.constexpr(128)
# Its name differs between Triton 3.6 and 3.7.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def copy_piece(source, slab, at, target, bar, COLUMN: gl.constexpr, WIDTH: gl.constexpr, pred):
    """Start the copy of BLOCK_N tokens and WIDTH columns into shared memory."""
    mbarrier.expect(bar, BLOCK_N * WIDTH * 2, pred=pred)
    tma.async_copy_global_to_shared(source, [slab, at, COLUMN], bar, target, pred=pred)


@gluon.jit
def load_queries(q, offset, COLUMN: gl.constexpr, LATENT: gl.constexpr, target):
    """Copy a piece of the queries into shared memory, 0 from LATENT on."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    rows = gl.convert_layout(offset, gl.SliceLayout(1, layout))
    columns = COLUMN + gl.arange(0, PIECE, layout=gl.SliceLayout(0, layout))
    tile = gl.load(q + rows[:, None] + columns[None, :], mask=(columns < LATENT)[None, :], other=0.0)
    target.store(tile)


@gluon.jit
def store_piece(base, offset, row_ok, tile, COLUMN: gl.constexpr, LATENT: gl.constexpr, layout: gl.constexpr):
    """Store a piece of the result; `offset` of each row."""
    columns = COLUMN + gl.arange(0, PIECE, layout=gl.SliceLayout(0, layout))
    gl.store(
        base + offset[:, None] + columns[None, :],
        tile.to(base.dtype.element_ty),
        mask=row_ok[:, None] & (columns < LATENT)[None, :],
    )


@gluon.jit(do_not_specialize=["q_len", "kv_len", "num_splits", "band_lower", "band_upper"])
def mla_decode_hopper_kernel(
    q, q_pe, kv, k_pe, block_table, out, lse, partial, partial_stats, key_mask, kv_start, kv_end,
    stride_qb, stride_qh, stride_qm, stride_pb, stride_ph, stride_pm, stride_tb, stride_ob, stride_oh, stride_om,
    stride_key_b, stride_key_n, stride_start_b, stride_start_m, stride_end_b, stride_end_m,
    num_heads, q_len, kv_len, num_splits, softmax_scale, band_lower, band_upper,
    LATENT: gl.constexpr, ROPE: gl.constexpr, BLOCK_R: gl.constexpr, PAGE: gl.constexpr, SPLIT: gl.constexpr,
    HAS_KEY_MASK: gl.constexpr, HAS_START: gl.constexpr, HAS_END: gl.constexpr, HAS_LOWER: gl.constexpr,
    HAS_UPPER: gl.constexpr, NAN_ROWS: gl.constexpr,
):  # fmt: skip
    """As mla_decode_kernel with TMA; BLOCK_N divides PAGE. NAN_ROWS: a row without keys gives NaN, not 0."""
    dtype: gl.constexpr = q.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    by_column: gl.constexpr = gl.SliceLayout(0, mma)
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    shared_pe: gl.constexpr = gl.NVMMASharedLayout(min(2 * BLOCK_R, 128) if BLOCK_R > 0 else 128, 16, rank=2)

    q_smem = gl.allocate_shared_memory(dtype, [4, BLOCK_M, PIECE], shared)
    kv_smem = gl.allocate_shared_memory(dtype, [4, BLOCK_N, PIECE], shared)
    p_smem = gl.allocate_shared_memory(dtype, [BLOCK_M, BLOCK_N], shared)
    bars = gl.allocate_shared_memory(gl.int64, [5, 1], mbarrier.MBarrierLayout())
    for g in gl.static_range(5):
        mbarrier.init(bars.index(g), count=1)
    if BLOCK_R > 0:
        pe_smem = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_R], shared_pe)

    rows_len = q_len * num_heads
    num_tiles = gl.cdiv(rows_len, BLOCK_M)
    pid = gl.program_id(0)
    tile = pid % num_tiles
    split = pid // num_tiles % num_splits
    batch = pid // num_tiles // num_splits
    batch_long = batch.to(gl.int64)

    # Rows past the end repeat the last one; only stores are masked.
    row_store = tile * BLOCK_M + gl.arange(0, BLOCK_M, layout=by_row)
    row_ok = row_store < rows_len
    row = gl.minimum(row_store, rows_len - 1)
    q_pos = row // num_heads
    head = (row % num_heads).to(gl.int64)
    q_row = q_pos.to(gl.int64)

    # The keys of each row are [lower, upper).
    lower = row * 0
    upper = lower + kv_len
    if HAS_START:
        start = gl.load(kv_start + batch_long * stride_start_b + q_row * stride_start_m)
        lower = gl.minimum(gl.maximum(start, 0), kv_len).to(gl.int32)
    if HAS_END:
        stop = gl.load(kv_end + batch_long * stride_end_b + q_row * stride_end_m)
        upper = gl.minimum(gl.maximum(stop, 0), kv_len).to(gl.int32)
    if HAS_LOWER:
        lower = gl.maximum(lower, q_pos + band_lower)
    if HAS_UPPER:
        upper = gl.minimum(upper, q_pos + band_upper + 1)
    begin = gl.min(lower, 0) // BLOCK_N
    end = gl.maximum(gl.cdiv(gl.maximum(gl.max(upper, 0), 0), BLOCK_N), begin)
    full_begin = gl.cdiv(gl.max(lower, 0), BLOCK_N)
    full_end = gl.maximum(gl.min(upper, 0), 0) // BLOCK_N
    share = gl.cdiv(end - begin, num_splits)
    begin = gl.minimum(begin + split * share, end)
    end = gl.minimum(begin + share, end)

    slab = batch
    at = begin * BLOCK_N
    some = begin < end
    if PAGE > 0:
        block_table += batch_long * stride_tb
        slab = gl.load(block_table + begin * BLOCK_N // PAGE, mask=some, other=0)
        at = begin * BLOCK_N % PAGE
    barrier()
    for g in gl.static_range(4):
        copy_piece(kv, slab, at, kv_smem.index(g), bars.index(g), g * 128, PIECE, some)
    if BLOCK_R > 0:
        copy_piece(k_pe, slab, at, pe_smem, bars.index(4), 0, BLOCK_R, some)

    q_offset = batch_long * stride_qb + head * stride_qh + q_row * stride_qm
    for g in gl.static_range(4):
        load_queries(q, q_offset, g * 128, LATENT, q_smem.index(g))
    if BLOCK_R > 0:
        pe_offset = gl.convert_layout(
            batch_long * stride_pb + head * stride_ph + q_row * stride_pm, gl.SliceLayout(1, operand)
        )
        columns = gl.arange(0, BLOCK_R, layout=gl.SliceLayout(0, operand))
        q_pe_tile = gl.load(q_pe + pe_offset[:, None] + columns[None, :], mask=(columns < ROPE)[None, :], other=0.0)
    fence_async_shared()
    barrier()

    scale_log2 = softmax_scale * LOG2E
    m_i = gl.full([BLOCK_M], float("-inf"), gl.float32, layout=by_row)
    l_i = gl.full([BLOCK_M], 0.0, gl.float32, layout=by_row)
    acc0 = gl.full([BLOCK_M, PIECE], 0.0, gl.float32, layout=mma)
    acc1 = gl.full([BLOCK_M, PIECE], 0.0, gl.float32, layout=mma)
    acc2 = gl.full([BLOCK_M, PIECE], 0.0, gl.float32, layout=mma)
    acc3 = gl.full([BLOCK_M, PIECE], 0.0, gl.float32, layout=mma)
    nothing = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, layout=mma)
    phase = 0
    for block in range(begin, end):
        kv_pos = block * BLOCK_N + gl.arange(0, BLOCK_N, layout=by_column)
        more = block + 1 < end
        slab = batch
        at = (block + 1) * BLOCK_N
        if PAGE > 0:
            slab = gl.load(block_table + at // PAGE, mask=more, other=0)
            at = at % PAGE
        mbarrier.wait(bars.index(0), phase)
        s = warpgroup_mma(q_smem.index(0), kv_smem.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
        for g in gl.static_range(1, 4):
            mbarrier.wait(bars.index(g), phase)
            s = warpgroup_mma(q_smem.index(g), kv_smem.index(g).permute((1, 0)), s, is_async=True)
        if BLOCK_R > 0:
            mbarrier.wait(bars.index(4), phase)
            s = warpgroup_mma(q_pe_tile, pe_smem.permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        if BLOCK_R > 0:
            barrier()
            copy_piece(k_pe, slab, at, pe_smem, bars.index(4), 0, BLOCK_R, more)
        s = s * scale_log2
        if (block < full_begin) | (block >= full_end):
            keep = (kv_pos[None, :] >= lower[:, None]) & (kv_pos[None, :] < upper[:, None])
            s = gl.where(keep, s, float("-inf"))
        if HAS_KEY_MASK:
            key_ptrs = key_mask + batch_long * stride_key_b + kv_pos.to(gl.int64) * stride_key_n
            s = gl.where((gl.load(key_ptrs, mask=kv_pos < kv_len, other=0) != 0)[None, :], s, float("-inf"))
        m_new = gl.maximum(m_i, gl.max(s, 1))
        # A row that has seen no key yet: subtract 0 instead of -inf, which would give NaN.
        m_safe = gl.where(m_new == float("-inf"), 0.0, m_new)
        p = gl.exp2(s - m_safe[:, None])
        alpha = gl.exp2(m_i - m_safe)
        p_smem.store(p.to(dtype))
        l_i = l_i * alpha + gl.sum(p, 1)
        m_i = m_new
        weights = p_smem.load(operand)
        acc0 = warpgroup_mma(weights, kv_smem.index(0), acc0 * alpha[:, None], is_async=True)
        acc1 = warpgroup_mma(weights, kv_smem.index(1), acc1 * alpha[:, None], is_async=True)
        acc2 = warpgroup_mma(weights, kv_smem.index(2), acc2 * alpha[:, None], is_async=True)
        acc3 = warpgroup_mma(weights, kv_smem.index(3), acc3 * alpha[:, None], is_async=True)
        acc0 = warpgroup_mma_wait(3, deps=[acc0])
        barrier()
        copy_piece(kv, slab, at, kv_smem.index(0), bars.index(0), 0, PIECE, more)
        acc1 = warpgroup_mma_wait(2, deps=[acc1])
        barrier()
        copy_piece(kv, slab, at, kv_smem.index(1), bars.index(1), 128, PIECE, more)
        acc2 = warpgroup_mma_wait(1, deps=[acc2])
        barrier()
        copy_piece(kv, slab, at, kv_smem.index(2), bars.index(2), 256, PIECE, more)
        acc3 = warpgroup_mma_wait(0, deps=[acc3])
        barrier()
        copy_piece(kv, slab, at, kv_smem.index(3), bars.index(3), 384, PIECE, more)
        phase ^= 1

    row_flat = (batch_long * num_heads + head) * q_len + q_row
    if SPLIT:
        share_flat = row_flat * num_splits + split
        offset = share_flat * LATENT
        store_piece(partial, offset, row_ok, acc0, 0, LATENT, mma)
        store_piece(partial, offset, row_ok, acc1, 128, LATENT, mma)
        store_piece(partial, offset, row_ok, acc2, 256, LATENT, mma)
        store_piece(partial, offset, row_ok, acc3, 384, LATENT, mma)
        gl.store(partial_stats + share_flat * 2, m_i, mask=row_ok)
        gl.store(partial_stats + share_flat * 2 + 1, l_i, mask=row_ok)
    else:
        empty = l_i == 0.0
        factor = 1.0 / gl.where(empty, 1.0, l_i)
        if NAN_ROWS:
            factor = gl.where(empty, float("nan"), factor)
        offset = batch_long * stride_ob + head * stride_oh + q_row * stride_om
        store_piece(out, offset, row_ok, acc0 * factor[:, None], 0, LATENT, mma)
        store_piece(out, offset, row_ok, acc1 * factor[:, None], 128, LATENT, mma)
        store_piece(out, offset, row_ok, acc2 * factor[:, None], 256, LATENT, mma)
        store_piece(out, offset, row_ok, acc3 * factor[:, None], 384, LATENT, mma)
        gl.store(lse + row_flat, gl.where(empty, float("-inf"), m_i * LN2 + gl.log2(1.0 / factor) * LN2), mask=row_ok)
