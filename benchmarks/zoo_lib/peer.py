"""What Inductor's own matcher makes of a model: its joint-graph passes, without code generation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.fuse_attention import _sfdp_init
from torch._inductor.fx_passes.joint_graph import joint_graph_passes


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

        def no_code(gm: torch.fx.GraphModule, _: list) -> Callable:
            gm.recompile()
            return gm

        def inference(gm: torch.fx.GraphModule, example_inputs: list) -> Callable:
            joint_graph_passes(gm)
            return no_code(gm, example_inputs)

        def partition(gm: torch.fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
            joint_graph_passes(gm)
            return min_cut_rematerialization_partition(gm, joint_inputs, compiler="inductor", **kwargs)

        make = partial(
            aot_autograd, fw_compiler=no_code, bw_compiler=no_code, inference_compiler=inference, partition_fn=partition
        )
        run = make(decompositions=select_decomp_table())(graph_module, inputs)
        fused = counters["inductor"]["fuse_attention"] - before

        def counted(*args: Any) -> Any:
            self.fused += fused
            return run(*args)

        return counted
