"""Which tensors a tensor is put together from along one axis.

torch.cat([k_nope, k_pe.expand(...)], -1)                          one piece per argument
k = kv.new_empty(...); k[..., :P] = k_nope; k[..., P:] = k_pe      one piece per range that is written
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..capture.trace import Value
from ..symbolic import is_one, product, same_size, static
from .axes import Atom, Dim, resolve, unify
from .descent import hides_gradient
from .labels import Labels, source_of
from .region import Cut, Operand


@dataclass(frozen=True, eq=False)
class Piece:
    """The indices `start` to `start + length` of the axis `channels` of `value`, a tensor with the axes `dims`."""

    value: Value
    dims: list[Dim]
    channels: Dim
    start: int
    length: int

    @classmethod
    def whole(cls, value: Value, dims: Sequence[Dim], channels: Dim) -> Piece:
        """All of `value`; the size of the axis must be a number."""
        return cls(value, list(dims), channels, 0, int(product(atom.size for atom in resolve(channels))))

    @property
    def is_whole(self) -> bool:
        return same_size(product(atom.size for atom in resolve(self.channels)), self.length)

    @property
    def dimension(self) -> int | None:
        """Which dimension of `value` the axis is, None if it is a part of one."""
        found = [i for i, dim in enumerate(self.dims) if resolve(dim) == resolve(self.channels)]
        return found[0] if found else None

    def range(self, start: int, length: int) -> Piece:
        """Indices of the piece, as the tensor it is put together from at that place if there is one."""
        found = taken(pieces_of(self.value, self.dims, self.channels), self.start + start, length)
        return found or Piece(self.value, self.dims, self.channels, self.start + start, length)

    def operand(self) -> tuple[Operand, Dim]:
        """The piece as an operand, and the axis it has in the place of the one that was cut."""
        if self.is_whole:
            return settled(self.value, self.dims), self.channels
        after: Dim = (Atom(self.length),)
        return Operand(self.value, self.dims, cuts=[Cut(self.channels, self.start, self.length, after)]), after


def settled(value: Value, dims: Sequence[Dim]) -> Operand:
    """`value`, whose axes are `dims`, as the tensor behind its views and exact casts."""
    labels = Labels()
    for own, given in zip(labels.of(value), dims):
        unify(given, own)
    labels.check_distinct()
    source = source_of(value)
    return Operand(source, labels.of(source))


def pieces_of(value: Value, dims: Sequence[Dim], channels: Dim) -> list[Piece]:
    """The pieces of `value` along the axis `channels`, in order; one, the whole, if nothing else is known."""
    whole = Piece.whole(value, dims, channels)
    axis = whole.dimension
    if axis is None:
        return [whole]
    if value.op == "view_scatter":
        return (None if hides_gradient(value, value.args[:2]) else _written(whole, axis)) or [whole]
    if isinstance(value.op, str) or value.name != "cat" or hides_gradient(value, value.args[0]):
        return [whole]
    if (value.args[1] if len(value.args) > 1 else 0) % value.ndim != axis:
        return [whole]
    if not all(piece.ndim == value.ndim and static(piece.shape[axis]) is not None for piece in value.args[0]):
        return [whole]
    return [_inside(piece, dims, axis) for piece in value.args[0] if static(piece.shape[axis])]


def taken(pieces: Sequence[Piece], start: int, length: int) -> Piece | None:
    """The indices `start` to `start + length` of what the pieces make up, if they lie in one piece."""
    position = 0
    for piece in pieces:
        if position <= start and start + length <= position + piece.length:
            return Piece(piece.value, piece.dims, piece.channels, piece.start + start - position, length)
        position += piece.length
    return None


def _inside(value: Value, dims: Sequence[Dim], axis: int) -> Piece:
    """An argument of `cat`, or what is written, as a piece: it shares all axes of the whole but one."""
    own: Dim = () if same_size(value.shape[axis], 1) else (Atom(value.shape[axis]),)
    return Piece.whole(value, [own if i == axis else dim for i, dim in enumerate(dims)], own)


def _written(whole: Piece, axis: int) -> list[Piece] | None:
    """Pieces of a tensor into a range of which another one was written."""
    value, dims = whole.value, whole.dims
    base, source, chain = value.args
    start, length = 0, whole.length
    shape = list(base.shape)
    for op, others, kwargs, _ in chain:
        if op.overloadpacket.__name__ != "slice" or kwargs:
            return None
        given: list[Any] = [*others, *[0, None, None, 1][len(others) :]]
        dim, first, last, step = given
        if not is_one(step):
            return None
        dim, first = dim % len(shape), static(0 if first is None else first)
        if dim != axis:
            if first != 0 or not (last is None or static(last) == _END or same_size(last, shape[dim])):
                return None
            continue
        size = length
        last = static(size if last is None else last)
        if first is None or last is None:
            return None
        first, last = (min(max(n + size if n < 0 else n, 0), size) for n in (first, last))
        start, length = start + first, max(last - first, 0)
    if source.ndim != value.ndim or not same_size(source.shape[axis], length):
        return None
    below, end = pieces_of(base, dims, whole.channels), start + length
    before = [taken(below, 0, start)] if start else []
    after = [taken(below, end, whole.length - end)] if end < whole.length else []
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
