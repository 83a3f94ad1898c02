"""Launchers of TRITON_MLA: latent attention for the ops `rocm_attn::mla_decode` and `rocm_attn::mla_prefill`.

Letters: B batch, H query heads, M q_len, N kv_len, C kv_lora_rank, P qk_nope_head_dim, R qk_rope_head_dim, E v_head_dim.
Needs torch and triton only. Works on ROCm and CUDA devices, and on CPU tensors under TRITON_INTERPRET=1.
"""

from __future__ import annotations

from torch import Tensor

from .launch import run_all
from .mla_decode_launch import mla_decode_launches


def mla_decode(
    q_latent: Tensor,
    q_pe: Tensor | None,
    kv_c: Tensor,
    k_pe: Tensor | None,
    block_table: Tensor | None = None,
    key_mask: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    *,
    softmax_scale: float,
    band_lower: int | None = None,
    band_upper: int | None = None,
    empty_rows: str = "nan",
    out_layout: str = "bhsd",
) -> tuple[Tensor, Tensor]:
    """Absorbed latent attention: `softmax(scale * (q_latent kv_c^T + q_pe k_pe^T)) kv_c`, for every head.

    Args:
        q_latent: `(B, H, M, C)`, queries times W_uk.
        q_pe: `(B, H, M, R)`, or None.
        kv_c: `(B, N, C)`, or with a block table `(num_blocks, block_size, C)`. The last stride is 1, others are free:
            kv_c and k_pe may be views of one buffer.
        k_pe: `(B, N, R)` or `(num_blocks, block_size, R)`, or None.
        block_table: `(B, max_blocks)` int32; what lies behind kv_end is not read. N is then max_blocks * block_size.
        key_mask: `(B or 1, N)` bool, True is kept.
        kv_start, kv_end: `(B or 1, M or 1)` int32 or int64, read on the device.
        band_lower, band_upper: Bounds of key position minus query position.
        empty_rows: What a row without keys gives, see rocm_attn_compile.spec.EmptyRows.
        out_layout: "bhsd", or "bshd": the memory of a contiguous `(B, M, H, C)`.

    Returns:
        `out_latent` `(B, H, M, C)` in the dtype of q_latent, to be multiplied by W_uv; `lse` `(B, H, M)` float32, natural
        log, -inf for an empty row. Equal from run to run.

    Raises:
        ValueError, NotImplementedError: See mla_decode_launch.check.
    """
    launches, out, lse = mla_decode_launches(
        q_latent, q_pe, kv_c, k_pe, block_table, key_mask, kv_start, kv_end, softmax_scale, band_lower, band_upper,
        empty_rows, out_layout,
    )  # fmt: skip
    run_all(launches, q_latent.device)
    return out, lse
