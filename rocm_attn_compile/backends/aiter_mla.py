"""ROCM_AITER_MLA: AITER's assembly kernels for latent attention, page size 1 inside.

AITER 0.1.20: the assembly kernels take bf16 (fp8 needs scales that no graph gives us), 16 or 128 heads.
"""

from dataclasses import replace

import torch

from .base import AttentionBackend
from .limits import CAUSAL_BOTTOM_RIGHT, MLA_HEADS, MLA_SHAPES
from .triton_mla import HEAD_DIMS, TAKES, V_HEAD_DIMS

BACKEND = AttentionBackend(
    name="ROCM_AITER_MLA",
    summary="AITER's assembly kernels for latent attention on MI300 and MI350: bf16, 16 or 128 heads",
    built=False,
    kinds=frozenset({"mla"}),
    archs=("gfx942", "gfx950"),
    dtypes=(torch.bfloat16,),
    head_dims=HEAD_DIMS,
    v_head_dims=V_HEAD_DIMS,
    takes=TAKES,
    limits=(MLA_SHAPES, CAUSAL_BOTTOM_RIGHT, MLA_HEADS),
    package="aiter",
)

TRITON_PREFILL = replace(
    BACKEND,
    name="ROCM_AITER_TRITON_MLA",
    summary="AITER MLA with prefill by AITER's Triton kernel; only the rules know it",
)
