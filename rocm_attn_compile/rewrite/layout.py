"""Which memory layout the op's output should have, so that what follows needs no copy and no view fails."""

from __future__ import annotations

import torch
import torch.fx as fx

from ..capture.memory import Look
from ..capture.trace import Value
from ..recognize.region import Region
from ..symbolic import is_one, same_size, to_expr
from .builder import GraphBuilder
from .canonical import is_in_layout

aten = torch.ops.aten

_SWAP_NAMES = frozenset(("transpose", "permute", "swapaxes"))
_COPYING_NAMES = frozenset(("reshape", "contiguous", "flatten", "clone"))


def choose_out_layout(builder: GraphBuilder, target: fx.Node, region: Region, value: Value) -> str:
    """ "bshd" if eager's result lies so, or if every reader swaps heads and queries and then copies; else "bhsd".

    The usual `(p @ v).transpose(1, 2).reshape(b, s, h * d)` then reads memory that is already in order.
    """
    roles = region.roles
    if not is_in_layout(region.labels.of(value), [roles.batch, roles.heads, roles.query, roles.value_depth]):
        return "bhsd"
    if target.users and all(_swaps_then_copies(user) for user in target.users):
        return "bshd"
    return "bshd" if _order_in_memory(builder.look(target)) == [0, 2, 1, 3] else "bhsd"


def with_strides_of(builder: GraphBuilder, result: fx.Node, target: fx.Node) -> fx.Node:
    """`result` with the memory layout that eager gives `target`, copied if it has another one and a reader may see it.

    A `.view` fails on any other layout, also one outside the graph.
    """
    wanted = builder.look(target)
    pairs = zip(wanted.shape, wanted.stride, builder.look(result).stride)
    if all(is_one(size) or same_size(a, b) for size, a, b in pairs):
        return result
    readers = [user for user in target.users if user not in builder.emitted]
    if all(_name(reader) in _COPYING_NAMES or _swaps_then_copies(reader) for reader in readers):
        return result
    order = _order_in_memory(wanted)
    if order is None:  # not dense in any order, and no view that joins dimensions is legal in eager either
        return result
    if order == list(range(len(order))):
        return builder.call(aten.clone.default, result, memory_format=torch.contiguous_format)
    copied = builder.call(aten.permute.default, result, order)
    copied = builder.call(aten.clone.default, copied, memory_format=torch.contiguous_format)
    return builder.call(aten.permute.default, copied, [order.index(i) for i in range(len(order))])


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


def _swaps_then_copies(node: fx.Node) -> bool:
    name = _name(node)
    if name not in _SWAP_NAMES or not node.users:
        return False
    numbers = list(node.args[1:])
    if len(numbers) == 1 and isinstance(numbers[0], (tuple, list)):
        numbers = list(numbers[0])
    swaps = numbers in ([1, 2], [2, 1], [-3, -2], [-2, -3]) if name != "permute" else numbers == [0, 2, 1, 3]
    return swaps and all(_name(user) in _COPYING_NAMES for user in node.users)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "").split(".")[0]
