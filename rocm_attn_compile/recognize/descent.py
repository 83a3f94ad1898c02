"""From a tensor down to what it is re-indexed from: views, exact casts, copies, and ranges of one axis.

    cache[:, :n] -> slice -> view -> linear          `descend` gives the way, `label` the axes on it

Unlike `labels`, which follows what keeps every index, this also follows `x[..., :512]`, `split` and `unbind`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..capture.trace import Value
from ..symbolic import is_one, same_size, static
from .axes import Atom, Dim
from .labels import Labels, cuts_gradient, is_exact_cast, is_view
from .region import Cut

_RANGES = frozenset(("slice", "select", "split_with_sizes", "split", "unbind"))


def descend(value: Value) -> list[Value]:
    """`value`, what it is re-indexed from, and so on down to what is not re-indexed from anything."""
    path = [value]
    while (source := below(path[-1])) is not None:
        path.append(source)
    return path


def below(value: Value) -> Value | None:
    """The tensor whose elements `value` holds, some or all of them, or None."""
    if isinstance(value.op, str) or cuts_gradient(value):
        return None
    if is_view(value) or is_exact_cast(value) or range_of(value) is not None:
        return value.args[0]
    if value.name == "copy":
        source = value.args[1]
        return source if isinstance(source, Value) and source.dtype == value.dtype else None
    if value.name == "cat":
        pieces = [piece for piece in value.args[0] if not any(same_size(size, 0) for size in piece.shape)]
        is_identity = len(pieces) == 1 and pieces[0].dtype == value.dtype and not hides_gradient(value, pieces)
        return pieces[0] if is_identity else None
    return None


def hides_gradient(value: Value, sources: Iterable[Value]) -> bool:
    """True if `value` was made under `no_grad` from sources that were not: see `labels.cuts_gradient`."""
    return not value.grad_mode and any(source.grad_mode for source in sources)


def range_of(value: Value) -> tuple[int, int, int] | None:
    """`(dimension, start, length)` if the value is a known range of the indices of one dimension of its first argument.

    A `select` or `unbind` is a range of one index, of a dimension that the value no longer has.
    """
    if value.name not in _RANGES:
        return None
    source, numbers = value.args[0], value.args[1:]
    start: Any
    if value.name == "split_with_sizes":
        dim, start = (numbers[1] if len(numbers) > 1 else 0), 0
        for size in numbers[0][: value.output_index]:
            start = start + size
    elif value.name == "split":
        dim, start = (numbers[1] if len(numbers) > 1 else 0), numbers[0] * value.output_index
    elif value.name == "unbind":
        dim, start = (numbers[0] if numbers else 0), value.output_index
    elif value.name == "select":
        dim, start = numbers
    else:
        dim, start = (numbers[0] if numbers else 0), numbers[1] if len(numbers) > 1 else 0
        start = 0 if start is None else start
        if len(numbers) > 3 and not is_one(numbers[3]):
            return None
    dim = dim % source.ndim
    size, length = source.shape[dim], (1 if value.ndim < source.ndim else value.shape[dim])
    first, size, length = static(start), static(size), static(length)
    if first is None or size is None or length is None:
        return None
    return dim, max(first + size if first < 0 else first, 0), length


def origin(value: Value) -> Value:
    """The tensor of which `value` is a view or a range, of numbers or symbols."""
    while not isinstance(value.op, str) and (is_view(value) or value.name in _RANGES):
        value = value.args[0]
    return value


def is_same_tensor(left: Value, right: Value) -> bool:
    """True if two values are one, or the same views and ranges of one: `cache[:n]` written twice."""
    return left is right or _identity(left) == _identity(right)


def _identity(value: Value) -> Any:
    if isinstance(value.op, str) or not (is_view(value) or value.name in _RANGES):
        return value.id
    return value.op, value.grad_mode, value.output_index, _plain((value.args, value.kwargs))


def _plain(tree: Any) -> Any:
    leaves, structure = pytree.tree_flatten(tree, is_leaf=lambda leaf: isinstance(leaf, Value))
    return str(structure), tuple(
        _identity(leaf) if isinstance(leaf, Value) else str(leaf.node.expr) if isinstance(leaf, torch.SymInt) else leaf
        for leaf in leaves
    )


def label(labels: Labels, path: Sequence[Value]) -> list[Cut]:
    """Label the values of a `descend`, from its end upwards; returns the ranges taken on the way, inner to outer."""
    cuts = []
    for source, value in zip(reversed(path), reversed(path[:-1])):
        if is_view(value) or is_exact_cast(value):
            labels.of(value)  # through `source`, which is labelled
            continue
        found, dims = range_of(value), labels.of(source)
        if found is not None:
            dim, start, length = found
            after: Dim = () if length == 1 else (Atom(length),)
            cuts.append(Cut(dims[dim], start, length, after))
            dims[dim : dim + 1] = [after] if value.ndim == source.ndim else []
            labels.set(value, dims)
            continue
        offset = value.ndim - source.ndim  # a copy, which may broadcast
        wide = [
            dims[i - offset] if i >= offset and same_size(source.shape[i - offset], size) else _axis(size)
            for i, size in enumerate(value.shape)
        ]
        labels.set(value, wide if value.name == "copy" else dims)
    return cuts


def _axis(size) -> Dim:
    return () if is_one(size) else (Atom(size),)
