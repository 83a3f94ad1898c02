"""TRITON_MLA: Triton kernels for multi-head latent attention, naive for prefill and absorbed for decode."""

import torch

from .base import AttentionBackend, Dims
from .limits import BLOCK_SIZE_NOT_1, CAUSAL_BOTTOM_RIGHT, MLA_DIMS, MLA_SHAPES

TAKES = frozenset({"gqa", "v_head_dim_differs", "band_upper", "decode", "symbolic_lengths"})
"""What both MLA backends take: no window, soft cap or bias."""

HEAD_DIMS = Dims(listed=tuple(head_dim for head_dim, _ in MLA_DIMS))
V_HEAD_DIMS = Dims(listed=tuple(v_head_dim for _, v_head_dim in MLA_DIMS))

BACKEND = AttentionBackend(
    name="TRITON_MLA",
    summary="Triton kernels for latent attention (DeepSeek): naive prefill, absorbed decode",
    built=False,
    kinds=frozenset({"mla"}),
    archs=("*",),
    dtypes=(torch.float16, torch.bfloat16),
    head_dims=HEAD_DIMS,
    v_head_dims=V_HEAD_DIMS,
    takes=TAKES,
    limits=(MLA_SHAPES, CAUSAL_BOTTOM_RIGHT, BLOCK_SIZE_NOT_1),
    package="triton",
    package_on_cpu=False,
)
