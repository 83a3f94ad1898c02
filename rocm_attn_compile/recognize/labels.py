"""Axis labels of captured values: pulled backwards through views to the tensor that owns the memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..capture.trace import Value
from ..reasons import Refusal
from ..symbolic import is_one, same_size
from .axes import Atom, Dim, broadcast, check_distinct, fresh_dims, regroup, resolve, unify
from .numbers import rounded

# fmt: off
VIEW_NAMES = frozenset((
    "view", "_unsafe_view", "reshape", "_reshape_copy", "expand", "permute", "transpose", "t", "mT", "unsqueeze",
    "squeeze", "clone", "contiguous", "alias", "lift_fresh", "lift_fresh_copy", "repeat", "view_copy", "expand_copy",
    "permute_copy", "transpose_copy", "unsqueeze_copy", "squeeze_copy", "t_copy", "alias_copy", "unflatten",
    "flatten", "swapaxes", "movedim",
))
# fmt: on
SAME_INDEX = frozenset(["clone", "contiguous", "alias", "lift_fresh", "lift_fresh_copy", "alias_copy"])
CAST_NAMES = frozenset(("_to_copy", "to"))
CONTRACTION_NAMES = frozenset(("bmm", "mm", "baddbmm", "addmm"))

_PRECISION = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 2, torch.float64: 3}


def is_view(value: Value) -> bool:
    """True if the value holds the same elements as its first argument, re-indexed (copies included)."""
    if isinstance(value.op, str):
        return False
    if value.name in VIEW_NAMES:
        return True
    if value.name == "select":
        return is_one(value.args[0].shape[value.args[1]])
    if value.name == "slice":
        source = value.args[0]
        return all(same_size(a, b) for a, b in zip(value.shape, source.shape)) and _unit_step(value)
    return False


def _unit_step(value: Value) -> bool:
    return len(value.args) < 5 or is_one(value.args[4])


def is_cast(value: Value) -> bool:
    """True for a dtype conversion between floating types (device moves excluded)."""
    if isinstance(value.op, str) or value.name not in CAST_NAMES:
        return False
    source = value.args[0]
    return source.dtype.is_floating_point and value.dtype.is_floating_point and source.device == value.device


def is_exact_cast(value: Value) -> bool:
    """True if the cast keeps every value: to the same or a strictly wider floating type."""
    if not is_cast(value):
        return False
    source, target = value.args[0].dtype, value.dtype
    return source == target or _PRECISION.get(source, 9) < _PRECISION.get(target, 0)


def number_of(value: Any) -> Any:
    """The Python number (or SymInt/SymFloat) a scalar operand is known to be, else None."""
    if isinstance(value, (bool, int, float, torch.SymInt, torch.SymFloat)):
        return value
    if not isinstance(value, Value):
        return None
    number = None
    if value.op == "constant":
        number = value.kwargs.get("value")
    elif isinstance(value.op, str):
        return None
    elif value.name == "full":
        number = value.args[1] if all(is_one(s) for s in value.shape) else None
    elif value.name == "scalar_tensor":
        number = value.args[0]
    elif is_view(value) or is_cast(value):
        number = number_of(value.args[0])
    return rounded(number, value.dtype)


def scaled(value: Value) -> tuple[Value, Any] | None:
    """`(source, factor)` if the value is a tensor times (or divided by) a known number."""
    if isinstance(value.op, str) or value.name not in ("mul", "div") or value.kwargs.get("rounding_mode"):
        return None
    left, right = value.args[:2]
    if value.name == "mul" and number_of(left) is not None:
        left, right = right, left
    factor = number_of(right)
    if factor is None or not isinstance(left, Value) or left.dtype != value.dtype or left.ndim != value.ndim:
        return None
    if value.name == "div":
        return None if factor == 0 else (left, 1.0 / factor)
    return left, factor


class Labels:
    """Labels of values, by memo. `set` gives a value its labels from outside (results of contractions).

    A view that cannot be followed raises Refusal; for an `operand` it is where the way ends: a tensor of its own.
    """

    def __init__(self, operand: bool = False) -> None:
        self._dims: dict[int, list[Dim]] = {}
        self._values: dict[int, Value] = {}
        self._is_operand = operand
        self._ends: set[int] = set()

    def set(self, value: Value, dims: list[Dim]) -> None:
        self._dims[value.id] = list(dims)
        self._values[value.id] = value

    def known(self, value: Value) -> bool:
        return value.id in self._dims

    def items(self) -> Iterator[tuple[Value, list[Dim]]]:
        """Every labelled value and its dimensions."""
        return ((value, self._dims[key]) for key, value in self._values.items())

    def of(self, value: Value) -> list[Dim]:
        """Dimensions of `value`; a value that is not a view of something gets fresh ones."""
        if value.id not in self._dims:
            self.set(value, self._derive(value))
        return list(self._dims[value.id])

    def pointwise(self, value: Value) -> list[Dim]:
        """Label a pointwise result from all its tensor arguments."""
        operands = [a for a in (*value.args, *value.kwargs.values()) if isinstance(a, Value)]
        self.set(value, broadcast(value.ndim, [(self.of(a), a.shape) for a in operands]))
        return self.of(value)

    def align(self, operand: Value, dims: list[Dim]) -> None:
        """Unify the axes of an operand with those of a pointwise result it broadcasts into (aligned right)."""
        offset = len(dims) - operand.ndim
        for i, dim in enumerate(self.of(operand)):
            if resolve(dim):
                unify(dims[offset + i], dim)

    def check_distinct(self) -> None:
        """Refuse if any labelled value uses one axis twice."""
        for key, dims in self._dims.items():
            check_distinct(dims, f"{self._values[key].name} of shape {list(self._values[key].shape)}")

    def _derive(self, value: Value) -> list[Dim]:
        if is_view(value) or is_cast(value):
            try:
                return self._through_view(value)
            except Refusal:
                if not self._is_operand:
                    raise
                self._ends.add(value.id)
                return fresh_dims(value.shape)
        factor = scaled(value)
        return fresh_dims(value.shape) if factor is None else self.of(factor[0])

    def source_of(self, value: Value) -> Value:
        """The tensor behind views and exact casts: what the kernel should read."""
        while (is_view(value) or is_exact_cast(value)) and not self._stops_at(value):
            value = value.args[0]
        return value

    def scaled_source_of(self, value: Value) -> tuple[Value, Any]:
        """The tensor behind views, exact casts and factors (but not in place: there it is gone), and their product."""
        factor: Any = 1
        while not self._stops_at(value):
            if is_view(value) or is_exact_cast(value):
                value = value.args[0]
                continue
            step = None if value.in_place else scaled(value)
            if step is None:
                break
            value, factor = step[0], factor * step[1]
        return value, factor

    def _stops_at(self, value: Value) -> bool:
        if self._is_operand:
            self.of(value)
        return value.id in self._ends or cuts_gradient(value)

    def _through_view(self, value: Value) -> list[Dim]:
        source = value.args[0]
        dims, name, ndim = self.of(source), value.name, value.ndim
        if name in SAME_INDEX or name in CAST_NAMES or name == "slice":
            return dims
        if name in ("permute", "permute_copy"):
            return [dims[i % ndim] for i in value.args[1]]
        if name in ("transpose", "transpose_copy", "swapaxes"):
            i, j = value.args[1] % ndim, value.args[2] % ndim
            dims[i], dims[j] = dims[j], dims[i]
            return dims
        if name in ("t", "t_copy", "mT"):
            if ndim >= 2:
                dims[-1], dims[-2] = dims[-2], dims[-1]
            return dims
        if name == "select":
            return [d for i, d in enumerate(dims) if i != value.args[1] % source.ndim]
        if name in ("unsqueeze", "unsqueeze_copy"):
            dims.insert(value.args[1] % ndim, ())
            return dims
        if name in ("squeeze", "squeeze_copy"):
            drop = value.args[1] if len(value.args) > 1 else range(source.ndim)
            drop = {d % source.ndim for d in ([drop] if isinstance(drop, int) else drop)}
            return [d for i, d in enumerate(dims) if not (i in drop and is_one(source.shape[i]))]
        if name in ("expand", "expand_copy"):
            offset = ndim - source.ndim
            out: list[Dim] = []
            for i, size in enumerate(value.shape):
                if i >= offset and same_size(source.shape[i - offset], size):
                    out.append(dims[i - offset])
                elif i < offset or is_one(source.shape[i - offset]):
                    out.append(() if is_one(size) else (Atom(size),))
                else:
                    raise Refusal("axis_expand", f"expand of {list(source.shape)} to {list(value.shape)} is undecided")
            return out
        if name == "repeat":
            offset = ndim - source.ndim
            out = []
            for i, count in enumerate(value.args[1]):
                inner = dims[i - offset] if i >= offset else ()
                out.append(inner if is_one(count) else (Atom(count), *inner))
            return out
        # view, reshape, flatten and their relatives: row-major order is kept
        if name in ("movedim",):
            raise Refusal("axis_view", f"{name} was not decomposed by the capture")
        return regroup(dims, value.shape)


def cuts_gradient(value: Value) -> bool:
    """True for a value made under `no_grad` from one made outside: no gradient flows through it, not even a view's."""
    return not value.grad_mode and any(a.grad_mode for a in value.args if isinstance(a, Value))


def source_of(value: Value) -> Value:
    """The tensor behind views and exact casts: what the kernel should read."""
    while (is_view(value) or is_exact_cast(value)) and not cuts_gradient(value):
        value = value.args[0]
    return value


def aligned(dims: list[Dim], value: Value) -> list[Dim]:
    """The axes of `value`, broadcast against a tensor with the axes `dims` (aligned right)."""
    offset = len(dims) - value.ndim
    return [() if is_one(size) else dims[offset + i] for i, size in enumerate(value.shape)]


def operands_of(contraction: Value) -> tuple[Value, Value]:
    """The two factors of a contraction, in the order of its call."""
    if contraction.name in ("baddbmm", "addmm"):
        return contraction.args[1], contraction.args[2]
    if contraction.name in ("bmm", "mm"):
        return contraction.args[0], contraction.args[1]
    factors = product_under_sum(contraction)
    assert factors is not None
    return factors.args[0], factors.args[1]


def product_under_sum(value: Value) -> Value | None:
    """The `mul` of a contraction written `(a * b).sum(dim)`, if `value` is one."""
    if value.name != "sum" or len(value.args) < 2:
        return None
    dims = value.args[1]
    if not isinstance(dims, (list, tuple)) or len(dims) != 1:
        return None
    inner = value.args[0]
    if isinstance(inner.op, str) or inner.name != "mul" or not all(isinstance(a, Value) for a in inner.args[:2]):
        return None
    return inner


def is_contraction(value: Value) -> bool:
    return not isinstance(value.op, str) and (value.name in CONTRACTION_NAMES or product_under_sum(value) is not None)


def label_contraction(labels: Labels, value: Value, left_labels: Labels, right_labels: Labels) -> Dim:
    """Label a contraction's result from its operands, each in its own labels; returns the contracted dimension.

    Labels of their own keep apart the uses of one tensor: in softmax(x x^T) x its rows are queries, keys and values.
    """
    left, right = operands_of(value)
    a, b = left_labels.of(left), right_labels.of(right)
    if value.name in ("bmm", "baddbmm"):
        unify(a[0], b[0])
        unify(a[2], b[1])
        labels.set(value, [a[0], a[1], b[2]])
        return a[2]
    if value.name in ("mm", "addmm"):
        unify(a[1], b[0])
        labels.set(value, [a[0], b[1]])
        return a[1]
    factors = product_under_sum(value)
    assert factors is not None
    full = broadcast(factors.ndim, [(a, left.shape), (b, right.shape)])
    axis = value.args[1][0] % len(full)
    keep = len(value.shape) == len(full)
    labels.set(value, [() if i == axis else d for i, d in enumerate(full) if keep or i != axis])
    return full[axis]
