"""The launches of a latent attention, for an architecture that need not be here: to compile and measure, not to run."""

from __future__ import annotations

from typing import Any

import torch

from .launch import Launch, Tuning
from .mla_decode_launch import mla_decode_launches
from .mla_prefill import prefill_backward_launches, prefill_launches


def launches(
    arch: str,
    dtype: torch.dtype,
    num_heads: int,
    kv_lora_rank: int = 512,
    qk_nope_head_dim: int = 128,
    qk_rope_head_dim: int = 64,
    v_head_dim: int = 128,
    q_len: int = 1,
    kv_len: int = 4096,
    batch: int = 2,
    causal: bool = True,
    absorbed: bool = True,
    backward: bool = False,
    block_size: int = 0,
    num_splits: int | None = None,
    traced: bool = False,
    **features: Any,
) -> dict[str, Launch]:
    """The launches of one call on meta tensors, by kernel name.

    Args:
        arch: "gfx942" and so on.
        dtype: Of queries and cache.
        num_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, q_len, kv_len, batch: Sizes.
        causal: The last query sees all keys.
        absorbed: The decode kernel; else the prefill kernels.
        backward: Whether the gradients' launches are wanted too; prefill only.
        block_size: Of a paged cache, 0 for a contiguous one; decode only.
        num_splits, traced: As in launch.Tuning.
        features: `key_mask`, `kv_start`, `kv_end`: true where present; `band_lower`, `empty_rows`.
    """

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    tuning = Tuning(arch=arch, num_splits=num_splits, traced=traced)
    masks = (
        empty(batch, kv_len, kind=torch.bool) if features.get("key_mask") else None,
        empty(batch, q_len, kind=torch.int32) if features.get("kv_start") else None,
        empty(batch, q_len, kind=torch.int64) if features.get("kv_end") or block_size else None,
    )
    band_upper = kv_len - q_len if causal else None
    scalars = 0.1, features.get("band_lower"), band_upper, features.get("empty_rows", "impossible")
    if absorbed:
        shape = (batch * kv_len // block_size, block_size) if block_size else (batch, kv_len)
        cache = empty(*shape, kv_lora_rank + qk_rope_head_dim)
        kv_c, k_pe = cache.split([kv_lora_rank, qk_rope_head_dim], dim=2)
        table = empty(batch, kv_len // block_size, kind=torch.int32) if block_size else None
        q, q_pe = (empty(batch, num_heads, q_len, width) for width in (kv_lora_rank, qk_rope_head_dim))
        found, _, _ = mla_decode_launches(q, q_pe, kv_c, k_pe, table, *masks, *scalars, "bhsd", tuning)
    else:
        tensors = (
            empty(batch, num_heads, q_len, qk_nope_head_dim), empty(batch, num_heads, q_len, qk_rope_head_dim),
            empty(batch, num_heads, kv_len, qk_nope_head_dim), empty(batch, kv_len, qk_rope_head_dim),
            empty(batch, num_heads, kv_len, v_head_dim),
        )  # fmt: skip
        found, out, lse = prefill_launches(*tensors, masks, *scalars, "bhsd", tuning)
        if backward:
            grad_out = torch.empty_like(out)
            wanted = [True] * 5
            found += prefill_backward_launches(grad_out, *tensors, masks, out, lse, *scalars, wanted, tuning)[0]
    return {launch.kernel.__name__: launch for launch in found}
