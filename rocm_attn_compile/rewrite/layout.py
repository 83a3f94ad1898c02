"""Which memory layout the op's output should have, so that what follows needs no copy and no view fails."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx as fx

from ..capture.memory import Look
from ..recognize.axes import Atom, Dim, atoms_of, resolve
from ..symbolic import is_one, same_size, to_expr
from .builder import GraphBuilder

aten = torch.ops.aten


def choose_out_layout(builder: GraphBuilder, target: fx.Node, groups: Sequence[Sequence[Atom]], dims: list[Dim]) -> str:
    """ "bshd" if every reader goes through the memory in that order, or if eager's result lies so; else "bhsd".

    The usual `(p @ v).transpose(1, 2).reshape(b, s, h * d)` then finds it in order. `groups` are the axes (batch,
    heads, query, channels), `dims` those of what the target held.
    """
    batch, heads, query, channels = groups
    if not (resolve(heads) and resolve(query)):
        return "bhsd"  # both are the same
    bshd = atoms_of([tuple(g) for g in (batch, query, heads, channels)])
    orders = [_order_read(reader, len(dims)) for reader in target.users]
    if not orders or None in orders:
        orders = [_order_in_memory(builder.look(target))]
    return "bshd" if all(order and atoms_of([dims[d] for d in order]) == bshd for order in orders) else "bhsd"


def with_strides_of(builder: GraphBuilder, result: fx.Node, target: fx.Node) -> fx.Node:
    """`result` with the memory layout that eager gives `target`, copied if it has another one and a reader may see it.

    A `.view` fails on any other layout, also one outside the graph.
    """
    wanted, given = builder.look(target), builder.look(result)
    pairs = zip(wanted.shape, wanted.stride, given.stride)
    if all(is_one(size) or same_size(a, b) for size, a, b in pairs):
        return result
    present = _order_in_memory(given)
    readers = [user for user in target.users if user not in builder.emitted]
    if present is not None and all(_agree(_order_read(r, len(present)), present, given) for r in readers):
        return result
    order = _order_in_memory(wanted)
    if order is None:  # not dense in any order, and no view that joins dimensions is legal in eager either
        return result
    if order == list(range(len(order))):
        return builder.call(aten.clone.default, result, memory_format=torch.contiguous_format)
    copied = builder.call(aten.permute.default, result, order)
    copied = builder.call(aten.clone.default, copied, memory_format=torch.contiguous_format)
    return builder.call(aten.permute.default, copied, [order.index(i) for i in range(len(order))])


def keys_side_by_side(builder: GraphBuilder, bias: fx.Node) -> fx.Node:
    """A bias in whose memory the keys of a query are neighbours, copied if others are.

    As T5 makes it, `table[buckets]` of (q, k, heads) permuted, the heads are: each head would fetch all heads' numbers,
    in every layer, and its gradient write so. Layers that share a bias share the copy, which AOTAutograd makes once.
    """
    look = builder.look(bias)
    steps = [stride for size, stride in zip(look.shape, look.stride) if not is_one(size)]
    if is_one(look.shape[-1]) or same_size(look.stride[-1], 1) or any(same_size(step, 0) for step in steps):
        return bias
    return builder.call(aten.clone.default, bias, memory_format=torch.contiguous_format)


def _order_read(reader: fx.Node, ndim: int) -> list[int] | None:
    """The order of dimensions in which a reader wants the memory; None for one that may see the strides.

    `reshape` is free where the memory is in the order of its input, and gives eager's values in any case.
    """
    identity = list(range(ndim))
    if _joins(reader):
        return identity
    order = _permutation(reader, ndim)
    return order if order and reader.users and all(map(_joins, reader.users)) else None


def _joins(node: fx.Node) -> bool:
    return _name(node) in ("reshape", "flatten", "contiguous") and not node.kwargs


def _permutation(node: fx.Node, ndim: int) -> list[int] | None:
    """The dimensions of the input, in the order of the output, for a call that permutes them."""
    numbers = list(node.args[1:])
    if len(numbers) == 1 and isinstance(numbers[0], (tuple, list)):
        numbers = list(numbers[0])
    if node.kwargs or not all(isinstance(number, int) for number in numbers):
        return None
    dims = [int(number) % ndim for number in numbers]  # type: ignore[arg-type]
    if _name(node) == "permute":
        return dims
    if _name(node) not in ("transpose", "swapaxes") or len(dims) != 2:
        return None
    order = list(range(ndim))
    order[dims[0]], order[dims[1]] = dims[1], dims[0]
    return order


def _agree(order: Sequence[int] | None, other: Sequence[int], look: Look) -> bool:
    """True if two orders differ only in where dimensions of size 1 stand."""

    def wide(dims: Sequence[int]) -> list[int]:
        return [d for d in dims if not is_one(look.shape[d])]

    return order is not None and wide(order) == wide(other)


def _order_in_memory(tensor: Look) -> list[int] | None:
    """The dimensions from the outermost to the innermost in memory; None if the tensor is not dense."""
    order: list[int] = []
    expected = to_expr(1)
    while len(order) < len(tensor.shape):
        free = [d for d in reversed(range(len(tensor.shape))) if d not in order]
        fitting = [d for d in free if is_one(tensor.shape[d]) or same_size(tensor.stride[d], expected)]
        if not fitting:
            return None
        order.insert(0, fitting[0])
        expected = expected * to_expr(tensor.shape[fitting[0]])
    return order


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "").split(".")[0]
