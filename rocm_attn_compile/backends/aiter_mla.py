"""ROCM_AITER_MLA: AITER's assembly kernels for latent attention, page size 1 inside.

AITER 0.1.20: the assembly kernels take bf16 (fp8 needs scales that no graph gives us), 16 or 128 heads.
"""

from dataclasses import replace

import torch

from .base import AttentionBackend, Dims
from .limits import CAUSAL_BOTTOM_RIGHT, MLA_DIMS, MLA_HEADS, MLA_SHAPES

TAKES = frozenset({"gqa", "v_head_dim_differs", "band_upper", "decode", "symbolic_lengths"})

HEAD_DIMS = Dims(listed=tuple(head_dim for head_dim, _ in MLA_DIMS))
V_HEAD_DIMS = Dims(listed=tuple(v_head_dim for _, v_head_dim in MLA_DIMS))

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
