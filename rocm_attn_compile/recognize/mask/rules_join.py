"""Ops that put elements together or move them within a dimension: cat, pad, repeat, roll."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy

from .integers import ZERO, expand, from_size, modulo
from .rules_view import floor_divide, with_index
from .values import Opaque, Scalar

if TYPE_CHECKING:
    from ...capture.trace import Value
    from .evaluate import Call, Evaluator

Index = tuple[sympy.Expr, ...]


def cat(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """The part whose range holds the index."""
    dim = call["dim"] % value.ndim
    parts = [part for part in call["tensors"] if part.ndim == value.ndim]  # legacy: empty 1-D tensors are skipped
    ends, start = [], ZERO
    for part in parts:
        start = expand(start + ev.size(part, dim))
        ends.append(start)
    starts = [ZERO, *ends[:-1]]
    result: Scalar | None = None
    for part, first, end in reversed(list(zip(parts, starts, ends))):
        inside = ev.logic.le(index[dim] - end + 1)
        if inside is False or ev.size(part, dim) == 0:
            continue  # never reached: evaluating there would leave the part's range
        x = ev.at(part, with_index(index, dim, index[dim] - first))
        x = x if part.dtype == value.dtype else ev.values.cast(x, value.dtype)
        result = x if result is None else ev.values.choose(inside, x, result)
    assert result is not None, f"{value!r} has no element"
    return result


def stack(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """Part i at index i of a new dimension."""
    dim = call["dim"] % value.ndim
    rest = index[:dim] + index[dim + 1 :]
    result: Scalar | None = None
    for position, part in reversed(list(enumerate(call["tensors"]))):
        x = ev.at(part, rest)
        x = x if part.dtype == value.dtype else ev.values.cast(x, value.dtype)
        result = x if result is None else ev.values.choose(ev.logic.eq(index[dim] - position), x, result)
    assert result is not None, f"{value!r} has no element"
    return result


def pad(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """The source inside its range, a constant outside; negative widths crop."""
    source, widths = call["self"], call["pad"]
    inside, point = [], list(index)
    for pair in range(len(widths) // 2):
        dim = value.ndim - 1 - pair
        point[dim] = expand(index[dim] - from_size(widths[2 * pair]))
        inside += [ev.logic.le(-point[dim]), ev.logic.le(point[dim] - ev.size(source, dim) + 1)]
    filler = ev.values.cast(ev.scalar(call["value"]), value.dtype)
    condition = ev.logic.all_of(inside)
    return filler if condition is False else ev.values.choose(condition, ev.at(source, point), filler)


def repeat(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """Copies side by side: the index modulo the size."""
    source = call["self"]
    point = []
    for dim, i in enumerate(index[len(index) - source.ndim :]):
        size = ev.size(source, dim)
        point.append(expand(i - size * floor_divide(ev, i, size)))
    return ev.at(source, point)


def flip(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """Counted from the end in the given dimensions."""
    dims = {dim % value.ndim for dim in call["dims"]}
    return ev.at(call["self"], [ev.size(value, d) - 1 - i if d in dims else i for d, i in enumerate(index)])


def roll(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """Shifted cyclically; without dims the whole tensor is one row, which is left alone."""
    if not call["dims"]:
        raise Opaque("roll without dims")
    point = list(index)
    for shift, dim in zip(call["shifts"], call["dims"]):
        point[dim] = modulo(expand(point[dim] - from_size(shift)), ev.size(value, dim))
    return ev.at(call["self"], point)


def unfold(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """Sliding windows: window number and place in the window, which is the last dimension."""
    source = call["self"]
    dim = call["dimension"] % source.ndim
    point = list(index[:-1])
    point[dim] = point[dim] * from_size(call["step"]) + index[-1]
    return ev.at(source, point)


RULES = {
    "cat": cat,
    "stack": stack,
    "constant_pad_nd": pad,
    "repeat": repeat,
    "flip": flip,
    "roll": roll,
    "unfold": unfold,
}
