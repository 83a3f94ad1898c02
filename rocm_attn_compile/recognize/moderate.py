"""Whether a bias can be so low somewhere that it acts as a mask.

A float mask that comes into the graph as a tensor may hold -inf or finfo.min, and so may what is computed from one.
What is computed from parameters, positions and small numbers holds nothing of the kind. That parameters are moderate is
an assumption: nobody trains a bias of -1e9.
"""

from __future__ import annotations

import math

import torch
from torch.utils import _pytree as pytree

from ..capture.trace import Value
from .labels import number_of
from .live import LiveUsers

_LARGEST = 1e4
"""Numbers beyond it are taken for fills."""

_BOUNDED = frozenset(["tanh", "sigmoid", "_softmax", "sin", "cos", "erf"])
"""Ops whose result is small whatever they read."""

_UNBOUNDED = frozenset(
    ["log", "log2", "log10", "log1p", "logit", "xlogy", "reciprocal", "tan", "rsqrt", "exp", "exp2", "expm1", "atanh"]
)
"""Ops that may give a huge number for a moderate one: the log of a mask is -inf where it drops."""


def is_moderate(value: Value, live: LiveUsers) -> bool:
    """True if no element of the float tensor `value` can be as low as a mask's fill."""
    return _is_moderate(value, live, {})


def _is_moderate(value: Value, live: LiveUsers, known: dict[int, bool]) -> bool:
    if not value.dtype.is_floating_point:
        return True  # positions, lengths, conditions: what they select is looked at where it is selected
    if value.id not in known:
        known[value.id] = _judge(value, live, known)
    return known[value.id]


def _judge(value: Value, live: LiveUsers, known: dict[int, bool]) -> bool:
    if value.name in _BOUNDED and not isinstance(value.op, str):
        return True
    if value.op == "input":
        return live.is_parameter(value)
    if value.op == "constant":
        number = value.kwargs.get("value")
        return number is not None and _is_small(number)
    if value.op == "opaque":  # a lookup in a table, or a layer
        return live.reads_parameter(value)
    leaves = pytree.tree_leaves((list(value.args), value.kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Value)]
    if not all(_is_small(leaf) for leaf in leaves if isinstance(leaf, (float, torch.SymFloat))):
        return False
    if value.name in _UNBOUNDED:
        return False
    if value.name == "div":
        divisor = _number(value.args[1])
        return divisor is not None and abs(divisor) * _LARGEST >= 1 and _is_moderate(value.args[0], live, known)
    if value.name == "pow":  # ALiBi's slopes are powers of a number
        return number_of(value.args[0]) not in (None, 0) and _is_free_of_inputs(value)
    return all(_is_moderate(t, live, known) for t in tensors)


def is_never_low(value: Value, live: LiveUsers) -> bool:
    """True if no element of `value` can be as low as a mask's fill, though some may be as high."""
    if is_moderate(value, live):
        return True
    if isinstance(value.op, str):
        return False
    if value.name == "mul":
        for inner, number in (value.args[:2], value.args[1::-1]):
            factor = number_of(number)
            if isinstance(inner, Value) and isinstance(factor, (int, float)) and factor >= 0:
                return is_never_low(inner, live)
    if value.name in ("masked_fill", "where") and len(value.args) == 3:
        chosen = value.args[::2] if value.name == "masked_fill" else value.args[1:]
        return all(_is_number_not_low(one) if number_of(one) is not None else is_never_low(one, live) for one in chosen)
    return False


def _is_number_not_low(value: object) -> bool:
    number = number_of(value)
    return isinstance(number, (int, float)) and number >= -_LARGEST


def _is_small(number: float | torch.SymFloat) -> bool:
    number = float(number)  # one that Dynamo has made dynamic is specialised
    return math.isfinite(number) and abs(number) <= _LARGEST


def _number(value: object) -> float | None:
    """The number that a divisor is, also one that is computed from numbers: DeBERTa's square root of a head size."""
    number = number_of(value)
    if isinstance(number, (int, float)):
        return number
    if not isinstance(value, Value) or isinstance(value.op, str) or value.name not in ("sqrt", "mul"):
        return None
    factors = [factor for factor in map(_number, value.args) if factor is not None and factor >= 0]
    if len(factors) < len(value.args):
        return None
    return math.sqrt(factors[0]) if value.name == "sqrt" else math.prod(factors)


def _is_free_of_inputs(value: Value) -> bool:
    """True if the value is computed from numbers and sizes alone."""
    todo, seen = [value], set()
    while todo:
        value = todo.pop()
        if value.op in ("input", "opaque"):
            return False
        for leaf in pytree.tree_leaves((list(value.args), value.kwargs)):
            if isinstance(leaf, Value) and leaf.id not in seen:
                seen.add(leaf.id)
                todo.append(leaf)
    return True
