"""What is in a graph: counting calls, nested graph modules included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.fx as fx


def count_calls(graph_module: fx.GraphModule) -> Counter[str]:
    """How often each op, function or method is called, in this graph module and the ones nested in it.

    Returns:
        Counts by name: "rocm_attn.attention" or "aten.bmm" for ops (without the overload), "softmax" for functions,
        ".view" for methods.
    """
    counts: Counter[str] = Counter()
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            counts.update(_name(node) for node in module.graph.nodes if node.op in ("call_function", "call_method"))
    return counts


def count_attention_calls(graph_module: fx.GraphModule) -> int:
    """How many attentions were replaced: calls of `rocm_attn::attention` and of its variants, without the backward."""
    calls = count_calls(graph_module)
    return sum(
        count
        for name, count in calls.items()
        if name.startswith("rocm_attn.attention") and not name.startswith("rocm_attn.attention_backward")
    )


def _name(node: fx.Node) -> str:
    """The name that `count_calls` uses for a node."""
    if node.op == "call_method":
        return f".{node.target}"
    target: Callable[..., Any] | Any = node.target
    packet = getattr(target, "overloadpacket", target)
    namespace = getattr(packet, "_qualified_op_name", None)  # "aten::bmm"
    if namespace is not None:
        return str(namespace).replace("::", ".")
    return getattr(target, "__name__", str(target))
