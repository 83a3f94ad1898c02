"""dk, dv and ds of large heads for Hopper, in Gluon: two warp groups that each keep one of the two gradients.

A program owns 64 keys of one key/value head and walks over blocks of queries of its whole group. For heads of 192 or
256 numbers no group has registers for dk and dv, so they divide the products instead of the keys:

    weigh:  s = k q^T   p = exp2(s)   dv += p^T g      dp = v g^T   ds = p (dp - delta)   dk += ds^T q   :differentiate
                             |                                ^  |
                             '------- shared memory ----------'  '------> memory (`send`)

Both do as much, and while one exponentiates the products of the other keep the matrix units busy. ds goes to memory, 2
bytes a score, a few heads at a time, and backward_large_dq.py multiplies it by the keys: five products in all.

A slot of shared memory goes round: `weigh` leaves the weights there, `differentiate` puts ds in their place, and `send`
gives it back when ds has been read out of it.

Letters as in common.py.
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

from .backward_hopper_parts import next_step, store_keys
from .common import CAP_FAST
from .hopper_parts import LOG2E, NEVER, NEVER_CAPPED, barrier, keep_pairs, signal, store_boxes
from .mask_ranges import load_range

KEYS = gl.constexpr(64)
"""Of a program."""
TILE_M = gl.constexpr(128)
"""Queries of a tile of ds: what a program of backward_large_dq.py reads."""


@gluon.jit
def query_range(n_first, q_len, band_lower, band_upper, HAS_LOWER: gl.constexpr, HAS_UPPER: gl.constexpr):
    """The tiles of queries `[begin, end)` that see one of the 64 keys from `n_first` on, were they all there."""
    lo = 0
    hi = q_len
    if HAS_UPPER:
        lo = gl.maximum(lo, n_first - band_upper)
    if HAS_LOWER:
        hi = gl.minimum(hi, n_first + KEYS - band_lower)
    begin = lo // TILE_M
    return begin, gl.maximum(begin, gl.cdiv(gl.maximum(hi, 0), TILE_M))


@gluon.jit
def pack(tile, BLOCK_M: gl.constexpr):
    """A (64, BLOCK_M) tile of 16-bit numbers by what a thread holds, in eights: shared memory has no conflicts then."""
    by_thread = tile.reshape([4, 2, 8, BLOCK_M // 16, 2, 4, 2]).permute((3, 0, 2, 5, 1, 4, 6))
    return by_thread.reshape([BLOCK_M * 8, 8])


@gluon.jit
def unpack(packed, BLOCK_M: gl.constexpr):
    """The inverse of pack."""
    by_thread = packed.reshape([BLOCK_M // 16, 4, 8, 4, 2, 2, 2]).permute((1, 4, 2, 0, 5, 3, 6))
    return by_thread.reshape([KEYS, BLOCK_M])


@gluon.jit
def multiply_scores(k_smem, q_smem, k_rest_smem, q_rest_smem, stage, nothing, BLOCK_REST: gl.constexpr):
    """Start k q^T."""
    s = warpgroup_mma(k_smem, q_smem.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
    if BLOCK_REST > 0:
        s = warpgroup_mma(k_rest_smem, q_rest_smem.index(stage).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def begin_sum(part, n_first, kv_len, width, layout: gl.constexpr, BLOCK: gl.constexpr, IS_FIRST: gl.constexpr):
    """What a sum over queries starts from: nothing, or what the launch for the queries before has left."""
    if IS_FIRST:
        tile = gl.full([KEYS, BLOCK], 0.0, gl.float32, layout=layout)
    else:
        row = n_first + gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
        columns = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
        at = part + (row.to(gl.int64) * width)[:, None] + columns[None, :]
        tile = gl.load(at, mask=(row < kv_len)[:, None], other=0.0)
    return tile


@gluon.jit
def weigh(
    grad_v, v_boxes, part, key_mask, kv_start, kv_end, q_ids, kv_ids, q_smem, k_smem, q_rest_smem, k_rest_smem, g_smem,
    x_smem, row_smem, kv_full, q_full, q_free, g_full, g_free, x_full, x_free, stride_dvn, stride_dve, stride_key_n,
    stride_start_m, stride_end_m, stride_qid_m, stride_kid_n, group, q_len, kv_len, scale_log2, inner_scale, band_lower,
    band_upper, batch, kv_head, n_first, end, steps, full_begin, full_end, V_HEAD_DIM: gl.constexpr,
    BLOCK_REST: gl.constexpr, BLOCK_E: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
    WIDTH: gl.constexpr, IS_FIRST: gl.constexpr, IS_LAST: gl.constexpr, HAS_KEY_MASK: gl.constexpr,
    HAS_START: gl.constexpr, HAS_END: gl.constexpr, HAS_IDS: gl.constexpr, HAS_LOWER: gl.constexpr,
    HAS_UPPER: gl.constexpr, SOFT_CAP: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    """The group of scores, weights and dv."""
    dtype: gl.constexpr = q_smem.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_E, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, result, 2)
    linear: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    by_key: gl.constexpr = gl.SliceLayout(1, scores)
    by_query: gl.constexpr = gl.SliceLayout(0, scores)
    kv_pos = n_first + gl.arange(0, KEYS, layout=by_key)
    PIECES: gl.constexpr = 2 if BLOCK_REST > 0 else 1
    nothing = gl.full([KEYS, BLOCK_M], 0.0, gl.float32, layout=scores)
    dv = begin_sum(part, n_first, kv_len, WIDTH, result, BLOCK_E, IS_FIRST)
    head = 0
    block = end - 1
    mbarrier.wait(kv_full, 0)
    mbarrier.wait(q_full.index(0), 0, pred=steps > 0)
    s = multiply_scores(k_smem, q_smem, k_rest_smem, q_rest_smem, 0, nothing, BLOCK_REST)
    for step in range(steps):
        stage = step % STAGES
        slot = step % SLOTS
        s = warpgroup_mma_wait(0, deps=[s])
        shift = row_smem.index(2 * stage).load(scores)
        signal(q_free.index(stage))
        if SOFT_CAP == CAP_FAST:
            s = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [s * inner_scale], dtype=gl.float32,
                                          is_pure=True, pack=1)  # fmt: skip
        if (block < full_begin) | (block >= full_end):
            q_pos = block * BLOCK_M + gl.arange(0, BLOCK_M, layout=by_query)
            keep = keep_pairs(
                q_pos, kv_pos, q_len, kv_len, key_mask, kv_start, kv_end, q_ids, kv_ids, stride_key_n, stride_start_m,
                stride_end_m, stride_qid_m, stride_kid_n, band_lower, band_upper, HAS_KEY_MASK, HAS_START, HAS_END,
                HAS_IDS, HAS_LOWER, HAS_UPPER,
            )  # fmt: skip
            s = gl.where(keep, s, NEVER_CAPPED if SOFT_CAP == CAP_FAST else NEVER)
        p = gl.exp2(s * scale_log2 - shift)
        # In ds with the derivative of the soft cap.
        weights = (p * (1.0 - s * s)).to(dtype) if SOFT_CAP == CAP_FAST else p.to(dtype)
        p = p.to(dtype)
        mbarrier.wait(x_free.index(slot), (step // SLOTS & 1) ^ 1)
        x_smem.index(slot)._reinterpret(dtype, [BLOCK_M * 8, 8], linear).store(pack(weights, BLOCK_M))
        signal(x_full.index(slot))
        mbarrier.wait(g_full.index(stage), step // STAGES & 1)
        dv = warpgroup_mma(gl.convert_layout(p, operand), g_smem.index(stage), dv, is_async=True)
        following = (step + 1) % STAGES
        mbarrier.wait(q_full.index(following), (step + 1) // STAGES & 1, pred=step + 1 < steps)
        s = multiply_scores(k_smem, q_smem, k_rest_smem, q_rest_smem, following, nothing, BLOCK_REST)
        dv = warpgroup_mma_wait(PIECES, deps=[dv])
        signal(g_free.index(stage))
        head, block = next_step(head, block, group)
    s = warpgroup_mma_wait(0, deps=[s])
    if IS_LAST and BOXES:
        # Nobody else reads the keys, which are as large.
        store_boxes(v_boxes, batch, kv_head, n_first, dv, k_smem, BLOCK_E, BLOCK_E)
        tma.store_wait(0)
    elif IS_LAST:
        store_keys(grad_v, dv, n_first, kv_len, stride_dvn, stride_dve, V_HEAD_DIM, result, BLOCK_E)
    else:
        store_keys(part, dv, n_first, kv_len, WIDTH, 1, BLOCK_E, result, BLOCK_E)


@gluon.jit
def differentiate(
    grad_k, grad_k_rest, k_boxes, k_rest_boxes, part, q_smem, q_rest_smem, v_smem, g_smem, x_smem, row_smem, kv_full,
    q_full, q_free, g_full, g_free, x_full, x_done, stride_dkn, stride_dkd, stride_dkpn, stride_dkpd, kv_len,
    softmax_scale, batch, kv_head, n_first, steps,
    HEAD_DIM: gl.constexpr, REST_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_REST: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, WIDTH: gl.constexpr, IS_FIRST: gl.constexpr,
    IS_LAST: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    """The group of ds and dk."""
    dtype: gl.constexpr = q_smem.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, result, 2)
    linear: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    packed: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0])
    nothing = gl.full([KEYS, BLOCK_M], 0.0, gl.float32, layout=scores)
    dk = begin_sum(part, n_first, kv_len, WIDTH, result, BLOCK_D, IS_FIRST)
    if BLOCK_REST > 0:
        rest: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_REST, 16])
        dk_rest = begin_sum(part + BLOCK_D, n_first, kv_len, WIDTH, rest, BLOCK_REST, IS_FIRST)
    mbarrier.wait(kv_full, 0)
    mbarrier.wait(g_full.index(0), 0, pred=steps > 0)
    dp = warpgroup_mma(v_smem, g_smem.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    for step in range(steps):
        stage = step % STAGES
        slot = step % SLOTS
        dp = warpgroup_mma_wait(0, deps=[dp])
        delta = row_smem.index(2 * stage + 1).load(scores)
        signal(g_free.index(stage))
        mbarrier.wait(x_full.index(slot), step // SLOTS & 1)
        weights = x_smem.index(slot)._reinterpret(dtype, [BLOCK_M * 8, 8], linear).load(packed)
        weights = gl.convert_layout(unpack(weights, BLOCK_M), scores)
        ds = (weights.to(gl.float32) * (dp - delta)).to(dtype)
        # All have read their weights.
        barrier()
        x_smem.index(slot).store(ds)
        fence_async_shared()
        signal(x_done.index(slot))
        mbarrier.wait(q_full.index(stage), step // STAGES & 1)
        ds = gl.convert_layout(ds, operand)
        dk = warpgroup_mma(ds, q_smem.index(stage), dk, is_async=True)
        if BLOCK_REST > 0:
            dk_rest = warpgroup_mma(ds, q_rest_smem.index(stage), dk_rest, is_async=True)
        following = (step + 1) % STAGES
        mbarrier.wait(g_full.index(following), (step + 1) // STAGES & 1, pred=step + 1 < steps)
        dp = warpgroup_mma(v_smem, g_smem.index(following).permute((1, 0)), nothing, use_acc=False, is_async=True)
        if BLOCK_REST > 0:
            dk, dk_rest = warpgroup_mma_wait(1, deps=[dk, dk_rest])
        else:
            dk = warpgroup_mma_wait(1, deps=[dk])
        signal(q_free.index(stage))
    dp = warpgroup_mma_wait(0, deps=[dp])
    if IS_LAST and BOXES:
        # Nobody else reads the values, which are as large as a piece of the keys.
        store_boxes(k_boxes, batch, kv_head, n_first, dk * softmax_scale, v_smem, BLOCK_D, BLOCK_D)
        if BLOCK_REST > 0:
            BITS: gl.constexpr = k_rest_boxes.dtype.primitive_bitwidth
            room = v_smem._reinterpret(k_rest_boxes.dtype, [KEYS, BLOCK_REST], gl.NVMMASharedLayout(128, BITS, rank=2))
            store_boxes(k_rest_boxes, batch, kv_head, n_first, dk_rest * softmax_scale, room, BLOCK_REST, BLOCK_REST)
        tma.store_wait(0)
    elif IS_LAST:
        store_keys(grad_k, dk * softmax_scale, n_first, kv_len, stride_dkn, stride_dkd, HEAD_DIM, result, BLOCK_D)
        if BLOCK_REST > 0:
            store_keys(grad_k_rest, dk_rest * softmax_scale, n_first, kv_len, stride_dkpn, stride_dkpd, REST_DIM, rest,
                       BLOCK_REST)  # fmt: skip
    else:
        store_keys(part, dk, n_first, kv_len, WIDTH, 1, BLOCK_D, result, BLOCK_D)
        if BLOCK_REST > 0:
            store_keys(part + BLOCK_D, dk_rest, n_first, kv_len, WIDTH, 1, BLOCK_REST, rest, BLOCK_REST)


@gluon.jit
def copy_in(
    q, k, q_rest, k_rest, v, grad_out, shift, delta, q_smem, k_smem, q_rest_smem, k_rest_smem, v_smem, g_smem, row_smem,
    kv_full, q_full, q_free, g_full, g_free, batch, kv_head, num_heads, group, n_first, end, steps,
    BLOCK_D: gl.constexpr, BLOCK_REST: gl.constexpr, BLOCK_E: gl.constexpr, ROPE: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warp that copies the keys and values in, then one block of queries and gradients after the other."""
    WIDTH: gl.constexpr = BLOCK_D + BLOCK_REST
    REST_COL: gl.constexpr = 0 if ROPE > 0 else BLOCK_D
    mbarrier.expect(kv_full, KEYS * (WIDTH + BLOCK_E) * 2)
    tma.async_copy_global_to_shared(k, [batch, kv_head, n_first, 0], kv_full, k_smem)
    if BLOCK_REST > 0:
        rest_head = kv_head
        if ROPE > 0:
            rest_head = kv_head * 0
        tma.async_copy_global_to_shared(k_rest, [batch, rest_head, n_first, REST_COL], kv_full, k_rest_smem)
    tma.async_copy_global_to_shared(v, [batch, kv_head, n_first, 0], kv_full, v_smem)
    head = 0
    block = end - 1
    for step in range(steps):
        stage = step % STAGES
        empty = (step // STAGES & 1) ^ 1
        q_first = block * BLOCK_M
        q_head = kv_head * group + head
        row = batch * num_heads + q_head
        bar = q_full.index(stage)
        mbarrier.wait(q_free.index(stage), empty)
        mbarrier.expect(bar, BLOCK_M * (WIDTH * 2 + 4))
        tma.async_copy_global_to_shared(q, [batch, q_head, q_first, 0], bar, q_smem.index(stage))
        if BLOCK_REST > 0:
            tma.async_copy_global_to_shared(q_rest, [batch, q_head, q_first, REST_COL], bar, q_rest_smem.index(stage))
        tma.async_copy_global_to_shared(shift, [row, q_first], bar, row_smem.index(2 * stage))
        bar = g_full.index(stage)
        mbarrier.wait(g_free.index(stage), empty)
        mbarrier.expect(bar, BLOCK_M * (BLOCK_E * 2 + 4))
        tma.async_copy_global_to_shared(grad_out, [batch, q_head, q_first, 0], bar, g_smem.index(stage))
        tma.async_copy_global_to_shared(delta, [row, q_first], bar, row_smem.index(2 * stage + 1))
        head, block = next_step(head, block, group)


@gluon.jit
def send(ds, x_smem, x_done, x_free, first_tile, num_tiles, row_tiles, place, group, end, steps,
         BLOCK_M: gl.constexpr, SLOTS: gl.constexpr):  # fmt: skip
    """A warp that copies ds to memory. `place` is that of the keys among the `row_tiles` of a tile of queries."""
    head = 0
    block = end - 1
    for step in range(steps):
        slot = step % SLOTS
        q_first = block * BLOCK_M
        row = ((first_tile + head * num_tiles + q_first // TILE_M) * row_tiles + place) * KEYS
        mbarrier.wait(x_done.index(slot), step // SLOTS & 1)
        tma.async_copy_shared_to_global(ds, [row, q_first % TILE_M], x_smem.index(slot))
        tma.store_wait(0)
        mbarrier.arrive(x_free.index(slot), count=1)
        head, block = next_step(head, block, group)


_SIZES = [
    "num_heads", "gqa_group_size", "q_len", "kv_len", "first_head", "head_count", "heads_at_once", "first_tile",
    "last_tile", "row_tiles", "band_lower", "band_upper",
]  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES)
def backward_large_kernel(
    q, k, q_rest, k_rest, v, grad_out, grad_k, grad_k_rest, grad_v, k_boxes, k_rest_boxes, v_boxes, part, shift, delta,
    ds, key_mask, kv_start, kv_end, q_ids, kv_ids, key_ranges,
    stride_dkb, stride_dkh, stride_dkn, stride_dkd, stride_dkpb, stride_dkph, stride_dkpn, stride_dkpd,
    stride_dvb, stride_dvh, stride_dvn, stride_dve, stride_key_b, stride_key_n, stride_start_b, stride_start_m,
    stride_end_b, stride_end_m, stride_qid_b, stride_qid_m, stride_kid_b, stride_kid_n,
    num_heads, gqa_group_size, q_len, kv_len, first_head, head_count, heads_at_once, first_tile, last_tile, row_tiles,
    softmax_scale, logits_soft_cap, band_lower, band_upper, HEAD_DIM: gl.constexpr, V_HEAD_DIM: gl.constexpr,
    ROPE: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_REST: gl.constexpr, BLOCK_E: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr, SLOTS: gl.constexpr, IS_FIRST: gl.constexpr, IS_LAST: gl.constexpr,
    HAS_KEY_MASK: gl.constexpr, HAS_START: gl.constexpr, HAS_END: gl.constexpr, HAS_IDS: gl.constexpr,
    HAS_LOWER: gl.constexpr, HAS_UPPER: gl.constexpr, SOFT_CAP: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    """Write `grad_k` `(B, K, N, D)`, `grad_v` `(B, K, N, E)` and ds of `head_count` key/value heads from `first_head`.

    The scores are in the RAW domain of common.py. q, k, q_rest, k_rest, v and grad_out are tensor descriptors of
    BLOCK_M or 64 rows, shift and delta of 1 x BLOCK_M of `(B * H, M)`. With ROPE the second pieces of queries and keys,
    and `grad_k_rest`, are tensors of their own; without it `grad_k_rest` starts inside of `grad_k`.

    Args:
        k_boxes, k_rest_boxes, v_boxes: With BOXES descriptors of the gradients, of 64 keys and a whole piece.
        part: Used where the queries of a head are not all in one launch: float32 sums `(heads, N, BLOCK_D + BLOCK_REST
            + BLOCK_E)` that the launch before has left, and this one leaves for the next.
        ds: Descriptor of 64 x BLOCK_M of `(tiles * 64, 128)`: for each query head from the first one's group on, and
            128 queries, `row_tiles` blocks of 64 keys, of which block i is at i % row_tiles. What no query sees is not
            written.
        key_ranges: Where a mask stands in tensors, the table of key_ranges_kernel by blocks of 64 keys and 128 queries.
        first_head, head_count: Of all batch entries' heads.
        first_tile, last_tile: Queries, by 128s.
    """
    dtype: gl.constexpr = q.dtype
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    in_order: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], shared)
    k_smem = gl.allocate_shared_memory(dtype, [KEYS, BLOCK_D], shared)
    q_rest_smem = q_smem
    k_rest_smem = k_smem
    if BLOCK_REST > 0:
        q_rest_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_REST], shared)
        k_rest_smem = gl.allocate_shared_memory(dtype, [KEYS, BLOCK_REST], shared)
    g_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_E], shared)
    v_smem = gl.allocate_shared_memory(dtype, [KEYS, BLOCK_E], shared)
    x_smem = gl.allocate_shared_memory(dtype, [SLOTS, KEYS, BLOCK_M], shared)
    row_smem = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, BLOCK_M], in_order)
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    g_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    g_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    x_done = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    x_free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=2)
        mbarrier.init(g_full.index(i), count=1)
        mbarrier.init(g_free.index(i), count=2)
    for i in gl.static_range(SLOTS):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_done.index(i), count=1)
        mbarrier.init(x_free.index(i), count=1)

    softmax_scale = softmax_scale.to(gl.float32)
    scale_log2 = softmax_scale * LOG2E
    inner_scale = softmax_scale
    if SOFT_CAP == CAP_FAST:
        inner_scale = softmax_scale / logits_soft_cap
        scale_log2 = logits_soft_cap * LOG2E
    num_kv_blocks = gl.cdiv(kv_len, KEYS)
    num_kv_heads = num_heads // gqa_group_size
    # As deal_programs: with an upper bound a head's first keys are seen by most queries.
    number = gl.program_id(0)
    first = number // (heads_at_once * num_kv_blocks) * heads_at_once
    count = gl.minimum(heads_at_once, head_count - first)
    rest = number - first * num_kv_blocks
    index = first + rest % count
    kv_block = rest // count
    batch = (first_head + index) // num_kv_heads
    kv_head = (first_head + index) % num_kv_heads
    n_first = kv_block * KEYS
    RANGED: gl.constexpr = HAS_KEY_MASK or HAS_START or HAS_END or HAS_IDS
    RATIO: gl.constexpr = TILE_M // BLOCK_M
    if RANGED:
        tile_begin, full_begin, full_end, tile_end = load_range(key_ranges, batch * num_kv_blocks + kv_block)
        full_begin *= RATIO
        full_end *= RATIO
    else:
        tile_begin, tile_end = query_range(n_first, q_len, band_lower, band_upper, HAS_LOWER, HAS_UPPER)
        # Blocks of queries that the mask leaves whole. Absent queries have weight 0 in any case, absent keys have not.
        full_begin = 0
        full_end = tile_end * RATIO
        if HAS_UPPER:
            full_begin = gl.cdiv(gl.maximum(n_first + KEYS - 1 - band_upper, 0), BLOCK_M)
        if HAS_LOWER:
            full_end = gl.maximum(n_first - band_lower + 1, 0) // BLOCK_M
    full_end = gl.where(n_first + KEYS > kv_len, 0, full_end)
    tile_begin = gl.maximum(tile_begin, first_tile)
    tile_end = gl.maximum(gl.minimum(tile_end, last_tile), tile_begin)
    end = tile_end * RATIO
    steps = (tile_end - tile_begin) * RATIO * gqa_group_size

    num_tiles = last_tile - first_tile
    batch_long = batch.to(gl.int64)
    if HAS_KEY_MASK:
        key_mask += batch_long * stride_key_b
    if HAS_START:
        kv_start += batch_long * stride_start_b
    if HAS_END:
        kv_end += batch_long * stride_end_b
    if HAS_IDS:
        q_ids += batch_long * stride_qid_b
        kv_ids += batch_long * stride_kid_b
    head_long = kv_head.to(gl.int64)
    grad_k += batch_long * stride_dkb + head_long * stride_dkh
    grad_v += batch_long * stride_dvb + head_long * stride_dvh
    if BLOCK_REST > 0:
        grad_k_rest += batch_long * stride_dkpb + head_long * stride_dkph
    WIDTH: gl.constexpr = BLOCK_D + BLOCK_REST + BLOCK_E
    part += index.to(gl.int64) * kv_len * WIDTH
    REST_DIM: gl.constexpr = ROPE if ROPE > 0 else HEAD_DIM - BLOCK_D
    barrier()
    gl.warp_specialize(
        [
            (weigh, (
                grad_v, v_boxes, part + BLOCK_D + BLOCK_REST, key_mask, kv_start, kv_end, q_ids, kv_ids, q_smem, k_smem,
                q_rest_smem, k_rest_smem, g_smem, x_smem, row_smem, kv_full.index(0), q_full, q_free, g_full, g_free,
                x_full, x_free, stride_dvn, stride_dve, stride_key_n, stride_start_m, stride_end_m, stride_qid_m,
                stride_kid_n, gqa_group_size, q_len, kv_len, scale_log2, inner_scale, band_lower, band_upper, batch,
                kv_head, n_first, end, steps, full_begin, full_end, V_HEAD_DIM, BLOCK_REST, BLOCK_E, BLOCK_M, STAGES,
                SLOTS, WIDTH, IS_FIRST, IS_LAST, HAS_KEY_MASK, HAS_START, HAS_END, HAS_IDS, HAS_LOWER, HAS_UPPER,
                SOFT_CAP, BOXES,
            )),
            (differentiate, (
                grad_k, grad_k_rest, k_boxes, k_rest_boxes, part, q_smem, q_rest_smem, v_smem, g_smem, x_smem, row_smem,
                kv_full.index(0), q_full, q_free, g_full, g_free, x_full, x_done, stride_dkn, stride_dkd, stride_dkpn,
                stride_dkpd, kv_len, softmax_scale, batch, kv_head, n_first, steps, HEAD_DIM, REST_DIM, BLOCK_D,
                BLOCK_REST, BLOCK_M, STAGES, SLOTS, WIDTH, IS_FIRST, IS_LAST, BOXES,
            )),
            (copy_in, (
                q, k, q_rest, k_rest, v, grad_out, shift, delta, q_smem, k_smem, q_rest_smem, k_rest_smem, v_smem,
                g_smem, row_smem, kv_full.index(0), q_full, q_free, g_full, g_free, batch, kv_head, num_heads,
                gqa_group_size, n_first, end, steps, BLOCK_D, BLOCK_REST, BLOCK_E, ROPE, BLOCK_M, STAGES,
            )),
            (send, (
                ds, x_smem, x_done, x_free, index * gqa_group_size * num_tiles - first_tile, num_tiles, row_tiles,
                kv_block % row_tiles, gqa_group_size, end, steps, BLOCK_M, SLOTS,
            )),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
