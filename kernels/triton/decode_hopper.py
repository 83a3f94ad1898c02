"""The decode kernel of float8 caches for Hopper, in Gluon: keys and values go from memory to the operands' registers.

forward.py's kernel takes a tile through shared memory twice, as it is and converted, with barriers between. Here every
lane loads 16 bytes that lie side by side, in a layout in which they are operands as they are, but for the order of
columns: that of the head dimension does not matter if queries have the same, that of the values' columns until the
result is stored. Each warp has keys of its own and its own softmax; warps meet at the end only. The next tile's loads
are on their way while a tile is used.

    K: lanes 4 r .. 4 r + 3 hold key r      V: lanes c, c + 4, .. c + 28 hold keys 2 c, 2 c + 1

A tile is `(W, N, columns)`, N keys for each of W warps. Until it is used it stays in 32-bit words: numbers of 8 bits
would take a register each. Letters and arithmetic as in forward.py and float8.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .combine import finish_rows
from .common import kv_block_range
from .float8 import WEIGHT_BITS
from .hopper_parts import LOG2E, NEVER, finite, row_limits

ROWS = gl.constexpr(16)
"""Rows of a tile: as many as the matrix instruction has."""


@gluon.constexpr_function
def _bits(size):
    return size.bit_length() - 1


@gluon.constexpr_function
def vector(words, lanes):
    """How many words of a row lie side by side in a lane, if so many lanes share it: 16 bytes or less."""
    return min(4, words // lanes)


@gluon.constexpr_function
def key_layout(W, N, words):
    """Of keys (W, N, words): a lane has vectors of the keys lane // 4 + 8 i."""
    width = _bits(vector(words, 4))
    along = [[0, 0, 1 << bit] for bit in range(_bits(words))]
    keys = [[0, 1 << bit, 0] for bit in range(_bits(N))]
    return gl.DistributedLinearLayout(
        reg_bases=along[:width] + along[width + 2 :] + keys[3:], lane_bases=along[width : width + 2] + keys[:3],
        warp_bases=[[1 << bit, 0, 0] for bit in range(_bits(W))], block_bases=[], shape=[W, N, words],
    )  # fmt: skip


@gluon.constexpr_function
def value_layout(W, N, words):
    """Of values (W, N, words): a lane has vectors of the keys 2 (lane % 4) + {0, 1, 8, 9} + 16 i."""
    width = _bits(vector(words, 8))
    along = [[0, 0, 1 << bit] for bit in range(_bits(words))]
    keys = [[0, 1 << bit, 0] for bit in range(_bits(N))]
    return gl.DistributedLinearLayout(
        reg_bases=along[:width] + keys[:1] + keys[3:] + along[width + 3 :],
        lane_bases=keys[1:3] + along[width : width + 3],
        warp_bases=[[1 << bit, 0, 0] for bit in range(_bits(W))], block_bases=[], shape=[W, N, words],
    )  # fmt: skip


_E4M3 = gl.constexpr(
    "{ .reg .b16 a, b; .reg .b32 c, d; mov.b32 {a, b}, $4; cvt.rn.f16x2.e4m3x2 c, a; cvt.rn.f16x2.e4m3x2 d, b; "
    "mov.b32 {$0, $1}, c; mov.b32 {$2, $3}, d; }"
)
_E5M2 = gl.constexpr(
    "{ .reg .b32 c, d; prmt.b32 c, 0, $4, 0x5040; prmt.b32 d, 0, $4, 0x7060; mov.b32 {$0, $1}, c; "
    "mov.b32 {$2, $3}, d; }"
)


@gluon.jit
def widen_words(x, FLOAT8: gl.constexpr):
    """The float16 numbers that the int32 words of a tile (W, N, words) are in FLOAT8, a float8: (W, N, 4 words)."""
    ASM: gl.constexpr = _E5M2 if FLOAT8 == gl.float8e5 else _E4M3
    a, b, c, d = gl.inline_asm_elementwise(
        ASM, "=h,=h,=h,=h,r", [x], dtype=(gl.int16, gl.int16, gl.int16, gl.int16), is_pure=True, pack=1
    )
    wide = gl.join(gl.join(a, b), gl.join(c, d)).permute((0, 1, 2, 4, 3))
    return wide.reshape([x.shape[0], x.shape[1], 4 * x.shape[2]]).to(gl.float16, bitcast=True)


@gluon.jit
def tile_rows(layout: gl.constexpr, W: gl.constexpr, N: gl.constexpr):
    """Which keys of a tile, (W, N, 1)."""
    warp = gl.arange(0, W, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    key = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    return warp.expand_dims(1).expand_dims(2) * N + key.expand_dims(0).expand_dims(2)


@gluon.jit
def tile_columns(layout: gl.constexpr, words: gl.constexpr):
    """Which words of a row, (1, 1, words)."""
    return gl.arange(0, words, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout))).expand_dims(0).expand_dims(1)


@gluon.jit
def load_pages(
    block_table, start, end, rows, used_end, num_blocks, stride_tn, PAGE: gl.constexpr, KEYS: gl.constexpr
):  # fmt: skip
    """The pages of the keys `start + rows`, one for a warp where its keys lie in one, int64; see pages.py."""
    if PAGE % KEYS == 0:
        rows = gl.min(rows, 1, keep_dims=True)
    at = gl.minimum(start + rows, used_end - 1) // PAGE
    page = gl.load(block_table + at * stride_tn, mask=rows * 0 + start < end, other=0).to(gl.int64)
    return gl.where(page < 0, page + num_blocks, page)


@gluon.jit
def load_words(base, page, start, end, rows, columns, used_end, stride_page, stride_n, PAGE: gl.constexpr):
    """Words of the keys `start + rows`; past `used_end` the last one again, from `end` on nothing."""
    row = gl.minimum(start + rows, used_end - 1)
    if PAGE > 0:
        at = page * stride_page + (row % PAGE).to(gl.int64) * stride_n
    else:
        at = row.to(gl.int64) * stride_n
    return gl.load(base + at + columns, mask=rows * 0 + start < end, eviction_policy="evict_first")


@gluon.jit(do_not_specialize=["q_len", "kv_len", "num_blocks", "num_splits", "band_lower", "band_upper"])
def decode_hopper_kernel(
    q, k, v, out, lse, partial, partial_stats, kv_start, kv_end, sinks, block_table, k_scale, v_scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om, stride_start_b, stride_start_m, stride_end_b, stride_end_m,
    stride_tb, stride_tn, stride_k_scale, stride_v_scale, num_heads, gqa_group_size, q_len, kv_len, num_blocks,
    num_splits, softmax_scale, band_lower, band_upper,
    BLOCK_D: gl.constexpr, BLOCK_E: gl.constexpr, WARPS: gl.constexpr, KEYS: gl.constexpr,
    PACK: gl.constexpr, SPLIT: gl.constexpr, PAGE: gl.constexpr, HAS_K_SCALE: gl.constexpr, HAS_V_SCALE: gl.constexpr,
    HALF: gl.constexpr, HAS_START: gl.constexpr, HAS_END: gl.constexpr, HAS_LOWER: gl.constexpr,
    HAS_UPPER: gl.constexpr, HAS_SINKS: gl.constexpr, EMPTY_ROWS: gl.constexpr,
):  # fmt: skip
    """As attention_forward_kernel for up to ROWS rows (query, head of a group) and a float8 cache.

    Without bias, masks other than by position, dropout, ALiBi, soft cap, and rows without keys that are a mean. Head
    sizes are BLOCK_D and BLOCK_E, last strides 1, the others of k and v multiples of 16.
    """
    FLOAT8: gl.constexpr = k.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    by_row: gl.constexpr = gl.SliceLayout(2, mma)
    by_key: gl.constexpr = key_layout(WARPS, KEYS, BLOCK_D // 4)
    by_value: gl.constexpr = value_layout(WARPS, KEYS, BLOCK_E // 4)
    # Numbers that a lane holds side by side, of a key and of a value.
    SIDE_D: gl.constexpr = 4 * vector(BLOCK_D // 4, 4)
    SIDE_E: gl.constexpr = 4 * vector(BLOCK_E // 4, 8)
    TILE: gl.constexpr = WARPS * KEYS
    pid = gl.program_id(0)
    split = 0
    if SPLIT:
        split = pid % num_splits
        pid = pid // num_splits
    num_kv_heads = num_heads // gqa_group_size
    batch = (pid // num_kv_heads).to(gl.int64)
    kv_head = (pid % num_kv_heads).to(gl.int64)
    k = (k + kv_head * stride_kh).to(gl.pointer_type(gl.int32), bitcast=True)
    v = (v + kv_head * stride_vh).to(gl.pointer_type(gl.int32), bitcast=True)
    words_kb = stride_kb // 4
    words_vb = stride_vb // 4
    if PAGE > 0:
        block_table += batch * stride_tb
    else:
        k += batch * words_kb
        v += batch * words_vb

    # The keys: of the tile by its rows, all of them in each warp; of each row where scores are masked.
    every: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    any_pos = gl.minimum(gl.arange(0, ROWS, layout=every) // PACK, q_len - 1)
    if HAS_START:
        kv_start += batch * stride_start_b
    if HAS_END:
        kv_end += batch * stride_end_b
    starts, ends = row_limits(any_pos, kv_len, kv_start, kv_end, stride_start_m, stride_end_m, 0, 0, HAS_START, HAS_END,
                              False, False)  # fmt: skip
    begin, _full_begin, _full_end, end = kv_block_range(
        0, q_len - 1, kv_len, starts, ends, band_lower, band_upper, TILE, HAS_LOWER, HAS_UPPER, HAS_START, HAS_END
    )
    if SPLIT:
        share = gl.cdiv(end - begin, num_splits)
        begin = gl.minimum(begin + split * share, end)
        end = gl.minimum(begin + share, end)
    begin = begin * TILE
    end = end * TILE
    used_end = kv_len
    if HAS_END:
        used_end = gl.max(ends, 0)

    k_rows = tile_rows(by_key, WARPS, KEYS)
    v_rows = tile_rows(by_value, WARPS, KEYS)
    k_columns = tile_columns(by_key, BLOCK_D // 4)
    v_columns = tile_columns(by_value, BLOCK_E // 4)
    stride_kn = stride_kn // 4
    stride_vn = stride_vn // 4
    k_page = 0
    v_page = 0
    if PAGE > 0:
        k_page = load_pages(block_table, begin, end, k_rows, used_end, num_blocks, stride_tn, PAGE, KEYS)
        v_page = load_pages(block_table, begin, end, v_rows, used_end, num_blocks, stride_tn, PAGE, KEYS)
    k_tile = load_words(k, k_page, begin, end, k_rows, k_columns, used_end, words_kb, stride_kn, PAGE)
    v_tile = load_words(v, v_page, begin, end, v_rows, v_columns, used_end, words_vb, stride_vn, PAGE)
    if PAGE > 0:
        # A tile ahead, as the tiles are, so that no load waits for the table.
        k_page = load_pages(block_table, begin + TILE, end, k_rows, used_end, num_blocks, stride_tn, PAGE, KEYS)
        v_page = load_pages(block_table, begin + TILE, end, v_rows, used_end, num_blocks, stride_tn, PAGE, KEYS)

    # Queries, in the order of columns that the keys have.
    at = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, gl.SliceLayout(1, left)))
    SIDE: gl.constexpr = SIDE_D // 2
    column = ((at // (8 * SIDE) * 4 + at // 2 % 4) * SIDE + at // 8 % SIDE) * 2 + at % 2
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(2, left)))
    row = gl.minimum(row, q_len * PACK - 1)
    head = kv_head * gqa_group_size + row % PACK
    offset = batch * stride_qb + head * stride_qh + (row // PACK).to(gl.int64) * stride_qm
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, left))).expand_dims(1).expand_dims(2)
    q_tile = gl.load(q + offset.expand_dims(0).expand_dims(2) + column.expand_dims(0).expand_dims(1) + 0 * warp)
    if HAS_K_SCALE:
        softmax_scale *= gl.load(k_scale + kv_head * stride_k_scale).to(gl.float32)
    factor = gl.full([WARPS, ROWS], 0.0, gl.float32, layout=by_row) + softmax_scale * LOG2E
    SHIFT: gl.constexpr = WEIGHT_BITS if HALF else 0.0
    if HALF:
        # As float8.queries_to_half.
        largest = gl.max(gl.abs(q_tile.to(gl.float32)), 2)
        exponent = gl.maximum((largest.to(gl.int32, bitcast=True) >> 23) & 255, 15)
        up = ((268 - exponent) << 23).to(gl.float32, bitcast=True)
        down = ((exponent - 14) << 23).to(gl.float32, bitcast=True)
        q_tile = (q_tile.to(gl.float32) * up.expand_dims(2)).to(gl.float16)
        factor *= gl.convert_layout(down, by_row)

    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, by_row))
    q_pos = gl.minimum(row // PACK, q_len - 1)
    lower, upper = row_limits(q_pos, kv_len, kv_start, kv_end, stride_start_m, stride_end_m, band_lower, band_upper,
                              HAS_START, HAS_END, HAS_LOWER, HAS_UPPER)  # fmt: skip
    lower = lower.expand_dims(0).expand_dims(2)
    upper = upper.expand_dims(0).expand_dims(2)
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, by_row)).expand_dims(1).expand_dims(2)
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, gl.SliceLayout(1, mma))).expand_dims(0).expand_dims(1)
    kv_local = warp * KEYS + key
    m_i = gl.full([WARPS, ROWS], NEVER, gl.float32, layout=by_row)
    l_i = gl.full([WARPS, ROWS], 0.0, gl.float32, layout=by_row)
    acc = gl.full([WARPS, ROWS, BLOCK_E], 0.0, gl.float32, layout=mma)
    nothing = gl.full([WARPS, ROWS, KEYS], 0.0, gl.float32, layout=mma)
    for start in range(begin, end, TILE):
        wide = widen_words(k_tile, FLOAT8).reshape([WARPS, KEYS, BLOCK_D // (4 * SIDE_D), 4, SIDE_D // 2, 2])
        wide = wide.permute((0, 1, 2, 4, 3, 5)).reshape([WARPS, KEYS, BLOCK_D]).permute((0, 2, 1))
        s = mma_v2(q_tile, gl.convert_layout(wide, right, assert_trivial=True), nothing)
        k_tile = load_words(k, k_page, start + TILE, end, k_rows, k_columns, used_end, words_kb, stride_kn, PAGE)
        s = s * factor.expand_dims(2)
        kv_pos = start + kv_local
        s = gl.where((kv_pos >= lower) & (kv_pos < upper), s, NEVER)
        m_new = gl.maximum(m_i, gl.max(s, 2))
        alpha = gl.exp2(m_i - finite(m_new))
        p = gl.exp2(s - (finite(m_new) - SHIFT).expand_dims(2))
        l_i = l_i * alpha + gl.sum(p, 2)
        m_i = m_new
        acc = acc * alpha.expand_dims(2)
        wide = widen_words(v_tile, FLOAT8).reshape([WARPS, KEYS, BLOCK_E // (8 * SIDE_E), 8, SIDE_E])
        wide = wide.permute((0, 1, 2, 4, 3)).reshape([WARPS, KEYS, BLOCK_E])
        weights = gl.convert_layout(p.to(gl.float16), left, assert_trivial=True)
        acc = mma_v2(weights, gl.convert_layout(wide, right, assert_trivial=True), acc)
        v_tile = load_words(v, v_page, start + TILE, end, v_rows, v_columns, used_end, words_vb, stride_vn, PAGE)
        if PAGE > 0:
            k_page = load_pages(block_table, start + 2 * TILE, end, k_rows, used_end, num_blocks, stride_tn, PAGE, KEYS)
            v_page = load_pages(block_table, start + 2 * TILE, end, v_rows, used_end, num_blocks, stride_tn, PAGE, KEYS)

    result_layout: gl.constexpr = gl.SliceLayout(0, mma)
    out_row: gl.constexpr = gl.SliceLayout(1, result_layout)
    top = gl.max(m_i, 0)
    alpha = gl.exp2(m_i - finite(top).expand_dims(0))
    total = gl.convert_layout(gl.sum(l_i * alpha, 0), out_row)
    result = gl.sum(acc * alpha.expand_dims(2), 0)
    top = gl.convert_layout(top, out_row) - SHIFT
    if HAS_V_SCALE:
        result *= gl.load(v_scale + kv_head * stride_v_scale).to(gl.float32)
    row = gl.arange(0, ROWS, layout=out_row)
    row_ok = row < q_len * PACK
    q_pos = (row // PACK).to(gl.int64)
    head = kv_head * gqa_group_size + row % PACK
    row_flat = (batch * num_heads + head) * q_len + q_pos
    at = gl.arange(0, BLOCK_E, layout=gl.SliceLayout(0, result_layout))
    column = (at // (8 * SIDE_E) * 8 + at % 8) * SIDE_E + at // 8 % SIDE_E
    if SPLIT:
        share_flat = row_flat * num_splits + split
        offset = share_flat * BLOCK_E
        gl.store(partial + (offset.expand_dims(1) + column.expand_dims(0)), result, mask=row_ok.expand_dims(1))
        gl.store(partial_stats + share_flat * 2, top, mask=row_ok)
        gl.store(partial_stats + share_flat * 2 + 1, total, mask=row_ok)
    else:
        sink = top
        if HAS_SINKS:
            sink = gl.load(sinks + head).to(gl.float32)
        result, row_lse = finish_rows(result, top, total, sink, HAS_SINKS, False, EMPTY_ROWS)
        offset = batch * stride_ob + head * stride_oh + q_pos * stride_om
        gl.store(out + (offset.expand_dims(1) + column.expand_dims(0)), result.to(out.dtype.element_ty),
                 mask=row_ok.expand_dims(1))  # fmt: skip
        gl.store(lse + row_flat, row_lse, mask=row_ok)
