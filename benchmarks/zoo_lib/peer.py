"""What Inductor's own matcher makes of a model: its joint-graph passes, without code generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._inductor.fx_passes.fuse_attention import _sfdp_init
from torch._inductor.fx_passes.joint_graph import joint_graph_passes

from .aot import compile_without_code


def prepare() -> None:
    """Trace the patterns once; it takes a while."""
    _sfdp_init()


class Peer:
    """A backend for `torch.compile`; `fused` sums, over all calls, the sites that the called graph has fused.

    Attributes:
        graphs: Number of graphs that Dynamo made.
    """

    def __init__(self) -> None:
        self.graphs = 0
        self.fused = 0

    def __call__(self, graph_module: torch.fx.GraphModule, inputs: list) -> Callable:
        self.graphs += 1
        before = counters["inductor"]["fuse_attention"]
        run = compile_without_code(graph_module, inputs, joint_graph_passes)
        fused = counters["inductor"]["fuse_attention"] - before

        def counted(*args: Any) -> Any:
            self.fused += fused
            return run(*args)

        return counted
