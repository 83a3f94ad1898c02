"""Ops that write part of a tensor, in their functional form: the written region has the new elements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch

from ..._torch_private import schema_arguments
from .integers import FloorDiv, expand, from_size, modulo
from .predicate import Predicate
from .rules_reduce import fresh_symbol
from .rules_view import element, reindex, slice_end, slice_start
from .values import Opaque, Scalar

if TYPE_CHECKING:
    from ...capture.trace import Value
    from .evaluate import Call, Evaluator

Index = tuple[sympy.Expr, ...]


def overwritten(ev: Evaluator, value: Value, source: Any, index: Index) -> Scalar:
    """An element of `source`, a Value or a number, broadcast and converted to the dtype of `value`."""
    x = ev.operand(source, index)
    if getattr(source, "dtype", None) == value.dtype:
        return x
    return ev.values.cast(x, value.dtype)


def copy(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """`copy_`: every element."""
    return overwritten(ev, value, call["src"], index)


def fill(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """`fill_` with a number or a 0-d tensor."""
    return overwritten(ev, value, call["value"], index)


class Region:
    """The part of a base tensor that a chain of views selects, at one index of the base.

    Attributes:
        conditions: Hold where the index is inside the part.
        point: The index into the view, meaningful where they hold.
        sizes: Shape of the view.
    """

    def __init__(self, ev: Evaluator, base: Value, index: Index) -> None:
        self.ev = ev
        self.conditions: list[Predicate] = []
        self.point = list(index)
        self.sizes = [from_size(size) for size in base.shape]

    def slice(self, dim: int, start: Any, end: Any, step: Any) -> None:
        """`[start:end:step]` of a dimension."""
        logic, size, stride = self.ev.logic, self.sizes[dim], from_size(step)
        first = slice_start(self.ev, start, size)
        last = slice_end(self.ev, end, size)
        i = self.point[dim]
        self.conditions += [logic.le(first - i), logic.le(i - last + 1)]
        if stride != 1:
            self.conditions.append(logic.eq(modulo(i - first, stride)))
        self.point[dim] = FloorDiv(expand(i - first), stride)
        length = sympy.Min(last, size) - first
        self.sizes[dim] = expand(FloorDiv(length + stride - 1, stride))

    def select(self, dim: int, position: Any) -> None:
        """One index of a dimension, which disappears."""
        position = element(self.ev, position, self.sizes[dim])
        self.conditions.append(self.ev.logic.eq(self.point.pop(dim) - position))
        self.sizes.pop(dim)

    def view(self, op: Any, args: tuple, kwargs: dict, output_index: int | None) -> None:
        """One view call of a chain.

        Raises:
            Opaque: The view is of a kind that is not followed.
        """
        name, rank = op.overloadpacket.__name__, len(self.sizes)
        bound = _bind(op, args, kwargs)
        if name == "slice":
            self.slice(bound["dim"] % rank, bound["start"], bound["end"], bound["step"])
        elif name == "select":
            self.select(bound["dim"] % rank, bound["index"])
        elif name in ("alias", "detach"):
            pass
        elif name in ("transpose", "t", "mT"):
            first, second = (bound["dim0"], bound["dim1"]) if "dim0" in bound else (-2, -1)
            for x in (self.point, self.sizes):
                x[first], x[second] = x[second], x[first]
        elif name == "permute":
            self.point = [self.point[dim] for dim in bound["dims"]]
            self.sizes = [self.sizes[dim] for dim in bound["dims"]]
        elif name == "unsqueeze":
            dim = bound["dim"] % (rank + 1)
            self.point.insert(dim, sympy.Integer(0))
            self.sizes.insert(dim, sympy.Integer(1))
        elif name in ("view", "_unsafe_view"):
            sizes = [from_size(size) for size in bound["size"]]
            if any(size == -1 for size in sizes):
                raise Opaque("write through a view of inferred size")
            self.point, self.sizes = reindex(self.ev, tuple(self.point), self.sizes, sizes), sizes
        else:
            raise Opaque(f"write through {name}")


def _bind(op: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments of a view call without its tensor, by name."""
    names = schema_arguments(op)[1:]
    return {**dict(names), **dict(zip((name for name, _ in names), args)), **kwargs}


def _write(ev: Evaluator, value: Value, base: Value, source: Any, region: Region, index: Index) -> Scalar:
    condition = ev.logic.all_of(region.conditions)
    if condition is False:
        return ev.at(base, index)
    inside = overwritten(ev, value, source, tuple(region.point))
    return inside if condition is True else ev.values.choose(condition, inside, ev.at(base, index))


def view_scatter(ev: Evaluator, value: Value, call: Any, index: Index) -> Scalar:
    """`base` after `source` was written through a chain of views."""
    base, source, chain = value.args
    region = Region(ev, base, index)
    for op, args, kwargs, output_index in chain:
        region.view(op, args, kwargs, output_index)
    return _write(ev, value, base, source, region, index)


def slice_scatter(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """`base[start:end:step] = src` in one dimension."""
    region = Region(ev, call["self"], index)
    region.slice(call["dim"] % value.ndim, call["start"], call["end"], call["step"])
    return _write(ev, value, call["self"], call["src"], region, index)


def select_scatter(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """`base[i] = src` in one dimension."""
    region = Region(ev, call["self"], index)
    region.select(call["dim"] % value.ndim, call["index"])
    return _write(ev, value, call["self"], call["src"], region, index)


def index_put(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """`base[indices] = values`: by one bool mask with one value, or by consecutive positions in each dimension."""
    base, indices, source = call["self"], list(call["indices"]), call["values"]
    if call["accumulate"]:
        raise Opaque("index_put that accumulates")
    if len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool:
        if any(from_size(size) != 1 for size in source.shape):
            raise Opaque("index_put of several values by a mask")
        mask = ev.at(indices[0], index[: indices[0].ndim])
        written = overwritten(ev, value, source, tuple(sympy.Integer(0) for _ in source.shape))
        return ev.values.choose(mask, written, ev.at(base, index))
    given = [dim for dim, x in enumerate(indices) if x is not None]
    if given != list(range(given[0], given[-1] + 1)):
        raise Opaque("index_put with slices between the indices")
    conditions, joint = _inverse_positions(ev, base, {dim: indices[dim] for dim in given}, index)
    condition = ev.logic.all_of(conditions)
    if condition is False:
        return ev.at(base, index)
    point = (*index[: given[0]], *joint, *index[given[-1] + 1 :])
    return ev.values.choose(condition, overwritten(ev, value, source, point), ev.at(base, index))


def _inverse_positions(
    ev: Evaluator, base: Value, indices: dict[int, Value], index: Index
) -> tuple[list[Predicate], list[sympy.Expr]]:
    """When `base[index]` is written by `base[indices] = ...`, and at which joint index of the index tensors."""
    width = max(x.ndim for x in indices.values())
    sizes = [sympy.Integer(1)] * width
    for x in indices.values():
        for dim in range(x.ndim):
            if ev.size(x, dim) != 1:
                sizes[width - x.ndim + dim] = ev.size(x, dim)
    symbols = [fresh_symbol(ev, size) for size in sizes]
    conditions: list[Predicate] = []
    joint: dict[sympy.Symbol, sympy.Expr] = {}
    for dim, x in indices.items():
        if x.dtype in (torch.bool, torch.uint8):
            raise Opaque("index_put by masks and positions")
        position = ev.operand(x, tuple(symbols))
        if not isinstance(position, sympy.Expr):
            raise Opaque("index_put at positions without a closed form")
        if ev.bounds.positive(-position):
            position = expand(position + ev.size(base, dim))
        elif not ev.bounds.never_negative(position):
            raise Opaque("index_put at positions of unknown sign")
        moving = [symbol for symbol in symbols if position.has(symbol)]
        if not moving:
            conditions.append(ev.logic.eq(index[dim] - position))
            continue
        offset = expand(position - moving[0])
        if len(moving) > 1 or offset.has(moving[0]) or moving[0] in joint:
            raise Opaque("index_put at positions that are not consecutive")
        inverse = expand(index[dim] - offset)
        size = sizes[symbols.index(moving[0])]
        joint[moving[0]] = inverse
        conditions += [ev.logic.le(-inverse), ev.logic.le(inverse - size + 1)]
    if any(symbol not in joint and size != 1 for symbol, size in zip(symbols, sizes)):
        raise Opaque("index_put that writes a position several times")
    return conditions, [joint.get(symbol, sympy.Integer(0)) for symbol in symbols]


RULES = {
    "copy": copy,
    "fill": fill,
    "view_scatter": view_scatter,
    "slice_scatter": slice_scatter,
    "select_scatter": select_scatter,
    "index_put": index_put,
}
