"""What a tensor element can be, symbolically: a predicate, an exact number, a choice between numbers, or unknown.

* bool tensors: a `Predicate`;
* numbers: a sympy integer expression, or a Python float for constants that are no integer (inf, nan, 0.5, finfo.min);
* `If`: one of two numbers, by a predicate;
* `FloatLoad`: the element of a tensor about which nothing more is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import sympy
import torch

from .bounds import LARGEST_DYNAMIC_SIZE
from .integers import EXACT_INTEGERS, INTEGER_RANGES, ONE, ZERO, expand
from .logic import Logic
from .predicate import And, BoolLoad, Or, Predicate, Rel, free_symbols, is_predicate, leaves

if TYPE_CHECKING:
    from ...capture.trace import Value

_LARGEST_INTEGER = 2**53
_LARGEST_FACTOR = 2**40
"""int64 results count as exact up to this factor of positions and loaded integers, which are taken to be small."""

_LEAF_LIMIT = 48


class Opaque(Exception):
    """Raised where nothing exact can be said; the evaluator then reads the tensor itself."""


@dataclass(frozen=True)
class If:
    """`then` where the condition holds, `otherwise` elsewhere; both numbers."""

    condition: Predicate
    then: Scalar
    otherwise: Scalar

    def __repr__(self) -> str:
        return f"({self.then} if {self.condition} else {self.otherwise})"


@dataclass(frozen=True)
class FloatLoad:
    """The element at `index` of a tensor that has no closed form."""

    value: Value
    index: tuple[sympy.Expr, ...]


Scalar: TypeAlias = Any
"""`Predicate | sympy.Expr | float | If | FloatLoad`. sympy has no types, so that the union would only ask for casts."""


def constant(x: bool | float) -> Scalar:
    """A Python number: bool as a predicate, an integral number as an integer, anything else as a float."""
    if isinstance(x, bool):
        return x
    if isinstance(x, int):
        return sympy.Integer(x)
    if math.isfinite(x) and x == int(x) and abs(x) <= _LARGEST_INTEGER:
        return sympy.Integer(int(x))
    return float(x)


def as_constant(x: Scalar) -> Any:
    """The bool, int or float, or None if `x` is not constant."""
    if isinstance(x, (bool, float)):
        return x
    return int(x) if isinstance(x, sympy.Integer) else None


def complexity(x: Scalar) -> int:
    """The number of comparisons, loads and numbers that the element is made of."""
    if isinstance(x, If):
        return complexity(x.condition) + complexity(x.then) + complexity(x.otherwise)
    return sum(1 for _ in leaves(x)) if is_predicate(x) else 1


def symbols_of(x: Scalar) -> set[sympy.Symbol]:
    """Every symbol that the element can depend on."""
    if is_predicate(x):
        return free_symbols(x)
    if isinstance(x, sympy.Expr):
        return set(x.free_symbols)
    if isinstance(x, If):
        return free_symbols(x.condition) | symbols_of(x.then) | symbols_of(x.otherwise)
    if isinstance(x, FloatLoad):
        return {symbol for i in x.index for symbol in i.free_symbols}
    return set()


class Values:
    """Builds and combines elements; owns no state but the logic it simplifies with."""

    def __init__(self, logic: Logic) -> None:
        self.logic = logic

    def choose(self, condition: Predicate, then: Scalar, otherwise: Scalar) -> Scalar:
        """`then if condition else otherwise`, for predicates or numbers alike."""
        if isinstance(condition, bool):
            return then if condition else otherwise
        then = self.given(then, condition)
        otherwise = self.given(otherwise, self.logic.negate(condition))
        if is_predicate(then) and is_predicate(otherwise):
            return self.logic.choose(condition, then, otherwise)
        then, otherwise = self.number(then), self.number(otherwise)
        if type(then) is type(otherwise) and then == otherwise:
            return then
        return If(condition, then, otherwise)

    def number(self, x: Scalar) -> Scalar:
        """A predicate as 1 or 0; anything else as it is."""
        if isinstance(x, bool):
            return ONE if x else ZERO
        return If(x, ONE, ZERO) if is_predicate(x) else x

    def given(self, x: Scalar, fact: Predicate) -> Scalar:
        """`x` simplified where `fact` is known to hold."""
        pinned = self._pinned(fact)
        if pinned:
            x = self.substitute(x, pinned)
        if isinstance(x, If):
            if self.logic.implies([fact], x.condition):
                return self.given(x.then, fact)
            if self.logic.implies([fact, x.condition], False):
                return self.given(x.otherwise, fact)
            then, otherwise = self.given(x.then, fact), self.given(x.otherwise, fact)
            return then if type(then) is type(otherwise) and then == otherwise else If(x.condition, then, otherwise)
        if isinstance(x, (Rel, BoolLoad)) and self.logic.implies([fact], x):
            return True
        return x

    def _pinned(self, fact: Predicate) -> dict[sympy.Symbol, sympy.Expr]:
        """`{symbol: value}` if the fact says that an index symbol has one value."""
        if not isinstance(fact, Rel) or fact.op == "ne":
            return {}
        bounds = self.logic.bounds
        for symbol in sorted(fact.expr.free_symbols & bounds.ranges.keys(), key=str):
            slope = fact.expr.coeff(symbol, 1)
            value = expand(symbol - fact.expr / slope) if slope in (1, -1) else None
            if value is None or value.has(symbol):
                continue
            lowest, highest = bounds.ranges[symbol]
            if fact.op == "eq" or (slope == 1 and value == lowest) or (slope == -1 and value == highest):
                return {symbol: value}
        return {}

    def substitute(self, x: Scalar, replacement: dict[Any, sympy.Expr]) -> Scalar:
        """`x` with symbols replaced."""
        if is_predicate(x):
            return self.logic.substitute(x, replacement)
        if isinstance(x, sympy.Expr):
            return expand(x.xreplace(replacement))
        if isinstance(x, If):
            return self.choose(
                self.logic.substitute(x.condition, replacement),
                self.substitute(x.then, replacement),
                self.substitute(x.otherwise, replacement),
            )
        if isinstance(x, FloatLoad):
            return FloatLoad(x.value, tuple(expand(i.xreplace(replacement)) for i in x.index))
        return x

    def lift(self, function: Callable[..., Scalar], *arguments: Scalar) -> Scalar:
        """Apply a function of plain numbers (and bool constants) inside every `If` and predicate."""
        return self._lift(function, list(arguments), [_LEAF_LIMIT])

    def _lift(self, function: Callable[..., Scalar], arguments: list[Scalar], budget: list[int]) -> Scalar:
        for position, x in enumerate(arguments):
            if isinstance(x, If):
                condition, then, otherwise = x.condition, x.then, x.otherwise
            elif isinstance(x, (Rel, BoolLoad, And, Or)):
                condition, then, otherwise = x, True, False
            else:
                continue
            negated = self.logic.negate(condition)
            others = arguments[:position], arguments[position + 1 :]
            # The other arguments often hang on the same condition.
            yes = [*(self.given(a, condition) for a in others[0]), then, *(self.given(a, condition) for a in others[1])]
            no = [*(self.given(a, negated) for a in others[0]), otherwise, *(self.given(a, negated) for a in others[1])]
            return self.choose(condition, self._lift(function, yes, budget), self._lift(function, no, budget))
        budget[0] -= 1
        if budget[0] < 0:
            raise Opaque(f"more than {_LEAF_LIMIT} cases")
        return function(*arguments)

    def cast(self, x: Scalar, dtype: torch.dtype) -> Scalar:
        """`x` converted to `dtype` exactly as torch does.

        Raises:
            Opaque: The conversion could round or wrap in a way that has no closed form.
        """
        if dtype == torch.bool:
            return x if is_predicate(x) else self.lift(self._nonzero, x)
        return self.lift(lambda leaf: self._cast_leaf(leaf, dtype), x)

    def _nonzero(self, x: Scalar) -> Predicate:
        if isinstance(x, (bool, float)):
            return bool(x)
        if isinstance(x, sympy.Expr):
            return self.logic.ne(x)
        raise Opaque("truth value of an unknown float")

    def _cast_leaf(self, x: Scalar, dtype: torch.dtype) -> Scalar:
        value = as_constant(x)
        if value is not None:
            return round_to(value, dtype)
        if isinstance(x, sympy.Expr):
            return self.fitting(x, dtype)
        raise Opaque(f"conversion of an unknown float to {dtype}")

    def fits(self, expr: sympy.Expr, dtype: torch.dtype) -> bool:
        """True if `dtype` holds `expr` exactly at every index."""
        if dtype in INTEGER_RANGES:
            return self.logic.bounds.within(expr, *INTEGER_RANGES[dtype], LARGEST_DYNAMIC_SIZE)
        if dtype in EXACT_INTEGERS:
            limit = EXACT_INTEGERS[dtype]
            return self.logic.bounds.within(expr, -limit, limit)
        return dtype == torch.int64 and all(abs(c) <= _LARGEST_FACTOR for c in expr.as_coefficients_dict().values())

    def fitting(self, expr: sympy.Expr, dtype: torch.dtype) -> sympy.Expr:
        """`expr` unchanged.

        Raises:
            Opaque: It may not be exact in `dtype`.
        """
        if not self.fits(expr, dtype):
            raise Opaque(f"{expr} may not be exact in {dtype}")
        return expr


def round_to(x: bool | float, dtype: torch.dtype) -> Scalar:
    """A Python number converted to `dtype`: rounded, overflowing to infinity, truncated for integer types."""
    if dtype.is_complex:
        raise Opaque("complex")
    if not dtype.is_floating_point and isinstance(x, float) and not math.isfinite(x):
        raise Opaque(f"{x} as an integer")
    if dtype in INTEGER_RANGES and not INTEGER_RANGES[dtype][0] <= x <= INTEGER_RANGES[dtype][1]:
        raise Opaque(f"{x} does not fit {dtype}")
    if isinstance(x, float):
        if abs(x) >= 2**63 and not dtype.is_floating_point:
            raise Opaque(f"{x} as an integer")
        rounded = torch.tensor([x], dtype=torch.float64, device="cpu").to(dtype)
    else:
        rounded = torch.tensor([x], dtype=torch.int64, device="cpu").to(dtype)
    return constant(rounded.item())
