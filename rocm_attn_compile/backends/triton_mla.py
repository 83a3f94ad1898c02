"""TRITON_MLA: Triton kernels for multi-head latent attention, naive for prefill and absorbed for decode."""

import torch

from .base import ANY_DIM, AttentionBackend
from .limits import BLOCK_SIZE_NOT_1, CAUSAL_BOTTOM_RIGHT, MLA_SHAPES

TAKES = frozenset({"gqa", "v_head_dim_differs", "band_upper", "decode", "symbolic_lengths"})
"""What both MLA backends take: no window, soft cap or bias."""

BACKEND = AttentionBackend(
    name="TRITON_MLA",
    summary="Triton kernels for latent attention (DeepSeek): naive prefill, absorbed decode",
    built=False,
    kinds=frozenset({"mla"}),
    archs=("*",),
    dtypes=(torch.float16, torch.bfloat16),
    # The pair of sizes is what counts: see MLA_SHAPES.
    head_dims=ANY_DIM,
    v_head_dims=ANY_DIM,
    takes=TAKES,
    limits=(MLA_SHAPES, CAUSAL_BOTTOM_RIGHT, BLOCK_SIZE_NOT_1),
    package="triton",
    package_on_cpu=False,
)
