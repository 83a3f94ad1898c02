"""Facts that hold at every index: `0 <= index < size`, sizes are positive, integer loads stay in their dtype.

Everything here is one-sided: True means proved for every index and every size, False means not proved.
"""

from __future__ import annotations

import itertools

import sympy
from sympy.core.function import AppliedUndef

from .integers import INTEGER_RANGES, ZERO, FloorDiv, expand, loaded_value

LARGEST_DYNAMIC_SIZE = 2**30
"""Sizes without an upper bound are taken to be at most this when asking whether int32 arithmetic can overflow."""

_CASE_LIMIT = 64
_serial = itertools.count()


class Bounds:
    """Inclusive ranges of index symbols.

    Args:
        ranges: Symbol -> (lowest, highest); both are expressions of shape symbols.
    """

    def __init__(self, ranges: dict[sympy.Symbol, tuple[sympy.Expr, sympy.Expr]]) -> None:
        self.ranges = dict(ranges)
        self._known: dict[tuple[sympy.Expr, int | None], bool] = {}

    def add(self, symbol: sympy.Symbol, size: sympy.Expr) -> None:
        """Declare a new index symbol of a dimension of `size` elements."""
        self.ranges[symbol] = (ZERO, expand(size - 1))

    def never_positive(self, expr: sympy.Expr, largest_size: int | None = None) -> bool:
        """True if `expr <= 0` at every index. `largest_size` additionally bounds every size from above."""
        expr = expand(expr)
        if isinstance(expr, sympy.Number):
            return bool(expr <= 0)
        key = (expr, largest_size)
        if key not in self._known:
            self._known[key] = self._prove(expr, largest_size, {}, _CASE_LIMIT)
        return self._known[key]

    def never_negative(self, expr: sympy.Expr) -> bool:
        """True if `expr >= 0` at every index."""
        return self.never_positive(-expr)

    def positive(self, expr: sympy.Expr) -> bool:
        """True if `expr >= 1` at every index."""
        return self.never_positive(1 - expr)

    def within(self, expr: sympy.Expr, lowest: int, highest: int, largest_size: int | None = None) -> bool:
        """True if `lowest <= expr <= highest` at every index."""
        return self.never_positive(expr - highest, largest_size) and self.never_positive(lowest - expr, largest_size)

    def _range(self, symbol: sympy.Expr, extra: dict) -> tuple[sympy.Expr, sympy.Expr] | None:
        if symbol in extra:
            return extra[symbol]
        if symbol in self.ranges:
            return self.ranges[symbol]
        if isinstance(symbol, AppliedUndef):
            return _as_integers(INTEGER_RANGES.get(loaded_value(symbol).dtype))
        return None

    def _prove(self, expr: sympy.Expr, largest_size: int | None, extra: dict, cases: int) -> bool:
        """`expr <= 0`, by removing what is not polynomial, then each ranged symbol, then the sizes."""
        if isinstance(expr, sympy.Number):
            return bool(expr <= 0)
        if cases <= 0:
            return False
        outer = _outermost(expr)
        if any(isinstance(atom, AppliedUndef) and self._range(atom, extra) is None for atom in outer):
            return False  # the element of an int64 tensor can be anything
        for atom in outer:
            if isinstance(atom, (sympy.Max, sympy.Min)):
                slope = expr.coeff(atom, 1)
                linear = isinstance(slope, sympy.Number) and not expand(expr - slope * atom).has(atom)
                # It equals one of its arguments at every point, so the claim must hold for each; for a Min that is
                # added (a Max that is subtracted) one suffices, as the claim for any argument is the stronger one.
                some = linear and (slope > 0) == isinstance(atom, sympy.Min)
                share = cases // len(atom.args)
                return (any if some else all)(
                    self._prove(expand(expr.xreplace({atom: argument})), largest_size, extra, share)
                    for argument in atom.args
                )
            if isinstance(atom, FloorDiv):
                replaced = self._without_floor(expr, atom, extra)
                return replaced is not None and self._prove(replaced, largest_size, extra, cases - 1)
        ranges = {atom: limits for atom in outer if (limits := self._range(atom, extra)) is not None}
        for symbol in sorted(ranges, key=str):
            slope = expr.coeff(symbol, 1)
            rest = expand(expr - slope * symbol)
            if symbol in rest.atoms(type(symbol)) or symbol in slope.atoms(type(symbol)):
                continue  # not affine in this symbol: its extremes need not be at the ends of the range
            lowest, highest = ranges[symbol]
            if self._prove(-slope, largest_size, extra, cases - 1):
                end = highest
            elif self._prove(slope, largest_size, extra, cases - 1):
                end = lowest
            else:
                continue
            return self._prove(expand(rest + slope * end), largest_size, extra, cases - 1)
        if ranges:
            return False
        return _sizes_never_positive(expr, outer, largest_size)

    def _without_floor(self, expr: sympy.Expr, floor: FloorDiv, extra: dict) -> sympy.Expr | None:
        """Replace `floor(a / d)` by `(a - r) / d` with a new symbol r in `0..d-1`; None if not possible."""
        base, divisor = floor.args
        if not self.positive(divisor):
            return None
        slope = expr.coeff(floor, 1)
        rest = expand(expr - slope * floor)
        if floor in rest.atoms(FloorDiv) or floor in slope.atoms(FloorDiv):
            return None
        scaled = sympy.cancel(slope / divisor)
        if not scaled.is_polynomial():
            return None
        remainder = sympy.Symbol(f"_r{next(_serial)}", integer=True, nonnegative=True)
        extra[remainder] = (ZERO, expand(divisor - 1))
        return expand(rest + scaled * (base - remainder))


def _as_integers(limits: tuple[int, int] | None) -> tuple[sympy.Integer, sympy.Integer] | None:
    return None if limits is None else (sympy.Integer(limits[0]), sympy.Integer(limits[1]))


def _outermost(expr: sympy.Expr) -> list[sympy.Expr]:
    """Atoms of the polynomial `expr`: symbols and function applications, not what is inside the latter."""
    found: list[sympy.Expr] = []
    pending = [expr]
    while pending:
        part = pending.pop()
        if isinstance(part, (sympy.Add, sympy.Mul)):
            pending.extend(part.args)
        elif isinstance(part, sympy.Pow) and isinstance(part.exp, sympy.Integer) and part.exp > 0:
            pending.append(part.base)
        elif not isinstance(part, sympy.Number) and part not in found:
            found.append(part)
    return found


def _lowest(atom: sympy.Expr) -> int | None:
    if atom.is_positive and atom.is_integer:
        return 1
    return 0 if atom.is_nonnegative else None


def _sizes_never_positive(expr: sympy.Expr, atoms: list[sympy.Expr], largest_size: int | None) -> bool:
    """`expr <= 0` for all sizes: shift each to start at 0, then no coefficient may be positive."""
    shift: dict[sympy.Expr, sympy.Expr] = {}
    for atom in atoms:
        lowest = _lowest(atom)
        if lowest is None or isinstance(atom, AppliedUndef):
            return False
        if largest_size is not None and isinstance(atom, sympy.Symbol):
            slope = expr.coeff(atom, 1)
            if isinstance(slope, sympy.Number) and atom not in (expr - slope * atom).free_symbols:
                shift[atom] = sympy.Integer(largest_size if slope > 0 else lowest)
                continue
        shift[atom] = sympy.Dummy(nonnegative=True, integer=True) + lowest
    shifted = expand(expr.xreplace(shift))
    return all(coefficient <= 0 for coefficient in shifted.as_coefficients_dict().values())
