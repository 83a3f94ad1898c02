"""Which blocks of queries a block of keys meets: from the band alone, or where rows have limits of their own.

Which rows keep a key is known only by reading the limits of all rows. One small launch does that once for every block
of keys, so that the kernels that walk over queries need not read, reduce and branch at every block that they pass.
"""

import triton
import triton.language as tl

from .common import load_row_masks


@triton.jit
def q_block_range(n_first, n_last, q_len, band_lower, band_upper, BLOCK_M: tl.constexpr, HAS_LOWER: tl.constexpr,
                  HAS_UPPER: tl.constexpr):  # fmt: skip
    """Which query blocks the keys `n_first..n_last` need by the band: `(begin, full_begin, full_end, end)`.

    As kv_block_range has them, the other way round.
    """
    lo = 0
    hi = q_len
    full_lo = 0
    full_hi = q_len
    if HAS_UPPER:
        lo = tl.maximum(lo, n_first - band_upper)
        full_lo = tl.maximum(full_lo, n_last - band_upper)
    if HAS_LOWER:
        hi = tl.minimum(hi, n_last - band_lower + 1)
        full_hi = tl.minimum(full_hi, n_first - band_lower + 1)
    begin = lo // BLOCK_M
    end = tl.maximum(begin, tl.cdiv(tl.maximum(hi, 0), BLOCK_M))
    full_begin = tl.minimum(tl.maximum(tl.cdiv(full_lo, BLOCK_M), begin), end)
    full_end = tl.minimum(tl.maximum(tl.maximum(full_hi, 0) // BLOCK_M, full_begin), end)
    return begin, full_begin, full_end, end


@triton.jit(do_not_specialize=["q_len", "kv_len", "band_lower", "band_upper"])
def backward_ranges_kernel(
    kv_start, kv_end, ranges, stride_start_b, stride_start_m, stride_end_b, stride_end_m,
    q_len, kv_len, band_lower, band_upper,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
    HAS_START: tl.constexpr, HAS_END: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr,
):  # fmt: skip
    """Write `ranges` `(B, cdiv(N, BLOCK_N), 4)` int32: the four numbers of q_block_range, with the rows' limits.

    Outside [begin, end) no pair is kept; inside there may be blocks of which none is, where limits do not grow with the
    rows. Inside [full_begin, full_end), the first run of such blocks, no pair is dropped by a limit of position. One
    program per block of keys reads the limits of BLOCKS query blocks at a time.
    """
    pid = tl.program_id(0)
    num_kv_blocks = tl.cdiv(kv_len, BLOCK_N)
    batch = (pid // num_kv_blocks).to(tl.int64)
    n_first = pid % num_kv_blocks * BLOCK_N
    n_last = tl.minimum(n_first + BLOCK_N, kv_len) - 1
    if HAS_START:
        kv_start += batch * stride_start_b
    if HAS_END:
        kv_end += batch * stride_end_b
    begin, full_begin, full_end, end = q_block_range(
        n_first, n_last, q_len, band_lower, band_upper, BLOCK_M, HAS_LOWER, HAS_UPPER
    )
    first = end
    last = begin
    full_first = end
    full_last = full_end
    for at in range(begin, end, BLOCKS):
        blocks = at + tl.arange(0, BLOCKS)
        rows = blocks[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        starts, ends, _ids = load_row_masks(
            kv_start, kv_end, kv_end, stride_start_m, stride_end_m, stride_end_m, tl.minimum(rows, q_len - 1), kv_len,
            HAS_START, HAS_END, False,
        )  # fmt: skip
        meets = blocks < end
        whole = (blocks >= full_begin) & (blocks < full_end)
        if HAS_START:
            meets &= tl.min(starts, 1) <= n_last
            whole &= tl.max(starts, 1) <= n_first
        if HAS_END:
            meets &= tl.max(ends, 1) > n_first
            whole &= tl.min(ends, 1) > n_last
        first = tl.minimum(first, tl.min(tl.where(meets, blocks, end)))
        last = tl.maximum(last, tl.max(tl.where(meets, blocks + 1, begin)))
        full_first = tl.minimum(full_first, tl.min(tl.where(whole, blocks, end)))
        full_last = tl.minimum(full_last, tl.min(tl.where((blocks > full_first) & (whole == 0), blocks, full_end)))
    last = tl.maximum(first, last)
    full_first = tl.minimum(tl.maximum(full_first, first), last)
    full_last = tl.minimum(tl.maximum(full_last, full_first), last)
    ranges += pid.to(tl.int64) * 4
    tl.store(ranges, first)
    tl.store(ranges + 1, full_first)
    tl.store(ranges + 2, full_last)
    tl.store(ranges + 3, last)
