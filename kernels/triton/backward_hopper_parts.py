"""The two copying warps of the one backward kernel for Hopper, and what all its roles share.

A sum over all keys has to be added up by the programs that own the keys. It stays deterministic because they take
turns: `turns` counts, for each block of queries, how many programs have added to it, in the order of their keys. The
copy engine adds; the warp that starts it waits for the turn, for the engine, and passes the turn on, while the others
compute.
"""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

BLOCK_N = gl.constexpr(128)
"""Keys of a program."""
HALF = gl.constexpr(64)
"""Half of them, and the side of a tile of dq."""
PART = gl.constexpr(16)
"""A (64, 64) float32 tile is PART rows of 256 numbers in `partial`, in the order of `pack`."""


@builtin
def async_add(descriptor, coord, source, _semantic=None):
    """The copy engine adds a tile in shared memory to global memory: Triton compiles it, Gluon has no name for it."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coord, source.handle)


@gluon.jit
def load_acquire(pointer):
    """The number at `pointer`; the copy engine then sees what had been added before it was stored."""
    return gl.inline_asm_elementwise(
        "{ ld.acquire.gpu.global.b32 $0, [$1]; fence.proxy.async.global; }", "=r,l", [pointer], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def store_release(pointer, value):
    """Store `value` once the calling warp's copies and additions are in global memory.

    tma.store_wait only waits until shared memory has been read.
    """
    gl.inline_asm_elementwise(
        "{ cp.async.bulk.wait_group 0; bar.warp.sync -1; st.release.gpu.global.b32 [$1], $2; mov.b32 $0, $2; }",
        "=r,l,r", [pointer, value], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def next_step(head, block, group):
    """What follows a block of queries: that of the group's next head, after the last head the block before it.

    Heads change fastest: programs with fewer blocks then simply finish earlier. If each head were walked through, they
    would start the next one before those with more blocks, on whom they wait.
    """
    head += 1
    done = head == group
    return gl.where(done, 0, head), gl.where(done, block - 1, block)


@gluon.jit
def next_of_walk(head, block, group, begin, end, split):
    """The same down to block `split`; below, each head is walked through by itself, from its last block to its first.

    In a window each program starts two blocks of 64 queries above the one before it, and where heads change fastest it
    comes to a block `2 * group` steps after that one: the cache does not hold what all read and add in between.
    """
    other_head, other_block = next_step(head, block, group)
    last = block == begin
    by_heads = block >= split
    head = gl.where(by_heads, other_head, gl.where(last, head + 1, head))
    return head, gl.where(by_heads, other_block, gl.where(last, gl.minimum(end, split), block) - 1)


@gluon.jit
def pack(tile):
    """A (64, 64) result as (1024, 4): what a thread holds, by fours, so that memory is written in order."""
    return tile.reshape([4, 2, 8, 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([1024, 4])


@gluon.jit
def store_keys(pointer, tile, n_first, kv_len, stride_n, stride_d, width, layout: gl.constexpr, BLOCK: gl.constexpr):
    """Store a gradient of the 64 keys from `n_first` on, or a piece of its columns."""
    row = n_first + gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
    gl.store(
        pointer + (row.to(gl.int64) * stride_n)[:, None] + (columns * stride_d)[None, :],
        tile.to(pointer.dtype.element_ty),
        mask=(row < kv_len)[:, None] & (columns < width)[None, :],
    )


@gluon.jit
def copy_in(
    q, k, v, grad_out, shift, delta, q_smem, k_smem, v_smem, g_smem, row_smem, kv_full, full, done, batch, kv_head,
    num_heads, group, n_first, begin, end, split, steps, BLOCK_M: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """A warp that copies the keys and values in, then one block of queries and gradients after the other."""
    mbarrier.expect(kv_full, 2 * BLOCK_N * WIDTH * 2)
    for side in gl.static_range(2):
        tma.async_copy_global_to_shared(k, [batch, kv_head, n_first + side * HALF, 0], kv_full, k_smem.index(side))
        tma.async_copy_global_to_shared(v, [batch, kv_head, n_first + side * HALF, 0], kv_full, v_smem.index(side))
    head = 0
    block = end - 1
    for step in range(steps):
        stage = step % 2
        q_first = block * BLOCK_M
        q_head = kv_head * group + head
        row = batch * num_heads + q_head
        mbarrier.wait(done.index(stage), (step // 2 + 1) % 2)
        mbarrier.expect(full.index(stage), 2 * BLOCK_M * WIDTH * 2 + 2 * BLOCK_M * 4)
        tma.async_copy_global_to_shared(q, [batch, q_head, q_first, 0], full.index(stage), q_smem.index(stage))
        tma.async_copy_global_to_shared(grad_out, [batch, q_head, q_first, 0], full.index(stage), g_smem.index(stage))
        tma.async_copy_global_to_shared(shift, [row, q_first], full.index(stage), row_smem.index(2 * stage))
        tma.async_copy_global_to_shared(delta, [row, q_first], full.index(stage), row_smem.index(2 * stage + 1))
        head, block = next_of_walk(head, block, group, begin, end, split)


@gluon.jit
def add_in_turn(
    partial, turns, ranges, dq_smem, done, taken, first_row, group, num_row_blocks, band_lower, kv_block,
    begin, end, split, steps, BLOCK_M: gl.constexpr, HAS_LOWER: gl.constexpr, RANGED: gl.constexpr,
):  # fmt: skip
    """A warp that adds dq of a block to what the programs with lower keys have left in `partial`; the first one stores.

    `first_row` is the first query head's number among all of them. RANGED: `ranges` says which keys a block meets. A
    program may pass blocks that do not meet its keys, on its way to others; there it has nothing to add, and no turn.
    """
    head = 0
    block = end - 1
    for step in range(steps):
        stage = step % 2
        first = 0
        meets = True
        if HAS_LOWER:
            # The first keys that the block sees.
            first = gl.maximum(block * BLOCK_M + band_lower, 0) // BLOCK_N
        if RANGED:
            first = gl.load(ranges + 4 * block)
            meets = (kv_block >= first) & (kv_block < gl.load(ranges + 4 * block + 3))
        tile = (first_row + head) * num_row_blocks + block
        # Staged in the step that follows.
        mbarrier.wait(done.index(stage ^ 1), (step + 1) // 2 % 2)
        if meets:
            if kv_block > first:
                while load_acquire(turns + tile) < kv_block - first:
                    pass
                for half in gl.static_range(2):
                    async_add(partial, [(2 * tile + half) * PART, 0], dq_smem.index(2 * stage + half))
            else:
                for half in gl.static_range(2):
                    tma.async_copy_shared_to_global(partial, [(2 * tile + half) * PART, 0],
                                                    dq_smem.index(2 * stage + half))  # fmt: skip
            tma.store_wait(0)
        mbarrier.arrive(taken.index(stage), count=1)
        if meets:
            store_release(turns + tile, kv_block - first + 1)
        head, block = next_of_walk(head, block, group, begin, end, split)
