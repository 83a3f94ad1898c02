"""Whether a bias can be so low somewhere that it acts as a mask.

A float mask that comes into the graph as a tensor may hold -inf or finfo.min, and so may what is computed from one.
What is computed from parameters, positions and small numbers holds nothing of the kind. That parameters are moderate is
an assumption: nobody trains a bias of -1e9.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.utils import _pytree as pytree

from ..capture.trace import Value
from .labels import number_of
from .live import LiveUsers

_LARGEST = 1e4
"""Numbers beyond it are taken for fills."""

_LARGEST_BIAS = 4e8
"""What is computed from such numbers may be a fill beyond it: -1e9 is the smallest that counts as one."""

_LARGEST_PARAMETER, _LARGEST_POSITION = 1e2, 1e4
"""Assumed of what nothing is known of: no training makes a fill of a parameter, and positions have other bounds."""

_BOUNDED = frozenset(["tanh", "sigmoid", "_softmax", "sin", "cos", "erf"])
"""Ops whose result is small whatever they read."""

_UNBOUNDED = frozenset(
    ["log", "log2", "log10", "log1p", "logit", "xlogy", "reciprocal", "tan", "rsqrt", "exp", "exp2", "expm1", "atanh"]
    + ["prod", "cumprod", "sinh", "cosh", "ldexp", "bitwise_left_shift", "__lshift__", "float_power"]
)
"""Ops that may give a huge number for a moderate one: the log of a mask is -inf where it drops."""

_PRODUCTS = frozenset(["mul", "mm", "bmm", "matmul", "dot", "mv", "convolution"])
_SUMS = frozenset(["add", "sub", "rsub", "addmm", "baddbmm"])
_PICKS = frozenset(["gather", "index", "index_select", "take", "take_along_dim"])
"""Ops whose result is of the first operand's numbers, wherever the positions come from."""
_CHOICES = frozenset(["where", "masked_fill", "maximum", "minimum", "clamp", "clamp_min", "clamp_max", "full_like"])


def is_moderate(value: Value, live: LiveUsers) -> bool:
    """True if no element of `value` can be as low as a mask's fill."""
    return _bound(value, live, {}) <= _LARGEST_BIAS


def _bound(value: object, live: LiveUsers, known: dict[int, float]) -> float:
    """No element is further from 0; infinity where that is unknown."""
    if not isinstance(value, Value):
        number = abs(value) if isinstance(value, (bool, int, float)) else math.inf
        return number if number <= _LARGEST else math.inf
    if value.dtype == torch.bool:
        return 1.0
    if value.id not in known:
        known[value.id] = _compute_bound(value, live, known)
    return known[value.id]


def _power(base: float, exponent: float) -> float:
    """`base ** exponent`, infinity beyond what a number holds."""
    try:
        return base**exponent
    except OverflowError:
        return math.inf


def _compute_bound(value: Value, live: LiveUsers, known: dict[int, float]) -> float:
    number = number_of(value)
    if isinstance(number, (int, float)):
        return _bound(number, live, known)
    if isinstance(value.op, str):
        if not value.dtype.is_floating_point:
            return _LARGEST_POSITION  # positions, lengths, conditions
        is_learned = {"input": live.is_parameter, "opaque": live.reads_parameter}.get(value.op, lambda _: False)
        return _LARGEST_PARAMETER if is_learned(value) else math.inf
    if value.name in _BOUNDED:
        return 1.0
    if value.name in _UNBOUNDED:
        return math.inf
    if value.name == "arange":
        return _LARGEST_POSITION
    if value.name in _PICKS:
        return _bound(value.args[0], live, known)
    leaves = pytree.tree_leaves((list(value.args), value.kwargs))
    if not all(_is_small(leaf) for leaf in leaves if isinstance(leaf, (float, torch.SymFloat))):
        return math.inf
    bounds = [_bound(leaf, live, known) for leaf in leaves if isinstance(leaf, Value)]
    if value.name == "div":
        divisor = _number(value.args[1])
        return math.inf if not divisor else _bound(value.args[0], live, known) / abs(divisor)
    if value.name == "pow":  # ALiBi's slopes are powers of a number
        if number_of(value.args[0]) not in (None, 0):
            return _LARGEST_PARAMETER if _is_free_of_inputs(value) else math.inf
        exponent = number_of(value.args[1])
        is_whole = isinstance(exponent, (int, float)) and exponent >= 1
        return _power(bounds[0], exponent) if is_whole else math.inf
    if value.name == "square":
        return bounds[0] * bounds[0]
    factors = [1.0, *(_bound(leaf, live, known) for leaf in value.args if isinstance(leaf, (int, float)))]
    if value.name in _PRODUCTS:
        return math.prod(bounds) * math.prod(factors if value.name == "mul" else [])
    if value.name in _SUMS:
        alpha = value.kwargs.get("alpha", 1)
        if not isinstance(alpha, (int, float)) or value.name in ("addmm", "baddbmm"):
            return bounds[0] + math.prod(bounds[1:]) if alpha == 1 else math.inf
        return (sum(bounds) + sum(factors)) * max(1.0, abs(alpha))
    if value.name in _CHOICES or (value.name == "full" and len(value.args) > 1):
        chosen = [leaf for leaf in value.args[1 if value.name == "full" else 0 :] if isinstance(leaf, (int, float))]
        bounds += [_bound(leaf, live, known) for leaf in chosen]
    return max([1.0, *bounds])


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


def multiplies_by_infinity(value: Value) -> bool:
    """True if `value` is computed with a product of which a factor is an infinite number."""
    factors = [number_of(factor) for inner in _producers(value) if inner.name == "mul" for factor in inner.args]
    return any(isinstance(factor, float) and math.isinf(factor) for factor in factors)


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
    return not any(inner.op in ("input", "opaque") for inner in _producers(value))


def _producers(value: Value) -> Iterator[Value]:
    """The value and all that it is computed from."""
    todo, seen = [value], {value.id}
    while todo:
        value = todo.pop()
        yield value
        for leaf in pytree.tree_leaves((list(value.args), value.kwargs)):
            if isinstance(leaf, Value) and leaf.id not in seen:
                seen.add(leaf.id)
                todo.append(leaf)
