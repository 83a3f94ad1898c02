"""The decode kernel of latent attention for few heads on Hopper, in Gluon: as mla_decode.py, tokens in place of rows.

16 rows of queries are bound by memory. Matrix instructions of a warp group take 64 rows, so here these are tokens, or
columns of the latent: s^T = k q^T, and out^T = v^T p^T, both with 16 columns. So a block of tokens is an operand as it
lies in shared memory, for both products, and no tile of registers is larger than the result.

A warp of its own copies blocks of 64 tokens in, half by half; two and a half fit. Programs that share the keys of a
tile take blocks in turn.

Letters as in mla_decode.py; conditions as of mla_decode_hopper.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_parts import (
    LN2,
    LOG2E,
    NEVER,
    barrier,
    clear_tokens,
    launch_dependents,
    next_slot,
    opaque_zero,
    row_limits,
    signal,
    soft_weights,
    uniform,
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

BLOCK_M = gl.constexpr(16)
HALVES = gl.constexpr(5)
"""Slots of half a block each; a slot of k_pe for each of PE_SLOTS blocks is free whenever a half of its block is."""
PE_SLOTS = gl.constexpr(3)


@gluon.jit
def copy_blocks(
    kv, k_pe, block_table, kv_smem, pe_smem, full, free, batch, begin, end, step, used_start, used_end,
    BOX: gl.constexpr, BLOCK_R: gl.constexpr, PAGE: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """The copying warp: blocks of tokens, BOX tokens at once; with EARLY (1, not 0) behind the first block."""
    slot = 2 * EARLY
    phase = 1
    pe_slot = 1 * EARLY
    begin += EARLY * step
    ahead = places(block_table, begin, batch, used_start, used_end, BOX, PAGE)
    for block in range(begin, end, step):
        # Read while this block waits for room.
        found = ahead
        ahead = places(block_table, block + step, batch, used_start, used_end, BOX, PAGE)
        for half in gl.static_range(2):
            mbarrier.wait(free.index(slot), phase)
            pe_target = pe_smem.index(pe_slot)
            copy_half(kv, k_pe, found, kv_smem.index(slot), pe_target, full.index(slot), half, BOX, BLOCK_R)
            slot, phase = next_slot(slot, phase, HALVES)
        pe_slot = gl.where(pe_slot == PE_SLOTS - 1, 0, pe_slot + 1)


@gluon.jit
def attend(
    q, q_pe, out, lse, partial, partial_stats, key_mask, kv_start, kv_end, q_smem, q_pe_smem, kv_smem, pe_smem, p_smem,
    full, free, q_full, stride_qb, stride_qh, stride_qm, stride_pb, stride_ph, stride_pm, stride_ob, stride_oh,
    stride_om, stride_key_n, stride_start_m, stride_end_m, tile, split, batch, num_heads, q_len, kv_len, num_splits,
    scale_log2, band_lower, band_upper, begin, end, step, full_begin, full_end, used_start, used_end,
    QUERY_TMA: gl.constexpr, LATENT: gl.constexpr, ROPE: gl.constexpr, BLOCK_R: gl.constexpr, EARLY: gl.constexpr,
    SPLIT: gl.constexpr, HAS_KEY_MASK: gl.constexpr, HAS_START: gl.constexpr, HAS_END: gl.constexpr,
    HAS_LOWER: gl.constexpr, HAS_UPPER: gl.constexpr, NAN_ROWS: gl.constexpr,
):  # fmt: skip
    """The warp group that computes."""
    dtype: gl.constexpr = q_smem.dtype
    # Scores (token, row) and results (column, row).
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    by_row: gl.constexpr = gl.SliceLayout(0, scores)
    by_token: gl.constexpr = gl.SliceLayout(1, scores)
    batch_long = batch.to(gl.int64)
    row_ok, q_pos, head = row_of(tile, num_heads, q_len * num_heads, BLOCK_M, by_row)
    q_row = q_pos.to(gl.int64)
    lower, upper = row_limits(q_pos, kv_len, kv_start, kv_end, stride_start_m, stride_end_m, band_lower, band_upper,
                              HAS_START, HAS_END, HAS_LOWER, HAS_UPPER)  # fmt: skip
    if QUERY_TMA:
        mbarrier.wait(q_full, 0)
    else:
        q += batch_long * stride_qb
        for half in gl.static_range(2):
            load_queries(q, tile, num_heads, q_len, stride_qh, stride_qm, BLOCK_M, half * 256, HALF, LATENT,
                         q_smem.index(half))  # fmt: skip
        if BLOCK_R > 0:
            q_pe += batch_long * stride_pb
            load_queries(q_pe, tile, num_heads, q_len, stride_ph, stride_pm, BLOCK_M, 0, BLOCK_R, ROPE,
                         q_pe_smem.index(0))  # fmt: skip
        fence_async_shared()
        barrier()

    m_i = gl.full([BLOCK_M], NEVER, gl.float32, layout=by_row)
    sums = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, layout=scores)
    left = gl.full([HALF, BLOCK_M], 0.0, gl.float32, layout=scores)
    right = gl.full([HALF, BLOCK_M], 0.0, gl.float32, layout=scores)
    slot = 0
    phase = 0
    pe_slot = 0
    for block in range(begin, end, step):
        start_n = block * BLOCK_N
        other, other_phase = next_slot(slot, phase, HALVES)
        # All operands' places of this round, and known to be uniform: see opaque_zero and uniform.
        zero = opaque_zero()
        first = kv_smem.index(uniform(slot))
        second = kv_smem.index(uniform(other))
        weights = p_smem.index(zero)
        mbarrier.wait(full.index(slot), phase)
        if (used_end < start_n + BLOCK_N) | (used_start > start_n):
            # What lies outside may be anything, also not a number.
            mbarrier.wait(full.index(other), other_phase)
            clear_tokens(first, used_start - start_n, used_end - start_n, BLOCK_N, 1)
            clear_tokens(second, used_start - start_n, used_end - start_n, BLOCK_N, 1)
            fence_async_shared()
            barrier()
        s = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, layout=scores)
        s = warpgroup_mma(first, q_smem.index(zero).permute((1, 0)), s, use_acc=False, is_async=True)
        mbarrier.wait(full.index(other), other_phase)
        s = warpgroup_mma(second, q_smem.index(zero + 1).permute((1, 0)), s, is_async=True)
        if BLOCK_R > 0:
            pe_tile = pe_smem.index(uniform(pe_slot))
            s = warpgroup_mma(pe_tile, q_pe_smem.index(zero).permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        kv_pos = start_n + gl.arange(0, BLOCK_N, layout=by_token)
        if (block < full_begin) | (block >= full_end):
            s = gl.where((kv_pos[:, None] >= lower[None, :]) & (kv_pos[:, None] < upper[None, :]), s, NEVER)
        if HAS_KEY_MASK:
            kept = gl.load(key_mask + kv_pos.to(gl.int64) * stride_key_n, mask=kv_pos < kv_len, other=0) != 0
            s = gl.where(kept[:, None], s, NEVER)
        p, m_i, alpha, sums = soft_weights(s, m_i, sums, scale_log2)
        weights.store(p.to(dtype))
        fence_async_shared()
        barrier()
        left = left * alpha[None, :]
        right = right * alpha[None, :]
        left = warpgroup_mma(first.permute((1, 0)), weights, left, is_async=True)
        right = warpgroup_mma(second.permute((1, 0)), weights, right, is_async=True)
        left = warpgroup_mma_wait(1, deps=[left])
        signal(free.index(slot))
        right = warpgroup_mma_wait(0, deps=[right])
        signal(free.index(other))
        slot, phase = next_slot(other, other_phase, HALVES)
        pe_slot = gl.where(pe_slot == PE_SLOTS - 1, 0, pe_slot + 1)

    if EARLY > 0:
        if begin >= end:
            # Nothing of it is used, but it must be here before this program ends.
            mbarrier.wait(full.index(0), 0)
            mbarrier.wait(full.index(1), 0)
    l_i = gl.sum(sums, 0)
    row_flat = (batch_long * num_heads + head) * q_len + q_row
    columns = gl.arange(0, HALF, layout=by_token)
    if SPLIT:
        launch_dependents()
        share_flat = row_flat * num_splits + split
        target = partial + (share_flat * LATENT)[None, :] + columns[:, None]
        gl.store(target, left, mask=row_ok[None, :] & (columns < LATENT)[:, None])
        gl.store(target + HALF, right, mask=row_ok[None, :] & (columns + HALF < LATENT)[:, None])
        gl.store(partial_stats + share_flat * 2, m_i, mask=row_ok)
        gl.store(partial_stats + share_flat * 2 + 1, l_i, mask=row_ok)
    else:
        empty = l_i == 0.0
        total = gl.where(empty, 1.0, l_i)
        if NAN_ROWS:
            total = gl.where(empty, float("nan"), total)
        target = out + (batch_long * stride_ob + head * stride_oh + q_row * stride_om)[None, :] + columns[:, None]
        left = (left / total[None, :]).to(dtype)
        right = (right / total[None, :]).to(dtype)
        gl.store(target, left, mask=row_ok[None, :] & (columns < LATENT)[:, None])
        gl.store(target + HALF, right, mask=row_ok[None, :] & (columns + HALF < LATENT)[:, None])
        gl.store(lse + row_flat, gl.where(empty, NEVER, m_i * LN2 + gl.log2(total) * LN2), mask=row_ok)


@gluon.jit(do_not_specialize=["q_len", "kv_len", "num_splits", "band_lower", "band_upper"])
def mla_decode_few_kernel(
    q, q_pe, q_boxes, q_pe_boxes, kv, k_pe, block_table, out, lse, partial, partial_stats, key_mask, kv_start, kv_end,
    stride_qb, stride_qh, stride_qm, stride_pb, stride_ph, stride_pm, stride_tb, stride_ob, stride_oh, stride_om,
    stride_key_b, stride_key_n, stride_start_b, stride_start_m, stride_end_b, stride_end_m,
    num_heads, q_len, kv_len, num_splits, softmax_scale, band_lower, band_upper,
    QUERY_TMA: gl.constexpr, LATENT: gl.constexpr, ROPE: gl.constexpr, BLOCK_R: gl.constexpr, BOX: gl.constexpr,
    PAGE: gl.constexpr, SPLIT: gl.constexpr, HAS_KEY_MASK: gl.constexpr, HAS_START: gl.constexpr, HAS_END: gl.constexpr,
    HAS_LOWER: gl.constexpr, HAS_UPPER: gl.constexpr, NAN_ROWS: gl.constexpr,
):  # fmt: skip
    """As mla_decode_hopper_kernel. kv and k_pe are tensor descriptors of BOX tokens, and of HALF and BLOCK_R columns.

    BOX divides PAGE and BLOCK_N. QUERY_TMA, q_boxes and q_pe_boxes as there.
    """
    dtype: gl.constexpr = q.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    WIDTH_R: gl.constexpr = BLOCK_R if BLOCK_R > 0 else 16
    shared_pe: gl.constexpr = gl.NVMMASharedLayout(min(2 * WIDTH_R, 128), 16, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_M, HALF], shared)
    q_pe_smem = gl.allocate_shared_memory(dtype, [1, BLOCK_M, WIDTH_R], shared_pe)
    kv_smem = gl.allocate_shared_memory(dtype, [HALVES, BLOCK_N, HALF], shared)
    pe_smem = gl.allocate_shared_memory(dtype, [PE_SLOTS, BLOCK_N, WIDTH_R], shared_pe)
    p_smem = gl.allocate_shared_memory(dtype, [1, BLOCK_N, BLOCK_M], gl.NVMMASharedLayout(32, 16, rank=2))
    full = gl.allocate_shared_memory(gl.int64, [HALVES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [HALVES, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(HALVES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)

    rows_len = q_len * num_heads
    num_tiles = gl.cdiv(rows_len, BLOCK_M)
    pid = gl.program_id(0)
    tile = pid % num_tiles
    split = pid // num_tiles % num_splits
    batch = pid // num_tiles // num_splits
    barrier()
    if QUERY_TMA:
        # They are on their way before anything is known of the keys.
        copy_queries(q_boxes, q_pe_boxes, tile, batch, num_heads, q_smem, (q_pe_smem.index(0),), q_full, BLOCK_R)
    # So is the first block, where its place does not depend on that either.
    EARLY: gl.constexpr = 1 if PAGE == 0 and not HAS_START and not HAS_LOWER else 0
    if EARLY > 0:
        found = places(block_table, split, batch, 0, 0, BOX, PAGE)
        copy_half(kv, k_pe, found, kv_smem.index(0), pe_smem.index(0), full.index(0), 0, BOX, BLOCK_R)
        copy_half(kv, k_pe, found, kv_smem.index(1), pe_smem.index(0), full.index(1), 1, BOX, BLOCK_R)
    batch_long = batch.to(gl.int64)
    if HAS_START:
        kv_start += batch_long * stride_start_b
    if HAS_END:
        kv_end += batch_long * stride_end_b
    if HAS_KEY_MASK:
        key_mask += batch_long * stride_key_b
    if PAGE > 0:
        block_table += batch_long * stride_tb

    _ok, q_pos, _head = row_of(tile, num_heads, rows_len, BLOCK_M, gl.BlockedLayout([1], [32], [4], [0]))
    lower, upper = row_limits(q_pos, kv_len, kv_start, kv_end, stride_start_m, stride_end_m, band_lower, band_upper,
                              HAS_START, HAS_END, HAS_LOWER, HAS_UPPER)  # fmt: skip
    used_start = gl.maximum(gl.min(lower, 0), 0)
    used_end = gl.maximum(gl.max(upper, 0), 0)
    begin = used_start // BLOCK_N + split
    end = gl.cdiv(used_end, BLOCK_N)
    full_begin = gl.cdiv(gl.max(lower, 0), BLOCK_N)
    full_end = gl.maximum(gl.min(upper, 0), 0) // BLOCK_N

    barrier()
    gl.warp_specialize(
        [
            (attend, (
                q, q_pe, out, lse, partial, partial_stats, key_mask, kv_start, kv_end, q_smem, q_pe_smem, kv_smem,
                pe_smem, p_smem, full, free, q_full, stride_qb, stride_qh, stride_qm, stride_pb, stride_ph, stride_pm,
                stride_ob, stride_oh, stride_om, stride_key_n, stride_start_m, stride_end_m, tile, split, batch,
                num_heads, q_len, kv_len, num_splits, softmax_scale * LOG2E, band_lower, band_upper, begin, end,
                num_splits, full_begin, full_end, used_start, used_end, QUERY_TMA, LATENT, ROPE, BLOCK_R, EARLY,
                SPLIT, HAS_KEY_MASK, HAS_START, HAS_END, HAS_LOWER, HAS_UPPER, NAN_ROWS,
            )),
            (copy_blocks, (
                kv, k_pe, block_table, kv_smem, pe_smem, full, free, batch, begin, end, num_splits, used_start,
                used_end, BOX, BLOCK_R, PAGE, EARLY,
            )),
        ],
        [1],
        [56],
    )  # fmt: skip
