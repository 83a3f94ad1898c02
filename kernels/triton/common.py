"""Device functions shared by the forward, backward and combine kernels: scores, masks, ranges, dropout.

Letters: B batch, H query heads, K key/value heads, M q_len, N kv_len, D head_dim, E v_head_dim.

Scores live in one of three domains, fixed at compile time:

* RAW (no bias, no ALiBi; a positive scale, or a soft cap): the plain product q k^T, or what cap_scores makes of it. The
  factor (score_factor) times log2(e) is applied together with the subtraction of the row maximum, one fused
  multiply-add per element.
* log2 (ALiBi, or a scale that is not positive): already scaled by log2(e).
* natural (a bias is added): not scaled by log2(e), because a bias of `finfo.min` would overflow to -inf and a row made
  of such values must stay uniform, as in eager.

Row maxima `m` and `lse` inside the kernels are in log2 units in the first two domains, natural in the third.

Every function takes 2-D index tensors that broadcast against the tile, so that the same code serves tiles of shape
(query, key) and, in the dk/dv kernel, (key, query).
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Values of the kernels' EMPTY_ROWS argument; see rocm_attn_compile.spec.EmptyRows. "zero" and "impossible" share code.
EMPTY_ZERO = tl.constexpr(0)
EMPTY_NAN = tl.constexpr(1)
EMPTY_MEAN = tl.constexpr(2)
EMPTY_MEAN_ADDED = tl.constexpr(3)
EMPTY_NAN_ADDED = tl.constexpr(4)

# Values of the kernels' SOFT_CAP: none, or how its tanh is evaluated.
NO_CAP = tl.constexpr(0)
CAP_PLAIN = tl.constexpr(1)
CAP_PRECISE = tl.constexpr(2)
CAP_FAST = tl.constexpr(3)
CAP_RECIPROCAL = tl.constexpr(4)

# Cutting a weight to bfloat16 loses this share of it on average: half a unit of the last place, 2**-8, times the mean
# of 1 / mantissa, 1 / (2 ln 2), if logarithms of weights are uniform over a binade. See truncate.
TRUNCATION = tl.constexpr(2.0**-8 / (2.0 * 0.6931471805599453))
TRUNCATION_LOG2 = tl.constexpr(0.004059457177543012)

# Values of the forward kernel's SHIFT: what is subtracted from the scores of a row before they are exponentiated.
RUNNING_MAX = tl.constexpr(0)
FIRST_MAX = tl.constexpr(1)
NO_MAX = tl.constexpr(2)
CAP_SERIES = tl.constexpr(3)
# With FIRST_MAX, a row whose sum leaves these bounds is computed again with RUNNING_MAX: 2**-64, 2**64.
SMALLEST_SUM = tl.constexpr(5.421010862427522e-20)
LARGEST_SUM = tl.constexpr(1.8446744073709552e19)


@triton.jit
def deal_programs(pid, heads, tiles, heads_at_once):
    """Which `(head, tile)` program `pid` of `heads * tiles` takes; see configs.heads_at_once."""
    first = pid // (heads_at_once * tiles) * heads_at_once
    count = tl.minimum(heads_at_once, heads - first)
    rest = pid - first * tiles
    return first + rest % count, rest // count


@triton.jit
def cap_scores(x, inner, SOFT_CAP: tl.constexpr):
    """`tanh(inner * x)` for a float32 tile `x` and a scalar `inner`, or what saves the most instructions instead.

    CAP_FAST: NVIDIA's instruction, relative error 2^-11. bfloat16 scores, as eager has them, are off by four times that
    before the cap and again after it.
    CAP_PLAIN, CAP_RECIPROCAL: `s` for which `1 + 2 s` is the tanh: -1 / (exp(2 y) + 1). The tanh has an absolute error
    of about 3e-7: it cancels for small y, which the cap multiplies, harmless beside 16-bit inputs. Not by a division,
    which takes ten instructions on AMD; elsewhere it is a square of rsqrt.
    CAP_PRECISE, for float32 inputs: a division, and for |y| < 0.25 the Taylor polynomial (next term below 1e-8).
    """
    if SOFT_CAP == CAP_FAST:
        s = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x * inner], dtype=tl.float32, is_pure=True, pack=1
        )
    elif SOFT_CAP == CAP_RECIPROCAL:
        s = libdevice.fast_dividef(-1.0, tl.exp2(x * (2.0 * LOG2E * inner)) + 1.0)
    elif SOFT_CAP == CAP_PLAIN:
        root = tl.rsqrt(tl.exp2(x * (2.0 * LOG2E * inner)) + 1.0)
        s = -root * root
    else:
        y = x * inner
        square = y * y
        series = -17.0 / 315.0 + square * (62.0 / 2835.0)
        series = 2.0 / 15.0 + square * series
        series = -1.0 / 3.0 + square * series
        t = 1.0 - 2.0 / (tl.exp2(y * (2.0 * LOG2E)) + 1.0)
        s = tl.where(square < 0.0625, y + y * (square * series), t)
    return s


@triton.jit
def narrow(x, dtype: tl.constexpr, ROUND_BITS: tl.constexpr):
    """Convert float32 to the dtype of a matrix operand.

    Without an instruction for it (ROUND_BITS, see configs.py), rounding to bfloat16 takes five operations an element,
    more than the exponential itself. Adding half a unit of the last place to the bits takes one: the same result except
    that ties go away from zero. Infinities stay, and so do NaNs that come from 16-bit inputs or from arithmetic.
    """
    if ROUND_BITS and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True) + 0x8000
        y = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def truncate(p):
    """Cut float32 weights to bfloat16, two in one operation, where rounding them takes an addition each.

    The caller makes them larger by a share of TRUNCATION, at no cost: TRUNCATION_LOG2 less is subtracted from the
    exponents; and gives that share to what it sums up once more, since they lose it here on average. A weight that
    bfloat16 holds, as 1, comes out of that as it was. The largest error is 0.72 units of the last place where rounding
    has 0.5, the mean square the same within 8 %.
    """
    return (p.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def load_alibi(alibi_slopes, batch, head, stride_slopes_b, stride_slopes_h, HAS_ALIBI: tl.constexpr,
               HAS_BIAS: tl.constexpr):  # fmt: skip
    """ALiBi's slopes of the heads `head`, of any shape, in the units of the scores' domain; 0 without ALiBi."""
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi_slopes + batch * stride_slopes_b + head * stride_slopes_h)
        if not HAS_BIAS:
            slope = slope * LOG2E
    return slope


@triton.jit
def add_alibi(s, slope, q_pos, kv_pos, kv_first, q_len, kv_len, HAS_ALIBI: tl.constexpr):
    """Subtract `slope * |distance|`: the last query is at the last key.

    Positions become numbers a row and a column at a time, not a distance at a time: NVIDIA GPUs convert at a quarter of
    their rate. They count from `kv_first`, which is in the tile, so that within 2^24 keys of it the distance is exact.
    """
    if HAS_ALIBI:
        row = (q_pos + (kv_len - q_len) - kv_first).to(tl.float32)
        s = s - slope * tl.abs(row - (kv_pos - kv_first).to(tl.float32))
    return s


@triton.jit
def score_tile(qk, softmax_scale, logits_soft_cap, bias, RAW: tl.constexpr, SOFT_CAP: tl.constexpr,
               HAS_BIAS: tl.constexpr):  # fmt: skip
    """Turn q k^T into scores of the chosen domain, without ALiBi.

    Returns:
        The scores, and the derivative of the soft cap (1 where there is none).
    """
    s = qk
    slope = 1.0
    if SOFT_CAP != NO_CAP:
        s = cap_scores(qk, softmax_scale / logits_soft_cap, SOFT_CAP)
        if SOFT_CAP == CAP_PLAIN or SOFT_CAP == CAP_RECIPROCAL:
            slope = (s * s + s) * -4.0
        else:
            slope = 1.0 - s * s
    factor = score_factor(softmax_scale, logits_soft_cap, SOFT_CAP)
    if HAS_BIAS:
        s = s * factor + bias
        if SOFT_CAP == CAP_PLAIN or SOFT_CAP == CAP_RECIPROCAL:
            s += logits_soft_cap
    elif not RAW:
        s = s * (factor * LOG2E)
    return s, slope


@triton.jit
def score_factor(softmax_scale, logits_soft_cap, SOFT_CAP: tl.constexpr):
    """What RAW scores are still to be multiplied by."""
    if SOFT_CAP == NO_CAP:
        factor = softmax_scale
    elif SOFT_CAP == CAP_PLAIN or SOFT_CAP == CAP_RECIPROCAL:
        factor = 2.0 * logits_soft_cap
    else:
        factor = logits_soft_cap
    return factor


@triton.jit
def score_offset(logits_soft_cap, SOFT_CAP: tl.constexpr, HAS_BIAS: tl.constexpr):
    """What is still to be added to scores without a bias after that, in log2 units: the row's shift takes it along."""
    offset = 0.0
    if (SOFT_CAP == CAP_PLAIN or SOFT_CAP == CAP_RECIPROCAL) and not HAS_BIAS:
        offset = logits_soft_cap * LOG2E
    return offset


@triton.jit
def exponent(s, m, scale_log2, RAW: tl.constexpr, HAS_BIAS: tl.constexpr, LARGER: tl.constexpr = 0.0):
    """The base-2 exponent of `exp(s - m)`, plus LARGER; `m` broadcasts against `s` and must not be -inf."""
    if LARGER != 0.0 and not HAS_BIAS:
        m = m - LARGER
    if RAW:
        x = s * scale_log2 - m
    elif HAS_BIAS:
        x = (s - m) * LOG2E
        # Not to m, which may be finfo.min and would not notice.
        if LARGER != 0.0:
            x += LARGER
    else:
        x = s - m
    return x


@triton.jit
def mask_positions(s, q_pos, kv_pos, kv_len, starts, ends, band_lower, band_upper, HAS_LOWER: tl.constexpr,
                   HAS_UPPER: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr):  # fmt: skip
    """Put -inf where a limit given by positions drops a pair: kv_len, the band, kv_start, kv_end."""
    keep = kv_pos < kv_len
    if HAS_UPPER:
        keep &= kv_pos - q_pos <= band_upper
    if HAS_LOWER:
        keep &= kv_pos - q_pos >= band_lower
    if HAS_START:
        keep &= kv_pos >= starts
    if HAS_END:
        keep &= kv_pos < ends
    return tl.where(keep, s, float("-inf"))


@triton.jit
def mask_scores(s, q_pos, kv_pos, kv_len, starts, ends, q_ids, kv_ids, key_keep, mask_keep, band_lower, band_upper,
                cut, BOUNDED: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, HAS_START: tl.constexpr,
                HAS_END: tl.constexpr, HAS_IDS: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
                HAS_ATTN_MASK: tl.constexpr):  # fmt: skip
    """Put -inf where the mask drops a pair.

    BOUNDED says whether the tile may cross a limit of position: 0 no, as the caller has proved from the block ranges;
    1 yes; 2 if the scalar `cut` is true. The other masks are read wherever they exist.
    """
    if BOUNDED == 1:
        s = mask_positions(s, q_pos, kv_pos, kv_len, starts, ends, band_lower, band_upper, HAS_LOWER, HAS_UPPER,
                           HAS_START, HAS_END)  # fmt: skip
    if BOUNDED == 2:
        if cut:
            s = mask_positions(s, q_pos, kv_pos, kv_len, starts, ends, band_lower, band_upper, HAS_LOWER, HAS_UPPER,
                               HAS_START, HAS_END)  # fmt: skip
    if HAS_IDS:
        s = tl.where(q_ids == kv_ids, s, float("-inf"))
    if HAS_KEY_MASK:
        s = tl.where(key_keep, s, float("-inf"))
    if HAS_ATTN_MASK:
        s = tl.where(mask_keep, s, float("-inf"))
    return s


@triton.jit
def load_row_masks(kv_start, kv_end, q_ids, stride_start_m, stride_end_m, stride_qid_m, q_pos, kv_len,
                   HAS_START: tl.constexpr, HAS_END: tl.constexpr, HAS_IDS: tl.constexpr):  # fmt: skip
    """Load `(kv_start, kv_end, q_ids)` of the rows `q_pos`, which must exist; anything absent is returned as q_pos.

    The limits are clamped to [0, kv_len], so that they fit in 32 bits. The pointers already point at the batch entry.
    """
    starts = q_pos
    ends = q_pos
    ids = q_pos
    at = q_pos.to(tl.int64)
    if HAS_START:
        starts = tl.minimum(tl.maximum(tl.load(kv_start + at * stride_start_m), 0), kv_len).to(tl.int32)
    if HAS_END:
        ends = tl.minimum(tl.maximum(tl.load(kv_end + at * stride_end_m), 0), kv_len).to(tl.int32)
    if HAS_IDS:
        ids = tl.load(q_ids + at * stride_qid_m)
    return starts, ends, ids


@triton.jit
def load_key_masks(key_mask, kv_ids, stride_key_n, stride_kid_n, kv_pos, kv_len, HAS_KEY_MASK: tl.constexpr,
                   HAS_IDS: tl.constexpr):  # fmt: skip
    """Load `(key_mask, kv_ids)` of the keys `kv_pos`; anything absent is returned as kv_pos."""
    keep = kv_pos
    ids = kv_pos
    at = kv_pos.to(tl.int64)
    ok = kv_pos < kv_len
    if HAS_KEY_MASK:
        keep = tl.load(key_mask + at * stride_key_n, mask=ok, other=0) != 0
    if HAS_IDS:
        ids = tl.load(kv_ids + at * stride_kid_n, mask=ok, other=0)
    return keep, ids


@triton.jit
def kv_block_range(q_first, q_last, kv_len, starts, ends, band_lower, band_upper, BLOCK_N: tl.constexpr,
                   HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, HAS_START: tl.constexpr,
                   HAS_END: tl.constexpr):  # fmt: skip
    """Which key blocks a block of queries `q_first..q_last` needs.

    Returns:
        `(begin, full_begin, full_end, end)` in blocks of BLOCK_N, non-decreasing: outside [begin, end) no pair is kept;
        inside [full_begin, full_end) no pair is dropped by a limit of position.
    """
    lo = 0
    hi = kv_len
    full_lo = 0
    full_hi = kv_len
    if HAS_UPPER:
        hi = tl.minimum(hi, q_last + band_upper + 1)
        full_hi = tl.minimum(full_hi, q_first + band_upper + 1)
    if HAS_LOWER:
        lo = tl.maximum(lo, q_first + band_lower)
        full_lo = tl.maximum(full_lo, q_last + band_lower)
    if HAS_START:
        lo = tl.maximum(lo, tl.min(starts))
        full_lo = tl.maximum(full_lo, tl.max(starts))
    if HAS_END:
        hi = tl.minimum(hi, tl.max(ends))
        full_hi = tl.minimum(full_hi, tl.min(ends))
    begin = lo // BLOCK_N
    end = tl.maximum(begin, tl.cdiv(tl.maximum(hi, 0), BLOCK_N))
    full_begin = tl.minimum(tl.maximum(tl.cdiv(full_lo, BLOCK_N), begin), end)
    full_end = tl.minimum(tl.maximum(tl.maximum(full_hi, 0) // BLOCK_N, full_begin), end)
    return begin, full_begin, full_end, end


@triton.jit
def dropout_keep(seed, row_index, kv_pos, kv_len, dropout_p):
    """True where a weight survives dropout. `row_index` is `(b * H + h) * M + q` as int64; offset = row * N + k.

    Equal to `tl.rand(seed, offset) >= dropout_p`. Philox is called directly because older releases of Triton run
    another (64-bit) variant when the offset has 64 bits, and the mask must not depend on the release.
    """
    offset = row_index * kv_len + kv_pos
    low = offset.to(tl.uint32)
    high = (offset >> 32).to(tl.uint32)
    zero = low * 0
    bits, _b, _c, _d = tl.philox(seed, low, high, zero, zero)
    return tl.uint_to_uniform_float(bits) >= dropout_p
