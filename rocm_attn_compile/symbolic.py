"""Sizes as sympy expressions, whether Dynamo traced them as ints or as symbols.

Everything after capture compares sizes through this module, so that static and dynamic graphs take
one code path. Nothing here installs a guard: a comparison that cannot be decided is "not equal". What Dynamo's own
guards say is known: the program runs only where they hold.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import sympy
import torch

Size: TypeAlias = int | torch.SymInt | sympy.Expr


def to_expr(size: Size) -> sympy.Expr:
    """The sympy expression of an int, a `SymInt` or an expression."""
    if isinstance(size, torch.SymInt):
        size = _as_guarded(size.node.expr, size.node.shape_env)
    if isinstance(size, sympy.Expr):
        if size.is_Atom:
            return size
        return size.replace(_is_exact_floor_div, lambda e: sympy.cancel(e.args[0] / e.args[1]))
    return sympy.Integer(int(size))


def _as_guarded(expr: sympy.Expr, shape_env: Any) -> sympy.Expr:
    """The symbol in an expression that is equal to it by a guard: Dynamo could not put one in the place of the other.

    MPT slices a bias of 64 keys to the s keys that there are: its size is 64 - Max(0, 64 - s), which the addition to
    the scores has guarded to be s.
    """
    if expr.is_Atom:
        return expr
    for guard in shape_env.guards:
        if isinstance(guard.expr, sympy.Eq) and not guard.size_oblivious and expr in guard.expr.args:
            left, right = guard.expr.args
            other = right if left == expr else left
            if other in expr.free_symbols:
                return other
    return expr


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
