"""Runs a Dynamo graph node by node on throw-away fakes, deciding for each node whether it may run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from rocm_attn_compile import _torch_private as private
from rocm_attn_compile.capture import policy, whole
from rocm_attn_compile.capture.ambient import Ambient
from rocm_attn_compile.capture.examples import (
    MISSING,
    Opaque,
    check_result,
    contradicts,
    example_of,
    is_foreign,
    reshaped_in_place,
    target_name,
)
from rocm_attn_compile.capture.memory import Look, Memory, contiguous_stride, tensors_in
from rocm_attn_compile.capture.recorder import Recorder, python_number
from rocm_attn_compile.capture.regions import Regions
from rocm_attn_compile.capture.trace import NodeTensor, Trace


class Shadow:
    """One run over one graph. Not reusable.

    Args:
        graph_module: The graph; only read.
        ambient: Modes at the start of the graph; followed along.

    Attributes:
        trace: What was learnt.
        inputs: The fakes of the placeholders; other objects as they are.
        outputs: Flat results of the graph.
    """

    def __init__(self, graph_module: fx.GraphModule, ambient: Ambient) -> None:
        self.trace = Trace(graph_module)
        self.memory = Memory()
        self.trace.values, self.trace.questions = self.memory.values, self.memory.questions
        self.recorder = Recorder(self.memory)
        self.ambient = ambient
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._env: dict[fx.Node, Any] = {}
        # Node -> code, for tensors that plain ATen calls on fakes cannot stand for.
        self._foreign: dict[fx.Node, str] = {}
        # Address of a real storage -> fakes of the inputs and attributes that live in it.
        self._sharers: dict[int, list[torch.Tensor]] = {}
        self._attributes: list[torch.Tensor] = []
        self._regions = Regions(self)

    def run(self, example_inputs: Sequence[Any] | None, aliases: Iterable[Sequence[int]] = ()) -> Trace:
        """Record the graph.

        Args:
            example_inputs: What the graph is called with, if known, one per placeholder.
            aliases: Groups of placeholder positions that may share memory, besides what `example_inputs` shows.
        """
        nodes = list(self.trace.graph_module.graph.nodes)
        self.trace.order.update({node: position for position, node in enumerate(nodes)})
        self._foreign.update(reshaped_in_place(nodes))
        placeholders = [node for node in nodes if node.op == "placeholder"]
        known = example_inputs is not None and len(example_inputs) == len(placeholders)
        reals = dict(zip(placeholders, example_inputs, strict=True)) if known and example_inputs is not None else {}
        with self.recorder:
            for time, node in enumerate(nodes):
                self.memory.node, self.memory.time = node, time
                self.memory.grad_mode = self.ambient.grad_mode
                if node.op == "output":
                    self.outputs = pytree.tree_leaves(self._lookup(node.args))
                    break
                result = self._env[node] = self._result(node, reals)
                if self.ambient.functorch_depth:
                    self.trace.transformed.add(node)
                if isinstance(result, torch.Tensor):
                    state = self.memory.state_of(result)
                    is_base = state.chain == ()
                    self.trace.tensors[node] = NodeTensor(node, time, state.value, state.storage, is_base, state.held)
                if node.op == "placeholder":
                    self.inputs.append(result)
                    if len(self.inputs) == len(placeholders):
                        self._join_aliases(aliases)
        return self.trace

    def _join_aliases(self, aliases: Iterable[Sequence[int]]) -> None:
        for group in aliases:
            self._share([self.inputs[position] for position in group])

    # --- one node ---

    def _result(self, node: fx.Node, reals: dict[fx.Node, Any]) -> Any:
        example = example_of(node)
        if node.op == "placeholder":
            return self._placeholder(node, example, reals.get(node))
        if node.op == "get_attr":
            return self._attribute(node)
        if self.ambient.switch(node):
            return None
        try:
            if policy.higher_order_name(node) is not None:
                return self._regions.result(node, example, *self._arguments(node))
            return self._call(node, example)
        except Opaque as reason:
            return self._opaque(node, example, reason.code, str(reason))
        except Exception as error:  # a fake run can fail in ways that the real run does not
            first_line = (str(error).splitlines() or [""])[0]
            return self._opaque(node, example, "failed", f"{target_name(node)}: {type(error).__name__}: {first_line}")

    def _placeholder(self, node: fx.Node, example: Any, real: Any) -> Any:
        if example is MISSING:
            example = real
        if not isinstance(example, torch.Tensor):
            return example
        if is_foreign(example):
            self._foreign[node] = "tensor_subclass"
        elif isinstance(real, torch.Tensor) and contradicts(example, real):
            self._foreign[node] = "meta_mismatch"
        fake = self.fresh(example, "input")
        self._note_memory(real if isinstance(real, torch.Tensor) else example, fake)
        return fake

    def _attribute(self, node: fx.Node) -> Any:
        item: Any = self.trace.graph_module
        for name in str(node.target).split("."):
            item = getattr(item, name)
        if not isinstance(item, torch.Tensor):
            return item
        if is_foreign(item):
            self._foreign[node] = "tensor_subclass"
        if str(node.target).startswith("_tensor_constant"):
            # FX's own name for a tensor that was made while tracing: nobody else can write it.
            return self.fresh(item, "constant", {"value": python_number(item)})
        fake = self.fresh(item, "input")
        self._note_memory(item, fake)
        self._attributes.append(fake)
        return fake

    def _call(self, node: fx.Node, example: Any) -> Any:
        if node.op == "call_module":
            raise Opaque("call_module", f"module {node.target} is called as a whole")
        name = target_name(node)
        args, kwargs = self._arguments(node)
        foreign = next((self._foreign[used] for used in node.all_input_nodes if used in self._foreign), None)
        has_tensors = bool(tensors_in((args, kwargs))) or foreign is not None
        is_plain_result = example is not MISSING and not tensors_in(example)
        if is_plain_result and not (has_tensors and policy.may_write(node)):
            return example  # sizes and numbers are Dynamo's own symbols, never computed anew
        if policy.is_functorch(node):
            raise Opaque("functorch", f"{name} crosses a vmap, grad or jvp level")
        if foreign is not None:
            raise Opaque(foreign, f"{name} works on {_kinds_of(node) or 'a tensor that fakes cannot stand for'}")
        if node in self._foreign:
            raise Opaque(self._foreign[node], f"{name} makes a tensor that is reshaped in place later")
        if any(is_foreign(tensor) for tensor in tensors_in(example)):
            raise Opaque("tensor_subclass", f"{name} returns a tensor that is not a plain strided one")
        if policy.is_identity(node):
            return args[0]
        if policy.is_data_attribute(node):
            return args[0].detach()
        if isinstance(example, torch.Tensor) and policy.is_cut(node):
            return self.fresh(example, "opaque", whole.factors(self.memory, node.target, args, kwargs))
        if node.op == "call_function" and node.target in whole.SPELLINGS:
            result = whole.record(self.recorder, node.target, args, kwargs, self._like(example))
        else:
            if not policy.is_runnable(node):
                raise Opaque("stateful_call", f"{name} is not known to be a plain tensor function")
            if private.makes_unbacked_size(example, [example_of(used) for used in node.all_input_nodes]):
                raise Opaque("data_dependent_shape", f"{name} returns a size that depends on data")
            if node.op == "call_method":
                result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                result = node.target(*args, **kwargs)  # type: ignore[operator]
            if policy.is_in_place_view(node):
                self._forget(result)
        if example is not MISSING and not is_plain_result:
            check_result(name, result, example)
        return example if is_plain_result else result

    def _forget(self, tensor: torch.Tensor) -> None:
        """Earlier nodes gave this very tensor object, which now has another shape: they hold their values no longer."""
        for earlier in self.trace.tensors.values():
            if self._env[earlier.node] is tensor:
                earlier.is_base = False
        self.memory.touch(tensor)

    def result_of(self, node: fx.Node) -> Any:
        """What an earlier node gave: fakes, numbers, symbols or modules."""
        return self._env[node]

    def _arguments(self, node: fx.Node) -> tuple[tuple, dict[str, Any]]:
        return self._lookup(node.args), self._lookup(node.kwargs)

    def _lookup(self, arguments: Any) -> Any:
        return fx.map_arg(arguments, self._env.__getitem__)

    # --- leaves ---

    def _opaque(self, node: fx.Node, example: Any, code: str, text: str) -> Any:
        """Stand in for a node that did not run: it may have written its operands and may return views of them."""
        operands = tensors_in(self._arguments(node))
        if node.op == "call_module":
            operands += self._attributes
        if policy.may_write(node):
            self.memory.clobber(operands)
        return self.leaves(node, example, code, text, operands)

    def leaves(self, node: fx.Node, example: Any, code: str, text: str, aliased: Sequence[torch.Tensor]) -> Any:
        """Opaque results for a node that did not run, which may share memory with `aliased`."""
        examples = tensors_in(example)
        if examples or aliased:
            self.trace.not_executed.append((node, code, text))
        if any(is_foreign(tensor) for tensor in examples):
            self._foreign[node] = "tensor_subclass"
        if example is MISSING:
            return None
        result = pytree.tree_map_only(torch.Tensor, lambda tensor: self.fresh(tensor, "opaque"), example)
        self.memory.may_alias([*tensors_in(result), *aliased])
        return result

    def fresh(self, example: torch.Tensor, op: str, kwargs: dict[str, Any] | None = None) -> torch.Tensor:
        """A new fake that looks like `example`, recorded as a leaf."""
        fake = self._like(example)
        assert fake is not None
        self.memory.leaf(op, fake, kwargs)
        return fake

    def _like(self, example: Any) -> torch.Tensor | None:
        if not isinstance(example, torch.Tensor):
            return None
        look = Look.of(example)
        shape, stride = look.shape, look.stride
        if is_foreign(example):
            # Only its place in memory matters: whatever uses it is not executed.
            shape = (1,) * len(shape)
            stride = contiguous_stride(shape)
        return self.recorder.without_recording(torch.empty_strided, shape, stride, dtype=look.dtype, device=look.device)

    def _note_memory(self, real: torch.Tensor, fake: torch.Tensor) -> None:
        """Find the inputs that share memory, by the storage of the tensors the graph was compiled with."""
        address = private.storage_address_or_none(real)
        if address is not None:
            sharers = self._sharers.setdefault(address, [])
            sharers.append(fake)
            self._share(sharers)

    def _share(self, fakes: Sequence[torch.Tensor]) -> None:
        if len(fakes) > 1:
            self.memory.may_alias(fakes)
            for fake in fakes:
                self.memory.state_of(fake).storage.shared_input = True


def _kinds_of(node: fx.Node) -> str:
    """The foreign tensors a node reads, in words; "" if they are foreign in another way than by their class."""
    examples = [example for used in node.all_input_nodes for example in tensors_in(example_of(used))]
    kinds = dict.fromkeys(f"{type(t).__name__} ({t.layout})" for t in examples if is_foreign(t))
    return f"{', '.join(kinds)}, not on plain strided tensors" if kinds else ""
