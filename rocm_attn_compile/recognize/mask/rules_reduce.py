"""Reductions and running sums whose summand is simple."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import sympy
import torch

from .integers import expand
from .values import Opaque, Scalar, symbols_of

if TYPE_CHECKING:
    from ...capture.trace import Value
    from .evaluate import Call, Evaluator

Index = tuple[sympy.Expr, ...]

_serial = itertools.count()


def fresh_symbol(ev: Evaluator, size: sympy.Expr) -> sympy.Symbol:
    """A new index symbol for a dimension of `size`."""
    symbol = sympy.Symbol(f"_j{next(_serial)}", integer=True, nonnegative=True)
    ev.bounds.add(symbol, size)
    return symbol


def cumsum(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """Sum of the elements up to and with this one; a summand that is the same everywhere is multiplied."""
    source = call["self"]
    if not source.ndim or value.dtype.is_floating_point:
        raise Opaque("running sum of floats")
    dim = call["dim"] % source.ndim
    symbol = fresh_symbol(ev, ev.size(source, dim))
    summand = ev.at(source, (*index[:dim], symbol, *index[dim + 1 :]))
    if symbol not in symbols_of(summand):
        count = index[dim] + 1
        number = ev.values.number(summand)
        return ev.values.lift(lambda x: ev.values.fitting(expand(x * count), value.dtype), number)
    ev.running_sums[value] = (source, dim)
    raise Opaque("running sum of elements that differ")


def quantifier(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """`any` and `all` of elements that do not differ along the reduced dimensions."""
    source = call["self"]
    dims = call.get("dim")
    dims = range(source.ndim) if dims is None else dims if isinstance(dims, (list, tuple)) else [dims]
    reduced = {dim % source.ndim for dim in dims} if source.ndim else set()
    if any(not ev.bounds.positive(ev.size(source, dim)) for dim in reduced):
        raise Opaque(f"{value.name} over a dimension that may be empty")
    keepdim = call.get("keepdim", False)
    rest = iter(i for d, i in enumerate(index) if not (keepdim and d in reduced))
    symbols, point = set(), []
    for dim in range(source.ndim):
        if dim in reduced:
            symbol = fresh_symbol(ev, ev.size(source, dim))
            symbols.add(symbol)
            point.append(symbol)
        else:
            point.append(next(rest))
    element = ev.values.cast(ev.at(source, point), torch.bool)
    if symbols & symbols_of(element):
        raise Opaque(f"{value.name} of elements that differ")
    return ev.values.cast(element, value.dtype)


RULES = {"cumsum": cumsum, "any": quantifier, "all": quantifier}
