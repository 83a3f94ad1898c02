"""Helpers on single comparisons and on lists of parts, shared by the simplifications of `logic.py`."""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from .integers import ZERO, expand
from .predicate import And, BoolLoad, Or, Predicate, Rel


def upper_sides(rel: Rel) -> list[sympy.Expr]:
    """Expressions e for which the comparison gives `e <= 0`."""
    if rel.op == "le":
        return [rel.expr]
    return [rel.expr, -rel.expr] if rel.op == "eq" else []


def related(a: sympy.Expr, b: sympy.Expr) -> bool:
    """A cheap test whether two expressions share something that could cancel."""
    return not a.free_symbols.isdisjoint(b.free_symbols)


def raw_negation(x: Predicate) -> Predicate:
    """Negation without simplification; an involution on simplified predicates."""
    if isinstance(x, bool):
        return not x
    if isinstance(x, BoolLoad):
        return BoolLoad(x.value, x.index, not x.negated)
    if isinstance(x, Rel):
        if x.op == "le":
            return Rel("le", tighten(expand(1 - x.expr)))
        return Rel("ne" if x.op == "eq" else "eq", x.expr)
    return (Or if isinstance(x, And) else And)([raw_negation(part) for part in x.parts])


def flatten(parts: Iterable[Predicate], kind: type) -> list[Predicate] | None:
    """Parts of nested `kind`s, each once; None if one decides the result alone."""
    neutral = kind is And
    found: dict[Predicate, None] = {}
    for part in parts:
        if isinstance(part, bool):
            if part is not neutral:
                return None
            continue
        for inner in part.parts if isinstance(part, (And, Or)) and isinstance(part, kind) else (part,):
            found[inner] = None
    return list(found)


def linear_extremum(expr: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr] | None:
    """A Max or Min that occurs once, with a numeric factor, and that factor."""
    for atom in expr.atoms(sympy.Max, sympy.Min):
        slope = expr.coeff(atom, 1)
        if isinstance(slope, sympy.Number) and slope != 0 and not expand(expr - slope * atom).has(atom):
            return atom, slope
    return None


def constant_and_divisor(expr: sympy.Expr) -> tuple[int, int]:
    """The constant term, and the greatest common divisor of the other coefficients (1 if they are not integers)."""
    divisor, constant = 0, ZERO
    for atom, coefficient in expr.as_coefficients_dict().items():
        if atom == 1:
            constant = coefficient
        elif not isinstance(coefficient, sympy.Integer) or not atom.is_integer:
            return 0, 1
        else:
            divisor = sympy.igcd(divisor, coefficient)
    if not isinstance(constant, sympy.Integer):
        return 0, 1
    return int(constant), int(divisor) or 1


def tighten(expr: sympy.Expr) -> sympy.Expr:
    """An equivalent of `expr <= 0` with coprime coefficients: `2 k - 3 <= 0` is `k - 1 <= 0`."""
    constant, divisor = constant_and_divisor(expr)
    if divisor == 1:
        return expr
    return expand((expr - constant) / divisor) + -((-constant) // divisor)


def leading_coefficient(expr: sympy.Expr) -> sympy.Expr:
    """Coefficient of the first atom in a fixed order, to choose one of `e == 0` and `-e == 0`."""
    terms = expr.as_coefficients_dict()
    atom = min((a for a in terms if a != 1), key=sympy.default_sort_key)
    return terms[atom]
