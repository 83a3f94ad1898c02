"""Ops that give the same elements another shape or name: views, slices, copies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .bounds import LARGEST_DYNAMIC_SIZE
from .integers import ONE, ZERO, FloorDiv, expand, from_size
from .values import Opaque, Scalar

if TYPE_CHECKING:
    from ...capture.trace import Value
    from .evaluate import Call, Evaluator

Index = tuple[sympy.Expr, ...]


def same(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """Copies and aliases: the same element."""
    return ev.at(call["self"], index)


def expand_(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """Broadcasting: new dimensions are dropped, size-1 dimensions read element 0 (done by `at`)."""
    return ev.operand(call["self"], index)


def reindex(ev: Evaluator, index: Index, sizes: list[sympy.Expr], targets: list[sympy.Expr]) -> list[sympy.Expr]:
    """The index into shape `targets` of the element at `index` of shape `sizes` with the same elements in order."""
    result: list[sympy.Expr] = []
    i = j = 0
    while i < len(sizes) or j < len(targets):
        if i < len(sizes) and sizes[i] == 1:
            i += 1
            continue
        if j < len(targets) and targets[j] == 1:
            result.append(ZERO)
            j += 1
            continue
        # The smallest run of dimensions with an equal number of elements on both sides.
        first_i, first_j = i, j
        left = right = ONE
        while True:
            if i < len(sizes) and (j > first_j or i == first_i) and not (i > first_i and _shorter(right, left)):
                left, i = expand(left * sizes[i]), i + 1
            elif j < len(targets):
                right, j = expand(right * targets[j]), j + 1
            elif i < len(sizes):
                left, i = expand(left * sizes[i]), i + 1
            else:
                break
            if j > first_j and i > first_i and left == right:
                break
        linear = ZERO
        for position in range(first_i, i):
            linear = expand(linear * sizes[position] + index[position])
        digits: list[sympy.Expr] = []
        for position in reversed(range(first_j + 1, j)):
            quotient = floor_divide(ev, linear, targets[position])
            digits.append(expand(linear - targets[position] * quotient))
            linear = quotient
        result.extend([linear, *reversed(digits)] if j > first_j else [])
    return result


def _shorter(right: sympy.Expr, left: sympy.Expr) -> bool:
    """True if `right` is known to hold fewer elements than `left`."""
    return bool((right - left).is_negative)


def floor_divide(ev: Evaluator, base: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    """`base // divisor` for a positive size: terms that the divisor divides come out, a small rest is 0."""
    whole, rest = ZERO, ZERO
    for term in sympy.Add.make_args(expand(base)):
        quotient = sympy.cancel(term / divisor)
        if quotient.is_integer and quotient.is_polynomial(*quotient.free_symbols):
            whole += quotient
        else:
            rest += term
    if ev.bounds.never_negative(rest) and ev.bounds.positive(divisor - rest):
        return expand(whole)
    return expand(whole + FloorDiv(rest, divisor))


def view(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """Reshapes. A view as another dtype reinterprets bytes and is not one."""
    source = call["self"]
    if source.dtype != value.dtype:
        raise Opaque("view as another dtype")
    sizes, targets = [[from_size(size) for size in x.shape] for x in (value, source)]
    return ev.at(source, reindex(ev, index, sizes, targets))


def permute(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """Dimension i of the result is dimension `dims[i]` of the source."""
    source: list[Any] = [None] * len(index)
    for position, dim in enumerate(call["dims"]):
        source[dim] = index[position]
    return ev.at(call["self"], source)


def transpose(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """Two dimensions change places; `t`, `mT` and `numpy_T` are spelt without arguments."""
    source = list(index)
    if len(source) < 2:
        return ev.at(call["self"], source)
    first, second = (call["dim0"], call["dim1"]) if "dim0" in call else (-2, -1)
    source[first], source[second] = source[second], source[first]
    return ev.at(call["self"], source)


def unsqueeze(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """A new dimension of size 1."""
    dim = call["dim"] % value.ndim
    return ev.at(call["self"], index[:dim] + index[dim + 1 :])


def squeeze(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """Dimensions of size 1 disappear."""
    source = call["self"]
    dims = call.get("dim", list(range(source.ndim)))
    dims = {dim % max(source.ndim, 1) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
    rest = iter(index)
    return ev.at(source, [ZERO if d in dims and ev.size(source, d) == 1 else next(rest) for d in range(source.ndim)])


def slice_start(ev: Evaluator, start: Any, size: sympy.Expr) -> sympy.Expr:
    """The first index that a slice of a dimension of `size` covers."""
    first = ZERO if start is None else from_size(start)
    if ev.bounds.never_negative(first) or not_negative_by_guard(start):
        return first
    if not ev.bounds.positive(-first):
        raise Opaque(f"slice from {first}, of unknown sign")
    first = expand(first + size)
    return first if ev.bounds.never_negative(first) else sympy.Max(first, ZERO)


def slice_end(ev: Evaluator, end: Any, size: sympy.Expr) -> sympy.Expr:
    """One past the last index that a slice covers; may exceed `size`."""
    last = size if end is None else from_size(end)
    if isinstance(last, sympy.Integer) and last >= LARGEST_DYNAMIC_SIZE:
        return size  # `x[1:]` is recorded with the largest int64
    if ev.bounds.never_negative(last) or not_negative_by_guard(end):
        return last
    if not ev.bounds.positive(-last):
        raise Opaque(f"slice up to {last}, of unknown sign")
    return expand(last + size)


def not_negative_by_guard(size: Any) -> bool:
    """True if the graph's guards, or ranges of its symbols, say that a `SymInt` is at least 0. Adds no guard."""
    return isinstance(size, torch.SymInt) and statically_known_true(size >= 0)


def slice_(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """`start + step * i`; where the slice ends does not matter inside it."""
    source = call["self"]
    dim = call["dim"] % value.ndim
    start = slice_start(ev, call["start"], ev.size(source, dim))
    return ev.at(source, with_index(index, dim, start + index[dim] * from_size(call["step"])))


def select(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """One index of a dimension, which disappears."""
    source = call["self"]
    dim = call["dim"] % source.ndim
    return ev.at(source, (*index[:dim], element(ev, call["index"], ev.size(source, dim)), *index[dim:]))


def element(ev: Evaluator, position: Any, size: sympy.Expr) -> sympy.Expr:
    """A possibly negative position in a dimension, counted from the front."""
    raw, position = position, from_size(position)
    if ev.bounds.never_negative(position) or not_negative_by_guard(raw):
        return position
    if ev.bounds.positive(-position):
        return expand(position + size)
    raise Opaque(f"index {position} of unknown sign")


def unbind(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """Output i is element i of a dimension."""
    source = call["self"]
    dim = call["dim"] % source.ndim
    return ev.at(source, (*index[:dim], sympy.Integer(value.output_index), *index[dim:]))


def split(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """Output i starts where the ones before it end; `split`, `split_with_sizes`."""
    dim = call["dim"] % value.ndim
    if "split_sizes" in call:
        start = sum((from_size(size) for size in call["split_sizes"][: value.output_index]), ZERO)
    else:
        start = from_size(call["split_size"]) * value.output_index
    return ev.at(call["self"], with_index(index, dim, index[dim] + start))


def with_index(index: Index, dim: int, i: sympy.Expr) -> Index:
    """`index` with another position in one dimension."""
    return (*index[:dim], i, *index[dim + 1 :])


RULES = {
    **dict.fromkeys(("alias", "clone", "contiguous", "detach", "lift", "lift_fresh", "lift_fresh_copy"), same),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "flatten", "unflatten"), view),
    **dict.fromkeys(("expand", "expand_copy", "broadcast_to", "expand_as"), expand_),
    **dict.fromkeys(("permute", "permute_copy"), permute),
    **dict.fromkeys(("transpose", "transpose_copy", "t", "t_copy", "mT", "adjoint", "swapaxes"), transpose),
    **dict.fromkeys(("unsqueeze", "unsqueeze_copy"), unsqueeze),
    **dict.fromkeys(("squeeze", "squeeze_copy"), squeeze),
    **dict.fromkeys(("slice", "slice_copy"), slice_),
    **dict.fromkeys(("select", "select_copy"), select),
    **dict.fromkeys(("unbind", "unbind_copy"), unbind),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"), split),
}
