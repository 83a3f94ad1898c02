"""Dynamo nodes that nothing needs: weights that a layer returns, views and means of them, and nobody reads."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from . import policy
from .trace import Trace, Value


def unread_nodes(trace: Trace) -> set[fx.Node]:
    """Nodes whose tensor neither the graph's results nor any effect depends on, directly or through others.

    A node counts as needed if it was not executed, may write to memory or to a shape (`unsqueeze_`), draws random
    numbers (which moves the generator on for what follows), or gives anything but one tensor.
    """
    needed = {trace.order[value.node] for value in trace.values if value.node in trace.order and _draws(value)}
    for tensor in trace.tensors.values():
        needed.update(tensor.storage.write_times)
    unread: set[fx.Node] = set()
    for node in reversed(trace.order):
        tensor_of_node = trace.tensors.get(node)
        if tensor_of_node is None or tensor_of_node.value.op == "opaque" or trace.order[node] in needed:
            continue
        if not policy.may_write(node) and all(user in unread for user in node.users):
            unread.add(node)
    return unread


def _draws(value: Value) -> bool:
    if value.op == "dropout":
        return bool(value.args[1] and value.args[2])
    if value.op == "sdpa":
        return bool(value.kwargs["dropout_p"])
    if isinstance(value.op, str):
        return False
    op: Any = value.op
    return torch.Tag.nondeterministic_seeded in op.tags
