"""The captured program: a functional SSA of ATen calls, with its way back to Dynamo's nodes.

`capture` fills these classes in; `normalize` and `recognize` read them and never touch an FX graph;
`rewrite` uses the bookkeeping (`Trace`) to place new nodes where every value they read is still intact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from .questions import Questions, edges


@edges("args", "kwargs", "node", "time", "users")
@dataclass(eq=False)
class Value:
    """One tensor value, immutable: an in-place op makes a new Value.

    Attributes:
        id: Unique, increasing in execution order.
        op: A *functional* `OpOverload` (`add_` is recorded as `add`), or one of the strings of `LEAF_OPS` and
            `WHOLE_OPS`, or "view_scatter": `args = (base, source, chain)`, the base storage's value after `source` was
            written through a view; `chain` is the tuple of view calls `(op, args, kwargs, output_index)` that lead
            from base to the view.
        args, kwargs: As in the call, tensors replaced by Values; numbers, SymInts, dtypes, lists as they are.
        shape, stride: Sizes are int or SymInt.
        dtype, device: Of the tensor.
        node: The Dynamo node during which it was computed; None for constants made outside.
        time: Position of that node in the graph; -1 before the first.
        grad_mode: Whether autograd would have recorded the computation.
        output_index: Which output of a multi-output op, else None.
        in_place: The call wrote it over its first argument, which is gone.
        users: Values that have this one among their arguments (views included), in order of execution.
        questions: Where it is told what the value is asked: see `questions`.
    """

    id: int
    op: torch._ops.OpOverload | str
    args: tuple
    kwargs: dict[str, Any]
    shape: tuple
    stride: tuple
    dtype: torch.dtype
    device: torch.device
    node: fx.Node | None
    time: int
    grad_mode: bool
    output_index: int | None = None
    in_place: bool = False
    users: list[Value] = field(default_factory=list)
    questions: Questions = field(default_factory=Questions)

    @property
    def name(self) -> str:
        """The op's short name: "mul", "_softmax", "input"."""
        return self.op if isinstance(self.op, str) else self.op.overloadpacket.__name__

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def place(self) -> str:
        """The name of its node, for texts; "" if it has none."""
        node = self.__dict__["node"]
        return "" if node is None else self.questions.called(node.name, _place_of, self)

    def __repr__(self) -> str:
        return self.questions.called(f"%{self.id}:{self.name}{list(self.shape)}", _repr_of, self)


def _place_of(reader: Any, value: Value) -> str:
    return value.place


def _repr_of(reader: Any, value: Value) -> str:
    return repr(value)


LEAF_OPS = ("input", "constant", "opaque")
"""Values with no visible producer. "input": a placeholder or get_attr. "constant": `kwargs["value"]` holds a Python
number when it has one element, else None. "opaque": the output of a Dynamo node that was not executed (a higher-order
op, a library call that is cut, something that failed); `node` says which. That of `F.linear` has
`kwargs["linear"] = (input, weight, bias or None)`, for who asks whether a tensor is a linear map of another."""

WHOLE_OPS = ("sdpa", "dropout")
"""Calls recorded whole because they decompose differently on every device. "sdpa": `kwargs` has query, key, value,
attn_mask, dropout_p, is_causal, scale, enable_gqa, always all eight. "dropout": args `(input, p, training)`."""


@dataclass(eq=False)
class Storage:
    """All tensors that share memory, and when that memory was written.

    Attributes:
        value: Value of the base tensor now (at the end of the trace).
        history: `(time, value)` of the base after each write, oldest first.
        shared_input: Two graph inputs share this memory, so a write through one changes the other.
    """

    value: Value
    history: list[tuple[int, Value]] = field(default_factory=list)
    shared_input: bool = False

    @property
    def write_times(self) -> list[int]:
        return [time for time, _ in self.history]


@dataclass(eq=False)
class NodeTensor:
    """What is known of a Dynamo node that yields one tensor.

    Attributes:
        node: The Dynamo node.
        time: Its position in the graph.
        value: Its value when the node ran.
        storage: The memory it lives in.
        is_base: It is the whole storage (not a view of another tensor), so `storage.history` is its own.
        held: Number of writes to the storage so far -> its value then, where it was read or written by then: a view
            has another value after a write through it, or through others.
    """

    node: fx.Node
    time: int
    value: Value
    storage: Storage
    is_base: bool
    held: dict[int, Value]


@dataclass(eq=False)
class Trace:
    """Everything `capture` learnt about one graph module.

    Attributes:
        graph_module: The Dynamo graph it describes, not modified by capture.
        values: All Values in order of execution.
        tensors: Dynamo node -> NodeTensor, for nodes that yield exactly one tensor.
        order: Dynamo node -> position.
        not_executed: `(node, code, text)` for each Dynamo node that became opaque, and why.
        subgraphs: `(node, attribute name)` of nested GraphModules that may be compiled on their own.
        subtraces: Attribute name -> trace of that nested GraphModule, in the modes (grad, autocast) it is called in.
        transformed: Nodes inside a vmap, grad or jvp level: their tensors carry a level that shapes do not show.
        questions: What its values are asked.
    """

    graph_module: fx.GraphModule
    values: list[Value] = field(default_factory=list)
    tensors: dict[fx.Node, NodeTensor] = field(default_factory=dict)
    order: dict[fx.Node, int] = field(default_factory=dict)
    not_executed: list[tuple[fx.Node, str, str]] = field(default_factory=list)
    subgraphs: list[tuple[fx.Node, str]] = field(default_factory=list)
    subtraces: dict[str, Trace] = field(default_factory=dict)
    transformed: set[fx.Node] = field(default_factory=set)
    questions: Questions = field(default_factory=Questions)
    _index: _Index | None = field(default=None, repr=False)

    def nodes_holding(self, value: Value, time: int) -> list[fx.Node]:
        """Dynamo nodes at or before `time` whose tensor still has exactly `value` at `time`, earliest first."""
        if self._index is None or self._index.num_tensors != len(self.tensors):
            self._index = _Index.of(self)
        found = []
        for tensor in self._index.candidates.get(value, ()):
            if tensor.time > time:
                break
            writes = sum(written <= time for written in tensor.storage.write_times)
            if tensor.held.get(writes) is value:
                found.append(tensor.node)
            elif tensor.is_base:
                past = [held for written, held in tensor.storage.history if written <= time]
                if past and past[-1] is value:
                    found.append(tensor.node)
        return found


@dataclass(eq=False)
class _Index:
    """For each value the tensors that hold it at some time, in graph order; valid for that many tensors."""

    candidates: dict[Value, list[NodeTensor]]
    num_tensors: int

    @classmethod
    def of(cls, trace: Trace) -> _Index:
        candidates: dict[Value, list[NodeTensor]] = {}
        for tensor in trace.tensors.values():
            held = list(tensor.held.values())
            if tensor.is_base:
                held += [value for written, value in tensor.storage.history if written >= tensor.time]
                # What it held when it was made may be the result of an earlier write.
            for value in dict.fromkeys(held):
                candidates.setdefault(value, []).append(tensor)
        return cls(candidates, len(trace.tensors))
