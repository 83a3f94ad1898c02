"""`explain(model)(*args)`: what the backend would do to a model, and why, without compiling kernels."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from . import _torch_private
from .pipeline import compile_graph
from .report import Report, Site, collect_reports


@dataclass(frozen=True)
class Explanation:
    """The reports of all graphs of one call.

    Attributes:
        reports: One per graph, in the order Dynamo met them.
        graph_breaks: Why each graph but the last ended early. An attention cut by a break is not recognised.
    """

    reports: list[Report]
    graph_breaks: list[str]

    @property
    def sites(self) -> list[Site]:
        """The attention sites of all graphs."""
        return [site for report in self.reports for site in report.sites]

    @property
    def look_alikes(self) -> list[Site]:
        """The refused look-alikes of all graphs."""
        return [site for report in self.reports for site in report.look_alikes]

    def __str__(self) -> str:
        replaced = sum(site.replaced for site in self.sites)
        lines = [
            f"{len(self.reports)} graph(s), {len(self.graph_breaks)} graph break(s), "
            f"{len(self.sites)} attention site(s), {replaced} replaced"
        ]
        lines += [f"graph break: {' '.join(reason.split())}" for reason in self.graph_breaks]
        return "\n\n".join(["\n".join(lines), *map(str, self.reports)])

    def to_json(self, indent: int | None = 2) -> str:
        """The explanation as JSON text."""
        data = {"graph_breaks": self.graph_breaks, "reports": [report.to_dict() for report in self.reports]}
        return json.dumps(data, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Explanation:
        """The inverse of `to_json`."""
        data = json.loads(text)
        return cls([Report.from_dict(report) for report in data["reports"]], data["graph_breaks"])


def explain(
    model: Callable,
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
    dynamic: bool | None = None,
) -> Callable[..., Explanation]:
    """Explain what `torch.compile(model, backend="rocm_attn", ...)` does with each attention of a call.

    Usage: `print(explain(model)(*args, **kwargs))`. The model is traced afresh, recognised, rewritten and run once in
    eager mode; nothing is given to Inductor. What is already compiled stays compiled, and `reports()` is not changed.
    As with any call, the model's side effects (a cache that is updated) happen.

    Args:
        model: Module or function; one that `torch.compile` has wrapped is unwrapped.
        options: As for `torch.compile`.
        mode: As for `torch.compile`; without effect here, as it is about kernels.
        dynamic: As for `torch.compile`.

    Returns:
        A function that takes the model's arguments and returns the `Explanation`.
    """

    def run(*args: Any, **kwargs: Any) -> Explanation:
        breaks: list[str] = []

        # A new function for every call: Dynamo keys its cache on the backend, so it compiles afresh.
        def compiler(graph_module: torch.fx.GraphModule, example_inputs: list) -> Callable:
            reason = _torch_private.graph_break_reason(graph_module)
            if reason is not None:
                breaks.append(reason)
            return compile_graph(graph_module, example_inputs, options=options, mode=mode, lowering="eager")

        plain = _torch_private.uncompiled(model)
        compiled = torch.compile(plain, backend=compiler, dynamic=dynamic)
        # Every explanation leaves an entry in Dynamo's cache; it must not be refused because there are many.
        lifted, own_call = _torch_private.recompile_limits_lifted(), _torch_private.module_compile_suspended(plain)
        with collect_reports() as reports, lifted, own_call:
            compiled(*args, **kwargs)
        return Explanation(reports, breaks)

    return run
