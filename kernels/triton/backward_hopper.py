"""dq, dk and dv in one kernel for Hopper, in Gluon: five products a tile instead of seven, and warps with roles.

A program owns 128 keys of one key/value head and walks over blocks of 64 queries of its whole group, or of 128 where
heads have 64 columns. Two warp groups own 64 keys each: they compute scores and weights, transposed so that the weights
are at once the left operand of dv and dk, and keep dk and dv in registers. ds goes to shared memory, where the two
exchange it: each multiplies all 128 keys' ds with half of the columns of the keys, or half of the 128 queries' ds with
all, a step late, so that neither waits for the other. With 128 columns:

    group 0:  s = k q^T   dp = v g^T   dv += p^T g   ds --.   dk += ds^T q   dq[:, :64] = ds k[:, :64]  --.
    group 1:  the same of the other 64 keys             --'                  dq[:, 64:] = ds k[:, 64:]  --'--> partial

Two warps of their own copy queries in and add dq to `partial`, see backward_hopper_parts.py. Programs draw their
numbers from a counter when they start, and wait only for lower numbers, which run already. All walk over the queries
from the last block down, one behind the other, so that after the first steps they seldom wait.

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

from .backward_hopper_parts import BLOCK_N, HALF, add_in_turn, copy_in, next_of_walk, pack, store_keys
from .common import CAP_FAST
from .hopper_parts import LOG2E, NEVER, NEVER_CAPPED, barrier, keep_pairs, opaque_zero, signal, store_boxes
from .mask_ranges import load_range, q_block_range


@gluon.jit
def multiply_scores(k_smem, q_smem, stage, zero, layout: gl.constexpr, SIDE: gl.constexpr, BLOCK_M: gl.constexpr):
    """Start k q^T of a group's 64 keys."""
    s = gl.full([HALF, BLOCK_M], 0.0, gl.float32, layout=layout)
    return warpgroup_mma(
        k_smem.index(zero + SIDE), q_smem.index(stage).permute((1, 0)), s, use_acc=False, is_async=True
    )


@gluon.jit
def multiply_dq(ds_smem, k_smem, stage, zero, layout: gl.constexpr, SIDE: gl.constexpr, BLOCK_M: gl.constexpr):
    """Start ds k of all 128 keys, for half of the columns or, where these are 64, half of the queries."""
    halves: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    dq = gl.full([HALF, HALF], 0.0, gl.float32, layout=layout)
    for i in gl.static_range(2):
        ds = ds_smem.index(2 * stage + i)
        k = k_smem.index(zero + i)
        # A tile of 128 columns lies as two of 64 behind each other.
        if BLOCK_M == HALF:
            k = k._reinterpret(k_smem.dtype, [2, HALF, HALF], halves).index(zero + SIDE)
        else:
            ds = ds._reinterpret(k_smem.dtype, [2, HALF, HALF], halves).index(zero + SIDE)
        dq = warpgroup_mma(ds.permute((1, 0)), k, dq, use_acc=i > 0, is_async=True)
    return dq


@gluon.jit
def stage_dq(dq_smem, dq, taken, step, SIDE: gl.constexpr):
    """Leave a step's half of dq in shared memory, when the engine has taken the one of two steps before.

    Before the first step (step is -1) that is what happens to be there, and nobody reads it.
    """
    linear: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    slot = (step + 2) % 2
    mbarrier.wait(taken.index(slot), (step + 2) // 2 % 2, pred=step >= 0)
    dq_smem.index(2 * slot + SIDE)._reinterpret(gl.float32, [1024, 4], linear).store(pack(dq))
    fence_async_shared()


@gluon.jit
def sum_keys(
    grad_k, grad_v, k_boxes, v_boxes, key_mask, kv_start, kv_end, q_ids, kv_ids, q_smem, k_smem, v_smem, g_smem,
    ds_smem, dq_smem, row_smem, kv_full, full, ds_full, done, taken, stride_dkn, stride_dkd, stride_dvn, stride_dve,
    stride_key_n, stride_start_m, stride_end_m, stride_qid_m, stride_kid_n, group, q_len, kv_len, softmax_scale,
    scale_log2, inner_scale, band_lower, band_upper, batch, kv_head, n_first, begin, end, split, steps, full_begin,
    full_end, SIDE: gl.constexpr, BLOCK_M: gl.constexpr, WIDTH: gl.constexpr, HEAD_DIM: gl.constexpr,
    V_HEAD_DIM: gl.constexpr, HAS_KEY_MASK: gl.constexpr, HAS_START: gl.constexpr, HAS_END: gl.constexpr,
    HAS_IDS: gl.constexpr, HAS_LOWER: gl.constexpr, HAS_UPPER: gl.constexpr, SOFT_CAP: gl.constexpr,
    BOXES: gl.constexpr,
):  # fmt: skip
    """One of the two warp groups.

    Both arrive at `done` at the end of a step: its queries and gradients are no longer needed, ds of the step before
    has been used, and dq of that step is staged.
    """
    dtype: gl.constexpr = q_smem.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, result, 2)
    by_key: gl.constexpr = gl.SliceLayout(1, scores)
    by_query: gl.constexpr = gl.SliceLayout(0, scores)
    kv_pos = n_first + SIDE * HALF + gl.arange(0, HALF, layout=by_key)
    nothing = gl.full([HALF, BLOCK_M], 0.0, gl.float32, layout=scores)
    dk = gl.full([HALF, WIDTH], 0.0, gl.float32, layout=result)
    dv = gl.full([HALF, WIDTH], 0.0, gl.float32, layout=result)
    head = 0
    block = end - 1
    mbarrier.wait(kv_full, 0)
    mbarrier.wait(full.index(0), 0, pred=steps > 0)
    s = multiply_scores(k_smem, q_smem, 0, 0, scores, SIDE, BLOCK_M)
    for step in range(steps):
        stage = step % 2
        other = stage ^ 1
        # See opaque_zero: descriptors made before the loop took 21 moves into uniform registers a step, and spills.
        zero = opaque_zero()
        s = warpgroup_mma_wait(0, deps=[s])
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
        dp = warpgroup_mma(v_smem.index(zero + SIDE), g_smem.index(stage).permute((1, 0)), nothing, use_acc=False,
                           is_async=True)  # fmt: skip
        # Rounded, they take half of the registers until ds needs them.
        p = gl.exp2(s * scale_log2 - row_smem.index(2 * stage).load(scores))
        # In ds with the derivative of the soft cap.
        weights = (p * (1.0 - s * s)).to(dtype) if SOFT_CAP == CAP_FAST else p.to(dtype)
        p = p.to(dtype)
        dv = warpgroup_mma(gl.convert_layout(p, operand), g_smem.index(stage), dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        ds = (weights.to(gl.float32) * (dp - row_smem.index(2 * stage + 1).load(scores))).to(dtype)
        mbarrier.wait(done.index(other), (step + 1) // 2 % 2 ^ 1, pred=step > 1)
        ds_smem.index(2 * stage + SIDE).store(ds)
        fence_async_shared()
        signal(ds_full.index(stage))
        # dq of the step before. In the first step it is of what happens to be there, and not used.
        mbarrier.wait(ds_full.index(other), (step + 1) // 2 % 2 ^ 1, pred=step > 0)
        dq = multiply_dq(ds_smem, k_smem, other, zero, tile, SIDE, BLOCK_M)
        ds = gl.convert_layout(ds, operand)
        dk = warpgroup_mma(ds, q_smem.index(stage), dk, is_async=True)
        dv, dq = warpgroup_mma_wait(1, deps=[dv, dq])
        stage_dq(dq_smem, dq, taken, step - 1, SIDE)
        mbarrier.wait(full.index(other), (step + 1) // 2 % 2, pred=step + 1 < steps)
        s = multiply_scores(k_smem, q_smem, other, zero, scores, SIDE, BLOCK_M)
        dk = warpgroup_mma_wait(1, deps=[dk])
        signal(done.index(stage))
        head, block = next_of_walk(head, block, group, begin, end, split)
    s = warpgroup_mma_wait(0, deps=[s])
    if steps > 0:
        last = steps - 1
        mbarrier.wait(ds_full.index(last % 2), last // 2 % 2)
        dq = multiply_dq(ds_smem, k_smem, last % 2, 0, tile, SIDE, BLOCK_M)
        dq = warpgroup_mma_wait(0, deps=[dq])
        stage_dq(dq_smem, dq, taken, last, SIDE)
        signal(done.index(steps % 2))

    n_first += SIDE * HALF
    if BOXES:
        # The group's own values have been read.
        room = v_smem.index(SIDE)
        store_boxes(v_boxes, batch, kv_head, n_first, dv, room, WIDTH, WIDTH)
        store_boxes(k_boxes, batch, kv_head, n_first, dk * softmax_scale, room, WIDTH, WIDTH)
        tma.store_wait(0)
    else:
        store_keys(grad_k, dk * softmax_scale, n_first, kv_len, stride_dkn, stride_dkd, HEAD_DIM, result, WIDTH)
        store_keys(grad_v, dv, n_first, kv_len, stride_dvn, stride_dve, V_HEAD_DIM, result, WIDTH)


_SIZES = ["batch_size", "num_heads", "gqa_group_size", "q_len", "kv_len", "heads_at_once", "band_lower", "band_upper"]


@gluon.jit(do_not_specialize=_SIZES)
def backward_hopper_kernel(
    q, k, v, grad_out, grad_k, grad_v, k_boxes, v_boxes, shift, delta, partial, turns, ticket, key_mask, kv_start,
    kv_end, q_ids, kv_ids, ranges, key_ranges, stride_dkb, stride_dkh, stride_dkn, stride_dkd, stride_dvb, stride_dvh,
    stride_dvn, stride_dve, stride_key_b, stride_key_n, stride_start_b, stride_start_m, stride_end_b, stride_end_m,
    stride_qid_b, stride_qid_m, stride_kid_b, stride_kid_n, batch_size, num_heads, gqa_group_size, q_len, kv_len,
    heads_at_once, softmax_scale, logits_soft_cap, band_lower, band_upper, HEAD_DIM: gl.constexpr,
    V_HEAD_DIM: gl.constexpr, HAS_KEY_MASK: gl.constexpr, HAS_START: gl.constexpr, HAS_END: gl.constexpr,
    HAS_IDS: gl.constexpr, HAS_LOWER: gl.constexpr, HAS_UPPER: gl.constexpr, SOFT_CAP: gl.constexpr,
    WIDTH: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    """Write `grad_k` `(B, K, N, D)` and `grad_v` `(B, K, N, E)`, and add up dq in `partial`.

    D and E are at most WIDTH, 64 or 128. The scores are in the RAW domain of common.py. q and grad_out are tensor
    descriptors of BLOCK_M x WIDTH, k and v of 64 x WIDTH, shift and delta of 1 x BLOCK_M of `(B * H, M)`.

    Args:
        k_boxes, v_boxes: With BOXES descriptors of `grad_k` and `grad_v`, of 64 x WIDTH.
        partial: Descriptor of PART x 256 of float32 `(B * H * blocks of queries * 32, 256)`, uninitialised: two tiles
            of 64 x 64 for each block, halves of its columns or rows. Blocks that see no key are not written.
        turns: int32 `(B, H, blocks of queries)`, zeros; more than 0 where `partial` has been written.
        ticket: int32 `(1,)`, zero.
        ranges, key_ranges: Where a mask stands in tensors, the tables of mask_ranges_kernel, for blocks of queries, and
            of key_ranges_kernel, for blocks of 128 keys. The turns at a block of queries are counted from the first
            of its range, so all keys in it must have the block in theirs: that is why one table is made of the other.
    """
    dtype: gl.constexpr = q.dtype
    # Queries of a step: tiles of scores, and of the queries and keys of a head, have 64 x 128 numbers in any case.
    BLOCK_M: gl.constexpr = 128 * HALF // WIDTH
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    in_order: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_M, WIDTH], shared)
    g_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_M, WIDTH], shared)
    k_smem = gl.allocate_shared_memory(dtype, [2, HALF, WIDTH], shared)
    v_smem = gl.allocate_shared_memory(dtype, [2, HALF, WIDTH], shared)
    ds_smem = gl.allocate_shared_memory(dtype, [4, HALF, BLOCK_M], shared)
    dq_smem = gl.allocate_shared_memory(gl.float32, [4, 16, 256], in_order)
    row_smem = gl.allocate_shared_memory(gl.float32, [4, 1, BLOCK_M], in_order)
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full.index(0), count=1)
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(ds_full.index(i), count=2)
        mbarrier.init(done.index(i), count=2)
        mbarrier.init(taken.index(i), count=1)

    softmax_scale = softmax_scale.to(gl.float32)
    scale_log2 = softmax_scale * LOG2E
    inner_scale = softmax_scale
    if SOFT_CAP == CAP_FAST:
        inner_scale = softmax_scale / logits_soft_cap
        scale_log2 = logits_soft_cap * LOG2E
    num_kv_blocks = gl.cdiv(kv_len, BLOCK_N)
    num_row_blocks = gl.cdiv(q_len, BLOCK_M)
    num_kv_heads = num_heads // gqa_group_size
    number = gl.atomic_add(ticket, 1, sem="relaxed", scope="gpu")
    # As deal_programs: a head's key blocks in ascending order.
    first = number // (heads_at_once * num_kv_blocks) * heads_at_once
    count = gl.minimum(heads_at_once, batch_size * num_kv_heads - first)
    rest = number - first * num_kv_blocks
    kv_index = first + rest % count
    kv_block = rest // count
    batch = kv_index // num_kv_heads
    kv_head = kv_index % num_kv_heads
    n_first = kv_block * BLOCK_N
    n_last = gl.minimum(n_first + BLOCK_N, kv_len) - 1
    RANGED: gl.constexpr = HAS_KEY_MASK or HAS_START or HAS_END or HAS_IDS
    if RANGED:
        begin, full_begin, full_end, end = load_range(key_ranges, batch * num_kv_blocks + kv_block)
        ranges += batch * num_row_blocks * 4
    else:
        # As if all queries of the last block were there: absent ones add nothing in any case. Absent keys do.
        begin, full_begin, full_end, end = q_block_range(
            n_first, n_last, num_row_blocks * BLOCK_M, band_lower, band_upper, BLOCK_M, HAS_LOWER, HAS_UPPER
        )
    full_end = gl.where(n_first + BLOCK_N > kv_len, 0, full_end)
    steps = (end - begin) * gqa_group_size
    # Not where programs end at the last query: those with less to do would wait in each head for those with more.
    split = 0
    if HAS_LOWER and HAS_UPPER:
        split = gl.maximum(num_row_blocks - gl.cdiv(BLOCK_N + band_upper - band_lower, BLOCK_M), 0)
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

    grad_k += batch_long * stride_dkb + kv_head.to(gl.int64) * stride_dkh
    grad_v += batch_long * stride_dvb + kv_head.to(gl.int64) * stride_dvh
    barrier()
    # Written out twice: constants stay constants only in the call itself.
    gl.warp_specialize(
        [
            (sum_keys, (
                grad_k, grad_v, k_boxes, v_boxes, key_mask, kv_start, kv_end, q_ids, kv_ids, q_smem, k_smem, v_smem,
                g_smem, ds_smem, dq_smem, row_smem, kv_full.index(0), full, ds_full, done, taken, stride_dkn,
                stride_dkd, stride_dvn, stride_dve, stride_key_n, stride_start_m, stride_end_m, stride_qid_m,
                stride_kid_n, gqa_group_size, q_len, kv_len, softmax_scale, scale_log2, inner_scale, band_lower,
                band_upper, batch, kv_head, n_first, begin, end, split, steps, full_begin, full_end, 0, BLOCK_M, WIDTH,
                HEAD_DIM, V_HEAD_DIM, HAS_KEY_MASK, HAS_START, HAS_END, HAS_IDS, HAS_LOWER, HAS_UPPER, SOFT_CAP, BOXES,
            )),
            (sum_keys, (
                grad_k, grad_v, k_boxes, v_boxes, key_mask, kv_start, kv_end, q_ids, kv_ids, q_smem, k_smem, v_smem,
                g_smem, ds_smem, dq_smem, row_smem, kv_full.index(0), full, ds_full, done, taken, stride_dkn,
                stride_dkd, stride_dvn, stride_dve, stride_key_n, stride_start_m, stride_end_m, stride_qid_m,
                stride_kid_n, gqa_group_size, q_len, kv_len, softmax_scale, scale_log2, inner_scale, band_lower,
                band_upper, batch, kv_head, n_first, begin, end, split, steps, full_begin, full_end, 1, BLOCK_M, WIDTH,
                HEAD_DIM, V_HEAD_DIM, HAS_KEY_MASK, HAS_START, HAS_END, HAS_IDS, HAS_LOWER, HAS_UPPER, SOFT_CAP, BOXES,
            )),
            (copy_in, (
                q, k, v, grad_out, shift, delta, q_smem, k_smem, v_smem, g_smem, row_smem, kv_full.index(0), full,
                done, batch, kv_head, num_heads, gqa_group_size, n_first, begin, end, split, steps,
                BLOCK_M, WIDTH,
            )),
            (add_in_turn, (
                partial, turns, ranges, dq_smem, done, taken, batch * num_heads + kv_head * gqa_group_size,
                gqa_group_size, num_row_blocks, band_lower, kv_block, begin, end, split, steps,
                BLOCK_M, HAS_LOWER, RANGED,
            )),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
