"""Run a model through the package, without code generation, and keep what became of every site."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from rocm_attn_compile.pipeline import compile_graph
from rocm_attn_compile.report import collect_reports

from .aot import compile_without_code


class Ours:
    """A backend for `torch.compile`; sites are counted per call of the graph that has them.

    Attributes:
        graphs: Number of graphs that Dynamo made.
        replaced: Sites by their "file:line".
        refused: The others, by ("file:line", code of the reason, text of the reason).
        notes: What the reports say about parts that were not looked into.
    """

    def __init__(self, lowering: str, options: dict[str, Any] | None = None) -> None:
        self.lowering, self.options = lowering, options
        self.graphs = 0
        self.replaced: Counter[str] = Counter()
        self.refused: Counter[tuple[str, str, str]] = Counter()
        self.notes: set[str] = set()

    def __call__(self, graph_module: torch.fx.GraphModule, inputs: list) -> Callable:
        lowering = "eager" if self.lowering == "aot_eager" else self.lowering
        with collect_reports() as reports:
            run = compile_graph(graph_module, inputs, options=self.options, lowering=lowering)
        if self.lowering == "aot_eager":  # PyTorch's own does not decompose, and then some backwards are not possible
            run = compile_without_code(graph_module, inputs)
        self.graphs += 1
        (report,) = reports
        self.notes |= set(report.notes)
        replaced = [site.source for site in report.sites if site.replaced]
        others = [site for site in (*report.sites, *report.look_alikes) if not site.replaced]
        refused = [(site.source, site.reasons[0].code, _short(site.reasons[0].text)) for site in others]

        def counted(*args: Any) -> Any:
            self.replaced.update(replaced)
            self.refused.update(refused)
            return run(*args)

        return counted


def _short(text: str) -> str:
    """Without the names of nodes that differ from layer to layer."""
    return re.sub(r"_\d+\b", "", text)[:300]
