"""Proved expressions and predicates back into tensors.

The rewriter supplies a `Builder`, which turns each call into a graph node (or, in the tests, runs it). Results
broadcast: a dimension along which nothing changes keeps size 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import sympy
import torch
from sympy.core.function import AppliedUndef

from .bounds import Bounds
from .classify import RowValue
from .integers import ZERO, FloorDiv, expand, from_size, loaded_value, loads_in
from .predicate import And, BoolLoad, Or, Predicate, Rel
from .values import If

if TYPE_CHECKING:
    from ...capture.trace import Value

aten = torch.ops.aten
Handle = Any
Axes = list[tuple[sympy.Symbol, sympy.Expr]]


class Builder(Protocol):
    """What emission needs from the graph being rewritten.

    Attributes:
        device: Where new tensors are made.
    """

    device: torch.device

    def tensor(self, value: Value) -> Handle:
        """The tensor of a captured value."""

    def size(self, expr: sympy.Expr) -> Handle:
        """An integer expression of sizes: an int, or whatever stands for a `SymInt`. See `size_arithmetic`."""

    def call(self, op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Handle:
        """The result of an ATen op on handles and numbers."""


def size_arithmetic(expr: sympy.Expr, symbols: dict[sympy.Symbol, Any]) -> Any:
    """An expression of sizes computed with Python's operators on what `symbols` holds (ints or SymInts)."""
    if isinstance(expr, sympy.Integer):
        return int(expr)
    if isinstance(expr, sympy.Symbol):
        return symbols[expr]
    parts = [size_arithmetic(argument, symbols) for argument in expr.args]
    if isinstance(expr, sympy.Add):
        return sum(parts[1:], parts[0])
    if isinstance(expr, sympy.Mul):
        result = parts[0]
        for part in parts[1:]:
            result = result * part
        return result
    if isinstance(expr, FloorDiv):
        return parts[0] // parts[1]
    if isinstance(expr, sympy.Max):
        return torch.sym_max(*parts) if len(parts) == 2 else max(parts)
    if isinstance(expr, sympy.Min):
        return torch.sym_min(*parts) if len(parts) == 2 else min(parts)
    if isinstance(expr, sympy.Pow):
        return parts[0] ** parts[1]
    raise NotImplementedError(f"size expression {expr}: only sums, products, floor division, min and max are emitted")


class Emitter:
    """Emits tensors of one rank, one dimension per axis.

    Args:
        builder: Makes the calls.
        axes: `(symbol, size)` of each dimension, in order.
        bounds: Facts about the symbols.
    """

    def __init__(self, builder: Builder, axes: Axes, bounds: Bounds) -> None:
        self.builder = builder
        self.bounds = bounds
        self.axes = axes
        self.position = {symbol: i for i, (symbol, _) in enumerate(axes)}
        self._known: dict[Any, Handle] = {}

    def number(self, x: RowValue) -> Handle:
        """An integer tensor of rank `len(axes)`."""
        result = self._number(x)
        return result if self._is_tensor(x) else self._filled(result, torch.int64)

    def truth(self, x: Predicate) -> Handle:
        """A bool tensor of rank `len(axes)`."""
        key = ("truth", x)
        if key not in self._known:
            self._known[key] = self._truth(x)
        return self._known[key]

    def _truth(self, x: Predicate) -> Handle:
        call = self.builder.call
        if isinstance(x, bool):
            return self._filled(x, torch.bool)
        if isinstance(x, Rel):
            op = {"le": aten.le.Scalar, "eq": aten.eq.Scalar, "ne": aten.ne.Scalar}[x.op]
            return call(op, self.number(x.expr), 0)
        if isinstance(x, BoolLoad):
            loaded = self._load(x.value, x.index)
            return call(aten.logical_not.default, loaded) if x.negated else loaded
        assert isinstance(x, (And, Or))
        op = aten.bitwise_and.Tensor if isinstance(x, And) else aten.bitwise_or.Tensor
        parts = [self.truth(part) for part in x.parts]
        result = parts[0]
        for part in parts[1:]:
            result = call(op, result, part)
        return result

    def _is_tensor(self, x: RowValue) -> bool:
        """False for expressions of sizes alone, which stay scalars."""
        if isinstance(x, If):
            return True
        return bool(loads_in(x)) or not x.free_symbols.isdisjoint(self.position)

    def _number(self, x: RowValue) -> Handle:
        """A tensor if `_is_tensor`, else a scalar handle."""
        key = ("number", x)
        if key not in self._known:
            self._known[key] = self._number_once(x)
        return self._known[key]

    def _number_once(self, x: RowValue) -> Handle:
        call = self.builder.call
        if isinstance(x, If):
            return call(aten.where.self, self.truth(x.condition), self.number(x.then), self.number(x.otherwise))
        if not self._is_tensor(x):
            return self.builder.size(x)
        if isinstance(x, sympy.Symbol):
            size = self.builder.size(self.axes[self.position[x]][1])
            line = call(aten.arange.default, size, dtype=torch.int64, device=self.builder.device)
            return self._placed(line, [x])
        if isinstance(x, (sympy.Add, sympy.Mul)):
            op = aten.add.Tensor if isinstance(x, sympy.Add) else aten.mul.Tensor
            tensors = [part for part in x.args if self._is_tensor(part)]
            scalars = [part for part in x.args if not self._is_tensor(part)]
            result = self._number(tensors[0])
            for part in tensors[1:]:
                result = call(op, result, self._number(part))
            # All scalars in one: sizes are cheaper to add on the host.
            return call(op, result, self.builder.size(x.func(*scalars))) if scalars else result
        if isinstance(x, FloorDiv):
            return call(aten.div.Tensor_mode, self.number(x.args[0]), self.number(x.args[1]), rounding_mode="floor")
        if isinstance(x, (sympy.Max, sympy.Min)):
            op = aten.maximum.default if isinstance(x, sympy.Max) else aten.minimum.default
            result = self.number(x.args[0])
            for part in x.args[1:]:
                result = call(op, result, self.number(part))
            return result
        if isinstance(x, sympy.Pow) and isinstance(x.exp, sympy.Integer) and x.exp > 1:
            base = self._number(x.base)
            result = base
            for _ in range(int(x.exp) - 1):
                result = call(aten.mul.Tensor, result, base)
            return result
        assert isinstance(x, AppliedUndef), f"cannot emit {x}"
        return self._widened(self._load(loaded_value(x), x.args), loaded_value(x).dtype)

    def _widened(self, handle: Handle, dtype: torch.dtype) -> Handle:
        """Positions are computed in int64, whatever the loaded dtype."""
        return handle if dtype == torch.int64 else self.builder.call(aten._to_copy.default, handle, dtype=torch.int64)

    def _filled(self, scalar: Handle, dtype: torch.dtype) -> Handle:
        """A scalar as a tensor of rank `len(axes)`."""
        shape = [1] * len(self.axes)
        return self.builder.call(aten.full.default, shape, scalar, dtype=dtype, device=self.builder.device)

    def _load(self, value: Value, index: Sequence[sympy.Expr]) -> Handle:
        """The elements of a captured tensor over the axes: a view where the index is plain, else a gather.

        A predicate may read outside the tensor where another part of it decides alone (a padding mask shorter than the
        cache). What is read there does not matter, but it must be inside.
        """
        tensor = self.builder.tensor(value)
        plain = [i for i in index if i in self.position]
        if len(set(plain)) == len(plain) and all(i in self.position or not self._is_tensor(i) for i in index):
            return self._view(tensor, value, index)
        positions = [self._inside(i, from_size(size)) for i, size in zip(index, value.shape)]
        return self.builder.call(aten.index.Tensor, tensor, positions)

    def _inside(self, i: sympy.Expr, size: sympy.Expr) -> Handle:
        """A position tensor, clamped unless it is proved to lie in a dimension of `size`."""
        position = self.number(i)
        if self.bounds.never_negative(i) and self.bounds.positive(size - i):
            return position
        return self.builder.call(aten.clamp.default, position, 0, self.builder.size(expand(size - 1)))

    def _view(self, tensor: Handle, value: Value, index: Sequence[sympy.Expr]) -> Handle:
        """Each dimension is one axis, or is read at one place."""
        dim, symbols = 0, []
        for i, size in zip(index, map(from_size, value.shape)):
            if i in self.position:
                tensor = self._fitted(tensor, dim, size, self.axes[self.position[i]][1])
                symbols.append(i)
                dim += 1
            elif self.bounds.never_negative(i) and self.bounds.positive(size - i):
                tensor = self.builder.call(aten.select.int, tensor, dim, self.builder.size(i))
            else:
                i = sympy.Min(sympy.Max(i, ZERO), size - 1)
                tensor = self.builder.call(aten.select.int, tensor, dim, self.builder.size(i))
        return self._placed(tensor, symbols)

    def _fitted(self, tensor: Handle, dim: int, size: sympy.Expr, length: sympy.Expr) -> Handle:
        """A dimension of `size` made as long as its axis: cut where it is longer, else clamped positions."""
        if size == length:
            return tensor
        call = self.builder.call
        if self.bounds.never_positive(length - size):
            return call(aten.slice.Tensor, tensor, dim, 0, self.builder.size(length))
        line = call(aten.arange.default, self.builder.size(length), dtype=torch.int64, device=self.builder.device)
        line = call(aten.clamp.default, line, 0, self.builder.size(expand(size - 1)))
        return call(aten.index_select.default, tensor, dim, line)

    def _placed(self, tensor: Handle, symbols: list[sympy.Symbol]) -> Handle:
        """Dimensions in the order of the axes, size 1 for the axes that are missing."""
        call = self.builder.call
        order = sorted(range(len(symbols)), key=lambda i: self.position[symbols[i]])
        if order != list(range(len(symbols))):
            tensor = call(aten.permute.default, tensor, order)
        present = {self.position[symbol] for symbol in symbols}
        for axis in range(len(self.axes)):
            if axis not in present:
                tensor = call(aten.unsqueeze.default, tensor, axis)
        return tensor
