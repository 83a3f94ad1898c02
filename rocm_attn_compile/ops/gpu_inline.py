"""When the op on GPU tensors can be written out in a trace: where its backend can name its kernel launches."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from rocm_attn_compile import _torch_private

TRACED_MODULES = {
    "TRITON_ATTN": "rocm_attn_compile.kernels.triton.traced",
    "TRITON_MLA": "rocm_attn_compile.kernels.triton.traced_mla",
}
"""Backend name -> module with `attention_forward`, `attention_backward` and `attention_with_weights`, or `mla_decode`,
`mla_prefill` and `mla_prefill_backward`, which are given `_torch_private`, what tuning chose (for attention), and the
op's arguments by name, without `impl`, with traced tensors."""


def forward(name: str, tuned: str, arguments: dict[str, Any]) -> Callable[[], Any] | None:
    """The forward to trace for backend `name` with the op's arguments, or None if the call must stay opaque."""
    return _body(name, "attention_forward", tuned, arguments)


def backward(name: str, tuned: str, arguments: dict[str, Any]) -> Callable[[], Any] | None:
    """The same for the backward."""
    return _body(name, "attention_backward", tuned, arguments)


def with_weights(name: str, call: Any) -> Callable[[], Any] | None:
    """The same for a call of the op that gives the weights, too, as returned_weights.py has it."""
    arguments = (call.tensors, call.settings, call.weights_empty_rows, call.weights_dtype)
    return _traced(name, "attention_with_weights", call.q.dtype, *arguments)


def latent(name: str, function: str, arguments: dict[str, Any]) -> Callable[[], Any] | None:
    """The same for one of the ops of latent attention, named like its function."""
    return _traced(name, function, arguments["v" if function != "mla_decode" else "kv_c"].dtype, **arguments)


def _body(name: str, function: str, tuned: str, arguments: dict[str, Any]) -> Callable[[], Any] | None:
    return _traced(name, function, arguments["q"].dtype, tuned, **arguments)


def _traced(name: str, function: str, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Callable[[], Any] | None:
    # float64 has no kernel: the op itself says so.
    if name not in TRACED_MODULES or dtype == torch.float64:
        return None
    module = importlib.import_module(TRACED_MODULES[name])
    return partial(getattr(module, function), _torch_private, *args, **kwargs)
