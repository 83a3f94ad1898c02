"""TRITON_MLA: our Triton kernels for latent attention (ops mla_prefill, mla_decode and mla)."""

import torch

from .base import AttentionBackend, Dims
from .limits import BLOCK_SIZE_NOT_1, MLA_LATENT

TAKES = frozenset(
    {
        "gqa",
        "v_head_dim_differs",
        "negative_scale",
        "training",
        "decode",
        "band_upper",
        "band_lower",
        "kv_start",
        "kv_end",
        "key_mask",
        "empty_rows_nan",
        "empty_rows_nan_added",
        "empty_rows_zero",
        "empty_rows_mean",
        "empty_rows_mean_added",
        "symbolic_heads",
        "symbolic_lengths",
    }
)
"""What the MLA ops take: every mask in closed form but packed documents; no soft cap, bias, sinks or dropout."""

BACKEND = AttentionBackend(
    name="TRITON_MLA",
    summary="our Triton kernels for latent attention (DeepSeek): prefill on shared rotary keys, absorbed decode",
    built=True,
    kinds=frozenset({"mla"}),
    archs=("*",),
    dtypes=(torch.float16, torch.bfloat16, torch.float32),
    # Of the attention as it is written; MLA_LATENT has the sizes that matter.
    head_dims=Dims(high=640),
    v_head_dims=Dims(high=512),
    takes=TAKES,
    limits=(MLA_LATENT, BLOCK_SIZE_NOT_1),
    package="triton",
    package_on_cpu=False,
    cpu_dtypes=(torch.float64,),
    cpu_any_dim=True,
)
