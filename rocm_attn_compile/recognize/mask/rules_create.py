"""Ops that make tensors out of numbers, and the triangles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
import torch

from .integers import ONE, ZERO, from_size
from .values import Opaque, Scalar

if TYPE_CHECKING:
    from ...capture.trace import Value
    from .evaluate import Call, Evaluator

Index = tuple[sympy.Expr, ...]


def arange(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """`start + step * i`, as long as the dtype holds it exactly."""
    start = ev.scalar(call.get("start", 0))
    step = ev.scalar(call.get("step", 1))
    if not isinstance(start, sympy.Expr) or not isinstance(step, sympy.Expr):
        raise Opaque(f"arange from {start} by {step}")
    return ev.values.fitting(start + step * index[0], value.dtype)


def filled(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """`full` and its relatives, `scalar_tensor`: one number everywhere."""
    number = call["s"] if "s" in call else call["fill_value"]
    return ev.values.cast(ev.scalar(number), value.dtype)


def ones(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """1, or True."""
    return True if value.dtype == torch.bool else ONE


def zeros(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """0, or False."""
    return False if value.dtype == torch.bool else ZERO


def eye(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """1 on the diagonal."""
    return ev.values.cast(ev.logic.eq(index[0] - index[1]), value.dtype)


def tril(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """Keeps column - row <= diagonal."""
    row, column = index[-2:]
    keep = ev.logic.le(column - row - from_size(call["diagonal"]))
    return ev.values.choose(keep, ev.at(call["self"], index), zeros(ev, value, call, index))


def triu(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """Keeps column - row >= diagonal."""
    row, column = index[-2:]
    keep = ev.logic.le(row - column + from_size(call["diagonal"]))
    return ev.values.choose(keep, ev.at(call["self"], index), zeros(ev, value, call, index))


RULES = {
    "arange": arange,
    **dict.fromkeys(("full", "full_like", "new_full", "scalar_tensor"), filled),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), ones),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "zero"), zeros),
    "eye": eye,
    "tril": tril,
    "triu": triu,
}
