"""The entry of this stage: one shadow run over a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from rocm_attn_compile import _torch_private as private
from rocm_attn_compile.capture.ambient import Ambient
from rocm_attn_compile.capture.examples import example_of
from rocm_attn_compile.capture.interpreter import Shadow
from rocm_attn_compile.capture.trace import Trace


def capture(graph_module: fx.GraphModule, example_inputs: Sequence[Any] | None = None, shape_env: Any = None) -> Trace:
    """Trace a Dynamo graph on throw-away fakes into a functional SSA.

    The graph is not modified, and nothing of it runs on real data. Sizes are Dynamo's own symbols, and no guard is
    added but what `F.scaled_dot_product_attention` relies on: keys are as many as values. A node that cannot run
    becomes an opaque leaf with an entry in `Trace.not_executed`.

    Args:
        graph_module: As a Dynamo backend receives it, with `example_value` on its nodes.
        example_inputs: What the backend received with it. Tells which inputs share memory, and stands in for a
            placeholder without `example_value`.
        shape_env: The `ShapeEnv` of its symbols; found in the examples if None.

    Returns:
        The trace, with the traces of the regions that can be compiled by themselves in `subtraces`.
    """
    if shape_env is None:
        shape_env = _shape_env_of(graph_module, example_inputs)
    with Ambient() as ambient, private.only_fakes(shape_env):
        return Shadow(graph_module, ambient).run(example_inputs)


def _shape_env_of(graph_module: fx.GraphModule, example_inputs: Sequence[Any] | None) -> Any:
    """The shape environment of the first symbol in the examples, or None if all sizes are numbers.

    The ragged size of a nested tensor that was made outside Dynamo is a symbol without one.
    """
    examples: list[Any] = [example_of(node) for node in graph_module.graph.nodes if node.op == "placeholder"]
    for example in [*examples, *(example_inputs or ())]:
        sizes = example.shape if isinstance(example, torch.Tensor) else (example,)
        for size in sizes:
            if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) and hasattr(size.node, "shape_env"):
                return size.node.shape_env
    return None
