"""The dropout mask as an op of its own, so that forward, backward and every derivative of them see the same one."""

from __future__ import annotations

import torch
from torch import Tensor

from rocm_attn_compile.ops.reference import philox_keep_mask
from rocm_attn_compile.ops.schemas import LIBRARY


def _keep_mask_cpu(dropout_seed: Tensor, dropout_p: float, size: list[int]) -> Tensor:
    """From torch's own CPU generator: many times faster than Philox spelled in tensor operations."""
    generator = torch.Generator().manual_seed(int(dropout_seed))
    return torch.empty(size, dtype=torch.bool).bernoulli_(1.0 - dropout_p, generator=generator)


def _keep_mask_gpu(dropout_seed: Tensor, dropout_p: float, size: list[int]) -> Tensor:
    """What the Triton kernel draws; no copy of the seed to the host."""
    B, H, M, N = size
    return philox_keep_mask(dropout_seed, dropout_p, B, H, M, N)


LIBRARY.impl("dropout_keep_mask", _keep_mask_cpu, "CPU")
LIBRARY.impl("dropout_keep_mask", _keep_mask_gpu, "CUDA")
