"""A bias as a sum of tensors, each times an expression of the positions; see `alibi`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from ..symbolic import is_one
from . import mask as prover
from .labels import number_of
from .mask.evaluate import Evaluator
from .mask.integers import ZERO, expand
from .mask.values import FloatLoad, If, Opaque

_DEPTH_LIMIT = 12


@dataclass(frozen=True)
class Term:
    """`factor * load * expr`."""

    factor: float
    load: FloatLoad | None
    expr: sympy.Expr


class Addends:
    """Takes an element apart into a sum, where the mask keeps the pair.

    Attributes:
        is_half: Something in it was computed in float16.
        is_rounded: Something in it was computed in float16 or bfloat16.
    """

    def __init__(self, evaluator: Evaluator, keep: Any, context: prover.MaskContext) -> None:
        self._evaluator, self._keep = evaluator, keep
        self._positions = {context.q, context.k}
        self.is_half = self.is_rounded = False

    def of(self, scalar: Any, depth: int = 0) -> Iterator[Term]:
        """The addends; raises Opaque, or ValueError, where there are none of this form."""
        scalar = self._given(scalar)
        if isinstance(scalar, (bool, If)) or depth > _DEPTH_LIMIT:
            raise Opaque("a choice")
        if isinstance(scalar, sympy.Expr):
            yield Term(1.0, None, scalar)
        elif isinstance(scalar, float):
            if not math.isfinite(scalar):
                raise Opaque("a fill")
            yield Term(scalar, None, sympy.Integer(1))
        elif isinstance(scalar, FloatLoad):
            yield from self._of_load(scalar, depth + 1)
        else:
            raise Opaque("a condition")

    def _given(self, scalar: Any) -> Any:
        """The element where the mask keeps the pair: there |k - q| of a causal mask is q - k."""
        evaluator = self._evaluator
        scalar = evaluator.values.given(scalar, self._keep)
        if isinstance(scalar, sympy.Expr):
            for larger in scalar.atoms(sympy.Max):
                for one in larger.args:
                    is_largest = (evaluator.logic.le(expand(x - one)) for x in larger.args)
                    if all(evaluator.logic.implies([self._keep], fact) for fact in is_largest):
                        scalar = expand(scalar.xreplace({larger: one}))
                        break
        return scalar

    def _of_load(self, load: FloatLoad, depth: int) -> Iterator[Term]:
        """A tensor that is computed from others, element by element."""
        value = load.value

        def operand(x: Any) -> list[Term]:
            number = number_of(x)
            if isinstance(number, (int, float)):
                return [Term(float(number), None, sympy.Integer(1))]
            scalar = self._evaluator.operand(x, load.index)
            if isinstance(scalar, If) and x.dtype.is_floating_point:
                # A choice between heads, such as where their number is no power of 2: slopes, as a tensor.
                index = load.index[len(load.index) - x.ndim :]
                whole = FloatLoad(x, tuple(ZERO if is_one(size) else i for i, size in zip(index, x.shape)))
                if not self._positions & symbols_of(whole, ZERO):
                    return [Term(1.0, whole, sympy.Integer(1))]
            return list(self.of(scalar, depth))

        if isinstance(value.op, str) or not self._positions & symbols_of(load, ZERO):
            yield Term(1.0, load, sympy.Integer(1))
            return
        self.is_half |= value.dtype == torch.float16
        self.is_rounded |= value.dtype in (torch.float16, torch.bfloat16)
        if value.name == "mul":
            left, right = (operand(x) for x in value.args[:2])
            for a in left:
                for b in right:
                    if a.load is not None and b.load is not None:
                        raise Opaque("a product of tensors")
                    yield Term(a.factor * b.factor, a.load or b.load, expand(a.expr * b.expr))
        elif value.name in ("add", "sub") and isinstance(value.kwargs.get("alpha", 1), (int, float)):
            sign = (1.0 if value.name == "add" else -1.0) * value.kwargs.get("alpha", 1)
            yield from operand(value.args[0])
            yield from (Term(t.factor * sign, t.load, t.expr) for t in operand(value.args[1]))
        elif value.name == "div" and number_of(value.args[1]) not in (None, 0) and len(value.args) == 2:
            number = float(number_of(value.args[1]))
            yield from (Term(t.factor / number, t.load, t.expr) for t in operand(value.args[0]))
        elif value.name == "neg":
            yield from (Term(-t.factor, t.load, t.expr) for t in operand(value.args[0]))
        elif value.name == "_to_copy":
            yield from operand(value.args[0])  # rounding is not meaning
        elif value.name == "abs":
            (term,) = operand(value.args[0])  # a ValueError is no line either
            if term.load is not None:
                raise Opaque("a tensor without its sign")
            larger = self._given(sympy.Max(term.expr, expand(-term.expr)))
            yield Term(abs(term.factor), None, larger)
        else:
            yield Term(1.0, load, sympy.Integer(1))


def symbols_of(load: FloatLoad | None, expr: sympy.Expr) -> set[sympy.Symbol]:
    """What an addend depends on."""
    return {*expr.free_symbols, *(s for i in (load.index if load is not None else ()) for s in i.free_symbols)}


def total(terms: Iterator[Term]) -> dict[FloatLoad | None, sympy.Expr]:
    """What each tensor is multiplied with, added up exactly; those that add up to 0 are left out."""
    sums: dict[FloatLoad | None, sympy.Expr] = {}
    for term in terms:
        if not math.isfinite(term.factor):
            raise Opaque("an infinite factor")
        sums[term.load] = sums.get(term.load, ZERO) + sympy.Rational(term.factor) * term.expr
    sums = {load: expand(expr) for load, expr in sums.items()}
    return {load: expr for load, expr in sums.items() if expr != 0}
