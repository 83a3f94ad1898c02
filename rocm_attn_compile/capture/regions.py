"""Higher-order ops: their bodies are graphs of their own, captured where they are called.

A body is captured under the modes of its call (grad mode, autocast), from which also follows whether the call writes
its operands or returns views of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from rocm_attn_compile import _torch_private as private
from rocm_attn_compile.capture import policy
from rocm_attn_compile.capture.ambient import Ambient
from rocm_attn_compile.capture.memory import tensors_in

if TYPE_CHECKING:
    from rocm_attn_compile.capture.interpreter import Shadow


@dataclass(frozen=True)
class Effect:
    """What calling a body does to its operands, by position.

    Attributes:
        written: Operands that it may write.
        viewed: Operands that its results may be views of.
    """

    written: frozenset[int]
    viewed: frozenset[int]


class Regions:
    """The higher-order ops of one graph.

    Args:
        owner: The run over that graph.
    """

    def __init__(self, owner: Shadow) -> None:
        self._owner = owner
        # Attribute name -> circumstances of its first call, and what it does in them.
        self._seen: dict[str, tuple[Any, Effect]] = {}
        self._ambiguous: set[str] = set()

    def result(self, node: fx.Node, example: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Leaves for the results of a higher-order op, with its effects on its operands."""
        owner = self._owner
        name = policy.higher_order_name(node)
        operands = tensors_in((args, kwargs))
        if name in policy.NESTED_REGIONS:
            aliased = self._runbodies(node, operands)
        elif name in policy.PURE_REGIONS:
            aliased = []
        else:
            owner.memory.clobber(operands)
            aliased = operands
        return owner.leaves(node, example, "higher_order_op", f"{name} is a region of its own", aliased)

    def _runbodies(self, node: fx.Node, operands: list[torch.Tensor]) -> list[torch.Tensor]:
        """Capture the bodies of a call and apply what they do to its operands.

        Returns:
            The operands that results may be views of.
        """
        memory = self._owner.memory
        passed = [self._owner.result_of(used) for used in _operand_nodes(node, self._owner.trace.graph_module)]
        viewed: list[torch.Tensor] = []
        for attribute, body in bodies(node, self._owner.trace.graph_module):
            num_inputs = sum(inner.op == "placeholder" for inner in body.graph.nodes)
            # The body's inputs are the last operands (`cond` has its predicate before them).
            inputs = passed[len(passed) - num_inputs :] if len(passed) >= num_inputs else None
            effect = self._enter(node, attribute, body, inputs)
            if inputs is None:
                memory.clobber(operands)
                viewed += operands
            else:
                memory.clobber(inputs[position] for position in effect.written)
                viewed += [inputs[position] for position in effect.viewed]
        return viewed

    def _enter(self, node: fx.Node, attribute: str, body: fx.GraphModule, inputs: list[Any] | None) -> Effect:
        """Capture one body, unless it was before in the same circumstances."""
        owner = self._owner
        groups = owner.memory.alias_groups(inputs) if inputs is not None else None
        circumstances = (owner.ambient.grad_mode, private.autocast_state(), groups)
        if attribute in self._seen:
            first, effect = self._seen[attribute]
            if first == circumstances:
                return effect
            # One body, two meanings: a rewrite for one of them could be wrong for the other.
            self._ambiguous.add(attribute)
            owner.trace.subtraces.pop(attribute, None)
            owner.trace.subgraphs[:] = [entry for entry in owner.trace.subgraphs if entry[1] != attribute]
        from rocm_attn_compile.capture.interpreter import Shadow

        with Ambient(owner.ambient.grad_mode) as ambient:
            shadow = Shadow(body, ambient)
            owner.recorder.without_recording(shadow.run, inputs, groups or ())
        effect = _effect(shadow)
        self._seen.setdefault(attribute, (circumstances, effect))
        if inputs is not None and attribute not in self._ambiguous:
            owner.trace.subgraphs.append((node, attribute))
            owner.trace.subtraces[attribute] = shadow.trace
        return effect


def _effect(shadow: Shadow) -> Effect:
    memory = shadow.memory
    storages = {
        position: memory.state_of(fake).storage
        for position, fake in enumerate(shadow.inputs)
        if isinstance(fake, torch.Tensor)
    }
    results = {memory.state_of(output).storage for output in shadow.outputs if isinstance(output, torch.Tensor)}
    reachable = {storage for result in results for storage in memory.connected(result)}
    return Effect(
        frozenset(position for position, storage in storages.items() if storage.history),
        frozenset(position for position, storage in storages.items() if storage in reachable),
    )


def bodies(node: fx.Node, graph_module: fx.GraphModule) -> list[tuple[str, fx.GraphModule]]:
    """The bodies that a higher-order op calls, with their attribute names."""
    found = {}
    for used in node.all_input_nodes:
        if used.op == "get_attr":
            body = _attribute(graph_module, used)
            if isinstance(body, fx.GraphModule):
                found[str(used.target)] = body
    return list(found.items())


def _operand_nodes(node: fx.Node, graph_module: fx.GraphModule) -> list[fx.Node]:
    """The arguments of a higher-order op that are not bodies, in order, repeated ones included."""
    nodes = [leaf for leaf in pytree.tree_leaves(node.args) if isinstance(leaf, fx.Node)]
    return [
        leaf
        for leaf in nodes
        if not (leaf.op == "get_attr" and isinstance(_attribute(graph_module, leaf), torch.nn.Module))
    ]


def _attribute(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    item: Any = graph_module
    for name in str(node.target).split("."):
        item = getattr(item, name, None)
    return item
