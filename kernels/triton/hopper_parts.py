"""What Hopper's kernels in Gluon share, whichever attention they compute."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
NEVER = gl.constexpr(float("-inf"))
NEVER_CAPPED = gl.constexpr(-1e18)
"""Far below what tanh gives, and its square is still a number."""
ROWS = gl.constexpr(64)
"""Rows of a warp group's products."""
# Its name differs between Triton 3.6 and 3.7.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def thread_sums(p):
    """The sums of each row's numbers in one thread, (rows, 4): adding up the threads can wait until the tile's end."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def halves(x, N: gl.constexpr):
    """The left and the right half of the N columns of a warp group's result; nothing moves."""
    half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N // 2, 16])
    left, right = x.reshape([ROWS, 2, N // 2]).permute((0, 2, 1)).split()
    return gl.convert_layout(left, half, assert_trivial=True), gl.convert_layout(right, half, assert_trivial=True)


@gluon.jit
def store_box(boxes, at, tile, room):
    """Start the copy of a warp group's tile to memory, by way of `room` in shared memory; see store_boxes."""
    room.store(tile.to(boxes.dtype))
    fence_async_shared()
    barrier()
    tma.async_copy_shared_to_global(boxes, at, room)


@gluon.jit
def store_boxes(boxes, batch, head, row, tile, room, BLOCK: gl.constexpr, COLUMNS: gl.constexpr):
    """Store a warp group's result of BLOCK columns through a descriptor of boxes of ROWS x COLUMNS.

    A thread holds two numbers here and two there: as ordinary stores they take 4000 clock cycles for 128 columns, of
    which nothing else makes use. What is in `room` may still be on its way afterwards: see tma.store_wait.
    """
    tma.store_wait(0)
    barrier()
    if COLUMNS == BLOCK:
        store_box(boxes, [batch, head, row, 0], tile, room)
    else:
        left, right = halves(tile, BLOCK)
        store_box(boxes, [batch, head, row, 0], left, room)
        tma.store_wait(0)
        barrier()
        store_box(boxes, [batch, head, row, COLUMNS], right, room)


@gluon.jit
def row_limits(
    q_pos, kv_len, kv_start, kv_end, stride_start_m, stride_end_m, band_lower, band_upper, HAS_START: gl.constexpr,
    HAS_END: gl.constexpr, HAS_LOWER: gl.constexpr, HAS_UPPER: gl.constexpr,
):  # fmt: skip
    """The keys [lower, upper) of each row; the pointers already point at the batch entry."""
    lower = q_pos * 0
    upper = lower + kv_len
    at = q_pos.to(gl.int64)
    if HAS_START:
        lower = gl.minimum(gl.maximum(gl.load(kv_start + at * stride_start_m), 0), kv_len).to(gl.int32)
    if HAS_END:
        upper = gl.minimum(gl.maximum(gl.load(kv_end + at * stride_end_m), 0), kv_len).to(gl.int32)
    if HAS_LOWER:
        lower = gl.maximum(lower, q_pos + band_lower)
    if HAS_UPPER:
        upper = gl.minimum(upper, q_pos + band_upper + 1)
    return lower, upper


@gluon.jit
def keep_pairs(
    q_pos, kv_pos, q_len, kv_len, key_mask, kv_start, kv_end, q_ids, kv_ids, stride_key_n, stride_start_m, stride_end_m,
    stride_qid_m, stride_kid_n, band_lower, band_upper, HAS_KEY_MASK: gl.constexpr, HAS_START: gl.constexpr,
    HAS_END: gl.constexpr, HAS_IDS: gl.constexpr, HAS_LOWER: gl.constexpr, HAS_UPPER: gl.constexpr,
):  # fmt: skip
    """Which pairs of a (key, query) tile the mask keeps. The pointers already point at the batch entry.

    Absent queries, which have no gradients to add, count as the last one.
    """
    keep = (kv_pos < kv_len)[:, None] & (q_pos >= 0)[None, :]
    if HAS_UPPER:
        keep &= kv_pos[:, None] - q_pos[None, :] <= band_upper
    if HAS_LOWER:
        keep &= kv_pos[:, None] - q_pos[None, :] >= band_lower
    row = gl.minimum(q_pos, q_len - 1).to(gl.int64)
    key = gl.minimum(kv_pos, kv_len - 1).to(gl.int64)
    if HAS_KEY_MASK:
        keep &= (gl.load(key_mask + key * stride_key_n) != 0)[:, None]
    if HAS_START:
        starts = gl.minimum(gl.maximum(gl.load(kv_start + row * stride_start_m), 0), kv_len).to(gl.int32)
        keep &= kv_pos[:, None] >= starts[None, :]
    if HAS_END:
        ends = gl.minimum(gl.maximum(gl.load(kv_end + row * stride_end_m), 0), kv_len).to(gl.int32)
        keep &= kv_pos[:, None] < ends[None, :]
    if HAS_IDS:
        keep &= gl.load(kv_ids + key * stride_kid_n)[:, None] == gl.load(q_ids + row * stride_qid_m)[None, :]
    return keep


@gluon.jit
def finite(m):
    """The maximum to subtract: 0 for a row that has seen no key, where -inf would give NaN."""
    return gl.where(m == NEVER, 0.0, m)


@gluon.jit
def signal(bar):
    """Arrive once for the calling warps, after all of them."""
    barrier()
    mbarrier.arrive(bar, count=1)


@gluon.jit
def release(keys, queries, is_last, EARLY: gl.constexpr):
    """As `signal` for keys, and with EARLY, where these were a tile's last ones, for its queries."""
    barrier()
    mbarrier.arrive(keys, count=1)
    if EARLY:
        mbarrier.arrive(queries, count=1, pred=is_last)


@gluon.jit
def launch_dependents():
    """Let the launch behind this one start, if it asked for that: it has to wait for this one's end itself."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def next_slot(slot, phase, SLOTS: gl.constexpr):
    """The slot of a ring after this one, and its phase."""
    wraps = slot == SLOTS - 1
    return gl.where(wraps, 0, slot + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def token_of(row, BOX: gl.constexpr, HEADS: gl.constexpr):
    """Which token of a tile its row is of, where BOX tokens of each of HEADS heads follow each other."""
    return row // (BOX * HEADS) * BOX + row % BOX


@gluon.jit
def clear_tokens(tile, first, last, BOX: gl.constexpr, HEADS: gl.constexpr):
    """Put 0 into the rows of a shared tile whose tokens are outside of [first, last); by a warp group."""
    WIDTH: gl.constexpr = tile.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    token = token_of(gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, layout)), BOX, HEADS)
    for column in gl.static_range(0, WIDTH, 64):
        part = tile.slice(column, 64, dim=1)
        kept = part.load(layout)
        part.store(gl.where(((token >= first) & (token < last))[:, None], kept, 0.0))


@gluon.jit
def soft_weights(s, m_i, sums, scale_log2):
    """A step of the online softmax over scores (key, row): `(p, m, alpha, sums)`, sums of p not yet added up by key."""
    m_new = gl.maximum(m_i, gl.max(s, 0) * scale_log2)
    alpha = gl.exp2(m_i - finite(m_new))
    p = gl.exp2(s * scale_log2 - finite(m_new)[None, :])
    return p, m_new, alpha, sums * alpha[None, :] + p


@gluon.jit
def opaque_zero():
    """0, which no compiler pass knows to be 0, nor to be the same again: what it is added to stays in its loop."""
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def uniform(x):
    """A number that is the same in all threads of a warp, so that ptxas knows: what is computed of it is computed once.

    A matrix instruction takes its descriptors from uniform registers. Without this each waits for four moves into them.
    """
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )
