"""Masks that are added to scores: a float tensor of zeros and of large negative fills.

When is a fill as good as dropping the key? `exp(score + fill - row maximum)` must be exactly 0 beside any kept key:

* hard, `is_hard`: -inf; or at most half of `finfo(dtype).min`; or at most -1e9 in float64, float32 and bfloat16, whose
  range such scores never come near. A score in float16 may reach 65504, so there only the first two count. Fills such
  as -10000 in float32 are not hard: a score can exceed them.
* absorbing, `absorbs`: `score + fill == fill` for every score below 2**20 in magnitude, that is, half the distance
  between neighbouring floats at `fill` is at least 2**20. Then a row of nothing but fills is exactly uniform, which is
  what `EmptyRows.MEAN_ADDED` says. The lowest number of float16 absorbs scores below 16 only; beyond them the sum
  overflows or not, and eager means nothing by it, so it counts as absorbing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import sympy
import torch

from ...reasons import Reason
from .classify import ClosedForm
from .predicate import Predicate
from .values import FloatLoad, If, Opaque, Scalar, Values, as_constant, round_to

if TYPE_CHECKING:
    from ...capture.trace import Value

_LARGEST_SCORE = 2.0**20
_HARD_FILL = -1e9


def is_hard(fill: float, dtype: torch.dtype) -> bool:
    """True if a key whose score has `fill` added gets probability exactly 0 beside any kept key.

    Args:
        fill: What is added, in the dtype of the mask.
        dtype: Of the scores the softmax sees.
    """
    lowest = torch.finfo(dtype).min
    return fill == -math.inf or fill <= lowest / 2 or (dtype != torch.float16 and fill <= _HARD_FILL)


def absorbs(fill: float, dtype: torch.dtype) -> bool:
    """True if `score + fill == fill` in `dtype` for every score below 2**20 (in float16: 16) in magnitude."""
    rounded = as_constant(round_to(fill, dtype))
    if rounded is None or math.isnan(rounded) or rounded == 0:
        return False
    if math.isinf(rounded) or (dtype == torch.float16 and rounded == torch.finfo(dtype).min):
        return True
    # frexp, because log2 rounds up just below a power of two, and for finfo(float64).min there is no such power.
    mantissa, exponent = math.frexp(abs(rounded))
    # A power of two has its neighbour on the side of zero at half the distance of the other.
    spacing = math.ldexp(torch.finfo(dtype).eps, exponent - (2 if mantissa == 0.5 else 1))
    return spacing / 2 >= _LARGEST_SCORE


@dataclass(frozen=True)
class OpaqueMask:
    """Nothing useful was proved; the tensor stays a dense mask or a bias.

    Attributes:
        reason: Why.
    """

    reason: Reason


@dataclass(frozen=True)
class AdditiveMask:
    """A float tensor that is 0 where `keep` holds and one of `fills` elsewhere.

    Attributes:
        keep: Where nothing is added.
        fills: `(number, predicate)`: what is added where; disjoint, together the complement of `keep`.
    """

    keep: ClosedForm
    fills: tuple[tuple[float, Predicate], ...]

    @property
    def fill(self) -> float | None:
        """The one fill, or None if there are several or none."""
        return self.fills[0][0] if len(self.fills) == 1 else None


@dataclass(frozen=True)
class Addend:
    """A term of a sum of masks that is no mask: it stays a bias.

    Attributes:
        value, index: The tensor, and the index into it at (batch, head, q, k).
        reason: Why it is no mask.
    """

    value: Value
    index: tuple[sympy.Expr, ...]
    reason: Reason


AdditivePart: TypeAlias = AdditiveMask | Addend


def leaves_by_number(values: Values, x: Scalar) -> dict[float, Predicate]:
    """Every number that an element can be, with the predicate of where it is.

    Raises:
        Opaque: Some leaf is not constant.
    """
    found: dict[float, Predicate] = {}

    def visit(x: Scalar, path: Predicate) -> None:
        if path is False:
            return
        if isinstance(x, If):
            visit(x.then, values.logic.all_of([path, x.condition]))
            visit(x.otherwise, values.logic.all_of([path, values.logic.negate(x.condition)]))
            return
        number = as_constant(x)
        if number is None:
            what = f"an element of {x.value!r}" if isinstance(x, FloatLoad) else f"{x}"
            raise Opaque(f"it is {what} somewhere, not one of a few numbers")
        if math.isnan(number):
            raise Opaque("it is NaN somewhere")
        found[number] = values.logic.any_of([found.get(number, False), path])

    visit(values.number(x), True)
    return found
