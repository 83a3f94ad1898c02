"""Autocast for eager callers, as `F.scaled_dot_product_attention` does it: q, k, v go to the autocast dtype.

Bias and sinks keep their dtype. The op computes with them in float32 anyway, and float32's lowest number, a common
fill, would become -inf in bfloat16. Calls with an `impl` come from the rewriter: their casts are in the graph, and what
stands in float32 there is what eager computes in float32 under autocast too, so they are left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rocm_attn_compile import _torch_private
from rocm_attn_compile.ops.returned_weights import attention_with_weights
from rocm_attn_compile.ops.schemas import LIBRARY, attention


def _register(op: Any, name: str, device_type: str, key: str) -> None:
    without_autocast = _torch_private.keyset(key)

    def kernel(*tensors: Tensor | None, **settings: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device_type)
        # float64 is left alone, as by every autocast rule.
        castable = () if settings.get("impl") else (torch.float16, torch.bfloat16, torch.float32)
        qkv = (t.to(dtype) if t is not None and t.dtype in castable else t for t in tensors[:3])
        with _torch_private.exclude_keys(without_autocast):
            return op(*qkv, *tensors[3:], **settings)

    LIBRARY.impl(name, kernel, key)


for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _register(attention, "attention", _device_type, _key)
    _register(attention_with_weights, "attention_with_weights", _device_type, _key)
