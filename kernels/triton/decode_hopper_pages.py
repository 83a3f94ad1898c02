"""The decode kernel of caches in pages for Hopper, in Gluon: pages come through tensor descriptors.

A page of 16 tokens is a small part of a tile. Pointers to its rows take registers and wait for the block table, and
what is on its way at once then does not keep memory busy. Here a warp of its own reads the table and starts a copy a
page. It needs no results, so it goes on with the keys of the next tile while those of the last are still used: a
program takes tiles, or shares of their keys, one after the other.

Memory is faster where what is read together lies together, and heads of a token mostly do. So a program takes HEADS
key/value heads at once, if there are programs enough then. Their queries are the rows of one tile. Scores of a query
with another head's keys are thrown away, and values are added up head by head.

    BLOCK_N rows of keys or values:   BOX tokens of head 0 | the same of head 1 | ... | the next BOX of head 0 | ...

Matrix instructions of a warp group take 64 rows. A step of decoding has fewer, so here these are keys, or columns of
values: s^T = k q^T, and out^T = v^T p^T. So a tile is an operand as it lies in shared memory, for both products.

Letters and arithmetic as in forward.py. The scale is positive.
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

from .combine import finish_rows
from .hopper_parts import (
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
    token_of,
    uniform,
)
from .pages import page_number


@gluon.jit
def share_of(item, num_tiles, num_splits):
    """`(batch, tile, split)` of a share of the keys of one of a batch entry's `num_tiles` tiles."""
    index = item // num_splits
    return index // num_tiles, index % num_tiles, item % num_splits


@gluon.jit
def limits_of(
    batch, q_len, kv_len, kv_start, kv_end, stride_start_b, stride_start_m, stride_end_b, stride_end_m, band_lower,
    band_upper, PACK: gl.constexpr, ROWS: gl.constexpr, HAS_START: gl.constexpr, HAS_END: gl.constexpr,
    HAS_LOWER: gl.constexpr, HAS_UPPER: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """`(lower, upper, start, end)`: the keys [lower, upper) of each row of a tile, and what of them any row sees."""
    if HAS_START:
        kv_start += batch.to(gl.int64) * stride_start_b
    if HAS_END:
        kv_end += batch.to(gl.int64) * stride_end_b
    q_pos = gl.minimum(gl.arange(0, ROWS, layout=layout) // PACK, q_len - 1)
    lower, upper = row_limits(q_pos, kv_len, kv_start, kv_end, stride_start_m, stride_end_m, band_lower, band_upper,
                              HAS_START, HAS_END, HAS_LOWER, HAS_UPPER)  # fmt: skip
    return lower, upper, gl.maximum(gl.min(lower, 0), 0), gl.maximum(gl.max(upper, 0), 0)


@gluon.jit
def pages_of(block_table, token, last_page, num_blocks, stride_tn, COUNT: gl.constexpr, BOX: gl.constexpr,
             PAGE: gl.constexpr, NOW: gl.constexpr):  # fmt: skip
    """The pages of COUNT times BOX tokens from `token` on; NOW: a compiler may not put that off.

    Outside of what is used a table may hold anything: of such a page a descriptor gives zeros, or another page.
    """
    if COUNT > 1:
        HALF: gl.constexpr = COUNT // 2
        found = pages_of(block_table, token, last_page, num_blocks, stride_tn, HALF, BOX, PAGE, NOW)
        found += pages_of(block_table, token + HALF * BOX, last_page, num_blocks, stride_tn, HALF, BOX, PAGE, NOW)
    else:
        found = (page_number(block_table, token // PAGE, last_page, num_blocks, stride_tn, NOW).to(gl.int32),)
    return found


@gluon.jit
def first_pages(block_table, block, step, last_page, num_blocks, stride_tn, TOKENS: gl.constexpr, BOX: gl.constexpr,
                PAGE: gl.constexpr):  # fmt: skip
    """The pages of a program's first two blocks of TOKENS tokens, `step` blocks apart, read at once."""
    COUNT: gl.constexpr = TOKENS // BOX
    first = block * TOKENS
    second = first + step * TOKENS
    return (
        pages_of(block_table, first, last_page, num_blocks, stride_tn, COUNT, BOX, PAGE, True),
        pages_of(block_table, second, last_page, num_blocks, stride_tn, COUNT, BOX, PAGE, True),
    )


@gluon.jit
def copy_tile(cache, pages, token, head, target, full, BOX: gl.constexpr, HEADS: gl.constexpr, PAGE: gl.constexpr):
    """Start the copies of a tile: tokens from `token` on, which lie in `pages`, of HEADS heads from `head` on."""
    mbarrier.expect(full, target.shape[0] * target.shape[1] * 2)
    for box in gl.static_range(target.shape[0] // (BOX * HEADS)):
        room = target.slice(box * BOX * HEADS, BOX * HEADS, dim=0)
        tma.async_copy_global_to_shared(cache, [pages[box], head, (token + box * BOX) % PAGE, 0], full, room)


@gluon.jit
def copy_keys(
    k, v, block_table, kv_start, kv_end, k_smem, v_smem, k_full, k_free, v_full, v_free, stride_start_b,
    stride_start_m, stride_end_b, stride_end_m, stride_tb, stride_tn, first_item, num_items, num_programs, num_tiles,
    num_splits, q_len, kv_len, num_blocks, band_lower, band_upper,
    HEADS: gl.constexpr, BOX: gl.constexpr, PAGE: gl.constexpr, PACK: gl.constexpr, ROWS: gl.constexpr,
    HAS_START: gl.constexpr, HAS_END: gl.constexpr, HAS_LOWER: gl.constexpr, HAS_UPPER: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    STAGES: gl.constexpr = k_smem.shape[0]
    TOKENS: gl.constexpr = k_smem.shape[1] // HEADS
    COUNT: gl.constexpr = TOKENS // BOX
    BOUNDED: gl.constexpr = HAS_START or HAS_LOWER
    last_page = kv_len // PAGE - 1
    stage = 0
    phase = 1
    for item in range(first_item, num_items, num_programs):
        batch, tile, split = share_of(item, num_tiles, num_splits)
        table = block_table + batch.to(gl.int64) * stride_tb
        if not BOUNDED:
            # What is first is known before kv_end is: no load waits for another.
            ahead, after = first_pages(table, split, num_splits, last_page, num_blocks, stride_tn, TOKENS, BOX, PAGE)
        _lower, _upper, used_start, used_end = limits_of(
            batch, q_len, kv_len, kv_start, kv_end, stride_start_b, stride_start_m, stride_end_b, stride_end_m,
            band_lower, band_upper, PACK, ROWS, HAS_START, HAS_END, HAS_LOWER, HAS_UPPER,
            gl.BlockedLayout([1], [32], [1], [0]),
        )  # fmt: skip
        begin = used_start // TOKENS + split
        if BOUNDED:
            ahead, after = first_pages(table, begin, num_splits, last_page, num_blocks, stride_tn, TOKENS, BOX, PAGE)
        for block in range(begin, gl.cdiv(used_end, TOKENS), num_splits):
            # Read two tiles before they are needed.
            pages = ahead
            ahead = after
            token = block * TOKENS
            third = token + 2 * num_splits * TOKENS
            after = pages_of(table, third, last_page, num_blocks, stride_tn, COUNT, BOX, PAGE, False)
            mbarrier.wait(k_free.index(stage), phase)
            copy_tile(k, pages, token, tile * HEADS, k_smem.index(stage), k_full.index(stage), BOX, HEADS, PAGE)
            mbarrier.wait(v_free.index(stage), phase)
            copy_tile(v, pages, token, tile * HEADS, v_smem.index(stage), v_full.index(stage), BOX, HEADS, PAGE)
            stage, phase = next_slot(stage, phase, STAGES)


@gluon.jit
def load_queries(q, batch, tile, q_len, stride_qb, stride_qh, stride_qm, target, PACK: gl.constexpr):
    """Bring a tile's rows into shared memory; rows past the end repeat the last one."""
    ROWS: gl.constexpr = target.shape[0]
    WIDTH: gl.constexpr = target.shape[1]
    lanes: gl.constexpr = min(WIDTH // 8, 32)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])
    row = gl.minimum(gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)), q_len * PACK - 1)
    head = (tile * PACK + row % PACK).to(gl.int64)
    offset = batch.to(gl.int64) * stride_qb + head * stride_qh + (row // PACK).to(gl.int64) * stride_qm
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    found = gl.load(q + offset[:, None] + column[None, :])
    # Those of the tile before are still read.
    barrier()
    target.store(found)
    fence_async_shared()
    barrier()


@gluon.jit
def add_values(accs, values, weights, BOX: gl.constexpr, HEADS: gl.constexpr):
    """Each head's result, (columns, rows), with its part of a tile of values added.

    Each adds up its own values only, since 0 times what is not finite is not a number.
    """
    SPAN: gl.constexpr = BOX if HEADS > 1 else values.shape[0]
    found = ()
    for head in gl.static_range(HEADS):
        acc = accs[head]
        for box in gl.static_range(values.shape[0] // (SPAN * HEADS)):
            part = values.slice((box * HEADS + head) * SPAN, SPAN, dim=0).permute((1, 0))
            share = weights.slice((box * HEADS + head) * SPAN, SPAN, dim=0)
            acc = warpgroup_mma(part, share, acc, is_async=True)
        found += (acc,)
    return found


@gluon.jit
def scaled(accs, factor, HEADS: gl.constexpr):
    """All heads' results times a factor for each row."""
    found = ()
    for head in gl.static_range(HEADS):
        found += (accs[head] * factor[None, :],)
    return found


@gluon.jit
def attend(
    q, out, lse, partial, partial_stats, kv_start, kv_end, sinks, q_smem, k_smem, v_smem, p_smem, k_full, k_free,
    v_full, v_free, stride_qb, stride_qh, stride_qm, stride_ob, stride_oh, stride_om, stride_start_b, stride_start_m,
    stride_end_b, stride_end_m, first_item, num_items, num_programs, num_tiles, num_splits, q_len, kv_len, scale_log2,
    band_lower, band_upper,
    HEADS: gl.constexpr, BOX: gl.constexpr, PACK: gl.constexpr, SPLIT: gl.constexpr, HAS_START: gl.constexpr,
    HAS_END: gl.constexpr, HAS_LOWER: gl.constexpr, HAS_UPPER: gl.constexpr, HAS_SINKS: gl.constexpr,
    EMPTY_ROWS: gl.constexpr,
):  # fmt: skip
    """The warp group that computes."""
    dtype: gl.constexpr = q_smem.dtype
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    WIDTH: gl.constexpr = k_smem.shape[2]
    ROWS: gl.constexpr = q_smem.shape[1]
    TOKENS: gl.constexpr = BLOCK_N // HEADS
    # Scores (key, row) and results (column, row).
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    by_row: gl.constexpr = gl.SliceLayout(0, scores)
    by_key: gl.constexpr = gl.SliceLayout(1, scores)
    row = gl.arange(0, ROWS, layout=by_row)
    key = gl.arange(0, BLOCK_N, layout=by_key)
    row_head = row % PACK // (PACK // HEADS)
    is_own = (key // BOX % HEADS)[:, None] == row_head[None, :]
    stage = 0
    phase = 0
    for item in range(first_item, num_items, num_programs):
        batch, tile, split = share_of(item, num_tiles, num_splits)
        lower, upper, used_start, used_end = limits_of(
            batch, q_len, kv_len, kv_start, kv_end, stride_start_b, stride_start_m, stride_end_b, stride_end_m,
            band_lower, band_upper, PACK, ROWS, HAS_START, HAS_END, HAS_LOWER, HAS_UPPER, by_row,
        )  # fmt: skip
        full_begin = gl.cdiv(gl.max(lower, 0), TOKENS)
        full_end = gl.maximum(gl.min(upper, 0), 0) // TOKENS
        load_queries(q, batch, tile, q_len, stride_qb, stride_qh, stride_qm, q_smem.index(0), PACK)

        m_i = gl.full([ROWS], NEVER, gl.float32, layout=by_row)
        sums = gl.full([BLOCK_N, ROWS], 0.0, gl.float32, layout=scores)
        accs = ()
        for _head in gl.static_range(HEADS):
            accs += (gl.full([WIDTH, ROWS], 0.0, gl.float32, layout=scores),)
        for block in range(used_start // TOKENS + split, gl.cdiv(used_end, TOKENS), num_splits):
            start_n = block * TOKENS
            # All operands' places of this round, and known to be uniform: see opaque_zero and uniform.
            zero = opaque_zero()
            place = uniform(stage)
            values = v_smem.index(place)
            weights = p_smem.index(zero)
            mbarrier.wait(k_full.index(stage), phase)
            s = gl.full([BLOCK_N, ROWS], 0.0, gl.float32, layout=scores)
            s = warpgroup_mma(k_smem.index(place), q_smem.index(zero).permute((1, 0)), s, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            signal(k_free.index(stage))
            if HEADS > 1:
                s = gl.where(is_own, s, NEVER)
            if (block < full_begin) | (block >= full_end):
                kv_pos = start_n + token_of(key, BOX, HEADS)
                s = gl.where((kv_pos[:, None] >= lower[None, :]) & (kv_pos[:, None] < upper[None, :]), s, NEVER)
            p, m_i, alpha, sums = soft_weights(s, m_i, sums, scale_log2)
            weights.store(p.to(dtype))
            accs = scaled(accs, alpha, HEADS)
            mbarrier.wait(v_full.index(stage), phase)
            if (used_end < start_n + TOKENS) | (used_start > start_n):
                # What lies outside may be anything, also not a number.
                clear_tokens(values, used_start - start_n, used_end - start_n, BOX, HEADS)
            fence_async_shared()
            barrier()
            accs = add_values(accs, values, weights, BOX, HEADS)
            if HEADS == 1:
                accs = (warpgroup_mma_wait(0, deps=accs),)
            else:
                accs = warpgroup_mma_wait(0, deps=accs)
            signal(v_free.index(stage))
            stage, phase = next_slot(stage, phase, STAGES)

        acc = accs[0]
        for head in gl.static_range(1, HEADS):
            acc = gl.where((row_head == head)[None, :], accs[head], acc)
        total = gl.sum(sums, 0)
        row_ok = row < q_len * PACK
        q_pos = (row // PACK).to(gl.int64)
        head = (tile * PACK + row % PACK).to(gl.int64)
        row_flat = (batch.to(gl.int64) * num_tiles * PACK + head) * q_len + q_pos
        column = gl.arange(0, WIDTH, layout=by_key)
        if SPLIT:
            launch_dependents()
            share_flat = row_flat * num_splits + split
            gl.store(partial + (share_flat * WIDTH)[None, :] + column[:, None], acc, mask=row_ok[None, :])
            gl.store(partial_stats + share_flat * 2, m_i, mask=row_ok)
            gl.store(partial_stats + share_flat * 2 + 1, total, mask=row_ok)
        else:
            sink = m_i
            if HAS_SINKS:
                sink = gl.load(sinks + head, mask=row_ok, other=0.0).to(gl.float32)
            turned = acc.permute((1, 0))
            along: gl.constexpr = gl.SliceLayout(1, turned.type.layout)
            result, row_lse = finish_rows(
                turned, gl.convert_layout(m_i, along), gl.convert_layout(total, along), gl.convert_layout(sink, along),
                HAS_SINKS, False, EMPTY_ROWS,
            )  # fmt: skip
            result = gl.convert_layout(result.permute((1, 0)), scores)
            offset = batch.to(gl.int64) * stride_ob + head * stride_oh + q_pos * stride_om
            gl.store(out + offset[None, :] + column[:, None], result.to(dtype), mask=row_ok[None, :])
            gl.store(lse + row_flat, gl.convert_layout(row_lse, by_row), mask=row_ok)


@gluon.jit(do_not_specialize=[
    "q_len", "kv_len", "num_blocks", "num_splits", "num_items", "num_programs", "num_tiles", "band_lower", "band_upper",
])  # fmt: skip
def decode_hopper_pages_kernel(
    q, k, v, out, lse, partial, partial_stats, kv_start, kv_end, sinks, block_table,
    stride_qb, stride_qh, stride_qm, stride_ob, stride_oh, stride_om, stride_start_b, stride_start_m, stride_end_b,
    stride_end_m, stride_tb, stride_tn, num_items, num_programs, num_tiles, q_len, kv_len, num_blocks, num_splits,
    softmax_scale, band_lower, band_upper,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, BOX: gl.constexpr,
    HEADS: gl.constexpr, PACK: gl.constexpr, SPLIT: gl.constexpr, PAGE: gl.constexpr, HAS_START: gl.constexpr,
    HAS_END: gl.constexpr, HAS_LOWER: gl.constexpr, HAS_UPPER: gl.constexpr, HAS_SINKS: gl.constexpr,
    EMPTY_ROWS: gl.constexpr,
):  # fmt: skip
    """As attention_forward_kernel for a paged cache of the queries' dtype, with INTERLEAVED.

    Without bias, masks other than by position, dropout, ALiBi, soft cap, and rows without keys that are a mean. Both
    head sizes are BLOCK_D. k and v are tensor descriptors of `(num_blocks, K, PAGE, BLOCK_D)`, in boxes of HEADS heads
    and BOX tokens; BOX divides PAGE, and BOX * HEADS divides BLOCK_N. A tile has up to ROWS rows (query, head of HEADS
    groups), and PACK is that number of heads; a batch entry has num_tiles tiles. num_items is the number of all shares
    of tiles, num_programs that of programs.
    """
    dtype: gl.constexpr = q.dtype.element_ty
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [1, ROWS, BLOCK_D], wide)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], wide)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], wide)
    p_smem = gl.allocate_shared_memory(dtype, [1, BLOCK_N, ROWS], gl.NVMMASharedLayout(2 * ROWS, 16, rank=2))
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=1)
    first_item = gl.program_id(0)
    barrier()
    gl.warp_specialize(
        [
            (attend, (
                q, out, lse, partial, partial_stats, kv_start, kv_end, sinks, q_smem, k_smem, v_smem, p_smem, k_full,
                k_free, v_full, v_free, stride_qb, stride_qh, stride_qm, stride_ob, stride_oh, stride_om,
                stride_start_b, stride_start_m, stride_end_b, stride_end_m, first_item, num_items, num_programs,
                num_tiles, num_splits, q_len, kv_len, softmax_scale * LOG2E, band_lower, band_upper, HEADS, BOX, PACK,
                SPLIT, HAS_START, HAS_END, HAS_LOWER, HAS_UPPER, HAS_SINKS, EMPTY_ROWS,
            )),
            (copy_keys, (
                k, v, block_table, kv_start, kv_end, k_smem, v_smem, k_full, k_free, v_full, v_free, stride_start_b,
                stride_start_m, stride_end_b, stride_end_m, stride_tb, stride_tn, first_item, num_items, num_programs,
                num_tiles, num_splits, q_len, kv_len, num_blocks, band_lower, band_upper, HEADS, BOX, PAGE, PACK, ROWS,
                HAS_START, HAS_END, HAS_LOWER, HAS_UPPER,
            )),
        ],
        [1],
        [96],
    )  # fmt: skip
