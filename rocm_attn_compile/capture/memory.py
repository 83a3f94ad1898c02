"""Who shares memory with whom, and what was written when: the bookkeeping under the recorder.

Every fake tensor has a state: its value, the storage it lives in, and the chain of views that leads to it from the
storage's base. A write makes a new value for the tensor and for the base, and moves the storage to a new version;
another view of that storage is re-derived through its chain when it is next read. What cannot be followed (an
undeclared alias, an `out=` argument) becomes an "opaque" value, which is exact because it claims nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from rocm_attn_compile import _torch_private as private
from rocm_attn_compile.capture.questions import Questions
from rocm_attn_compile.capture.trace import Storage, Value
from rocm_attn_compile.symbolic import same_size


@dataclass(frozen=True, eq=False)
class Look:
    """Shape, strides, dtype and device of a tensor at one moment (in-place views change the tensor object)."""

    shape: tuple
    stride: tuple
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor | Value) -> Look:
        """The look of a tensor or of a value."""
        if isinstance(tensor, Value):
            return cls(tensor.shape, tensor.stride, tensor.dtype, tensor.device)
        return cls(tuple(tensor.shape), safe_stride(tensor), tensor.dtype, tensor.device)

    def is_same(self, other: Look) -> bool:
        """True if provably the same, without asking the shape environment."""
        return (
            (self.dtype, self.device) == (other.dtype, other.device)
            and same_sizes(self.shape, other.shape)
            and same_sizes(self.stride, other.stride)
        )


@dataclass(frozen=True, eq=False)
class ViewStep:
    """One step from a base to a view: `call` is `(op, other args, kwargs, output index)`, `look` its result."""

    call: tuple[Any, tuple, dict[str, Any], int | None]
    look: Look


Chain = tuple[ViewStep, ...]


@dataclass(eq=False)
class TensorState:
    """What is known of one fake tensor.

    Attributes:
        tensor: The tensor, kept alive so that its id stays its own.
        value: Its value after the first `version` writes to its storage.
        storage: Its memory.
        version: See `value`.
        chain: Views from the base to it; empty for the base, None if unknown.
        held: Version -> value, of all versions in which it was looked at.
    """

    tensor: torch.Tensor
    value: Value
    storage: Storage
    version: int
    chain: Chain | None
    held: dict[int, Value] = field(default_factory=dict)

    def hold(self, value: Value) -> None:
        """It has `value` now."""
        self.value, self.version = value, len(self.storage.history)
        self.held[self.version] = value


class Memory:
    """Values, and the tensors and storages that hold them.

    Attributes:
        values, questions: The SSA, in order of execution, and what it is asked.
        node, time, grad_mode: Stamped on new values; set by the interpreter before each node.
    """

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.questions = Questions()
        self.node: fx.Node | None = None
        self.time, self.grad_mode = -1, True
        self._states: dict[int, TensorState] = {}
        # Keyed by the address of the untyped storage, which the entry keeps alive.
        self._storages: dict[int, tuple[Any, Storage]] = {}
        self._alias_groups: dict[Storage, list[set[Storage]]] = {}

    # --- making values ---

    def new_value(self, op: Any, args: tuple, kwargs: dict[str, Any], look: Look, index: int | None = None) -> Value:
        """Append a value; `args` and `kwargs` hold Values where the call had tensors."""
        value = Value(
            id=len(self.values),
            op=op,
            args=args,
            kwargs=kwargs,
            shape=look.shape,
            stride=look.stride,
            dtype=look.dtype,
            device=look.device,
            node=self.node,
            time=self.time,
            grad_mode=self.grad_mode,
            output_index=index,
            questions=self.questions,
        )
        self.values.append(value)
        for used in dict.fromkeys(values_in((args, kwargs))):
            used.users.append(value)
        return value

    def opaque(self, look: Look) -> Value:
        """A value of which nothing is claimed but its look."""
        return self.new_value("opaque", (), {}, look)

    def leaf(self, op: str, tensor: torch.Tensor, kwargs: dict[str, Any] | None = None) -> TensorState:
        """Give a new tensor the value of a leaf, in memory of its own."""
        return self.own(tensor, self.new_value(op, (), kwargs or {}, Look.of(tensor)))

    def as_values(self, tree: Any) -> Any:
        """The tree with tensors replaced by their current values."""
        return pytree.tree_map_only(torch.Tensor, self.value_of, tree)

    # --- tensors ---

    def is_known(self, tensor: torch.Tensor) -> bool:
        """True if the tensor object has been seen."""
        return id(tensor) in self._states

    def storage_at(self, tensor: torch.Tensor) -> Storage | None:
        """The recorded storage that the tensor lives in, if any."""
        known = self._storages.get(private.storage_address(tensor))
        return known[1] if known is not None else None

    def own(self, tensor: torch.Tensor, value: Value) -> TensorState:
        """Give a tensor a value in new memory, of which it is the base."""
        storage = Storage(value)
        self._storages[private.storage_address(tensor)] = (tensor.untyped_storage(), storage)
        return self.place(tensor, value, storage, ())

    def place(self, tensor: torch.Tensor, value: Value, storage: Storage, chain: Chain | None) -> TensorState:
        """Give a tensor a value in existing memory."""
        state = TensorState(tensor, value, storage, len(storage.history), chain)
        state.hold(value)
        self._states[id(tensor)] = state
        return state

    def state_of(self, tensor: torch.Tensor) -> TensorState:
        """The state of a tensor, brought up to date with writes through other tensors."""
        state = self._states.get(id(tensor))
        if state is None:
            storage = self.storage_at(tensor)
            if storage is None:
                return self.leaf("constant", tensor, {"value": None})
            return self.place(tensor, self.opaque(Look.of(tensor)), storage, None)
        if state.version != len(state.storage.history):
            state.hold(self._derive(state))
        return state

    def value_of(self, tensor: torch.Tensor) -> Value:
        """The current value of a tensor."""
        return self.state_of(tensor).value

    def _derive(self, state: TensorState) -> Value:
        """The value of a view of its storage's present content."""
        if state.chain is None:
            return self.opaque(Look.of(state.tensor))
        value = state.storage.value
        for step in state.chain:
            op, args, kwargs, index = step.call
            value = self.new_value(op, (value, *args), kwargs, step.look, index)
        return value

    # --- writes ---

    def write(self, state: TensorState, value: Value) -> None:
        """A tensor now has `value`; so has the part of its storage that it views."""
        storage = state.storage
        if state.chain == ():
            base = value
        elif state.chain is None:
            base = self.opaque(Look.of(storage.value))
        else:
            chain = tuple(step.call for step in state.chain)
            base = self.new_value("view_scatter", (storage.value, value, chain), {}, Look.of(storage.value))
        self._advance(storage, base)
        state.hold(value)
        self._clobber_aliases(storage)

    def touch(self, tensor: torch.Tensor) -> None:
        """Count a write that changes nothing, so that values read before are looked up anew."""
        storage = self.state_of(tensor).storage
        self._advance(storage, storage.value)

    def clobber(self, tensors: Iterable[torch.Tensor]) -> None:
        """Something unknown may have been written into these tensors."""
        for storage in dict.fromkeys(self.state_of(tensor).storage for tensor in tensors):
            self._advance(storage, self.opaque(Look.of(storage.value)))
            self._clobber_aliases(storage)

    def may_alias(self, tensors: Sequence[torch.Tensor]) -> None:
        """These tensors may share memory in a way that is not visible: a write to one may change all."""
        group = {self.state_of(tensor).storage for tensor in tensors}
        if len(group) > 1:
            for storage in group:
                self._alias_groups.setdefault(storage, []).append(group)

    def connected(self, storage: Storage) -> set[Storage]:
        """All storages that a write to this one may change, itself included."""
        reached, pending = {storage}, [storage]
        while pending:
            for group in self._alias_groups.get(pending.pop(), ()):
                pending.extend(group - reached)
                reached |= group
        return reached

    def alias_groups(self, items: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
        """Positions of the tensors among `items` that may share memory with one another, two or more a group."""
        groups: dict[Storage, list[int]] = {}
        for position, item in enumerate(items):
            if isinstance(item, torch.Tensor):
                storage = self.state_of(item).storage
                leader = next((other for other in groups if other in self.connected(storage)), storage)
                groups.setdefault(leader, []).append(position)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)

    def _clobber_aliases(self, written: Storage) -> None:
        # By value id, so that two runs number their values alike.
        for storage in sorted(self.connected(written) - {written}, key=lambda s: s.value.id):
            self._advance(storage, self.opaque(Look.of(storage.value)))

    def _advance(self, storage: Storage, base: Value) -> None:
        storage.value = base
        storage.history.append((self.time, base))


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """Tensors among the leaves of a tree, in order."""
    return _leaves_of_type(tree, torch.Tensor)


def values_in(tree: Any) -> list[Value]:
    """Values among the leaves of a tree, in order."""
    return _leaves_of_type(tree, Value)


def _leaves_of_type(tree: Any, kind: type) -> list:
    # By hand: pytree costs ten times as much on the small trees of a call, and these run for every call.
    found: list = []
    pending = [tree]
    while pending:
        item = pending.pop()
        if isinstance(item, kind):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            pending.extend(reversed(item))
        elif isinstance(item, dict):
            pending.extend(reversed(item.values()))
    return found


def same_sizes(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """True if two lists of sizes are provably equal; never guards."""
    return len(left) == len(right) and all(a is b or same_size(a, b) for a, b in zip(left, right, strict=True))


def safe_stride(tensor: torch.Tensor) -> tuple:
    """Strides of a tensor; contiguous ones where it has none to give (sparse, functorch wrappers)."""
    try:
        stride = tuple(tensor.stride())
    except (RuntimeError, NotImplementedError):
        stride = ()
    return stride if len(stride) == tensor.dim() else contiguous_stride(tuple(tensor.shape))


def contiguous_stride(shape: tuple) -> tuple:
    """Strides of a contiguous tensor of that shape."""
    strides: list[Any] = []
    size: Any = 1
    for extent in reversed(shape):
        strides.insert(0, size)
        size = size * extent
    return tuple(strides)
