"""The dispatch mode that turns ATen calls on fake tensors into values (see `memory`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rocm_attn_compile import _torch_private as private
from rocm_attn_compile.capture.memory import Look, Memory, TensorState, ViewStep, tensors_in, values_in
from rocm_attn_compile.capture.schema import Effects, effects
from rocm_attn_compile.capture.trace import Value

aten = torch.ops.aten


class Recorder(private.TorchDispatchMode):
    """Records every ATen call made while it is active and not paused.

    Attributes:
        memory: Where the values go.
        paused: Record nothing: a nested graph has its own recorder, and some runs are only for a shape.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory
        self.paused = False

    def without_recording(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call a function on fakes only to see what its result looks like."""
        before, self.paused = self.paused, True
        try:
            return function(*args, **kwargs)
        finally:
            self.paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run one call on the fakes below this mode and record it."""
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        effect = effects(func)
        before = self.memory.state_of(args[0]) if effect.changes_metadata else None
        out = func(*args, **kwargs)
        if before is not None:
            self._record_in_place_view(effect, before, args, kwargs, out)
        elif effect.writes:
            self._record_write(effect, args, kwargs, out)
        else:
            self._record_call(func, effect, args, kwargs, out)
        return out

    def _record_call(self, func: Any, effect: Effects, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """A call that writes nothing: its outputs are new tensors, or views."""
        memory = self.memory
        outputs = out if isinstance(out, (list, tuple)) else (out,)
        if not any(isinstance(output, torch.Tensor) for output in outputs):
            return
        if func in (aten.lift_fresh.default, aten.lift_fresh_copy.default) and not memory.is_known(args[0]):
            # `torch.tensor(0.5)` arrives here with the real tensor that it made.
            memory.leaf("constant", out, {"value": python_number(args[0])})
            return
        if func is aten.detach.default and _is_factory(memory.value_of(args[0])):
            # The Python bindings of `torch.ones` and its like detach their result; nothing is cut off there.
            state = memory.state_of(args[0])
            memory.place(out, state.value, state.storage, state.chain)
            return
        inputs = {id(tensor) for tensor in tensors_in((args, kwargs))}
        value_args, value_kwargs = memory.as_values(args), memory.as_values(kwargs)
        for position, output in enumerate(outputs):
            if not isinstance(output, torch.Tensor) or id(output) in inputs:
                continue
            index = None if out is output else position
            value = memory.new_value(func, value_args, value_kwargs, Look.of(output), index)
            known = memory.storage_at(output)
            source = argument(effect.aliased, args, kwargs) if effect.aliased else None
            if source is None and known is not None:
                # Undeclared: `_unsafe_view` shares memory with its argument all the same.
                source = args[0]
            if not isinstance(source, torch.Tensor):
                if known is None:
                    memory.own(output, value)
                else:
                    memory.place(output, value, known, None)
                continue
            state = memory.state_of(source)
            if known is not None and known is not state.storage:
                memory.place(output, value, known, None)
                memory.may_alias([output, source])
                continue
            step = ViewStep((func, value_args[1:], value_kwargs, index), Look.of(output))
            replayable = source is args[0] and state.chain is not None and not values_in(step.call)
            memory.place(output, value, state.storage, (*(state.chain or ()), step) if replayable else None)

    def _record_write(self, effect: Effects, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """A call that writes into its arguments, recorded as the functional call that makes the new content."""
        memory = self.memory
        targets = [tensor for place in effect.writes for tensor in tensors_in(argument(place, args, kwargs))]
        if effect.functional is not None and len(targets) == 1:
            state = memory.state_of(targets[0])
            values = memory.as_values(args), memory.as_values(kwargs)
            value = memory.new_value(effect.functional, *values, Look.of(targets[0]))
            value.in_place = True
            memory.write(state, value)
        else:
            for target in targets:
                state = memory.state_of(target)
                if not Look.of(target).is_same(Look.of(state.value)):
                    # `out=` and `resize_` change the tensor object itself: it is not what earlier nodes say it is.
                    state.chain, state.held = None, {}
                memory.write(state, memory.opaque(Look.of(target)))
        written = {id(target) for target in targets}
        for output in tensors_in(out):
            if id(output) in written:
                continue
            known = memory.storage_at(output)
            if known is None:
                memory.leaf("opaque", output)
            elif len(targets) == 1 and known is memory.state_of(targets[0]).storage:
                # The written tensor again, as another Python object.
                state = memory.state_of(targets[0])
                memory.place(output, state.value, known, state.chain)
            else:
                memory.place(output, memory.opaque(Look.of(output)), known, None)

    def _record_in_place_view(
        self, effect: Effects, state: TensorState, args: tuple, kwargs: dict[str, Any], out: Any
    ) -> None:
        """`transpose_` and its like: the tensor object becomes a view of what it was; the data stays."""
        memory = self.memory
        rest, keywords = memory.as_values(args[1:]), memory.as_values(kwargs)
        look = Look.of(args[0])
        value = memory.new_value(effect.functional, (state.value, *rest), keywords, look)
        step = ViewStep((effect.functional, rest, keywords, None), look)
        chain = (*state.chain, step) if state.chain is not None else None
        for tensor in (args[0], out):
            memory.place(tensor, value, state.storage, chain)


def _is_factory(value: Value) -> bool:
    """True for a tensor whose content depends on no other tensor, so that no gradient can flow into it."""
    if isinstance(value.op, str):
        return value.op == "constant"
    is_like = value.name.endswith("_like") or value.name.startswith("new_")
    return is_like or not values_in((value.args, value.kwargs))


def argument(place: tuple[int | None, str], args: tuple, kwargs: dict[str, Any]) -> Any:
    """The argument of a call at a place of its schema."""
    position, name = place
    if position is not None and position < len(args):
        return args[position]
    return kwargs.get(name)


def python_number(tensor: torch.Tensor) -> bool | int | float | complex | None:
    """The number in a real one-element tensor, else None."""
    if private.is_fake(tensor) or tensor.numel() != 1:
        return None
    with private.without_dispatch_modes():
        return tensor.detach().reshape(()).item()
