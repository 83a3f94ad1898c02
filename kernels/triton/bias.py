"""Reads tiles of attn_bias, in the way that suits its layout (the kernels' BIAS argument).

A tile that is loaded element by element has a register layout of its own. Triton then moves it, and on NVIDIA the
scores too, through shared memory, and computes the softmax once in each layout. A tile from a tensor descriptor, or
one row for all queries, takes the layout of the scores instead.
"""

import triton
import triton.language as tl

FLOAT32_MIN = tl.constexpr(-3.4028234663852886e38)

BIAS_ELEMENTS = tl.constexpr(0)
BIAS_TILES = tl.constexpr(1)
BIAS_ROW = tl.constexpr(2)


@triton.jit
def load_bias(source, batch, head, q_first, start_n, rows, cols, ok, stride_bb, stride_bh, stride_bn,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, TRANSPOSED: tl.constexpr):  # fmt: skip
    """Load the bias of queries `q_first..` and keys `start_n..` as float32.

    A float64 bias below the float32 range becomes the smallest float32, not -inf.

    Args:
        source: Pointer to the element of query `q_first` and key 0, or with BIAS_TILES the descriptor.
        batch, head: Used with BIAS_TILES only.
        rows: 2-D offsets in elements of the queries, not used with BIAS_ROW.
        cols: 2-D numbers of the keys from start_n on.
        ok: Which of them exist, as 2-D as cols.
        TRANSPOSED: The tile is (key, query).
    """
    if BIAS == BIAS_TILES:
        batch = tl.where(stride_bb == 0, 0, batch.to(tl.int32))
        head = tl.where(stride_bh == 0, 0, head.to(tl.int32))
        bias = source.load([batch, head, q_first, start_n]).reshape(BLOCK_M, BLOCK_N)
        if TRANSPOSED:
            bias = tl.trans(bias)
    else:
        source += start_n.to(tl.int64) * stride_bn
        if BIAS == BIAS_ROW:
            bias = tl.load(source + cols * stride_bn, mask=ok, other=0.0)
        else:
            bias = tl.load(source + (rows + cols * stride_bn), mask=ok, other=0.0)
    if bias.dtype == tl.float64:
        bias = tl.where(bias == float("-inf"), bias, tl.maximum(bias, FLOAT32_MIN))
    return bias.to(tl.float32)
