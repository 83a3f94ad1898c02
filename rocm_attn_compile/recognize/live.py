"""Who still reads a value: in the trace, and in Dynamo nodes the trace did not execute."""

from __future__ import annotations

import torch.fx as fx

from ..capture.trace import Trace, Value
from ..capture.unread import unread_nodes
from ..reasons import Refusal
from .proofs import Proofs


class LiveUsers:
    """Uses of values that matter. Built once per trace; answers are conservative (a doubtful use counts).

    Attributes:
        proofs: What was proved of masks, for sites that ask again.
    """

    def __init__(self, trace: Trace) -> None:
        self.proofs = Proofs()
        self._order = trace.order
        self._holders: dict[int, list[fx.Node]] = {}
        self._blind = {node for node, _, _ in trace.not_executed}
        self._unread = unread_nodes(trace)
        for node, tensor in trace.tensors.items():
            held = {value.id for value in tensor.held.values()}
            if tensor.is_base:
                held |= {value.id for _, value in tensor.storage.history}
            for key in held:
                self._holders.setdefault(key, []).append(node)
            if tensor.value.op == "opaque":
                self._blind.add(node)

    def holders(self, value: Value) -> list[fx.Node]:
        """Dynamo nodes whose tensor has (or at some time had) this value."""
        return self._holders.get(value.id, [])

    def users(self, value: Value, code: str) -> list[Value]:
        """Live SSA users, each once, in order; a use outside the trace raises Refusal with `code`."""
        for node in self.holders(value):
            for use in node.users:
                if use in self._unread:
                    continue
                if use.op == "output":
                    raise Refusal(
                        code, f"{node.name} is returned by the graph, to the caller or to what follows a graph break"
                    )
                if use in self._blind or use not in self._order:
                    raise Refusal(code, f"{node.name} goes into {use.name}, which the analysis does not look into")
        return [user for user in dict.fromkeys(value.users) if not self.is_dead(user)]

    def is_dead(self, value: Value) -> bool:
        """True if nothing reads the value, directly or through what nobody reads either."""
        if not self._unread.issuperset(self.holders(value)):
            return False
        return all(self.is_dead(user) for user in value.users)

    def describe(self, value: Value) -> str:
        """The value by the name of its Dynamo node."""
        names = ", ".join(node.name for node in self.holders(value))
        return names or (value.node.name if value.node is not None else value.name)
