"""When the op on CPU tensors can be written out in a trace: `ops/cpu.py` without its looks at values.

The code that is traced is that of cpu.py and cpu_backward.py itself; there, what only spares work for some values is
skipped for traced tensors. Here is decided whether that code comes out right without those looks.

Not inside a checkpointed region: ATen's kernel counts as random, since it has an argument for dropout, and what is
random is not computed again there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from rocm_attn_compile import _torch_private
from rocm_attn_compile.ops import cpu, cpu_backward
from rocm_attn_compile.ops.kv_cache import CACHE_TENSORS

_SMALL_COPY = 1 << 20
"""Bytes that are copied in the time of an opaque call's way through Python, some 0.2 ms."""


def forward(_name: str, _tuned: str, arguments: dict[str, Any]) -> Callable[[], Any] | None:
    """The forward to trace with the op's arguments by name, or None if the call must stay opaque."""
    if _torch_private.is_recomputed() or not _is_traced_right(arguments["q"]):
        return None
    cache = [arguments[name] for name in CACHE_TENSORS]
    if any(tensor is not None for tensor in cache):
        return None
    arguments = {name: value for name, value in arguments.items() if name not in CACHE_TENSORS}
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    is_decode = q.shape[2] == 1
    is_fused = cpu.takes_fused(q, k, v, arguments["logits_soft_cap"], arguments["dropout_p"])
    # The fused kernel takes the heads of a group as rows of one query, but only in a decode step.
    if is_decode and not is_fused and _has_groups(q, k):
        return None
    if is_fused and not is_decode and _has_large_groups(q, k, v):
        return None
    return partial(cpu.forward, **arguments)


def backward(_name: str, _tuned: str, arguments: dict[str, Any]) -> Callable[[], Any] | None:
    """The same for the backward. Its fused kernel reads lse, and whether that is exact depends on values:

    * a bias of finfo.min, or a row without a near key under ALiBi, leaves an lse that has lost log N;
    * an empty row whose fill was added has gradients that only the unfused code computes.
    """
    if _torch_private.is_recomputed() or not _is_traced_right(arguments["q"]):
        return None
    q, k, v, attn_bias, slopes = (arguments[name] for name in ("q", "k", "v", "attn_bias", "alibi_slopes"))
    wants_dbias = attn_bias is not None and arguments["output_mask"][3]
    numbers = (arguments["logits_soft_cap"], arguments["dropout_p"])
    if not wants_dbias and cpu_backward.takes_fused_backward(q, k, v, *numbers):
        fill_was_added = arguments["empty_rows"] == "mean_added" and arguments["sinks"] is None
        if attn_bias is not None or slopes is not None or fill_was_added or _has_large_groups(q, k, v):
            return None
    return partial(cpu_backward.backward, **arguments)


def _is_traced_right(q: Tensor) -> bool:
    """False where a trace takes the lse of ATen's kernel for float32 and it is float64 (PyTorch 2.11)."""
    return q.dtype != torch.float64 or lse_is_traced_in_float64()


@cache
def lse_is_traced_in_float64() -> bool:
    """True if ATen's kernel says of float64 inputs what it gives."""
    q = torch.empty(1, 1, 2, 8, dtype=torch.float64, device="meta")
    return _torch_private.cpu_flash_attention(q, q, q)[1].dtype == torch.float64


def _has_groups(q: Tensor, k: Tensor) -> bool:
    """Heads share k and v: products in half precision with the few rows of a decode step are slow."""
    return q.shape[1] != k.shape[1]


def _has_large_groups(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Heads share so much of k and v that a call is cheaper: the fused kernel has them share by a stride of 0, which
    Inductor writes out in memory."""
    copied = (k.numel() + v.numel()) * (q.shape[1] // k.shape[1]) * q.element_size()
    return _has_groups(q, k) and copied > _SMALL_COPY
