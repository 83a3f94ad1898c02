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

    Where a size is a multiple of another, as Swin's windows are of those of one image, the quotient is a symbol of its
    own, and the size a product: fractions would not be whole numbers term by term.
    """

    def __init__(self) -> None:
        self._guards: list[Any] = []
        self._same: dict[sympy.Expr, sympy.Expr] = {}
        self._quotients: dict[sympy.Symbol, sympy.Expr] = {}
        self._reduced: dict[sympy.Expr, sympy.Expr] = {}

    def is_about(self, guards: list[Any]) -> bool:
        """False if guards have been taken back since."""
        known = len(self._guards)
        return known == 0 or (known <= len(guards) and guards[known - 1] is self._guards[-1])

    def update(self, guards: list[Any]) -> None:
        """Learn what is new among the guards."""
        for guard in guards[len(self._guards) :]:
            self._guards.append(guard)
            if isinstance(guard.expr, sympy.Eq) and not guard.size_oblivious:
                left, right = guard.expr.args
                if left.is_integer and right.is_integer:  # not of floats, and not of truth values
                    self._learn(left - right)

    def in_terms_of_others(self, expr: sympy.Expr) -> sympy.Expr:
        """The expression in those symbols and quotients that no guard says are equal to others."""
        if not self._same:
            return expr
        if expr not in self._reduced:
            reduced = expr
            for _ in range(len(self._same)):
                simpler = reduced.xreplace(self._same)
                if simpler == reduced:
                    break
                reduced = sympy.expand(simpler)
            self._reduced[expr] = reduced
        return self._reduced[expr]

    def quotient(self, symbol: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr] | None:
        """What is divided by what, without a rest, if the symbol is such a quotient."""
        if symbol not in self._quotients:
            return None
        divisor = self.in_terms_of_others(self._quotients[symbol])
        return sympy.expand(divisor * symbol), divisor

    def _learn(self, difference: sympy.Expr) -> None:
        """The difference of two sizes is 0."""
        difference = _without_nonzero_factors(sympy.expand(self.in_terms_of_others(difference)))
        parts = {part for part in sympy.preorder_traversal(difference) if part.args and not _is_arithmetic(part)}
        calls = sorted(parts, key=lambda part: (-part.count_ops(), str(part)))
        for call in calls:
            if _is_exact_division(call, difference) and self._learn_product(*call.args):
                return
        symbols = sorted(difference.free_symbols, key=lambda s: (s in self._quotients, str(s)), reverse=True)
        for unknown in (*calls, *symbols):
            if self._learn_solution(difference, unknown):
                return

    def _learn_product(self, base: sympy.Expr, divisor: sympy.Expr) -> bool:
        """`base` is a whole multiple of `divisor`; False if no symbol of it can be given in terms of the factors."""
        positive = True if base.is_positive and divisor.is_positive else None
        quotient = sympy.Symbol(f"({base}//{divisor})", integer=True, positive=positive)
        difference = sympy.expand(base - divisor * quotient)
        for symbol in sorted(base.free_symbols - divisor.free_symbols, key=str):
            if self._learn_solution(difference, symbol):
                self._quotients[quotient] = divisor
                return True
        return False

    def _learn_solution(self, difference: sympy.Expr, unknown: sympy.Expr) -> bool:
        solution = _solved(difference, unknown)
        if solution is None:
            return False
        self._same[unknown] = solution
        self._reduced.clear()
        return True


_known: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()


def _known_to(shape_env: Any) -> _Known:
    """What its guards say by now."""
    known = _known.get(shape_env)
    if known is None or not known.is_about(shape_env.guards):
        known = _known[shape_env] = _Known()
    known.update(shape_env.guards)
    return known


def exact_quotient(size: sympy.Expr, shape_env: Any) -> tuple[sympy.Expr, sympy.Expr] | None:
    """What is divided by what if `size` stands for the quotient of two sizes, one a whole multiple of the other."""
    return None if shape_env is None else _known_to(shape_env).quotient(size)


def _is_arithmetic(expr: sympy.Expr) -> bool:
    return expr.is_Add or expr.is_Mul or expr.is_Pow


def _without_nonzero_factors(difference: sympy.Expr) -> sympy.Expr:
    """Something that is 0 where the difference is: `a * c - b * c` is 0 where a - b is, c being a size and not 0."""
    factors = sympy.Mul.make_args(sympy.factor_terms(difference))
    return sympy.expand(sympy.Mul(*(factor for factor in factors if not factor.is_nonzero)))


def _is_exact_division(call: sympy.Expr, difference: sympy.Expr) -> bool:
    """True if the difference, which is 0, says that there is no rest: `a == b * (a // b)`, or `a % b == 0`."""
    name = type(call).__name__
    if name == "FloorDiv":
        base, divisor = call.args
        return sympy.expand(base - divisor * call) in (difference, -difference)
    return name in ("Mod", "PythonMod") and difference in (call, -call)


def _solved(difference: sympy.Expr, unknown: sympy.Expr) -> sympy.Expr | None:
    """What `unknown` is where the difference is 0, if it is in it once, times a number, and that is a whole number."""
    coefficient = difference.coeff(unknown, 1)
    rest = sympy.expand(difference - coefficient * unknown)
    if not coefficient.is_Integer or coefficient == 0 or rest.has(unknown):
        return None
    solution = sympy.expand(-rest / coefficient)
    is_whole = all(number.is_Integer for number in solution.as_coefficients_dict().values())
    return solution if is_whole else None


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
