"""Sizes as sympy expressions, whether Dynamo traced them as ints or as symbols.

Everything after capture compares sizes through this module, so that static and dynamic graphs take
one code path. Nothing here installs a guard: a comparison that cannot be decided is "not equal". What Dynamo's own
guards say is known: the program runs only where they hold.
"""

from __future__ import annotations

import weakref
from typing import Any, TypeAlias

import sympy
import torch

Size: TypeAlias = int | torch.SymInt | sympy.Expr


def to_expr(size: Size) -> sympy.Expr:
    """The sympy expression of an int, a `SymInt` or an expression."""
    if isinstance(size, torch.SymInt):
        size = _known_to(size.node.shape_env).in_terms_of_others(size.node.expr)
    if isinstance(size, sympy.Expr):
        if size.is_Atom:
            return size
        return size.replace(_is_exact_floor_div, lambda e: sympy.cancel(e.args[0] / e.args[1]))
    return sympy.Integer(int(size))


class _Known:
    """What Dynamo's guards say of sizes that it could not put in the place of one another itself.

    MPT slices a bias of 64 keys to the s keys that there are: its size is 64 - Max(0, 64 - s), which the addition to
    the scores has guarded to be s. A convolution's relative shift cuts 2 * t - 1 positions back to p // 2 + 1, which
    is t. A mask of (batch * heads, ...) is asserted to have as many rows as there are heads in the batch.
    """

    def __init__(self) -> None:
        self.num_guards = 0
        self._same: dict[sympy.Expr, sympy.Expr] = {}

    def in_terms_of_others(self, expr: sympy.Expr) -> sympy.Expr:
        """The expression in those symbols and quotients that no guard says are equal to others."""
        for _ in range(len(self._same)):
            simpler = expr.xreplace(self._same)
            if simpler == expr:
                break
            expr = sympy.expand(simpler)
        return expr

    def learn(self, left: sympy.Expr, right: sympy.Expr) -> None:
        difference = sympy.expand(self.in_terms_of_others(left) - self.in_terms_of_others(right))
        parts = {part for part in sympy.preorder_traversal(difference) if part.args and not _is_arithmetic(part)}
        calls = sorted(parts, key=lambda part: (-part.count_ops(), str(part)))
        for unknown in (*calls, *sorted(difference.free_symbols, key=str, reverse=True)):
            solution = _solved(difference, unknown)
            if solution is not None:
                self._same[unknown] = solution
                return


_known: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()


def _known_to(shape_env: Any) -> _Known:
    """What its guards say by now."""
    guards = shape_env.guards
    known = _known.get(shape_env)
    if known is None or known.num_guards > len(guards):
        known = _known[shape_env] = _Known()
    for guard in guards[known.num_guards :]:
        if isinstance(guard.expr, sympy.Eq) and not guard.size_oblivious:
            known.learn(*guard.expr.args)
    known.num_guards = len(guards)
    return known


def _is_arithmetic(expr: sympy.Expr) -> bool:
    return expr.is_Add or expr.is_Mul or expr.is_Pow


def _solved(difference: sympy.Expr, unknown: sympy.Expr) -> sympy.Expr | None:
    """What `unknown` is where the difference is 0, if it is in it once, times a number, and that is a whole number.

    A quotient that is in it with its divisor is exact: `a == b * (a // b)`.
    """
    coefficient = difference.coeff(unknown, 1)
    rest = sympy.expand(difference - coefficient * unknown)
    if coefficient.is_Integer and coefficient != 0 and not rest.has(unknown):
        solution = sympy.expand(-rest / coefficient)
        is_whole = all(number.is_Integer for number in solution.as_coefficients_dict().values())
        return solution if is_whole else None
    if type(unknown).__name__ == "FloorDiv":
        base, divisor = unknown.args
        factor = sympy.cancel(difference / (base - divisor * unknown))
        return base / divisor if factor.is_Integer and factor != 0 else None
    return None


def _is_exact_floor_div(expr: sympy.Basic) -> bool:
    """True for torch's `FloorDiv(a * b, b)`, which it leaves unsimplified after a view with -1."""
    if type(expr).__name__ != "FloorDiv":
        return False
    return sympy.cancel(expr.args[0] / expr.args[1]).as_numer_denom()[1] == 1


def same_size(left: Size, right: Size) -> bool:
    """True only if the two sizes are proved equal; never guards."""
    a, b = to_expr(left), to_expr(right)
    return a == b or sympy.expand(a - b) == 0


def is_one(size: Size) -> bool:
    """True only if the size is statically 1."""
    return to_expr(size) == 1


def static(size: Size) -> int | None:
    """The size as an int, None if it is symbolic."""
    expr = to_expr(size)
    return int(expr) if expr.is_Integer else None


def divide(total: Size, part: Size) -> sympy.Expr | None:
    """`total / part` if that is an integer expression, else None."""
    a, b = to_expr(total), to_expr(part)
    if a == b:
        return sympy.Integer(1)
    if b == 0:
        return None
    numerator, denominator = sympy.cancel(a / b).as_numer_denom()
    return numerator if denominator == 1 else None


def product(sizes) -> sympy.Expr:
    """The product of sizes; 1 for none."""
    result = sympy.Integer(1)
    for size in sizes:
        result = result * to_expr(size)
    return result
