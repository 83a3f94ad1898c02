"""Exact integer expressions: sympy plus one floor division of our own.

Index symbols, shape symbols and loads of integer tensors are all integer sympy atoms. A load is an undefined function,
one per `Value`, applied to the index it is read at: `L7(b, k)`.

Torch's own `FloorDiv` and `Mod` are not used: they assume non-negative arguments in places, which masks do not grant.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import sympy
import torch
from sympy.core.function import AppliedUndef

from ...symbolic import to_expr

if TYPE_CHECKING:
    from ...capture.trace import Value

ZERO = sympy.Integer(0)
ONE = sympy.Integer(1)


class FloorDiv(sympy.Function):
    """`floor(base / divisor)` over the integers, for either sign; simplifies only what is always true."""

    nargs = (2,)
    is_integer = True

    @classmethod
    def eval(cls, base: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr | None:
        if not isinstance(divisor, sympy.Integer):
            return None
        if divisor == 0:
            return None
        if divisor < 0:
            return cls(expand(-base), -divisor)
        if divisor == 1:
            return base
        if isinstance(base, sympy.Integer):
            return sympy.Integer(int(base) // int(divisor))
        if isinstance(base, FloorDiv) and isinstance(base.args[1], sympy.Integer) and base.args[1] > 0:
            return cls(base.args[0], base.args[1] * divisor)
        whole, rest = ZERO, ZERO
        for atom, coefficient in base.as_coefficients_dict().items():
            if not isinstance(coefficient, sympy.Integer) or not atom.is_integer:
                return None
            quotient, remainder = divmod(int(coefficient), int(divisor))
            if atom == 1 or remainder == 0:
                whole, rest = whole + quotient * atom, rest + remainder * atom
            else:
                rest = rest + coefficient * atom
        if whole == 0:
            return None
        return whole + cls(rest, divisor)

    def _eval_is_nonnegative(self) -> bool | None:
        base, divisor = self.args
        return True if base.is_nonnegative and divisor.is_positive else None


def expand(expr: sympy.Expr) -> sympy.Expr:
    """Sums of products; cheap when it already is one."""
    if expr.is_Atom:
        return expr
    for term in sympy.Add.make_args(expr):
        if any(factor.is_Add or factor.is_Pow for factor in sympy.Mul.make_args(term)):
            return sympy.expand(expr)
    return expr


def modulo(base: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    """The remainder with the sign of the divisor, as Python's `%` and `torch.remainder`."""
    return expand(base - divisor * FloorDiv(base, divisor))


_SIZE_FUNCTIONS = {
    "FloorDiv": FloorDiv,
    "CleanDiv": FloorDiv,
    "Mod": modulo,
    "PythonMod": modulo,
    "Max": sympy.Max,
    "Min": sympy.Min,
}


def from_size(size: Any) -> sympy.Expr:
    """An int, `SymInt` or shape expression, with torch's integer functions replaced by the ones used here."""
    expr = to_expr(size)
    if expr.is_Atom:
        return expr
    arguments = [from_size(argument) for argument in expr.args]
    ours = _SIZE_FUNCTIONS.get(type(expr).__name__)
    return expand(ours(*arguments) if ours is not None else expr.func(*arguments))


_serial = itertools.count()
_function_of: weakref.WeakKeyDictionary[Value, Any] = weakref.WeakKeyDictionary()
_value_of: weakref.WeakValueDictionary[str, Value] = weakref.WeakValueDictionary()


def load(value: Value, index: tuple[sympy.Expr, ...]) -> sympy.Expr:
    """The element of an integer tensor at `index`, as an integer atom."""
    function = _function_of.get(value)
    if function is None:
        # The name is unique in the process: sympy caches applied functions by name.
        function = sympy.Function(f"L{next(_serial)}", integer=True)
        _function_of[value] = function
        _value_of[function.__name__] = value
    return function(*index)


def loaded_value(atom: AppliedUndef) -> Value:
    """The tensor that a load atom reads."""
    return _value_of[atom.func.__name__]


def loads_in(expr: sympy.Expr) -> set[AppliedUndef]:
    """Every load in the expression, also those inside an index of another."""
    return expr.atoms(AppliedUndef)


INTEGER_RANGES = {
    dtype: (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32)
}
"""Ranges that arithmetic may leave. int64 is taken as unbounded: eager itself is meaningless once it overflows."""

EXACT_INTEGERS = {torch.float64: 2**53, torch.float32: 2**24, torch.float16: 2**11, torch.bfloat16: 2**8}
"""Every integer up to this magnitude has an exact representation in the float type."""
