"""Loads and stores of tiles, through pointers or through Hopper's tensor memory accelerator.

A head dimension that is no power of two is read in two pieces, BLOCK_D columns and then BLOCK_REST more (0: no second
piece), so that 96, 80 or 192 columns cost what they hold instead of 128 or 256.

With TMA the kernel's q, k, v are tensor descriptors of the whole `(B, H, length, D)` tensor instead of pointers: one
instruction fetches a tile, addresses cost no registers, and what lies outside is read as 0.
"""

import triton
import triton.language as tl

from .float8 import widen


@triton.jit
def load_tile(ptr, first, stride_row, stride_col, row_end, FIRST_COL: tl.constexpr, SIZE: tl.constexpr,
              BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr, CHECK_ROWS: tl.constexpr,
              WIDE: tl.constexpr, at=None, PAGED: tl.constexpr = False):  # fmt: skip
    """Load rows `first..` and columns `FIRST_COL..` of a matrix of SIZE columns, 0 outside.

    CHECK_ROWS says that row_end may cut the tile. WIDE: offsets inside the tile need 64 bits. PAGED: the rows start at
    the offsets `at`, which are int64, instead of stride_row apart.
    """
    offs_row = tl.arange(0, BLOCK_ROW)
    offs_col = tl.arange(0, BLOCK_COL)
    row_ok = first + offs_row < row_end
    col_ok = FIRST_COL + offs_col < SIZE
    if WIDE:
        offs_row = offs_row.to(tl.int64)
        offs_col = offs_col.to(tl.int64)
    if PAGED:
        ptrs = (ptr + FIRST_COL * stride_col + at)[:, None] + offs_col[None, :] * stride_col
    else:
        ptr += first.to(tl.int64) * stride_row + FIRST_COL * stride_col
        ptrs = ptr + offs_row[:, None] * stride_row + offs_col[None, :] * stride_col
    if CHECK_ROWS and FIRST_COL + BLOCK_COL > SIZE:
        tile = tl.load(ptrs, mask=row_ok[:, None] & col_ok[None, :], other=0.0)
    elif CHECK_ROWS:
        tile = tl.load(ptrs, mask=row_ok[:, None], other=0.0)
    elif FIRST_COL + BLOCK_COL > SIZE:
        tile = tl.load(ptrs, mask=col_ok[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def load_head_tile(source, batch, head, first, stride_row, stride_col, row_end, FIRST_COL: tl.constexpr,
                   SIZE: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr, CHECK_ROWS: tl.constexpr,
                   WIDE: tl.constexpr, TMA: tl.constexpr, at=None, PAGED: tl.constexpr = False):  # fmt: skip
    """load_tile of one head: `source` is the head's first element, or with TMA the descriptor of the whole tensor."""
    if TMA:
        tile = source.load([batch.to(tl.int32), head.to(tl.int32), first, FIRST_COL]).reshape(BLOCK_ROW, BLOCK_COL)
    else:
        tile = load_tile(source, first, stride_row, stride_col, row_end, FIRST_COL, SIZE, BLOCK_ROW, BLOCK_COL,
                         CHECK_ROWS, WIDE, at, PAGED)  # fmt: skip
    return tile


@triton.jit
def load_key_tile(source, batch, head, first, stride_row, stride_col, row_end, FIRST_COL: tl.constexpr,
                  SIZE: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr, CHECK_ROWS: tl.constexpr,
                  WIDE: tl.constexpr, TMA: tl.constexpr, TRANSPOSED: tl.constexpr, at=None,
                  PAGED: tl.constexpr = False):  # fmt: skip
    """load_head_tile, transposed: (BLOCK_COL, BLOCK_ROW). TRANSPOSED: by the pointers, see configs.py."""
    if TMA or not TRANSPOSED:
        tile = tl.trans(load_head_tile(source, batch, head, first, stride_row, stride_col, row_end, FIRST_COL, SIZE,
                                       BLOCK_ROW, BLOCK_COL, CHECK_ROWS, WIDE, TMA, at, PAGED))  # fmt: skip
    else:
        offs_row = tl.arange(0, BLOCK_ROW)
        offs_col = tl.arange(0, BLOCK_COL)
        row_ok = first + offs_row < row_end
        col_ok = FIRST_COL + offs_col < SIZE
        if WIDE:
            offs_row = offs_row.to(tl.int64)
            offs_col = offs_col.to(tl.int64)
        if PAGED:
            ptrs = (source + FIRST_COL * stride_col + at)[None, :] + offs_col[:, None] * stride_col
        else:
            ptr = source + first.to(tl.int64) * stride_row + FIRST_COL * stride_col
            ptrs = ptr + offs_row[None, :] * stride_row + offs_col[:, None] * stride_col
        if CHECK_ROWS and FIRST_COL + BLOCK_COL > SIZE:
            tile = tl.load(ptrs, mask=row_ok[None, :] & col_ok[:, None], other=0.0)
        elif CHECK_ROWS:
            tile = tl.load(ptrs, mask=row_ok[None, :], other=0.0)
        elif FIRST_COL + BLOCK_COL > SIZE:
            tile = tl.load(ptrs, mask=col_ok[:, None], other=0.0)
        else:
            tile = tl.load(ptrs)
    return tile


@triton.jit
def q_k_product(
    q_tile, q_rest_tile, k, k_rest, batch, kv_head, rest_head, start_n, stride_kn, stride_kd, stride_rest_n,
    stride_rest_d, kv_len, HEAD_DIM: tl.constexpr, REST_COL: tl.constexpr, REST_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr, CHECK_ROWS: tl.constexpr,
    WIDE: tl.constexpr, TMA: tl.constexpr, TRANSPOSE_KEYS: tl.constexpr, PRECISION: tl.constexpr, at=None,
    PAGED: tl.constexpr = False, FLOAT8_ASM: tl.constexpr = False,
):  # fmt: skip
    """q k^T of the keys from `start_n` on: load_key_tile and a product, for each piece of the head dimension.

    Keys of a narrower dtype are converted to that of the queries.
    """
    k_tile = load_key_tile(
        k, batch, kv_head, start_n, stride_kn, stride_kd, kv_len, 0, HEAD_DIM, BLOCK_N, BLOCK_D, CHECK_ROWS, WIDE, TMA,
        TRANSPOSE_KEYS, at, PAGED,
    )  # fmt: skip
    qk = tl.dot(q_tile, widen(k_tile, q_tile.dtype, FLOAT8_ASM), input_precision=PRECISION)
    if BLOCK_REST > 0:
        k_rest_tile = load_key_tile(
            k_rest, batch, rest_head, start_n, stride_rest_n, stride_rest_d, kv_len, REST_COL, REST_SIZE, BLOCK_N,
            BLOCK_REST, CHECK_ROWS, WIDE, TMA, TRANSPOSE_KEYS, at, PAGED,
        )  # fmt: skip
        qk = tl.dot(q_rest_tile, widen(k_rest_tile, q_tile.dtype, FLOAT8_ASM), qk, input_precision=PRECISION)
    return qk


@triton.jit
def store_tile(ptr, tile, first, stride_row, stride_col, row_end, FIRST_COL: tl.constexpr, SIZE: tl.constexpr,
               BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """The counterpart of load_tile; converts to the pointer's dtype."""
    offs_row = tl.arange(0, BLOCK_ROW)
    offs_col = tl.arange(0, BLOCK_COL)
    ok = (first + offs_row < row_end)[:, None] & (FIRST_COL + offs_col < SIZE)[None, :]
    if WIDE:
        offs_row = offs_row.to(tl.int64)
        offs_col = offs_col.to(tl.int64)
    ptr += first.to(tl.int64) * stride_row + FIRST_COL * stride_col
    ptrs = ptr + offs_row[:, None] * stride_row + offs_col[None, :] * stride_col
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=ok)


@triton.jit
def tile_ptrs(ptr, row, col, stride_row, stride_col):
    """Pointers of a mask or bias tile; `row` and `col` are 2-D, local to `ptr`, and broadcast."""
    return ptr + (row * stride_row + col * stride_col)
