"""Launchers of TRITON_MLA: latent attention for the ops `rocm_attn::mla_decode` and `rocm_attn::mla_prefill`.

Letters: B batch, H query heads, M q_len, N kv_len, C kv_lora_rank, P qk_nope_head_dim, R qk_rope_head_dim, E
v_head_dim. Needs torch and triton only. Works on ROCm and CUDA devices, and on CPU tensors under TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .launch import run_all
from .mla_decode_launch import mla_decode_launches
from .mla_prefill import (
    check,
    expanded_backward,
    expanded_forward,
    gradients,
    in_pieces,
    prefill_backward_launches,
    prefill_launches,
)


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
        `out_latent` `(B, H, M, C)` in the dtype of q_latent, to be multiplied by W_uv; `lse` `(B, H, M)` float32,
        natural log, -inf for an empty row. Equal from run to run.

    Raises:
        ValueError, NotImplementedError: See mla_decode_launch.check.
    """
    launches, out, lse = mla_decode_launches(
        q_latent, q_pe, kv_c, k_pe, block_table, key_mask, kv_start, kv_end, softmax_scale, band_lower, band_upper,
        empty_rows, out_layout,
    )  # fmt: skip
    run_all(launches, q_latent.device)
    return out, lse


def mla_prefill(
    q_nope: Tensor,
    q_pe: Tensor | None,
    k_nope: Tensor,
    k_pe: Tensor | None,
    v: Tensor,
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
    """Latent attention with expanded keys: `softmax(scale * (q_nope k_nope^T + q_pe k_pe^T)) v`.

    Args:
        q_nope: `(B, H, M, P)`.
        q_pe: `(B, H, M, R)`, or None.
        k_nope: `(B, H, N, P)`.
        k_pe: `(B, N, R)`, shared by all heads, or None.
        v: `(B, H, N, E)`.
        key_mask, kv_start, kv_end, band_lower, band_upper, empty_rows, out_layout: As of mla_decode.

    Returns:
        `out` `(B, H, M, E)` in the dtype of q_nope; `lse` `(B, H, M)` float32.

    Raises:
        ValueError, NotImplementedError: See launch.check and mla_prefill.check.
    """
    check(q_nope, q_pe, k_nope, k_pe)
    masks = key_mask, kv_start, kv_end
    if q_pe is None or k_pe is None or not in_pieces(q_nope, k_pe, v):
        return expanded_forward(
            q_nope, q_pe, k_nope, k_pe, v, masks, softmax_scale, band_lower, band_upper, empty_rows, out_layout
        )
    launches, out, lse = prefill_launches(
        q_nope, q_pe, k_nope, k_pe, v, masks, softmax_scale, band_lower, band_upper, empty_rows, out_layout
    )
    run_all(launches, q_nope.device)
    return out, lse


def mla_prefill_backward(
    grad_out: Tensor,
    q_nope: Tensor,
    q_pe: Tensor | None,
    k_nope: Tensor,
    k_pe: Tensor | None,
    v: Tensor,
    key_mask: Tensor | None,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    softmax_scale: float,
    band_lower: int | None = None,
    band_upper: int | None = None,
    empty_rows: str = "nan",
    output_mask: Sequence[bool] = (True, True, True, True, True),
) -> tuple[Tensor | None, ...]:
    """Gradients of mla_prefill's `out`, equal from run to run.

    Args:
        grad_out: `(B, H, M, E)`, any strides.
        out, lse: What mla_prefill returned.
        output_mask: Which of the gradients of q_nope, q_pe, k_nope, k_pe, v are wanted.

    Returns:
        The five gradients, None where not wanted or where there is no input.

    Raises:
        ValueError, NotImplementedError: As of mla_prefill.
    """
    check(q_nope, q_pe, k_nope, k_pe)
    masks = key_mask, kv_start, kv_end
    if q_pe is None or k_pe is None or not in_pieces(q_nope, k_pe, v):
        found = expanded_backward(
            grad_out, q_nope, q_pe, k_nope, k_pe, v, masks, out, lse, softmax_scale, band_lower, band_upper, empty_rows,
            output_mask,
        )  # fmt: skip
        return tuple(gradient if wanted else None for gradient, wanted in zip(found, output_mask))
    launches, tensors = prefill_backward_launches(
        grad_out, q_nope, q_pe, k_nope, k_pe, v, masks, out, lse, softmax_scale, band_lower, band_upper, empty_rows,
        output_mask,
    )  # fmt: skip
    run_all(launches, q_nope.device)
    return gradients(tensors, k_pe, output_mask)
