"""Arithmetic and comparison of exact integers as torch does them in a given dtype.

A float tensor is followed only while it holds integers that its dtype represents exactly; an IEEE operation whose
exact result is representable returns it. Anything that could round is left to `Opaque`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import sympy
import torch

from .integers import EXACT_INTEGERS, ZERO, FloorDiv, expand
from .predicate import Predicate
from .values import Opaque, Scalar, as_constant, round_to

if TYPE_CHECKING:
    from ...capture.trace import Value
    from .evaluate import Call, Evaluator

Numbers = dict[str, Scalar]


def common_dtype(left: Any, right: Any) -> torch.dtype:
    """The dtype in which torch compares two operands, tensors or numbers."""

    def sample(x: Any) -> Any:
        if hasattr(x, "shape"):
            return torch.empty([1] * min(x.ndim, 1), dtype=x.dtype, device="cpu")
        return 1 if isinstance(x, torch.SymInt) else x

    return torch.result_type(sample(left), sample(right))


def compare(ev: Evaluator, name: str, left: Scalar, right: Scalar, dtype: torch.dtype) -> Predicate:
    """A comparison of two numbers that torch carries out in `dtype`.

    Raises:
        Opaque: Conversion to `dtype` could change the outcome.
    """
    constants = as_constant(left), as_constant(right)
    if None not in constants:
        a, b = (as_constant(round_to(x, dtype)) for x in constants)
        return {"le": a <= b, "lt": a < b, "ge": a >= b, "gt": a > b, "eq": a == b, "ne": a != b}[name]
    left, right = (sympy.Integer(int(x)) if isinstance(x, bool) else x for x in (left, right))
    for x in (left, right):
        if not isinstance(x, (sympy.Expr, float)):
            raise Opaque("comparison of something unknown")
    if isinstance(left, float):
        return compare(ev, {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt"}.get(name, name), right, left, dtype)
    if isinstance(right, float):
        return _compare_with_float(ev, name, left, right, dtype)
    if dtype in EXACT_INTEGERS:
        # Rounding is monotone, so one side well inside the exact range decides as in exact arithmetic.
        limit = EXACT_INTEGERS[dtype] - 1
        if not any(ev.bounds.within(x, -limit, limit) for x in (left, right)):
            raise Opaque(f"comparison in {dtype} of integers it may not hold exactly")
    elif dtype != torch.int64 and not all(ev.values.fits(x, dtype) for x in (left, right)):
        raise Opaque(f"comparison in {dtype} of integers it may not hold")
    difference = left - right
    logic = ev.logic
    if name == "le":
        return logic.le(difference)
    if name == "lt":
        return logic.le(difference + 1)
    if name == "ge":
        return logic.le(-difference)
    if name == "gt":
        return logic.le(1 - difference)
    return logic.eq(difference) if name == "eq" else logic.ne(difference)


def _compare_with_float(ev: Evaluator, name: str, left: Scalar, right: float, dtype: torch.dtype) -> Predicate:
    """An integer expression against a constant that is no (small) integer."""
    if dtype not in EXACT_INTEGERS:
        raise Opaque(f"comparison with {right} in {dtype}")
    limit = EXACT_INTEGERS[dtype] - 1
    rounded = as_constant(round_to(right, dtype))
    if isinstance(rounded, int):
        return compare(ev, name, left, sympy.Integer(rounded), dtype)
    if math.isnan(rounded):
        return name == "ne"
    if abs(rounded) >= limit:
        if not ev.bounds.within(left, -limit, limit):
            raise Opaque(f"comparison in {dtype} of integers it may not hold exactly")
        return name == "ne" or name in (("le", "lt") if rounded > 0 else ("ge", "gt"))
    if name in ("eq", "ne"):
        return name == "ne"
    # Nothing lies between floor and ceil: x <= 2.5 is x <= 2, x > 2.5 is x >= 3.
    if name in ("le", "lt"):
        return ev.logic.le(left - math.floor(rounded))
    return ev.logic.le(math.ceil(rounded) - left)


def _exact(ev: Evaluator, value: Value, numbers: Numbers) -> list[sympy.Expr]:
    """The operands, if all are integers that the result's dtype holds exactly."""
    for x in numbers.values():
        if not isinstance(x, (sympy.Expr, bool)):
            raise Opaque(f"{value.name} with {x}")
    expressions = [sympy.Integer(int(x)) if isinstance(x, bool) else x for x in numbers.values()]
    if value.dtype.is_floating_point:
        for expression in expressions:
            ev.values.fitting(expression, value.dtype)
    return expressions


def add(ev: Evaluator, value: Value, call: Call, numbers: Numbers) -> Scalar:
    """`self + alpha * other`; also an infinity plus anything finite."""
    for name, sign in (("self", 1), ("other", 1 if value.name == "add" else -1)):
        x, y = numbers[name], numbers["other" if name == "self" else "self"]
        if isinstance(x, float) and math.isinf(x) and isinstance(y, sympy.Expr) and call["alpha"] == 1:
            ev.values.fitting(y, value.dtype)
            return sign * x
    left, right = _exact(ev, value, numbers)
    alpha = ev.scalar(call["alpha"])
    if not isinstance(alpha, sympy.Expr):
        raise Opaque(f"{value.name} with alpha={alpha}")
    scaled = ev.values.fitting(expand(alpha * right), value.dtype)
    return ev.values.fitting(expand(left + scaled if value.name == "add" else left - scaled), value.dtype)


def rsub(ev: Evaluator, value: Value, call: Call, numbers: Numbers) -> Scalar:
    """`other - alpha * self`."""
    left, right = _exact(ev, value, numbers)
    alpha = ev.scalar(call["alpha"])
    if not isinstance(alpha, sympy.Expr):
        raise Opaque(f"rsub with alpha={alpha}")
    scaled = ev.values.fitting(expand(alpha * left), value.dtype)
    return ev.values.fitting(expand(right - scaled), value.dtype)


def mul(ev: Evaluator, value: Value, call: Call, numbers: Numbers) -> Scalar:
    """The product."""
    left, right = _exact(ev, value, numbers)
    return ev.values.fitting(expand(left * right), value.dtype)


def neg(ev: Evaluator, value: Value, call: Call, numbers: Numbers) -> Scalar:
    """The negative."""
    (x,) = _exact(ev, value, numbers)
    return ev.values.fitting(expand(-x), value.dtype)


def absolute(ev: Evaluator, value: Value, call: Call, numbers: Numbers) -> Scalar:
    """The magnitude, as a maximum so that comparisons split into two."""
    (x,) = _exact(ev, value, numbers)
    return ev.values.fitting(_larger(ev, x, expand(-x)), value.dtype)


def sign(ev: Evaluator, value: Value, call: Call, numbers: Numbers) -> Scalar:
    """-1, 0 or 1."""
    (x,) = _exact(ev, value, numbers)
    one = sympy.Integer(1)
    return ev.values.choose(ev.logic.le(1 - x), one, ev.values.choose(ev.logic.le(x + 1), -one, ZERO))


def extremum(ev: Evaluator, value: Value, call: Call, numbers: Numbers) -> Scalar:
    """`maximum` and `minimum`."""
    left, right = _exact(ev, value, numbers)
    return _larger(ev, left, right) if value.name in ("maximum", "fmax") else _smaller(ev, left, right)


def clamp(ev: Evaluator, value: Value, call: Call, numbers: Numbers) -> Scalar:
    """Limits from below, then from above."""
    _exact(ev, value, numbers)
    result = numbers["self"]
    if "min" in numbers:
        result = _larger(ev, result, numbers["min"])
    if "max" in numbers:
        result = _smaller(ev, result, numbers["max"])
    return ev.values.fitting(result, value.dtype)


def floor_divide(ev: Evaluator, value: Value, call: Call, numbers: Numbers) -> Scalar:
    """Division rounded down; `div` only with that rounding, since a true quotient is seldom an integer."""
    if value.name == "div" and call.get("rounding_mode") != "floor":
        raise Opaque("true division")
    base, divisor = _exact(ev, value, numbers)
    if value.dtype.is_floating_point:
        raise Opaque("floor division of floats")
    return ev.values.fitting(_quotient(ev, base, divisor), value.dtype)


def remainder(ev: Evaluator, value: Value, call: Call, numbers: Numbers) -> Scalar:
    """The remainder with the sign of the divisor."""
    base, divisor = _exact(ev, value, numbers)
    if value.dtype.is_floating_point:
        raise Opaque("remainder of floats")
    return ev.values.fitting(expand(base - divisor * _quotient(ev, base, divisor)), value.dtype)


def bitwise_not(ev: Evaluator, value: Value, call: Call, numbers: Numbers) -> Scalar:
    """`-x - 1` in two's complement."""
    (x,) = _exact(ev, value, numbers)
    return ev.values.fitting(expand(-x - 1), value.dtype)


def _quotient(ev: Evaluator, base: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    if ev.bounds.positive(-divisor):
        base, divisor = expand(-base), expand(-divisor)
    if not ev.bounds.positive(divisor):
        raise Opaque(f"division by {divisor}, of unknown sign")
    if ev.bounds.never_negative(base) and ev.bounds.positive(divisor - base):
        return ZERO
    return expand(FloorDiv(base, divisor))


def _larger(ev: Evaluator, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    if ev.bounds.never_positive(a - b):
        return b
    return a if ev.bounds.never_positive(b - a) else sympy.Max(a, b)


def _smaller(ev: Evaluator, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    if ev.bounds.never_positive(a - b):
        return a
    return b if ev.bounds.never_positive(b - a) else sympy.Min(a, b)


SYMBOLIC = {
    "add": add,
    "sub": add,
    "rsub": rsub,
    "mul": mul,
    "neg": neg,
    "abs": absolute,
    "sign": sign,
    "sgn": sign,
    "maximum": extremum,
    "minimum": extremum,
    "fmax": extremum,
    "fmin": extremum,
    "clamp": clamp,
    "clamp_min": clamp,
    "clamp_max": clamp,
    "div": floor_divide,
    "floor_divide": floor_divide,
    "remainder": remainder,
    "bitwise_not": bitwise_not,
}
