"""ROCM_AITER_UNIFIED_ATTN: AITER's Triton `unified_attention`, one kernel for prefill and decode over a paged cache.

AITER 0.1.20: asserts causal (bottom-right), takes windows, soft cap and sinks, has no backward. It takes alibi_slopes,
but where it counts the distance from is not documented, and beside sinks that matters: ALiBi is not declared.
"""

import torch

from .base import AttentionBackend
from .limits import BLOCK_SIZE_16, CAUSAL_BOTTOM_RIGHT, WINDOW_BOTTOM_RIGHT
from .rocm_attn import HEAD_DIMS

BACKEND = AttentionBackend(
    name="ROCM_AITER_UNIFIED_ATTN",
    summary="AITER's Triton unified attention: causal inference, prefill and decode in one kernel",
    built=False,
    kinds=frozenset({"attention"}),
    archs=("gfx*",),
    dtypes=(torch.float16, torch.bfloat16),
    head_dims=HEAD_DIMS,
    v_head_dims=HEAD_DIMS,
    takes=frozenset(
        {
            "gqa",
            "logits_soft_cap",
            "sinks",
            "band_upper",
            "band_lower",
            "decode",
            "paged_kv",
            "float8_kv",
            "kv_scale",
            "symbolic_lengths",
        }
    ),
    limits=(CAUSAL_BOTTOM_RIGHT, WINDOW_BOTTOM_RIGHT, BLOCK_SIZE_16),
    package="aiter",
)
