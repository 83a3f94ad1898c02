"""What is in a graph: what a call compiles to, and how often something is called in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

if TYPE_CHECKING:
    from rocm_attn_compile.report import Report, Site


@dataclass
class Compiled:
    """What one call of a compiled function gave.

    Attributes:
        result: What the function returned.
        graphs: Dynamo's graphs after our rewriting, in the order they were compiled.
        reports: One per graph.
    """

    result: Any
    graphs: list[fx.GraphModule]
    reports: list[Report]

    @property
    def num_attention_calls(self) -> int:
        """Calls of our op in all graphs."""
        return sum(count_attention_calls(graph) for graph in self.graphs)

    @property
    def sites(self) -> list[Site]:
        """The attention sites in all reports."""
        return [site for report in self.reports for site in report.sites]

    @property
    def reason_codes(self) -> set[str]:
        """Codes of all reasons: of sites not replaced or not as first chosen, and of refused look-alikes."""
        entries = [*self.sites, *(entry for report in self.reports for entry in report.look_alikes)]
        return {reason.code for entry in entries for reason in entry.reasons}


def compile_and_capture(
    function: Callable[..., Any],
    *args: Any,
    options: dict[str, Any] | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = True,
    lowering: str = "eager",
    **kwargs: Any,
) -> Compiled:
    """Compile a function or module as `backend="rocm_attn"` does, call it, and keep the rewritten graphs.

    Args:
        function: Called as `function(*args, **kwargs)`.
        options, dynamic, fullgraph: As for `torch.compile`.
        lowering: What runs the graphs: "eager", "aot_eager" or "inductor".
    """
    from rocm_attn_compile.pipeline import compile_graph  # not at import: tests of single stages need no pipeline
    from rocm_attn_compile.report import collect_reports

    graphs: list[fx.GraphModule] = []

    def backend(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph_module)  # it is rewritten in place
        return compile_graph(graph_module, example_inputs, options=options, lowering=lowering)

    compiled = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=fullgraph)
    with collect_reports() as reports:
        result = compiled(*args, **kwargs)
    return Compiled(result, graphs, reports)


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
    """How many attentions were replaced: calls of `rocm_attn::attention` and `rocm_attn::mla...`, without backwards."""
    calls = count_calls(graph_module)
    return sum(
        count
        for name, count in calls.items()
        if name.startswith(("rocm_attn.attention", "rocm_attn.mla")) and not name.endswith("_backward")
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
