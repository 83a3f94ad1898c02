"""Hand the rewritten graph to what compiles it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.fx as fx

from .. import _torch_private

LOWERINGS = ("inductor", "aot_eager", "eager")


def lower(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    lowering: str,
    mode: str | None,
    inductor_options: dict[str, Any],
) -> Callable:
    """Compile the graph: "inductor" for users, "aot_eager" and "eager" for explain and tests.

    Raises:
        ValueError: Unknown lowering.
    """
    if lowering == "inductor":
        return _torch_private.inductor_compile(graph_module, example_inputs, mode, inductor_options)
    if lowering == "aot_eager":
        return _torch_private.aot_eager_compile(graph_module, example_inputs)
    if lowering == "eager":
        return graph_module.forward
    raise ValueError(f"lowering must be one of {', '.join(LOWERINGS)}, got {lowering!r}")
