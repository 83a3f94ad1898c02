"""The forward kernel of prefill for Hopper, in Gluon: as forward.py, with warps of different roles.

A program takes tiles of 128 rows, one after the other. One warp copies queries, keys and values in through tensor
descriptors; two warp groups own 64 rows each. A group has the scores of the next block of keys computed while it adds
up the values of the present one, and both products run while it exponentiates the scores before them:

    s = q k[i]^T, acc += p v[i - 1]  in flight      p, m, l of s, when s is there      acc shrinks, when it is there

While one group exponentiates, the other's products keep the matrix units busy; they take turns in starting them.
This is the schedule of FlashAttention-3 (arXiv 2407.08608, section 3).

Letters as in common.py. The scale is positive.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .cap_series import series_holds
from .common import (
    CAP_SERIES,
    EMPTY_NAN,
    EMPTY_NAN_ADDED,
    FIRST_MAX,
    LARGEST_SUM,
    NO_CAP,
    NO_MAX,
    RUNNING_MAX,
    SMALLEST_SUM,
    kv_block_range,
)
from .forward_hopper_capped import attend_capped
from .hopper_parts import (
    LN2,
    LOG2E,
    NEVER,
    ROWS,
    barrier,
    finite,
    opaque_zero,
    release,
    row_limits,
    signal,
    store_boxes,
    thread_sums,
)
from .mask_ranges import load_range

BLOCK_M = gl.constexpr(128)
"""Rows of a tile."""


@gluon.jit
def tile_of(index, num_heads, gqa_group_size, q_len, HAS_UPPER: gl.constexpr):
    """`(batch, head, row_block)` of a tile: the heads of a group are neighbours, the longest rows come first."""
    num_row_blocks = gl.cdiv(q_len, BLOCK_M)
    num_kv_heads = num_heads // gqa_group_size
    tiles = gqa_group_size * num_row_blocks
    kv_index = index // tiles
    tile = index % tiles
    row_block = tile // gqa_group_size
    if HAS_UPPER:
        row_block = num_row_blocks - 1 - row_block
    return kv_index // num_kv_heads, kv_index % num_kv_heads * gqa_group_size + tile % gqa_group_size, row_block


@gluon.jit
def key_range(
    row_block, batch, q_len, kv_len, kv_start, kv_end, ranges, stride_start_b, stride_start_m, stride_end_b,
    stride_end_m, band_lower, band_upper, BLOCK_N: gl.constexpr, WARPS: gl.constexpr, HAS_START: gl.constexpr,
    HAS_END: gl.constexpr, HAS_LOWER: gl.constexpr, HAS_UPPER: gl.constexpr, RANGED: gl.constexpr,
):  # fmt: skip
    """common.kv_block_range of a tile, or what `ranges` says."""
    # All rows in each warp: no exchange between warps.
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    q_pos = gl.minimum(row_block * BLOCK_M + gl.arange(0, BLOCK_M, layout=layout), q_len - 1)
    q_first = row_block * BLOCK_M
    starts = q_pos
    ends = q_pos
    if HAS_START:
        at = batch.to(gl.int64) * stride_start_b + q_pos.to(gl.int64) * stride_start_m
        starts = gl.minimum(gl.maximum(gl.load(kv_start + at), 0), kv_len).to(gl.int32)
    if HAS_END:
        at = batch.to(gl.int64) * stride_end_b + q_pos.to(gl.int64) * stride_end_m
        ends = gl.minimum(gl.maximum(gl.load(kv_end + at), 0), kv_len).to(gl.int32)
    if RANGED:
        found = load_range(ranges, batch * gl.cdiv(q_len, BLOCK_M) + row_block)
    else:
        found = kv_block_range(
            q_first, gl.minimum(q_first + BLOCK_M, q_len) - 1, kv_len, starts, ends, band_lower, band_upper, BLOCK_N,
            HAS_LOWER, HAS_UPPER, HAS_START, HAS_END,
        )  # fmt: skip
    return found


@gluon.jit
def publish(tile_smem, tile_full, count, what):
    """Tell both groups which tile is the next, `2 * tile + repeated`, or -1: none."""
    slot = count & 1
    tile_smem.index(slot).store(gl.full([32], 0, gl.int32, layout=gl.BlockedLayout([1], [32], [1], [0])) + what)
    signal(tile_full.index(slot))


@gluon.jit
def receive(tile_smem, tile_full, count):
    """The counterpart of publish, for a group."""
    slot = count & 1
    mbarrier.wait(tile_full.index(slot), count >> 1 & 1)
    return gl.max(tile_smem.index(slot).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def finished(failed_smem, tile_done, count, SHIFT: gl.constexpr):
    """Wait until both groups are through with the tile that was published as number `count`: whether it failed."""
    slot = count & 1
    mbarrier.wait(tile_done.index(slot), count >> 1 & 1)
    failed = False
    if SHIFT == FIRST_MAX or SHIFT == CAP_SERIES:
        layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
        failed = gl.max(failed_smem.index(2 * slot).load(layout) | failed_smem.index(2 * slot + 1).load(layout), 0) != 0
    return failed


@gluon.jit
def copy_tiles(
    q, k, v, q_rest, k_rest, kv_start, kv_end, ranges, counters, q_smem, k_smem, v_smem, q_rest_smem, k_rest_smem,
    tile_smem, failed_smem, q_full, q_free, k_full, k_free, v_full, v_free, tile_full, tile_done,
    stride_start_b, stride_start_m, stride_end_b, stride_end_m,
    first_tile, num_tiles, num_programs, num_heads, gqa_group_size, q_len, kv_len,
    band_lower, band_upper,
    BLOCK_D: gl.constexpr, BLOCK_REST: gl.constexpr, BLOCK_E: gl.constexpr, ROPE: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, SHIFT: gl.constexpr, HAS_START: gl.constexpr, HAS_END: gl.constexpr,
    HAS_LOWER: gl.constexpr, HAS_UPPER: gl.constexpr, RANGED: gl.constexpr,
):  # fmt: skip
    """The copying warp, which also takes the tiles: the groups still compute when it has started all copies of one.

    A tile whose sums failed is taken again after the next one, which is on its way by then.
    """
    REST_COL: gl.constexpr = 0 if ROPE > 0 else BLOCK_D
    WIDTH: gl.constexpr = BLOCK_D + BLOCK_REST
    step = 0
    tiles = 0
    count = 0
    index = first_tile
    repeated = 0
    # Not first_tile: of two variables of a loop that start with the same value Triton takes the one that the other is
    # assigned to for a constant.
    before = -1
    is_checked = True
    while index >= 0:
        publish(tile_smem, tile_full, count, 2 * index + repeated)
        batch, head, row_block = tile_of(index, num_heads, gqa_group_size, q_len, HAS_UPPER)
        begin, _full_begin, _full_end, end = key_range(
            row_block, batch, q_len, kv_len, kv_start, kv_end, ranges, stride_start_b, stride_start_m, stride_end_b,
            stride_end_m, band_lower, band_upper, BLOCK_N, 1, HAS_START, HAS_END, HAS_LOWER, HAS_UPPER, RANGED,
        )  # fmt: skip
        kv_head = head // gqa_group_size
        rest_head = kv_head
        if ROPE > 0:
            rest_head = kv_head * 0
        if begin < end:
            for group in gl.static_range(2):
                row = row_block * BLOCK_M + group * ROWS
                bar = q_full.index(group)
                mbarrier.wait(q_free.index(group), (tiles & 1) ^ 1)
                mbarrier.expect(bar, ROWS * WIDTH * 2)
                tma.async_copy_global_to_shared(q, [batch, head, row, 0], bar, q_smem.index(group))
                if BLOCK_REST > 0:
                    tma.async_copy_global_to_shared(q_rest, [batch, head, row, REST_COL], bar, q_rest_smem.index(group))
            for block in range(begin, end):
                stage = step % STAGES
                phase = (step // STAGES & 1) ^ 1
                key = block * BLOCK_N
                bar = k_full.index(stage)
                mbarrier.wait(k_free.index(stage), phase)
                mbarrier.expect(bar, BLOCK_N * WIDTH * 2)
                tma.async_copy_global_to_shared(k, [batch, kv_head, key, 0], bar, k_smem.index(stage))
                if BLOCK_REST > 0:
                    tma.async_copy_global_to_shared(
                        k_rest, [batch, rest_head, key, REST_COL], bar, k_rest_smem.index(stage)
                    )
                bar = v_full.index(stage)
                mbarrier.wait(v_free.index(stage), phase)
                mbarrier.expect(bar, BLOCK_N * BLOCK_E * 2)
                tma.async_copy_global_to_shared(v, [batch, kv_head, key, 0], bar, v_smem.index(stage))
                step += 1
            tiles += 1

        following = before
        again = False
        if count > 0:
            again = finished(failed_smem, tile_done, count - 1, SHIFT) & (is_checked == 0)
        is_checked = False
        if again == 0:
            following = num_programs + gl.atomic_add(counters, 1, sem="relaxed")
            if following >= num_tiles:
                # Only this tile is left: was it well?
                again = finished(failed_smem, tile_done, count, SHIFT)
                following = gl.where(again, index, -1)
                is_checked = True
        before = index
        index = following
        repeated = again.to(gl.int32)
        count += 1
    publish(tile_smem, tile_full, count, -1)
    # The last program leaves them as they were.
    if gl.atomic_add(counters + 1, 1, sem="relaxed") == num_programs - 1:
        gl.store(counters, 0)
        gl.store(counters + 1, 0)


@gluon.jit
def start_scores(q, k, q_rest, k_rest, nothing, BLOCK_REST: gl.constexpr):
    """Start q k^T of a block."""
    s = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
    if BLOCK_REST > 0:
        s = warpgroup_mma(q_rest, k_rest.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def finish_scores(
    s, lower, upper, block, full_begin, full_end, inner, key_mask, q_id, kv_ids, stride_key_n, stride_kid_n, kv_len,
    BLOCK_N: gl.constexpr, SHIFT: gl.constexpr, SOFT_CAP: gl.constexpr, HAS_KEY_MASK: gl.constexpr,
    HAS_IDS: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Soft cap and masks, which are read only in blocks that they cut."""
    if SOFT_CAP != NO_CAP:
        s = gl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [s * inner], dtype=gl.float32, is_pure=True, pack=1
        )
    if (block < full_begin) | (block >= full_end):
        kv_pos = block * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
        keep = (kv_pos[None, :] >= lower[:, None]) & (kv_pos[None, :] < upper[:, None])
        at = gl.minimum(kv_pos, kv_len - 1).to(gl.int64)
        if HAS_KEY_MASK:
            keep &= (gl.load(key_mask + at * stride_key_n) != 0)[None, :]
        if HAS_IDS:
            keep &= gl.load(kv_ids + at * stride_kid_n)[None, :] == q_id[:, None]
        s = gl.where(keep, s, NEVER)
    return s


@gluon.jit
def attend_tile(
    q_smem, k_smem, v_smem, q_rest_smem, k_rest_smem, q_full, q_free, k_full, k_free, v_full, v_free, turn, begin,
    full_begin, full_end, end, lower, upper, step, tiles, turns, scale_log2, inner, key_mask, q_id, kv_ids,
    stride_key_n, stride_kid_n, kv_len,
    GROUP: gl.constexpr, BLOCK_REST: gl.constexpr, BLOCK_E: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    SHIFT: gl.constexpr, SOFT_CAP: gl.constexpr, HAS_KEY_MASK: gl.constexpr, HAS_IDS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """A group's rows of a tile with at least one block of keys: `acc`, `m`, `l`, and the number of the next block.

    With FIRST_MAX `m` is the maximum of the products with the first block of keys. With EARLY the next tile's queries
    may come when this one's last scores are there, else when its last weights are.
    """
    dtype: gl.constexpr = q_smem.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_E, 16])
    weight: gl.constexpr = gl.DotOperandLayout(0, result, 2)
    out_row: gl.constexpr = gl.SliceLayout(1, result)
    nothing = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, layout=scores)
    acc = gl.full([ROWS, BLOCK_E], 0.0, gl.float32, layout=result)
    m_i = gl.full([ROWS], 0.0, gl.float32, layout=gl.SliceLayout(1, scores))
    stage = step % STAGES
    phase = step // STAGES & 1
    mbarrier.wait(q_full.index(GROUP), tiles & 1)
    mbarrier.wait(k_full.index(stage), phase)
    s = start_scores(q_smem.index(GROUP), k_smem.index(stage), q_rest_smem.index(GROUP), k_rest_smem.index(stage),
                     nothing, BLOCK_REST)  # fmt: skip
    s = warpgroup_mma_wait(0, deps=[s])
    release(k_free.index(stage), q_free.index(GROUP), begin + 1 == end, EARLY)
    if SHIFT == FIRST_MAX:
        m_i = gl.max(s, 1) * scale_log2
    s = finish_scores(s, lower, upper, begin, full_begin, full_end, inner, key_mask, q_id, kv_ids, stride_key_n,
                      stride_kid_n, kv_len, BLOCK_N, SHIFT, SOFT_CAP, HAS_KEY_MASK, HAS_IDS, scores)  # fmt: skip
    if SHIFT == RUNNING_MAX:
        m_i = gl.max(s, 1) * scale_log2
    p = gl.exp2(s * scale_log2 - finite(m_i)[:, None])
    l_i = thread_sums(p)
    weights = gl.convert_layout(p.to(dtype), weight)
    mbarrier.wait(v_full.index(stage), phase)
    for block in range(begin + 1, end):
        last = stage
        step += 1
        stage = step % STAGES
        phase = step // STAGES & 1
        mbarrier.wait(k_full.index(stage), phase)
        mbarrier.wait(turn.index(GROUP), (turns & 1) ^ (1 - GROUP))
        s = start_scores(q_smem.index(GROUP), k_smem.index(stage), q_rest_smem.index(GROUP), k_rest_smem.index(stage),
                         nothing, BLOCK_REST)  # fmt: skip
        acc = warpgroup_mma(weights, v_smem.index(last), acc, is_async=True)
        signal(turn.index(1 - GROUP))
        turns += 1
        s = warpgroup_mma_wait(1, deps=[s])
        release(k_free.index(stage), q_free.index(GROUP), block + 1 == end, EARLY)
        s = finish_scores(s, lower, upper, block, full_begin, full_end, inner, key_mask, q_id, kv_ids, stride_key_n,
                          stride_kid_n, kv_len, BLOCK_N, SHIFT, SOFT_CAP, HAS_KEY_MASK, HAS_IDS, scores)  # fmt: skip
        if SHIFT == RUNNING_MAX:
            m_new = gl.maximum(m_i, gl.max(s, 1) * scale_log2)
            alpha = gl.exp2(m_i - finite(m_new))
            m_i = m_new
            l_i = l_i * gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout), assert_trivial=True)[:, None]
        p = gl.exp2(s * scale_log2 - finite(m_i)[:, None])
        l_i += thread_sums(p)
        # ptxas moves a wait for a product up to the start of its block of instructions. So that the exponentials
        # stay before it, that block starts here, with the wait for the copy of v.
        mbarrier.wait(v_full.index(stage), phase)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        signal(v_free.index(last))
        if SHIFT == RUNNING_MAX:
            acc = acc * gl.convert_layout(alpha, out_row)[:, None]
        weights = gl.convert_layout(p.to(dtype), weight)
    if not EARLY:
        signal(q_free.index(GROUP))
    acc = warpgroup_mma(weights, v_smem.index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    signal(v_free.index(stage))
    l_i = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, scores), assert_trivial=True)
    return acc, m_i, l_i, step + 1, turns


@gluon.jit
def attend(
    out, out_boxes, lse, kv_start, kv_end, key_mask, q_ids, kv_ids, ranges, sinks, q_smem, k_smem, v_smem, q_rest_smem,
    k_rest_smem, out_smem, tile_smem, failed_smem, q_full, q_free, k_full, k_free, v_full, v_free, turn, tile_full,
    tile_done, stride_ob, stride_oh, stride_om, stride_start_b, stride_start_m, stride_end_b, stride_end_m,
    stride_key_b, stride_key_n, stride_qid_b, stride_qid_m, stride_kid_b, stride_kid_n, num_heads, gqa_group_size,
    q_len, kv_len, scale_log2, inner, band_lower, band_upper,
    GROUP: gl.constexpr, V_HEAD_DIM: gl.constexpr, BLOCK_REST: gl.constexpr, BLOCK_E: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SHIFT: gl.constexpr,
    SOFT_CAP: gl.constexpr, HAS_START: gl.constexpr, HAS_END: gl.constexpr, HAS_LOWER: gl.constexpr,
    HAS_UPPER: gl.constexpr, HAS_KEY_MASK: gl.constexpr, HAS_IDS: gl.constexpr, RANGED: gl.constexpr,
    HAS_SINKS: gl.constexpr, EMPTY_ROWS: gl.constexpr, BOX_E: gl.constexpr,
):  # fmt: skip
    """One warp group; GROUP says which rows of a tile are its own."""
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_E, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, scores)
    out_row: gl.constexpr = gl.SliceLayout(1, result)
    AGAIN: gl.constexpr = NO_MAX if SHIFT == CAP_SERIES else RUNNING_MAX
    # For tiles that are computed again it hardly matters. But what ptxas makes of the polynomial's loop beside that one
    # is 1 to 2 % faster with it under a causal mask, and without it where there is none (docs/kernels.md).
    EARLY: gl.constexpr = SHIFT != CAP_SERIES or HAS_UPPER
    step = 0
    turns = 0
    tiles = 0
    count = 0
    what = receive(tile_smem, tile_full, count)
    while what >= 0:
        batch, head, row_block = tile_of(what >> 1, num_heads, gqa_group_size, q_len, HAS_UPPER)
        begin, full_begin, full_end, end = key_range(
            row_block, batch, q_len, kv_len, kv_start, kv_end, ranges, stride_start_b, stride_start_m, stride_end_b,
            stride_end_m, band_lower, band_upper, BLOCK_N, 4, HAS_START, HAS_END, HAS_LOWER, HAS_UPPER, RANGED,
        )  # fmt: skip
        batch_long = batch.to(gl.int64)
        head_long = head.to(gl.int64)
        q_first = row_block * BLOCK_M + GROUP * ROWS
        starts = kv_start
        ends = kv_end
        if HAS_START:
            starts += batch_long * stride_start_b
        if HAS_END:
            ends += batch_long * stride_end_b
        q_pos = gl.minimum(q_first + gl.arange(0, ROWS, layout=by_row), q_len - 1)
        lower, upper = row_limits(q_pos, kv_len, starts, ends, stride_start_m, stride_end_m, band_lower, band_upper,
                                  HAS_START, HAS_END, HAS_LOWER, HAS_UPPER)  # fmt: skip
        key_mask_row = key_mask
        kv_ids_row = kv_ids
        q_id = q_pos
        if HAS_KEY_MASK:
            key_mask_row += batch_long * stride_key_b
        if HAS_IDS:
            kv_ids_row += batch_long * stride_kid_b
            q_id = gl.load(q_ids + batch_long * stride_qid_b + q_pos.to(gl.int64) * stride_qid_m)
        m_i = gl.full([ROWS], NEVER, gl.float32, layout=by_row)
        l_i = gl.full([ROWS], 0.0, gl.float32, layout=by_row)
        acc = gl.full([ROWS, BLOCK_E], 0.0, gl.float32, layout=result)
        if begin < end:
            if SHIFT == FIRST_MAX or SHIFT == CAP_SERIES:
                if (what & 1) != 0:
                    acc, m_i, l_i, step, turns = attend_tile(
                        q_smem, k_smem, v_smem, q_rest_smem, k_rest_smem, q_full, q_free, k_full, k_free, v_full,
                        v_free, turn, begin, full_begin, full_end, end, lower, upper, step, tiles, turns, scale_log2,
                        inner, key_mask_row, q_id, kv_ids_row, stride_key_n, stride_kid_n, kv_len, GROUP, BLOCK_REST,
                        BLOCK_E, BLOCK_N, STAGES, AGAIN, SOFT_CAP, HAS_KEY_MASK, HAS_IDS, EARLY,
                    )  # fmt: skip
                elif SHIFT == CAP_SERIES:
                    acc, l_i, step, turns = attend_capped(
                        q_smem, k_smem, v_smem, q_full, q_free, k_full, k_free, v_full, v_free, turn, begin, full_begin,
                        full_end, end, lower, upper, step, tiles, turns, scale_log2, inner, GROUP, BLOCK_E, BLOCK_N,
                        STAGES,
                    )  # fmt: skip
                    m_i = gl.full([ROWS], 0.0, gl.float32, layout=by_row)
                else:
                    acc, m_i, l_i, step, turns = attend_tile(
                        q_smem, k_smem, v_smem, q_rest_smem, k_rest_smem, q_full, q_free, k_full, k_free, v_full,
                        v_free, turn, begin, full_begin, full_end, end, lower, upper, step, tiles, turns, scale_log2,
                        inner, key_mask_row, q_id, kv_ids_row, stride_key_n, stride_kid_n, kv_len, GROUP, BLOCK_REST,
                        BLOCK_E, BLOCK_N, STAGES, SHIFT, SOFT_CAP, HAS_KEY_MASK, HAS_IDS, EARLY,
                    )  # fmt: skip
            else:
                acc, m_i, l_i, step, turns = attend_tile(
                    q_smem, k_smem, v_smem, q_rest_smem, k_rest_smem, q_full, q_free, k_full, k_free, v_full, v_free,
                    turn, begin, full_begin, full_end, end, lower, upper, step, tiles, turns, scale_log2, inner,
                    key_mask_row, q_id, kv_ids_row, stride_key_n, stride_kid_n, kv_len, GROUP, BLOCK_REST, BLOCK_E,
                    BLOCK_N, STAGES, SHIFT, SOFT_CAP, HAS_KEY_MASK, HAS_IDS, EARLY,
                )  # fmt: skip
            tiles += 1
        if SHIFT == FIRST_MAX:
            # Not a number is out of bounds, too.
            good = ((l_i > SMALLEST_SUM) & (l_i < LARGEST_SUM)) | (lower >= upper)
            failed_smem.index(2 * (count & 1) + GROUP).store(gl.where(good, 0, (what & 1) ^ 1))
        if SHIFT == CAP_SERIES:
            good = series_holds(l_i, upper - lower, scale_log2) | (lower >= upper)
            failed_smem.index(2 * (count & 1) + GROUP).store(gl.where(good, 0, (what & 1) ^ 1))
        signal(tile_done.index(count & 1))

        if HAS_SINKS:
            # Without a key m may be anything, and the sink takes all.
            m_i = gl.where(l_i == 0.0, NEVER, m_i)
            sink = gl.load(sinks + head).to(gl.float32) * LOG2E
            top = finite(gl.maximum(m_i, sink))
            shrink = gl.exp2(m_i - top)
            l_i = l_i * shrink + gl.exp2(sink - top)
            acc = acc * gl.convert_layout(shrink, out_row)[:, None]
            m_i = top
        empty = l_i == 0.0
        total = gl.where(empty, 1.0, l_i)
        row = q_first + gl.arange(0, ROWS, layout=by_row)
        row_lse = gl.where(empty, NEVER, m_i * LN2 + gl.log2(total) * LN2)
        gl.store(lse + (batch_long * num_heads + head_long) * q_len + row, row_lse, mask=row < q_len)
        share = 1.0 / total
        if EMPTY_ROWS == EMPTY_NAN or EMPTY_ROWS == EMPTY_NAN_ADDED:
            share = gl.where(empty, float("nan"), share)
        acc = acc * gl.convert_layout(share, out_row)[:, None]
        if BOX_E > 0:
            # On its way while the next tile is computed.
            store_boxes(out_boxes, batch, head, q_first, acc, out_smem.index(GROUP), BLOCK_E, BOX_E)
        else:
            row = q_first + gl.arange(0, ROWS, layout=out_row)
            # Not made before all tiles, and held in 15 registers since: see opaque_zero. 16: still known to be aligned.
            column = gl.arange(0, BLOCK_E, layout=gl.SliceLayout(0, result)) + 16 * opaque_zero()
            start = out + batch_long * stride_ob + head_long * stride_oh
            pointers = start + (row.to(gl.int64) * stride_om)[:, None] + column[None, :]
            ok = (row < q_len)[:, None] & (column < V_HEAD_DIM)[None, :]
            gl.store(pointers, acc.to(out.dtype.element_ty), mask=ok)
        count += 1
        what = receive(tile_smem, tile_full, count)
    if BOX_E > 0:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["q_len", "kv_len", "num_tiles", "band_lower", "band_upper"])
def attention_forward_hopper_kernel(
    q, k, v, q_rest, k_rest, out, out_boxes, lse, kv_start, kv_end, key_mask, q_ids, kv_ids, ranges, sinks, counters,
    stride_ob, stride_oh, stride_om, stride_start_b, stride_start_m, stride_end_b, stride_end_m,
    stride_key_b, stride_key_n, stride_qid_b, stride_qid_m, stride_kid_b, stride_kid_n,
    num_heads, gqa_group_size, q_len, kv_len, num_tiles, softmax_scale, logits_soft_cap,
    band_lower, band_upper,
    V_HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_REST: gl.constexpr, BLOCK_E: gl.constexpr,
    ROPE: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SHIFT: gl.constexpr,
    SOFT_CAP: gl.constexpr, HAS_START: gl.constexpr, HAS_END: gl.constexpr, HAS_LOWER: gl.constexpr,
    HAS_UPPER: gl.constexpr, HAS_KEY_MASK: gl.constexpr, HAS_IDS: gl.constexpr, RANGED: gl.constexpr,
    HAS_SINKS: gl.constexpr, EMPTY_ROWS: gl.constexpr, BOX_E: gl.constexpr,
):  # fmt: skip
    """As attention_forward_kernel with TMA, and with RANGED where there is padding or are ids.

    Without bias, mask tensors, dropout, ALiBi, splits and caches.

    q, k, v, q_rest, k_rest are tensor descriptors of ROWS queries or BLOCK_N keys, and out_boxes one of `out`, of ROWS
    rows and BOX_E columns, all or half of them; with BOX_E = 0 there is none. Programs, no more than tiles, take tiles
    by counting: each its own, then the next of all. `counters`, int32 `(2,)`, are 0 before and afterwards.
    """
    dtype: gl.constexpr = q.dtype
    WIDTH_R: gl.constexpr = BLOCK_REST if BLOCK_REST > 0 else 16
    shared_d: gl.constexpr = gl.NVMMASharedLayout(min(2 * BLOCK_D, 128), 16, rank=2)
    shared_e: gl.constexpr = gl.NVMMASharedLayout(min(2 * BLOCK_E, 128), 16, rank=2)
    shared_r: gl.constexpr = gl.NVMMASharedLayout(min(2 * WIDTH_R, 128), 16, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [2, ROWS, BLOCK_D], shared_d)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], shared_d)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_E], shared_e)
    q_rest_smem = q_smem
    k_rest_smem = k_smem
    if BLOCK_REST > 0:
        q_rest_smem = gl.allocate_shared_memory(dtype, [2, ROWS, WIDTH_R], shared_r)
        k_rest_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, WIDTH_R], shared_r)
    out_smem = q_smem
    if BOX_E > 0:
        out_smem = gl.allocate_shared_memory(dtype, [2, ROWS, BOX_E], shared_e)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    simple: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tile_smem = gl.allocate_shared_memory(gl.int32, [2, 32], simple)
    failed_smem = gl.allocate_shared_memory(gl.int32, [4, ROWS], simple)
    tile_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    tile_done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(tile_full.index(i), count=1)
        mbarrier.init(tile_done.index(i), count=2)
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
        mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    barrier()
    scale_log2 = softmax_scale * LOG2E
    inner = softmax_scale
    if SOFT_CAP != NO_CAP:
        scale_log2 = logits_soft_cap * LOG2E
        inner = softmax_scale / logits_soft_cap
    # Written out twice: constants stay constants only in the call itself.
    gl.warp_specialize(
        [
            (attend, (
                out, out_boxes, lse, kv_start, kv_end, key_mask, q_ids, kv_ids, ranges, sinks, q_smem, k_smem, v_smem,
                q_rest_smem, k_rest_smem, out_smem, tile_smem, failed_smem, q_full, q_free, k_full, k_free, v_full,
                v_free, turn, tile_full, tile_done, stride_ob, stride_oh, stride_om, stride_start_b, stride_start_m,
                stride_end_b, stride_end_m, stride_key_b, stride_key_n, stride_qid_b, stride_qid_m, stride_kid_b,
                stride_kid_n, num_heads, gqa_group_size, q_len, kv_len, scale_log2, inner, band_lower, band_upper,
                0, V_HEAD_DIM, BLOCK_REST, BLOCK_E, BLOCK_N, STAGES, SHIFT, SOFT_CAP, HAS_START,
                HAS_END, HAS_LOWER, HAS_UPPER, HAS_KEY_MASK, HAS_IDS, RANGED, HAS_SINKS, EMPTY_ROWS, BOX_E,
            )),
            (attend, (
                out, out_boxes, lse, kv_start, kv_end, key_mask, q_ids, kv_ids, ranges, sinks, q_smem, k_smem, v_smem,
                q_rest_smem, k_rest_smem, out_smem, tile_smem, failed_smem, q_full, q_free, k_full, k_free, v_full,
                v_free, turn, tile_full, tile_done, stride_ob, stride_oh, stride_om, stride_start_b, stride_start_m,
                stride_end_b, stride_end_m, stride_key_b, stride_key_n, stride_qid_b, stride_qid_m, stride_kid_b,
                stride_kid_n, num_heads, gqa_group_size, q_len, kv_len, scale_log2, inner, band_lower, band_upper,
                1, V_HEAD_DIM, BLOCK_REST, BLOCK_E, BLOCK_N, STAGES, SHIFT, SOFT_CAP, HAS_START,
                HAS_END, HAS_LOWER, HAS_UPPER, HAS_KEY_MASK, HAS_IDS, RANGED, HAS_SINKS, EMPTY_ROWS, BOX_E,
            )),
            (copy_tiles, (
                q, k, v, q_rest, k_rest, kv_start, kv_end, ranges, counters, q_smem, k_smem, v_smem, q_rest_smem,
                k_rest_smem, tile_smem, failed_smem, q_full, q_free, k_full, k_free, v_full, v_free, tile_full,
                tile_done, stride_start_b, stride_start_m, stride_end_b, stride_end_m, gl.program_id(0), num_tiles,
                gl.num_programs(0), num_heads, gqa_group_size, q_len, kv_len, band_lower,
                band_upper, BLOCK_D, BLOCK_REST, BLOCK_E, ROPE, BLOCK_N, STAGES, SHIFT, HAS_START, HAS_END, HAS_LOWER,
                HAS_UPPER, RANGED,
            )),
        ],
        [4, 1],
        [240, 32],
    )  # fmt: skip
