"""The Dynamo backend: `torch.compile(model, backend="rocm_attn", mode=..., options={...})`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.fx as fx

from .pipeline import compile_graph


def rocm_attn(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable:
    """Compile one Dynamo graph: replace its attentions, then give it to Inductor.

    Args:
        graph_module: As Dynamo captured it; rewritten in place.
        example_inputs: The real inputs.
        mode: As for Inductor ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"); the last two
            also measure our kernels, see docs/how-it-works.md.
        options: Ours (`rocm_attn_compile.Options`) and Inductor's in one dict.

    Raises:
        ValueError: Unknown option or backend name, or an explicit backend that cannot run here.
        StrictError: `options={"strict": True}` and some site is not computed by the backend chosen for it.
    """
    return compile_graph(graph_module, example_inputs, mode=mode, options=options)
