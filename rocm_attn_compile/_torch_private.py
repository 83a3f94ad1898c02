"""The only door to PyTorch's private names: one thin function or alias each, so that a new torch breaks one file.

Every entry has a test in tests/test_torch_private.py that notices when it changes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.fx

# --- Inductor's options (options.py) ---


def inductor_option_names() -> list[str]:
    """Names that `torch.compile(backend="inductor", options=...)` accepts, such as "triton.cudagraphs"."""
    from torch._inductor import list_options

    return list_options()


def check_inductor_options(options: dict[str, Any]) -> None:
    """Validate names and types of Inductor options exactly as torch does.

    Raises:
        RuntimeError: Torch's own, for an unknown name or a value of the wrong type.
    """
    torch._TorchCompileInductorWrapper(None, options, None)


# --- Reports and explain (report.py, explain.py) ---


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """Write a text artifact to `TORCH_TRACE` logs, where tlparse shows it; does nothing when tracing is off."""
    from torch._logging import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=payload)


def uncompiled(model: Callable) -> Callable:
    """The function or module under `torch.compile` wrappers; `model` itself when it is not compiled."""
    from torch._dynamo.eval_frame import OptimizedModule, innermost_fn

    if isinstance(model, OptimizedModule):
        return model._orig_mod
    return innermost_fn(model)


def recompile_limits_lifted() -> AbstractContextManager:
    """Context in which Dynamo compiles however many versions of a function exist already."""
    import torch._dynamo

    unlimited = 1 << 30
    return torch._dynamo.config.patch(recompile_limit=unlimited, accumulated_recompile_limit=unlimited)


def graph_break_reason(graph_module: torch.fx.GraphModule) -> str | None:
    """Why Dynamo ended this graph early, or None if it ended by returning."""
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    return reason.reason if reason is not None and reason.graph_break else None


# --- Memory of a call (testing/memory.py) ---


def cpu_allocations(profile: torch.profiler.profile) -> list[int]:
    """Bytes of each CPU allocation (positive) and release (negative) in a profile, in order of time."""
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = [
        event
        for event in results.events()
        if event.name() == "[memory]" and event.device_type() == torch._C._autograd.DeviceType.CPU
    ]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
