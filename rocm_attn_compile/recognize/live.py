"""Who still reads a value: in the trace, and in Dynamo nodes the trace did not execute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from ..capture.trace import Trace, Value
from ..capture.unread import unread_nodes
from ..reasons import Refusal
from .proofs import Proofs


def _question(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method whose answer is on the record, and not what it reads: see `capture.questions`."""

    @functools.wraps(method)
    def asked(self: LiveUsers, *arguments: Any) -> Any:
        return self.questions.ask(method, self, *arguments)

    return asked


class LiveUsers:
    """Uses of values that matter, and what their Dynamo nodes say. Built once per trace.

    Answers are conservative: a doubtful use counts.

    Attributes:
        questions: Where it is recorded what is asked.
        proofs: What was proved of masks, for sites that ask again.
    """

    def __init__(self, trace: Trace) -> None:
        self.questions = trace.questions
        self.proofs = Proofs(trace.questions)
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

    @_question
    def readers(self, value: Value) -> tuple[list[Value], bool]:
        """Live SSA users, each once, in order, and whether something outside the trace reads it, too."""
        uses = [use for node in self._held_by(value) for use in node.users if use not in self._unread]
        outside = any(use.op == "output" or use in self._blind or use not in self._order for use in uses)
        return [user for user in dict.fromkeys(value.users) if not self._is_dead(user)], outside

    @_question
    def users(self, value: Value, code: str) -> list[Value]:
        """Live SSA users, each once, in order; a use outside the trace raises Refusal with `code`."""
        name = self.questions.called
        for node in self._held_by(value):
            for use in node.users:
                if use in self._unread:
                    continue
                if use.op == "output":
                    raise Refusal(
                        code,
                        f"{name(node.name)} is returned by the graph, to the caller or to what follows a graph break",
                    )
                if use in self._blind or use not in self._order:
                    raise Refusal(
                        code, f"{name(node.name)} goes into {name(use.name)}, which the analysis does not look into"
                    )
        return [user for user in dict.fromkeys(value.users) if not self._is_dead(user)]

    @_question
    def requires_grad(self, value: Value) -> list[bool]:
        """Whether autograd tracks it, as each Dynamo node says whose tensor has (or at some time had) this value."""
        return [example.requires_grad for example in self._examples(value)]

    @_question
    def is_parameter(self, value: Value) -> bool:
        """True for a parameter of the model."""
        return any(isinstance(example, torch.nn.Parameter) for example in self._examples(value))

    @_question
    def reads_parameter(self, value: Value) -> bool:
        """True if the Dynamo node of the value reads a parameter of the model."""
        inputs = value.node.all_input_nodes if value.node is not None else []
        return any(isinstance(node.meta.get("example_value"), torch.nn.Parameter) for node in inputs)

    @_question
    def first_alike(self, value: Value) -> Value:
        """See `Proofs.first`."""
        return self.proofs.first(value)

    @_question
    def are_alike(self, left: Value, right: Value) -> bool:
        """True if two values are computed alike from the same values."""
        return self.proofs.first(left) is self.proofs.first(right)

    def describe(self, value: Value) -> str:
        """The value by the name of its Dynamo node, for texts."""
        with self.questions.unrecorded():
            names = ", ".join(node.name for node in self._held_by(value)) or value.place or value.name
        return self.questions.called(names, LiveUsers.describe, value)

    def _held_by(self, value: Value) -> list[fx.Node]:
        """Dynamo nodes whose tensor has (or at some time had) this value."""
        return self._holders.get(value.id, [])

    def _examples(self, value: Value) -> list[torch.Tensor]:
        examples = [node.meta.get("example_value") for node in self._held_by(value)]
        return [example for example in examples if isinstance(example, torch.Tensor)]

    def _is_dead(self, value: Value) -> bool:
        """True if nothing reads the value, directly or through what nobody reads either."""
        if not self._unread.issuperset(self._held_by(value)):
            return False
        return all(self._is_dead(user) for user in value.users)
