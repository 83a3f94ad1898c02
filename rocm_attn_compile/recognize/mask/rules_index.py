"""Ops that read elements at computed positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
import torch

from .integers import expand, modulo
from .values import Opaque, Scalar

if TYPE_CHECKING:
    from ...capture.trace import Value
    from .evaluate import Call, Evaluator

Index = tuple[sympy.Expr, ...]


def read_at(ev: Evaluator, source: Value, point: list[Scalar], wraps: bool = False) -> Scalar:
    """The element at a computed index.

    Args:
        ev: The evaluator.
        source: What is read.
        point: One position per dimension; eager raises where one is out of range, so it is not.
        wraps: Negative positions count from the end, as in `x[i]`; other ops reject them.
    """

    def leaf(*positions: Scalar) -> Scalar:
        checked = []
        for dim, position in enumerate(positions):
            if not isinstance(position, sympy.Expr):
                raise Opaque("index that is no integer expression")
            size = ev.size(source, dim)
            if ev.bounds.positive(-position):
                position = expand(position + size)
            elif wraps and not ev.bounds.never_negative(position):
                position = modulo(position, size)  # of unknown sign, as a position read from a tensor is
            checked.append(position)
        return ev.at(source, checked)

    return ev.values.lift(leaf, *point)


def index(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """Advanced indexing: index tensors broadcast together, their dimensions replace the indexed ones."""
    source, indices = call["self"], list(call["indices"])
    indices += [None] * (source.ndim - len(indices))
    given = [dim for dim, x in enumerate(indices) if x is not None]
    if any(indices[dim].dtype in (torch.bool, torch.uint8) for dim in given):
        raise Opaque("indexing by a bool mask")
    width = max(indices[dim].ndim for dim in given)
    adjacent = given == list(range(given[0], given[-1] + 1))
    front = given[0] if adjacent else 0  # torch puts the joint dimensions first when slices are in between
    joint, rest = index[front : front + width], iter(index[:front] + index[front + width :])
    return read_at(ev, source, [next(rest) if x is None else ev.operand(x, joint) for x in indices], wraps=True)


def gather(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """One coordinate comes from the index tensor."""
    point: list[Scalar] = list(index)
    if point:
        point[call["dim"]] = ev.at(call["index"], index)
    return read_at(ev, call["self"], point)


def index_select(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """Rows of a dimension, by a vector of positions."""
    dim = call["dim"] % value.ndim
    positions = call["index"]
    row = ev.at(positions, (index[dim],) if positions.ndim else ())
    return read_at(ev, call["self"], [*index[:dim], row, *index[dim + 1 :]])


RULES = {"index": index, "_unsafe_index": index, "gather": gather, "index_select": index_select}
