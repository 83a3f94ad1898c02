"""Which blocks of keys a block of queries meets, and the other way round, where that stands in tensors.

Which keys a row keeps by its limits, by ids, or by padding is known only by reading them all. One small launch does
that once for every block, so that the kernels that walk over blocks skip those that keep nothing, and look at masks
only in those that are not kept whole. FlexAttention's block masks have the same purpose (Dong et al., 2024); these are
two numbers per range, made on the device from the closed form.
"""

import triton
import triton.language as tl

from .common import kv_block_range, load_key_masks, load_row_masks


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


@triton.jit
def rows_of_blocks(kv_start, kv_end, q_ids, stride_start_m, stride_end_m, stride_qid_m, blocks, q_len, kv_len,
                   BLOCK_M: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr,
                   HAS_IDS: tl.constexpr):  # fmt: skip
    """The least and the greatest start, end and id of the rows of each of `blocks`."""
    rows = tl.minimum(blocks[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :], q_len - 1)
    starts, ends, ids = load_row_masks(
        kv_start, kv_end, q_ids, stride_start_m, stride_end_m, stride_qid_m, rows, kv_len, HAS_START, HAS_END, HAS_IDS
    )
    return tl.min(starts, 1), tl.max(starts, 1), tl.min(ends, 1), tl.max(ends, 1), tl.min(ids, 1), tl.max(ids, 1)


@triton.jit
def keys_of_blocks(key_mask, kv_ids, stride_key_n, stride_kid_n, blocks, kv_len, BLOCK_N: tl.constexpr,
                   HAS_KEY_MASK: tl.constexpr, HAS_IDS: tl.constexpr):  # fmt: skip
    """Of each of `blocks`: whether some key is kept (1 or 0), whether every one is, the least and the greatest id."""
    keys = tl.minimum(blocks[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], kv_len - 1)
    keep, ids = load_key_masks(key_mask, kv_ids, stride_key_n, stride_kid_n, keys, kv_len, HAS_KEY_MASK, HAS_IDS)
    keep = tl.where(keep, 1, 0)
    return tl.max(keep, 1), tl.min(keep, 1), tl.min(ids, 1), tl.max(ids, 1)


@triton.jit(do_not_specialize=["q_len", "kv_len", "band_lower", "band_upper"])
def mask_ranges_kernel(
    key_mask, kv_start, kv_end, q_ids, kv_ids, ranges, stride_key_b, stride_key_n, stride_start_b, stride_start_m,
    stride_end_b, stride_end_m, stride_qid_b, stride_qid_m, stride_kid_b, stride_kid_n,
    q_len, kv_len, band_lower, band_upper,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, BY_KEY: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr, HAS_IDS: tl.constexpr,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr,
):  # fmt: skip
    """Write `ranges` `(B, blocks, 4)` int32: of each block of queries `(begin, full_begin, full_end, end)` of keys.

    In blocks of BLOCK_N keys, or with BY_KEY the other way round, of each block of keys in blocks of BLOCK_M queries.
    Outside [begin, end) no pair is kept; inside there may be blocks of which none is, where a mask has holes. Inside
    [full_begin, full_end), the first run of such blocks, every pair of a query and a key that exist is kept. A program
    per block reads what BLOCKS of the others have at a time.
    """
    pid = tl.program_id(0)
    num_own = tl.cdiv(kv_len, BLOCK_N) if BY_KEY else tl.cdiv(q_len, BLOCK_M)
    batch = (pid // num_own).to(tl.int64)
    own = pid % num_own + tl.arange(0, 1)
    if HAS_KEY_MASK:
        key_mask += batch * stride_key_b
    if HAS_START:
        kv_start += batch * stride_start_b
    if HAS_END:
        kv_end += batch * stride_end_b
    if HAS_IDS:
        q_ids += batch * stride_qid_b
        kv_ids += batch * stride_kid_b
    if BY_KEY:
        n_first = pid % num_own * BLOCK_N
        n_last = tl.minimum(n_first + BLOCK_N, kv_len) - 1
        some, every, least_key, most_key = keys_of_blocks(
            key_mask, kv_ids, stride_key_n, stride_kid_n, own, kv_len, BLOCK_N, HAS_KEY_MASK, HAS_IDS
        )
        begin, full_begin, full_end, end = q_block_range(
            n_first, n_last, q_len, band_lower, band_upper, BLOCK_M, HAS_LOWER, HAS_UPPER
        )
    else:
        q_first = pid % num_own * BLOCK_M
        q_last = tl.minimum(q_first + BLOCK_M, q_len) - 1
        start_least, start_most, end_least, end_most, least_row, most_row = rows_of_blocks(
            kv_start, kv_end, q_ids, stride_start_m, stride_end_m, stride_qid_m, own, q_len, kv_len,
            BLOCK_M, HAS_START, HAS_END, HAS_IDS,
        )  # fmt: skip
        begin, full_begin, full_end, end = kv_block_range(
            q_first, q_last, kv_len, kv_start, kv_end, band_lower, band_upper, BLOCK_N, HAS_LOWER, HAS_UPPER, False,
            False,
        )  # fmt: skip
    first = end
    last = begin
    full_first = end
    full_last = full_end
    for at in range(begin, end, BLOCKS):
        blocks = at + tl.arange(0, BLOCKS)
        if BY_KEY:
            start_least, start_most, end_least, end_most, least_row, most_row = rows_of_blocks(
                kv_start, kv_end, q_ids, stride_start_m, stride_end_m, stride_qid_m, blocks, q_len, kv_len,
                BLOCK_M, HAS_START, HAS_END, HAS_IDS,
            )  # fmt: skip
        else:
            n_first = blocks * BLOCK_N
            n_last = tl.minimum(n_first + BLOCK_N, kv_len) - 1
            some, every, least_key, most_key = keys_of_blocks(
                key_mask, kv_ids, stride_key_n, stride_kid_n, blocks, kv_len, BLOCK_N, HAS_KEY_MASK, HAS_IDS
            )
        meets = blocks < end
        whole = (blocks >= full_begin) & (blocks < full_end)
        if HAS_START:
            meets &= start_least <= n_last
            whole &= start_most <= n_first
        if HAS_END:
            meets &= end_most > n_first
            whole &= end_least > n_last
        if HAS_IDS:
            meets &= (least_row <= most_key) & (most_row >= least_key)
            whole &= (least_row == most_key) & (most_row == least_key)
        if HAS_KEY_MASK:
            meets &= some != 0
            whole &= every != 0
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


@triton.jit(do_not_specialize=["num_row_blocks", "num_kv_blocks"])
def key_ranges_kernel(ranges, key_ranges, num_row_blocks, num_kv_blocks, BLOCKS: tl.constexpr):
    """From `ranges` by blocks of queries the same by blocks of keys: `key_ranges` `(B, blocks of keys, 4)`.

    What mask_ranges_kernel finds with BY_KEY may lack a block of queries that has the keys in its range: one with keys
    before and after them. Here none is missing.
    """
    pid = tl.program_id(0)
    own = pid % num_kv_blocks
    ranges += (pid // num_kv_blocks).to(tl.int64) * num_row_blocks * 4
    first = num_row_blocks
    last = 0
    full_first = num_row_blocks
    full_last = num_row_blocks
    for at in range(0, num_row_blocks, BLOCKS):
        blocks = at + tl.arange(0, BLOCKS)
        begin, full_begin, full_end, end = load_range(ranges, tl.minimum(blocks, num_row_blocks - 1))
        meets = (blocks < num_row_blocks) & (begin <= own) & (own < end)
        whole = (full_begin <= own) & (own < full_end)
        first = tl.minimum(first, tl.min(tl.where(meets, blocks, num_row_blocks)))
        last = tl.maximum(last, tl.max(tl.where(meets, blocks + 1, 0)))
        full_first = tl.minimum(full_first, tl.min(tl.where(whole, blocks, num_row_blocks)))
        after = (blocks > full_first) & (whole == 0)
        full_last = tl.minimum(full_last, tl.min(tl.where(after, blocks, num_row_blocks)))
    last = tl.maximum(first, last)
    full_first = tl.minimum(tl.maximum(full_first, first), last)
    full_last = tl.minimum(tl.maximum(full_last, full_first), last)
    key_ranges += pid.to(tl.int64) * 4
    tl.store(key_ranges, first)
    tl.store(key_ranges + 1, full_first)
    tl.store(key_ranges + 2, full_last)
    tl.store(key_ranges + 3, last)


@triton.jit
def load_range(ranges, index):
    """The four numbers of block `index`."""
    ranges += index * 4
    return tl.load(ranges), tl.load(ranges + 1), tl.load(ranges + 2), tl.load(ranges + 3)
