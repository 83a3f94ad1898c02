"""From keys or values down to the cache that they were read from: views, one gather of blocks, float8 and its scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..capture.trace import Value
from ..ops.kv_cache import FP8
from ..reasons import Refusal
from ..symbolic import same_size
from .axes import Atom, Dim, atoms_of, resolve, unify
from .descent import below, label
from .labels import Labels, cuts_gradient, is_cast, scaled, source_of
from .region import Cut

_TABLES = (torch.int32, torch.int64)  # bool and bytes are masks


class Walk:
    """The way from `path[0]` down to the cache, `path[-1]`.

    Attributes:
        path: The values on the way.
        table: The block table, behind views and casts, if something was gathered.
        number: The product of the known numbers on the way.
        After `label`, whose axes are the caller's:
        root_dims, table_dims: Axes of the cache and of the table.
        blocks: The axis of the cache along which was gathered.
        scales: `(tensor, axes, divides)` of each tensor on the way that multiplies.
        cuts: Ranges taken on the way.
    """

    def __init__(self, path: list[Value], table: Value | None, number: Any) -> None:
        self.path, self.table, self.number = path, table, number
        self.root = path[-1]
        self.root_dims: list[Dim] = []
        self.table_dims: list[Dim] = []
        self.blocks: tuple[Atom, ...] = ()
        self.scales: list[tuple[Value, list[Dim], bool]] = []
        self.cuts: list[Cut] = []

    def label(self, value: Value, dims: list[Dim]) -> None:
        """Label everything on the way so that `value`, where it starts, has the axes `dims`; raises Refusal."""
        labels, scales = Labels(), []
        for source, above in zip(reversed(self.path), reversed(self.path[:-1])):
            if (gather := _gather(above)) is not None:
                self._label_gather(labels, source, above, *gather)
            elif (factor := _tensor_factor(above)) is not None:
                labels.set(above, labels.of(source))
                labels.align(factor[1], labels.of(above))
                scales.append((factor[1], factor[2]))
            elif is_cast(above) or scaled(above) is not None:
                labels.of(source)
                labels.of(above)
            else:
                self.cuts += label(labels, [above, source])
        for given, own in zip(dims, labels.of(value)):
            unify(given, own)
        labels.check_distinct()
        self.root_dims = labels.of(self.root)
        if self.table is not None:
            self.table_dims = labels.of(self.table)
        self.scales = [(source_of(scale), labels.of(source_of(scale)), divides) for scale, divides in scales]

    def _label_gather(self, labels: Labels, cache: Value, value: Value, dim: int, index: Value) -> None:
        below_casts, way = index, []
        while (lower := _int_source(below_casts)) is not None:
            way.append((below_casts, lower))
            below_casts = lower
        for upper, lower in reversed(way):
            if upper.name in ("_to_copy", "to"):
                labels.set(upper, labels.of(lower))
        dims, of_index = labels.of(cache), labels.of(index)
        if len(resolve(dims[dim])) != 1:
            raise Refusal("cache_layout", "the blocks are gathered along several axes, or one of one block")
        self.blocks = tuple(resolve(dims[dim]))
        if value.name == "gather":
            of_table = set(atoms_of(labels.of(source_of(index))))
            for i, other in enumerate(of_index):
                whole = same_size(index.shape[i], cache.shape[i]) and not of_table & set(resolve(other))
                if i != dim and not whole:
                    raise Refusal("cache_layout", "what is gathered differs from row to row")
            of_index = [of_index[dim]]
        labels.set(value, [*dims[:dim], *of_index, *dims[dim + 1 :]])


def walk(value: Value) -> Walk:
    """The way from keys or values down to what is not re-indexed, gathered or scaled from anything."""
    path, table, number = [value], None, 1
    while (source := _below(value := path[-1])) is not None:
        if (gather := _gather(value)) is not None:
            if table is not None:
                break
            table = _table_of(gather[1])
        elif (factor := scaled(value)) is not None:
            number = number * factor[1]
        path.append(source)
    return Walk(path, table, number)


def _below(value: Value) -> Value | None:
    if isinstance(value.op, str) or cuts_gradient(value):
        return None
    source = below(value)
    if source is not None:
        return source
    if _gather(value) is not None:
        return value.args[0]
    # A cast to float8 quantises: what lies before it is not what is read.
    if value.dtype in FP8:
        return None
    if is_cast(value):
        return value.args[0]
    if (number := scaled(value)) is not None:
        return number[0]
    tensor = _tensor_factor(value)
    return None if tensor is None else tensor[0]


def _gather(value: Value) -> tuple[int, Value] | None:
    """`(dimension, index)` if the value is gathered along one dimension of its first argument by a tensor."""
    if isinstance(value.op, str):
        return None
    if value.name == "index":
        given = [(dim, index) for dim, index in enumerate(value.args[1]) if index is not None]
        if len(given) != 1:
            return None
        dim, index = given[0]
    elif value.name in ("index_select", "gather"):
        dim, index = value.args[1] % max(value.args[0].ndim, 1), value.args[2]
    else:
        return None
    is_table = isinstance(index, Value) and index.dtype in _TABLES and index.ndim >= 1
    # Numbers of the program itself pick heads (Falcon's `qkv[..., [-2], :]`), not blocks.
    return (dim, index) if is_table and _table_of(index).op != "constant" else None


def _tensor_factor(value: Value) -> tuple[Value, Value, bool] | None:
    """`(source, factor, divides)` of a product with a smaller tensor."""
    if isinstance(value.op, str) or value.name not in ("mul", "div") or value.kwargs.get("rounding_mode"):
        return None
    left, right = value.args[:2]
    if not (isinstance(left, Value) and isinstance(right, Value)):
        return None
    if value.name == "mul" and not _fills(left, value):
        left, right = right, left
    if not _fills(left, value) or _fills(right, value) or not right.dtype.is_floating_point:
        return None
    return left, right, value.name == "div"


def _fills(operand: Value, value: Value) -> bool:
    sizes: Sequence[Any] = operand.shape
    return len(sizes) == value.ndim and all(same_size(a, b) for a, b in zip(sizes, value.shape))


def _int_source(value: Value) -> Value | None:
    """What an index is a view of, or a conversion between integers."""
    if isinstance(value.op, str):
        return None
    source = source_of(value)
    if source is not value:
        return source
    if value.name in ("_to_copy", "to") and value.args[0].dtype in _TABLES and value.args[0].device == value.device:
        return value.args[0]
    return None


def _table_of(index: Value) -> Value:
    while (source := _int_source(index)) is not None:
        index = source
    return index
