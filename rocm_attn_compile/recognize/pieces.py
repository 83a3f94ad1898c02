"""Which tensors a tensor is put together from along one axis.

torch.cat([k_nope, k_pe.expand(...)], -1)                          one piece per argument
k = kv.new_empty(...); k[..., :P] = k_nope; k[..., P:] = k_pe      one piece per range that is written
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..capture.trace import Value
from ..symbolic import same_size
from .axes import Atom, Dim, unify
from .descent import hides_gradient
from .labels import Labels, source_of
from .region import Cut, Operand


@dataclass(frozen=True, eq=False)
class Piece:
    """The indices `start` to `start + length` of dimension `axis` of `value`, whose dimensions have the axes `dims`."""

    value: Value
    dims: list[Dim]
    axis: int
    start: int
    length: int

    @property
    def is_whole(self) -> bool:
        return same_size(self.value.shape[self.axis], self.length)

    def operand(self) -> tuple[Operand, Dim]:
        """The piece as an operand, and the axis it has in the place of the one that was cut."""
        if self.is_whole:
            return settled(self.value, self.dims), self.dims[self.axis]
        after: Dim = (Atom(self.length),)
        return Operand(self.value, self.dims, cuts=[Cut(self.dims[self.axis], self.start, self.length, after)]), after


def settled(value: Value, dims: Sequence[Dim]) -> Operand:
    """`value`, whose axes are `dims`, as the tensor behind its views and exact casts."""
    labels = Labels()
    for own, given in zip(labels.of(value), dims):
        unify(given, own)
    labels.check_distinct()
    source = source_of(value)
    return Operand(source, labels.of(source))


def pieces_of(value: Value, dims: Sequence[Dim], axis: int) -> list[Piece]:
    """The pieces of `value` along dimension `axis`, in order; one, the whole, if nothing else is known."""
    whole = [Piece(value, list(dims), axis, 0, int(value.shape[axis]))]
    if value.op == "view_scatter":
        return (None if hides_gradient(value, value.args[:2]) else _written(value, dims, axis)) or whole
    if isinstance(value.op, str) or value.name != "cat" or hides_gradient(value, value.args[0]):
        return whole
    if (value.args[1] if len(value.args) > 1 else 0) % value.ndim != axis:
        return whole
    if not all(piece.ndim == value.ndim and isinstance(piece.shape[axis], int) for piece in value.args[0]):
        return whole
    return [_inside(piece, dims, axis) for piece in value.args[0]]


def taken(pieces: Sequence[Piece], start: int, length: int) -> Piece | None:
    """The indices `start` to `start + length` of what the pieces make up, if they lie in one piece."""
    position = 0
    for piece in pieces:
        if position <= start and start + length <= position + piece.length:
            return Piece(piece.value, piece.dims, piece.axis, piece.start + start - position, length)
        position += piece.length
    return None


def _inside(value: Value, dims: Sequence[Dim], axis: int) -> Piece:
    """An argument of `cat`, or what is written, as a piece: it shares all axes of the whole but one."""
    size = value.shape[axis]
    own: Dim = () if same_size(size, 1) else (Atom(size),)
    return Piece(value, [own if i == axis else dim for i, dim in enumerate(dims)], axis, 0, int(size))


def _written(value: Value, dims: Sequence[Dim], axis: int) -> list[Piece] | None:
    """Pieces of a tensor into a range of which another one was written."""
    base, source, chain = value.args
    start, length = 0, int(value.shape[axis])
    shape = list(base.shape)
    for op, others, kwargs, _ in chain:
        if op.overloadpacket.__name__ != "slice" or kwargs:
            return None
        given: list[Any] = [*others, *[0, None, None, 1][len(others) :]]
        dim, first, last, step = given
        if step != 1:
            return None
        dim, first = dim % len(shape), first or 0
        if dim != axis:
            if first != 0 or not (last is None or last == _END or same_size(last, shape[dim])):
                return None
            continue
        size = length
        last = size if last is None else last
        if not isinstance(first, int) or not isinstance(last, int):
            return None
        first, last = (min(max(n + size if n < 0 else n, 0), size) for n in (first, last))
        start, length = start + first, max(last - first, 0)
    if source.ndim != value.ndim or not same_size(source.shape[axis], length):
        return None
    below = pieces_of(base, dims, axis)
    total = int(value.shape[axis])
    before = [taken(below, 0, start)] if start else []
    after = [taken(below, start + length, total - start - length)] if start + length < total else []
    out = [*before, _inside(_copied(source), dims, axis), *after]
    return None if None in out else [piece for piece in out if piece is not None]


_END = 9223372036854775807
"""The end that Python's `x[a:]` has in ATen."""


def _copied(value: Value) -> Value:
    """What `copy(target, source)` writes, if it has the target's shape and dtype."""
    if isinstance(value.op, str) or value.name != "copy":
        return value
    source = value.args[1]
    fits = isinstance(source, Value) and source.dtype == value.dtype and source.ndim == value.ndim
    return source if fits and all(same_size(a, b) for a, b in zip(source.shape, value.shape)) else value
