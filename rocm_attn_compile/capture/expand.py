"""Splices attention-bearing composites into Dynamo's graph as pre-dispatch ATen calls.

The calls are traced before autograd and autocast are applied, so that both still act on them when the graph runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from rocm_attn_compile import _torch_private as private
from rocm_attn_compile.capture import policy
from rocm_attn_compile.capture.ambient import Ambient
from rocm_attn_compile.capture.composites import COMPOSITES, IGNORES_AUTOCAST
from rocm_attn_compile.capture.examples import MISSING, Opaque, check_result, example_of, target_name
from rocm_attn_compile.capture.memory import tensors_in
from rocm_attn_compile.capture.regions import bodies

_KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack")


@dataclass
class Expansion:
    """What `expand` did.

    Attributes:
        expanded: Names of the nodes that were replaced by their parts.
        refused: `(node, text)` for composites that stay whole, and why.
    """

    expanded: list[str] = field(default_factory=list)
    refused: list[tuple[fx.Node, str]] = field(default_factory=list)


def expand(graph_module: fx.GraphModule) -> Expansion:
    """Replace every composite of `COMPOSITES` in the graph, and in regions that are compiled by themselves.

    A composite that cannot be traced or spliced is left exactly as it is. Never raises for a legal graph.
    """
    result = Expansion()
    with Ambient() as ambient:
        _expand_graph(graph_module, ambient, result)
    return result


def _expand_graph(graph_module: fx.GraphModule, ambient: Ambient, result: Expansion) -> None:
    before = len(result.expanded)
    for node in list(graph_module.graph.nodes):
        if ambient.switch(node):
            continue
        if policy.higher_order_name(node) in policy.NESTED_REGIONS:
            for _, body in bodies(node, graph_module):
                with Ambient(ambient.grad_mode) as inner:
                    _expand_graph(body, inner, result)
        if node.op != "call_function" or node.target not in COMPOSITES:
            continue
        try:
            traced = _trace(node)
        except Exception as error:  # a composite that cannot be traced is a legal program all the same
            first_line = (str(error).splitlines() or [""])[0]
            result.refused.append((node, f"{target_name(node)}: {type(error).__name__}: {first_line}"))
            continue
        name = node.name
        _splice(graph_module.graph, node, traced, ambient.grad_mode)
        result.expanded.append(name)
    if len(result.expanded) > before:
        graph_module.graph.lint()
        graph_module.recompile()


def _trace(node: fx.Node) -> fx.Graph:
    """The parts of a composite as a graph with one placeholder per distinct node among its arguments.

    Raises:
        Exception: Anything that tracing raises; `Opaque` if the parts cannot stand in for the node.
    """
    target: Any = node.target
    if target in IGNORES_AUTOCAST and private.autocast_state():
        raise Opaque("autocast", "it ignores autocast, its parts would not")
    operands = node.all_input_nodes
    examples = [example_of(operand) for operand in operands]
    if any(example is MISSING for example in examples) or not all(map(private.is_fake, tensors_in(examples))):
        raise Opaque("missing_example", "its arguments are not plain fake tensors")
    if any(user.op != "call_function" or target_name(user) != "getitem" for user in node.users) and not isinstance(
        example_of(node), torch.Tensor
    ):
        raise Opaque("tuple_used_whole", "its result is used as a tuple")

    def parts(*actual: Any) -> Any:
        values = dict(zip(operands, actual, strict=True))
        return COMPOSITES[target](
            *fx.map_arg(node.args, values.__getitem__), **fx.map_arg(node.kwargs, values.__getitem__)
        )

    traced = private.trace_before_dispatch(parts, examples)
    output = next(inner for inner in traced.graph.nodes if inner.op == "output")
    check_result(target_name(node), pytree.tree_map_only(fx.Node, example_of, output.args[0]), example_of(node))
    for inner in traced.graph.nodes:
        if inner.op in ("get_attr", "call_module"):
            raise Opaque("captured_constant", "its parts hold a constant of their own")
        if inner.op == "call_function" and policy.may_write(inner):
            raise Opaque("writes", f"its parts write in place ({inner.target})")
    return traced.graph


def _splice(graph: fx.Graph, node: fx.Node, parts: fx.Graph, grad_mode: bool) -> None:
    """Put the parts in the node's place; with `grad_mode` autograd records them."""
    copies: dict[fx.Node, fx.Node] = {}
    operands = iter(node.all_input_nodes)
    output: Any = None
    with graph.inserting_before(node):
        for part in parts.nodes:
            if part.op == "placeholder":
                copies[part] = next(operands)
            elif part.op == "output":
                output = fx.map_arg(part.args[0], copies.__getitem__)
            else:
                copy = graph.node_copy(part, copies.__getitem__)
                copy.meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
                copy.meta["example_value"] = example_of(part)
                if grad_mode and part.target is not torch.ops.aten.detach.default:
                    _inherit_gradient(copy)
                copies[part] = copy
    if isinstance(output, fx.Node):
        node.replace_all_uses_with(output)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(output[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)
    # Such as the averaged weights that nobody asked for. Nothing here writes, so whatever is unused can go.
    for copy in reversed(copies.values()):
        if copy.op == "call_function" and not copy.users and copy not in node.all_input_nodes:
            graph.erase_node(copy)


def _inherit_gradient(node: fx.Node) -> None:
    """The parts were traced without autograd: let their examples require grad where an input's does."""
    inputs = (example_of(source) for source in node.all_input_nodes)
    if any(tensor.requires_grad for tensor in tensors_in(list(inputs))):
        for tensor in tensors_in(example_of(node)):
            if tensor.is_floating_point():
                tensor.requires_grad_()
