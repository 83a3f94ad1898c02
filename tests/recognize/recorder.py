"""A Dynamo backend for tests: our pipeline, and the graphs it made."""

from __future__ import annotations

import torch

from rocm_attn_compile.pipeline import compile_graph
from rocm_attn_compile.testing import count_attention_calls


class Recorder:
    """A Dynamo backend: our pipeline, keeping the rewritten graph modules."""

    def __init__(self, lowering: str = "aot_eager", **options) -> None:
        self.lowering, self.options = lowering, options
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph_module, example_inputs):
        self.graphs.append(graph_module)
        return compile_graph(graph_module, example_inputs, lowering=self.lowering, options=self.options)

    @property
    def calls(self) -> int:
        return sum(map(count_attention_calls, self.graphs))
