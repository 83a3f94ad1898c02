"""TRITON_ATTN: our Triton kernels (kernels/triton), which compute the whole canonical op, forward and backward."""

import torch

from .base import AttentionBackend, Dims
from .limits import BLOCK_SIZE_16, FLOAT8

BACKEND = AttentionBackend(
    name="TRITON_ATTN",
    summary="our Triton kernels: every feature, forward and backward, any GPU Triton supports",
    built=True,
    # An MLA site in naive form is an attention like any other, if with v_head_dim != head_dim.
    kinds=frozenset({"attention", "mla"}),
    archs=("*",),
    dtypes=(torch.float16, torch.bfloat16, torch.float32),
    head_dims=Dims(low=8, high=256),
    v_head_dims=Dims(low=8, high=256),
    # Listed, although it is all of them today: a feature added later must not be taken without a kernel for it.
    takes=frozenset(
        {
            "gqa",
            "v_head_dim_differs",
            "negative_scale",
            "logits_soft_cap",
            "score_floor",
            "sinks",
            "attn_bias",
            "alibi",
            "bias_gradient",
            "dropout",
            "training",
            "returned_weights",
            "decode",
            "band_upper",
            "band_lower",
            "kv_start",
            "kv_end",
            "key_mask",
            "segment_ids",
            "attn_mask",
            "empty_rows_nan",
            "empty_rows_nan_added",
            "empty_rows_zero",
            "empty_rows_mean",
            "empty_rows_mean_added",
            "paged_kv",
            "float8_kv",
            "kv_scale",
            "symbolic_heads",
            "symbolic_lengths",
        }
    ),
    limits=(BLOCK_SIZE_16, FLOAT8),
    package="triton",
    # On CPU tensors the op runs ATen, for which none of the kernel's limits holds.
    package_on_cpu=False,
    cpu_dtypes=(torch.float64,),
    cpu_any_dim=True,
)
