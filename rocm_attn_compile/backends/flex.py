"""FLEX_ATTENTION: PyTorch's FlexAttention, compiled by Inductor; the last resort for masks nothing else takes.

A row without a key is 0 in FlexAttention, so the other meanings of such a row are refused. Of a paged cache it wants a
mask of pages made on the host's side, and it reads no float8: a cache is gathered before it. ALiBi would be a
score_mod; vLLM's backend of that name refuses it, and it is not declared here until it is written.
"""

import torch

from .base import AttentionBackend, Dims

BACKEND = AttentionBackend(
    name="FLEX_ATTENTION",
    summary="PyTorch's FlexAttention: any mask and bias, forward and backward, any GPU Inductor supports",
    built=False,
    kinds=frozenset({"attention", "mla"}),
    archs=("*",),
    dtypes=(torch.float16, torch.bfloat16, torch.float32),
    head_dims=Dims(low=16),
    v_head_dims=Dims(low=16),
    takes=frozenset(
        {
            "gqa",
            "v_head_dim_differs",
            "negative_scale",
            "logits_soft_cap",
            "attn_bias",
            "bias_gradient",
            "training",
            "band_upper",
            "band_lower",
            "kv_start",
            "kv_end",
            "key_mask",
            "segment_ids",
            "attn_mask",
            "empty_rows_zero",
            "decode",
            "symbolic_lengths",
        }
    ),
    package="triton",
    package_on_cpu=False,
)
