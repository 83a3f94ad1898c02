"""Predicates over integer indices: comparisons with zero and bool tensor elements, combined with and/or.

`True` and `False` are the constants. Negation is pushed down to the leaves when it is built, so there is no Not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeGuard

import sympy

from .integers import loads_in

if TYPE_CHECKING:
    from ...capture.trace import Value


_SIGNS = {"le": "<=", "eq": "==", "ne": "!="}


@dataclass(frozen=True)
class Rel:
    """`expr <= 0` ("le"), `expr == 0` ("eq") or `expr != 0` ("ne"), over the integers."""

    op: Literal["le", "eq", "ne"]
    expr: sympy.Expr

    def __repr__(self) -> str:
        return f"[{self.expr} {_SIGNS[self.op]} 0]"


@dataclass(frozen=True)
class BoolLoad:
    """The element of a bool tensor at `index`, or its negation."""

    value: Value
    index: tuple[sympy.Expr, ...]
    negated: bool = False

    def __repr__(self) -> str:
        return f"{'~' if self.negated else ''}{self.value!r}{list(self.index)}"


class _Compound:
    """Parts in a fixed order for reproducible output; equality ignores the order."""

    __slots__ = ("_set", "parts")

    def __init__(self, parts: Iterable[Predicate]) -> None:
        self.parts = tuple(parts)
        self._set = frozenset(self.parts)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._set == other._set

    def __hash__(self) -> int:
        return hash((type(self).__name__, self._set))


class And(_Compound):
    """All parts hold."""

    def __repr__(self) -> str:
        return "(" + " & ".join(map(repr, self.parts)) + ")"


class Or(_Compound):
    """Some part holds."""

    def __repr__(self) -> str:
        return "(" + " | ".join(map(repr, self.parts)) + ")"


Predicate: TypeAlias = bool | Rel | BoolLoad | And | Or
_KINDS = (bool, Rel, BoolLoad, And, Or)


def is_predicate(x: object) -> TypeGuard[Predicate]:
    """True for the constants and every predicate class."""
    return isinstance(x, _KINDS)


def conjuncts(x: Predicate) -> tuple[Predicate, ...]:
    """The parts that must all hold."""
    if x is True:
        return ()
    return x.parts if isinstance(x, And) else (x,)


def disjuncts(x: Predicate) -> tuple[Predicate, ...]:
    """The parts of which one must hold."""
    if x is False:
        return ()
    return x.parts if isinstance(x, Or) else (x,)


def leaves(x: Predicate) -> Iterator[Rel | BoolLoad]:
    """Every comparison and load of the predicate."""
    if isinstance(x, (And, Or)):
        for part in x.parts:
            yield from leaves(part)
    elif isinstance(x, (Rel, BoolLoad)):
        yield x


def expressions(x: Predicate) -> Iterator[sympy.Expr]:
    """Every integer expression in the predicate, indices of loads included."""
    for leaf in leaves(x):
        if isinstance(leaf, Rel):
            yield leaf.expr
        else:
            yield from leaf.index


def free_symbols(x: Predicate) -> set[sympy.Symbol]:
    """The symbols that the predicate can depend on."""
    return {symbol for expr in expressions(x) for symbol in expr.free_symbols}


def has_loads(x: Predicate) -> bool:
    """True if the predicate reads a tensor."""
    return any(isinstance(leaf, BoolLoad) or loads_in(leaf.expr) for leaf in leaves(x))
