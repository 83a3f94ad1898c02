"""Emit nodes into Dynamo's graph at one place, reading captured values where they are still intact.

A captured value is looked up as a Dynamo node whose tensor has not been written to since; one that lives in no node
(an implicit cast of autocast, a view inside a library call) is emitted again as functional ATen.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from .. import _torch_private
from ..capture.memory import Look
from ..capture.trace import Trace, Value
from ..reasons import Refusal
from ..recognize.mask.integers import from_size
from ..symbolic import Size, exact_quotient, product, to_expr

aten = torch.ops.aten

_SNAPSHOT_LIMIT = 1 << 16
"""Elements; a copy of more would cost what the rewrite is to save."""

_COPIED_META = ("stack_trace", "nn_module_stack", "source_fn_stack")


class GraphBuilder:
    """Builds nodes after `anchor` (a node of `trace.graph_module`).

    Attributes:
        time: Position of the anchor: values are read as they are right after it ran.
        emitted: Nodes added so far, in order; `discard` removes them again.
        sources: The nodes that are read, and what they hold.
        remade: The emitted nodes that compute a captured value again.

    With `saves`, tensors are those that autograd keeps for the backward: what is written later is copied. `examples`
    are remembered from call to call: the layers of a model emit the same.
    """

    def __init__(
        self,
        trace: Trace,
        anchor: fx.Node,
        replaced: dict[fx.Node, fx.Node],
        saves: bool = False,
        examples: dict[Any, Any] | None = None,
    ) -> None:
        self.trace = trace
        self.graph = trace.graph_module.graph
        self.anchor = anchor
        self.time = trace.order[anchor]
        self.device: torch.device = anchor.meta["example_value"].device
        self.emitted: list[fx.Node] = []
        self._shape_env = _torch_private.current_shape_env()
        self._records_gradient = anchor not in trace.tensors or trace.tensors[anchor].value.grad_mode
        self._cursor = anchor
        self._replaced = replaced
        self._saves = saves
        self._examples = {} if examples is None else examples
        self.sources: dict[fx.Node, Value] = {}
        self.remade: dict[fx.Node, Value] = {}
        self._values: dict[int, fx.Node] = {}
        self._sizes: dict[sympy.Expr, Any] = {}

    def discard(self) -> None:
        """Remove everything emitted: the graph is as before."""
        for node in reversed(self.emitted):
            self.graph.erase_node(node)
        self.emitted.clear()

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Emit one call; its example value is computed from its arguments'."""
        with self.graph.inserting_after(self._cursor):
            node = self.graph.call_function(op, args, kwargs)
        self._cursor = node
        self.emitted.append(node)
        for key in _COPIED_META:
            if key in self.anchor.meta:
                node.meta[key] = self.anchor.meta[key]
        node.meta["example_value"] = self._example(op, args, kwargs)
        return node

    def example(self, handle: Any) -> Any:
        """The example value of a handle; of a tensor only the look counts, see `Look.of`."""
        return handle.meta["example_value"] if isinstance(handle, fx.Node) else handle

    def look(self, node: fx.Node) -> Look:
        """Shape, strides, dtype and device of the tensor a node yields."""
        return Look.of(self.example(node))

    def tensor(self, value: Value) -> fx.Node:
        """A node that holds `value` at this place; raises Refusal if there is none and none can be made."""
        if value.id in self._values:
            return self._values[value.id]
        node = self._held(value) or self._snapshot(value)
        if node is None:
            node = self._under_view(value) or self._emit_again(value)
            self.remade[node] = value
        else:
            self.sources[node] = value
        if self._saves and self.is_written_later(node):
            node = self.call(aten.clone.default, node)
        self._values[value.id] = node
        return node

    def is_written_later(self, node: fx.Node) -> bool:
        """True if the memory of a Dynamo node is written after this place: autograd must not have saved it."""
        known = self.trace.tensors.get(node)
        return known is not None and any(time > self.time for time in known.storage.write_times)

    def size(self, size: Size) -> Any:
        """An int, or a node that holds the symbolic size."""
        expr = to_expr(size)
        if expr.is_Integer:
            return int(expr)
        if expr not in self._sizes:
            self._sizes[expr] = self._size_node(expr)
        return self._sizes[expr]

    def _example(self, op: Any, args: Any, kwargs: Any) -> Any:
        """Computed on fakes of our own: Dynamo's have several modes, and those inside vmap a level that is gone."""
        args, kwargs = pytree.tree_map_only(fx.Node, self.example, (args, kwargs))
        key = _key_of(op, args, kwargs, self._records_gradient)
        if key is not None and key in self._examples:
            return self._examples[key]
        example = self._compute_example(op, args, kwargs)
        if key is not None:
            self._examples[key] = example
        return example

    def _compute_example(self, op: Any, args: Any, kwargs: Any) -> Any:
        with _torch_private.only_fakes(self._shape_env), torch.set_grad_enabled(self._records_gradient):
            args, kwargs = pytree.tree_map_only(torch.Tensor, _look_alike, (args, kwargs))
            return op(*args, **kwargs)

    def _held(self, value: Value) -> fx.Node | None:
        holders = self.trace.nodes_holding(value, self.time)
        return self._replaced.get(holders[0], holders[0]) if holders else None

    def _under_view(self, value: Value) -> fx.Node | None:
        """From a node that holds all its elements otherwise: the product inside a `matmul` is in no node itself."""
        for user in value.users:
            if user.grad_mode < value.grad_mode or isinstance(user.op, str) or user.args[0] is not value:
                continue
            if user.name in ("view", "_unsafe_view", "unsqueeze", "squeeze"):
                undo, arguments = aten.reshape.default, [self.size(size) for size in value.shape]
            elif user.name == "permute":
                order = [dim % value.ndim for dim in user.args[1]]
                undo, arguments = aten.permute.default, [order.index(dim) for dim in range(value.ndim)]
            else:
                continue
            node = self.tensor(user) if self._held(user) is not None else self._under_view(user)
            if node is not None:
                return self.call(undo, node, arguments)
        return None

    def _snapshot(self, value: Value) -> fx.Node | None:
        """A copy made where the value was still intact, for small tensors (a cache position that is counted up)."""
        for tensor in self.trace.tensors.values():
            if tensor.value is not value or tensor.time > self.time or tensor.node in self._replaced:
                continue
            if not product(value.shape).is_number or product(value.shape) > _SNAPSHOT_LIMIT:
                return None
            place = tensor.node
            while place.op == "placeholder" and place.next.op == "placeholder":
                place = place.next
            with self.graph.inserting_after(place):
                node = self.graph.call_function(aten.clone.default, (tensor.node,))
            self.emitted.append(node)
            node.meta = {k: v for k, v in tensor.node.meta.items() if k in (*_COPIED_META, "example_value")}
            return node
        return None

    def _emit_again(self, value: Value) -> fx.Node:
        if value.op == "constant" and value.kwargs.get("value") is not None:
            return self.call(
                aten.full.default,
                [int(s) for s in value.shape],
                value.kwargs["value"],
                dtype=value.dtype,
                device=value.device,
            )
        if isinstance(value.op, str):
            raise Refusal("value_unavailable", f"{value!r} was overwritten or never visible where it is needed")
        if torch.Tag.nondeterministic_seeded in value.op.tags:
            raise Refusal("value_unavailable", f"{value!r} is random and cannot be computed again")
        args, kwargs = pytree.tree_map(
            self._argument, (list(value.args), dict(value.kwargs)), is_leaf=lambda a: isinstance(a, Value)
        )
        node = self.call(value.op, *args, **kwargs)
        if value.output_index is not None:
            node = self.call(operator.getitem, node, value.output_index)
        # What was computed under no_grad stays without gradient where it is computed with grad mode on.
        if self._records_gradient and not value.grad_mode and value.dtype.is_floating_point:
            node = self.call(aten.detach.default, node)
        return node

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, Value):
            return self.tensor(argument)
        if isinstance(argument, torch.SymInt):
            return self.size(argument)
        if isinstance(argument, torch.SymFloat):
            raise Refusal("value_unavailable", "a dynamic float is needed again")
        return argument

    def _size_node(self, expr: sympy.Expr) -> Any:
        node = self._held_size(expr)
        if node is not None:
            return node
        quotient = exact_quotient(expr, self._shape_env)
        if quotient is not None:
            whole = self._held_size(quotient[0])
            if whole is not None:
                return self._combine(operator.floordiv, whole, self.size(quotient[1]))
        combine, parts = _COMBINES.get(type(expr).__name__), expr.args
        if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and expr.exp > 1:
            combine, parts = operator.mul, (expr.base,) * int(expr.exp)
        if combine is None:
            raise Refusal("size_unavailable", f"no node of the graph holds the size {expr}")
        return functools.reduce(lambda a, b: self._combine(combine, a, b), [self.size(e) for e in parts])

    def _held_size(self, expr: sympy.Expr) -> fx.Node | None:
        """A node of Dynamo's graph that is this size, or the size of a tensor there."""
        wanted = from_size(expr)
        for node, position in self.trace.order.items():
            example = node.meta.get("example_value")
            if position <= self.time and isinstance(example, torch.SymInt) and from_size(example) == wanted:
                return node
        for node, tensor in self.trace.tensors.items():
            if tensor.time > self.time or (node.op == "placeholder" and not node.users):
                continue
            example = node.meta.get("example_value")
            if not isinstance(example, torch.Tensor):
                continue
            for dim, size in enumerate(example.shape):
                if not isinstance(size, int) and from_size(size) == wanted:
                    return self.call(aten.sym_size.int, self._replaced.get(node, node), dim)
        return None

    def _combine(self, op: Any, left: Any, right: Any) -> Any:
        return op(left, right) if isinstance(left, int) and isinstance(right, int) else self.call(op, left, right)


_COMBINES: dict[str, Any] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
}
"""Sympy node -> function of two sizes; floor division is torch's class or that of the masks."""


def _key_of(op: Any, args: Any, kwargs: Any, records_gradient: bool) -> Any:
    """Two calls with one key have equal examples; None where a size is a symbol."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    parts: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            look = Look.of(leaf)
            if not all(type(number) is int for number in (*look.shape, *look.stride)):
                return None
            parts.append((look.shape, look.stride, look.dtype, look.device, leaf.requires_grad))
        elif isinstance(leaf, (torch.SymInt, torch.SymFloat)):
            return None
        else:
            parts.append((type(leaf), leaf))
    return op, str(structure), tuple(parts), records_gradient


def _look_alike(tensor: torch.Tensor) -> torch.Tensor:
    look = Look.of(tensor)
    plain = torch.empty_strided(look.shape, look.stride, dtype=look.dtype, device=look.device)
    # invoke_subgraph asks the example of its body's result whether it requires grad
    return plain.requires_grad_(look.dtype.is_floating_point and tensor.requires_grad)
