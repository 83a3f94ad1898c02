"""ROCM_ATTN: our HIP kernels, made for AMD's matrix units; inference with causal masks.

The limits are those of vLLM's backend of that name, except that a soft cap and sinks, which it drops silently or runs
on a slower path, are refused, and that a window of W keeps exactly W keys.
"""

import torch

from .base import AttentionBackend, Dims
from .limits import BLOCK_SIZE_16, CAUSAL_BOTTOM_RIGHT, WINDOW_BOTTOM_RIGHT

HEAD_DIMS = Dims(listed=(32, 64, 96, 128, 160, 192, 224, 256))

BACKEND = AttentionBackend(
    name="ROCM_ATTN",
    summary="HIP kernels for AMD GPUs: causal inference, with split-KV decode",
    built=False,
    kinds=frozenset({"attention"}),
    archs=("gfx*",),
    dtypes=(torch.float16, torch.bfloat16),
    head_dims=HEAD_DIMS,
    v_head_dims=HEAD_DIMS,
    takes=frozenset(
        {"gqa", "band_upper", "band_lower", "decode", "paged_kv", "float8_kv", "kv_scale", "symbolic_lengths"}
    ),
    limits=(CAUSAL_BOTTOM_RIGHT, WINDOW_BOTTOM_RIGHT, BLOCK_SIZE_16),
)
