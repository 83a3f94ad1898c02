"""What the two Hopper kernels of latent attention share: rows, and the copies of blocks of tokens.

A block has 64 tokens and comes in two halves of 256 columns, each with a barrier of its own. A page of fewer tokens, or
of no multiple of 64, is copied BOX tokens at a time; BOX divides both.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

BLOCK_N = gl.constexpr(64)
"""Tokens of a block."""
HALF = gl.constexpr(256)
"""Columns of half a block."""


@gluon.jit
def row_of(tile, num_heads, rows_len, ROWS: gl.constexpr, layout: gl.constexpr):
    """`(exists, query position, head)` of the ROWS of a tile; rows past the end repeat the last one."""
    row_store = tile * ROWS + gl.arange(0, ROWS, layout=layout)
    row = gl.minimum(row_store, rows_len - 1)
    return row_store < rows_len, row // num_heads, (row % num_heads).to(gl.int64)


@gluon.jit
def copy_queries(q_boxes, q_pe_boxes, tile, batch, num_heads, q_smem, rooms, arrived, BLOCK_R: gl.constexpr):
    """Start the copies of a tile's queries, heads of one position, through descriptors: q_pe to each of the `rooms`."""
    ROWS: gl.constexpr = q_smem.shape[1]
    row = tile * ROWS
    q_pos = row // num_heads
    head = row - q_pos * num_heads
    mbarrier.expect(arrived, ROWS * (2 * HALF + len(rooms) * BLOCK_R) * 2)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(q_boxes, [batch, q_pos, head, half * 256], arrived, q_smem.index(half))
    if BLOCK_R > 0:
        for room in gl.static_range(len(rooms)):
            tma.async_copy_global_to_shared(q_pe_boxes, [batch, q_pos, head, 0], arrived, rooms[room])


@gluon.jit
def load_queries(
    q, tile, num_heads, q_len, stride_h, stride_m, ROWS: gl.constexpr, COLUMN: gl.constexpr, COUNT: gl.constexpr,
    WIDTH: gl.constexpr, target,
):  # fmt: skip
    """Copy COUNT columns of a batch entry's queries from COLUMN on into shared memory, 0 from WIDTH on."""
    lanes: gl.constexpr = min(COUNT // 8, 32)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])
    _ok, q_pos, head = row_of(tile, num_heads, q_len * num_heads, ROWS, gl.SliceLayout(1, layout))
    offset = head * stride_h + q_pos.to(gl.int64) * stride_m
    columns = COLUMN + gl.arange(0, COUNT, layout=gl.SliceLayout(0, layout))
    target.store(gl.load(q + offset[:, None] + columns[None, :], mask=(columns < WIDTH)[None, :], other=0.0))


@gluon.jit
def place(block_table, token, batch, used_start, used_end, BOX: gl.constexpr, PAGE: gl.constexpr):
    """Where BOX tokens lie: page or batch entry, and the token in it."""
    slab = batch
    if PAGE > 0:
        # A block table may hold anything outside of what is used.
        token = gl.minimum(gl.maximum(token, used_start // BOX * BOX), gl.maximum(used_end - 1, 0) // BOX * BOX)
        slab = gl.load(block_table + token // PAGE)
        token = token % PAGE
    return slab, token


@gluon.jit
def places(block_table, block, batch, used_start, used_end, BOX: gl.constexpr, PAGE: gl.constexpr):
    """place() of 16 tokens each of a block, in one tuple: as many as there are boxes, the others are never used."""
    first = block * BLOCK_N
    slab0, at0 = place(block_table, first, batch, used_start, used_end, BOX, PAGE)
    slab1, at1, slab2, at2, slab3, at3 = slab0, at0, slab0, at0, slab0, at0
    if BOX < 64:
        slab2, at2 = place(block_table, first + 32, batch, used_start, used_end, BOX, PAGE)
    if BOX < 32:
        slab1, at1 = place(block_table, first + 16, batch, used_start, used_end, BOX, PAGE)
        slab3, at3 = place(block_table, first + 48, batch, used_start, used_end, BOX, PAGE)
    return slab0, at0, slab1, at1, slab2, at2, slab3, at3


@gluon.jit
def copy_half(
    kv, k_pe, found, target, pe_target, full, RIGHT: gl.constexpr, BOX: gl.constexpr, BLOCK_R: gl.constexpr
):  # fmt: skip
    """Start the copies of half of a block whose places are `found`. With the right half (RIGHT is 1) comes k_pe."""
    mbarrier.expect(full, BLOCK_N * (HALF + RIGHT * BLOCK_R) * 2)
    for part in gl.static_range(64 // BOX):
        slab = found[part * BOX // 16 * 2]
        at = found[part * BOX // 16 * 2 + 1]
        tma.async_copy_global_to_shared(kv, [slab, at, RIGHT * 256], full, target.slice(part * BOX, BOX, dim=0))
        if RIGHT * BLOCK_R > 0:
            tma.async_copy_global_to_shared(k_pe, [slab, at, 0], full, pe_target.slice(part * BOX, BOX, dim=0))
