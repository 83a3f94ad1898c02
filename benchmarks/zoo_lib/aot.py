"""AOTAutograd with Inductor's decompositions and partitioner, and without code generation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table


def compile_without_code(
    graph_module: torch.fx.GraphModule, inputs: list, passes: Callable[[torch.fx.GraphModule], Any] | None = None
) -> Callable:
    """What the graph computes, run op by op; `passes` change the inference or the joint graph before."""

    def no_code(gm: torch.fx.GraphModule, _: list) -> Callable:
        gm.recompile()
        return gm

    def inference(gm: torch.fx.GraphModule, example_inputs: list) -> Callable:
        if passes is not None:
            passes(gm)
        return no_code(gm, example_inputs)

    def partition(gm: torch.fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        if passes is not None:
            passes(gm)
        return min_cut_rematerialization_partition(gm, joint_inputs, compiler="inductor", **kwargs)

    make = partial(
        aot_autograd, fw_compiler=no_code, bw_compiler=no_code, inference_compiler=inference, partition_fn=partition
    )
    return make(decompositions=select_decomp_table())(graph_module, inputs)
