"""The soft cap as a polynomial of the product, for weights that need no maximum: the forward kernels' SHIFT CAP_SERIES.

A cap by its tanh takes the special-function unit as long as the exponential does, on AMD a second exponential and a
reciprocal. Where the tanh's argument is END at most, an odd polynomial does, as exact as NVIDIA's instruction. No score
is compared with END: the row's sum tells. The polynomial grows without bound and crosses its value at END once, so

* a product beyond END makes a weight, hence a sum, of at least 2^top, top = log2(e) cap tanh(END);
* a product below -END makes a weight below 2^-top, as its true weight is, so n such weights change a row's sum by less
  than a share of 1 / LOSS if the sum is at least n LOSS 2^-top.

Where a row's sum is outside of that, or not a number, the tile is computed again with the true cap. So results are
right on any input, at more than twice the time where scores come near the cap.
"""

import math

import triton
import triton.language as tl

from .common import LOG2E
from .sizes import known

# Of the argument, its third and its fifth power; tools/fit_soft_cap.py prints them.
FIRST = tl.constexpr(0.9996967278)
THIRD = tl.constexpr(-0.3245738876)
FIFTH = tl.constexpr(0.0935748364)
END = tl.constexpr(0.8)
TOP = tl.constexpr(0.6635)
"""Somewhat less than the polynomial's least value from END on, which is 0.6642."""
LOSS = tl.constexpr(4096.0)

MEAN_WEIGHT = 2.0**10
"""What weights may be on average before a call would rather not begin with the polynomial."""
LEAST_FACTOR, LARGEST_FACTOR = 2.0**-20, 2.0**20
"""Of softmax_scale / logits_soft_cap, so that its fifth power and that of the product are float32's."""


@triton.jit
def factored_series(scale_log2, inner):
    """`(factor, p, q)`: `scale_log2 * tanh(inner * x)` by the polynomial is y ((y y + p)^2 + q) with y = factor x.

    That is an operation less than by Horner's rule, where the queries bring the factor. It is a bfloat16, so that they
    are multiplied by it two at once. The fifth power's coefficient follows from it, up to 2 % off. The other two take
    back what that changes in [-END, END] but for an eighth: x^4 is about END^2 x^2 - END^4 / 8 there.
    """
    factor = (inner * tl.exp2(0.2 * tl.log2(scale_log2 * FIFTH))).to(tl.bfloat16).to(tl.float32)
    ratio = inner / factor
    square = ratio * ratio
    linear = scale_log2 * ratio
    change = 1.0 / (linear * square * square) - FIFTH
    p = linear * square * 0.5 * (THIRD - END**2 * change)
    return factor, p, linear * (FIRST + END**4 / 8 * change) - p * p


@triton.jit
def series_exponent(y, p, q):
    """The polynomial in the form of factored_series, of a float32 tile of products y."""
    square = y * y + p
    return y * (square * square + q)


@triton.jit
def scale_queries(q_tile, factor):
    """The queries with factored_series' factor: rounded once more, a quarter of what rounding scores would be."""
    return (q_tile.to(tl.float32) * factor).to(q_tile.dtype)


@triton.jit
def series_holds(total, keys, scale_log2):
    """Which rows' sums `total` of at most `keys` weights show that the polynomial held. NaN does not hold."""
    top = tl.exp2(scale_log2 * TOP)
    return (total < top) & (total * top >= keys * LOSS)


def series_fits(softmax_scale: float, logits_soft_cap: float, kv_len: int) -> bool:
    """Whether a call may begin with it: the cap leaves room for ordinary sums, and the factors are float32's."""
    top = math.exp2(logits_soft_cap * TOP.value * LOG2E.value)
    return known(kv_len <= top / MEAN_WEIGHT) and LEAST_FACTOR <= softmax_scale / logits_soft_cap <= LARGEST_FACTOR
