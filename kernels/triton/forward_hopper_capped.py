"""The loop of forward_hopper.py under a soft cap that begins with the polynomial of cap_series.py.

A score takes two operations more than without a cap, so that a group's own exponentials are what it waits for, and not
the matrix units. Here it waits for the values in the middle of them: weights of the left half of the columns are packed
and in place while the right half is exponentiated. (Without a cap that gains nothing.)

Masks are by position alone, no maximum is needed, and there is one piece of the head dimension: see
forward_hopper_launch.CAP_BY_SERIES.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .cap_series import factored_series, series_exponent
from .hopper_parts import NEVER, ROWS, barrier, halves, signal, thread_sums


@gluon.jit
def scale_in_place(q_smem, factor):
    """Multiply a group's queries where they lie."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    factors = gl.full(q_smem.shape, factor.to(q_smem.dtype), q_smem.dtype, layout=layout)
    scaled = gl.inline_asm_elementwise(
        "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [q_smem.load(layout), factors], dtype=q_smem.dtype, is_pure=True, pack=2
    )
    q_smem.store(scaled)
    fence_async_shared()
    barrier()


@gluon.jit
def masked(s, lower, upper, block, full_begin, full_end, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """Scores of keys outside [lower, upper) become -inf; most blocks have none. The polynomial of -inf is -inf."""
    if (block < full_begin) | (block >= full_end):
        kv_pos = block * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
        s = gl.where((kv_pos[None, :] >= lower[:, None]) & (kv_pos[None, :] < upper[:, None]), s, NEVER)
    return s


@gluon.jit
def weights_of(s, constant, linear):
    """exp2 of the polynomial; see cap_series.factored_series."""
    return gl.exp2(series_exponent(s, constant, linear))


@gluon.jit
def attend_capped(
    q_smem, k_smem, v_smem, q_full, q_free, k_full, k_free, v_full, v_free, turn, begin, full_begin, full_end, end,
    lower, upper, step, tiles, turns, scale_log2, inner,
    GROUP: gl.constexpr, BLOCK_E: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A group's rows of a tile with at least one block of keys, as forward_hopper.attend_tile."""
    dtype: gl.constexpr = q_smem.dtype
    HALF: gl.constexpr = BLOCK_N // 2
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_E, 16])
    weight: gl.constexpr = gl.DotOperandLayout(0, result, 2)
    nothing = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, layout=scores)
    acc = gl.full([ROWS, BLOCK_E], 0.0, gl.float32, layout=result)
    stage = step % STAGES
    phase = step // STAGES & 1
    factor, constant, linear = factored_series(scale_log2, inner)
    mbarrier.wait(q_full.index(GROUP), tiles & 1)
    scale_in_place(q_smem.index(GROUP), factor)
    mbarrier.wait(k_full.index(stage), phase)
    keys = k_smem.index(stage).permute((1, 0))
    s = warpgroup_mma(q_smem.index(GROUP), keys, nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    signal(k_free.index(stage))
    whole = weights_of(masked(s, lower, upper, begin, full_begin, full_end, BLOCK_N, scores), constant, linear)
    l_i = thread_sums(whole)
    p_left, p_right = halves(whole, BLOCK_N)
    left = gl.convert_layout(p_left.to(dtype), weight, assert_trivial=True)
    right = gl.convert_layout(p_right.to(dtype), weight, assert_trivial=True)
    mbarrier.wait(v_full.index(stage), phase)
    for block in range(begin + 1, end):
        last = v_smem.index(stage)
        last_free = v_free.index(stage)
        step += 1
        stage = step % STAGES
        phase = step // STAGES & 1
        mbarrier.wait(k_full.index(stage), phase)
        mbarrier.wait(turn.index(GROUP), (turns & 1) ^ (1 - GROUP))
        keys = k_smem.index(stage).permute((1, 0))
        s = warpgroup_mma(q_smem.index(GROUP), keys, nothing, use_acc=False, is_async=True)
        acc = warpgroup_mma(left, last.slice(0, HALF), acc, is_async=True)
        acc = warpgroup_mma(right, last.slice(HALF, HALF), acc, is_async=True)
        signal(turn.index(1 - GROUP))
        turns += 1
        s = warpgroup_mma_wait(2, deps=[s])
        signal(k_free.index(stage))
        s = masked(s, lower, upper, block, full_begin, full_end, BLOCK_N, scores)
        s_left, s_right = halves(s, BLOCK_N)
        p_left = weights_of(s_left, constant, linear)
        l_i += gl.convert_layout(thread_sums(p_left), l_i.type.layout, assert_trivial=True)
        # ptxas moves a wait for a product up to the start of its block of instructions, which is this wait.
        mbarrier.wait(v_full.index(stage), phase)
        acc, p_left = warpgroup_mma_wait(0, deps=[acc, p_left])
        signal(last_free)
        left = gl.convert_layout(p_left.to(dtype), weight, assert_trivial=True)
        p_right = weights_of(s_right, constant, linear)
        l_i += gl.convert_layout(thread_sums(p_right), l_i.type.layout, assert_trivial=True)
        right = gl.convert_layout(p_right.to(dtype), weight, assert_trivial=True)
    signal(q_free.index(GROUP))
    acc = warpgroup_mma(left, v_smem.index(stage).slice(0, HALF), acc, is_async=True)
    acc = warpgroup_mma(right, v_smem.index(stage).slice(HALF, HALF), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    signal(v_free.index(stage))
    l_i = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, scores), assert_trivial=True)
    return acc, l_i, step + 1, turns
