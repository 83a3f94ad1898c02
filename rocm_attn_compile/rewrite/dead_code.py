"""Remove what a rewritten site no longer needs, and nothing else.

FX's own dead-code elimination is unsafe here: it takes in-place methods (`masked_fill_`) for pure and deletes live
writes. Here only nodes that computed a value of a rewritten site may go, with what reads them in vain and what only
they read. A node that writes to memory goes only together with every tensor that shares the memory, when nobody
outside reads it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.fx as fx

from ..capture.trace import Storage, Trace, Value
from ..capture.unread import unread_nodes

_KEPT = ("placeholder", "get_attr", "output")


def remove_dead(trace: Trace, values: Iterable[Value]) -> None:
    """Erase unused nodes that computed `values`."""
    graph, values = trace.graph_module.graph, list(values)
    ids = {value.id for value in values}
    # A dropout of nothing, or a cast to the same dtype, holds a value that another node computed.
    holders = [*(value.node for value in values), *(n for n, held in trace.tensors.items() if held.value.id in ids)]
    candidates = {n for n in holders if n is not None and n.op not in _KEPT}
    unread = unread_nodes(trace)
    for node in trace.order:  # in order, so that readers of readers follow
        if node in unread and any(source in candidates for source in node.all_input_nodes):
            candidates.add(node)
    for node in reversed(trace.order):  # what only they read: masks
        if node in unread and node.op not in _KEPT and node.users and candidates.issuperset(node.users):
            candidates.add(node)
    by_time = {position: node for node, position in trace.order.items()}
    writers: dict[fx.Node, Storage] = {}
    aliases: dict[int, tuple[Storage, set[fx.Node]]] = {}
    for node, tensor in trace.tensors.items():
        aliases.setdefault(id(tensor.storage), (tensor.storage, set()))[1].add(node)
    for storage, nodes in aliases.values():
        for time in storage.write_times:
            writers[by_time[time]] = storage
            nodes.add(by_time[time])
    erased: set[fx.Node] = set()
    changed = True
    while changed:
        changed = False
        for node in sorted(candidates - erased, key=lambda n: -trace.order[n]):
            if not node.users and node not in writers:
                graph.erase_node(node)
                erased.add(node)
                changed = True
        for storage, nodes in aliases.values():
            group = nodes - erased
            if storage.write_times and group and group <= candidates and _is_closed(group):
                for node in sorted(group, key=lambda n: -trace.order[n]):
                    graph.erase_node(node)
                erased |= group
                changed = True


def _is_closed(group: set[fx.Node]) -> bool:
    return all(user in group for node in group for user in node.users)
