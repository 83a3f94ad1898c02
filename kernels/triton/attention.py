"""Launchers of TRITON_ATTN: the forward and backward of the canonical op `rocm_attn::attention`, and of
`attention_with_weights`.

Letters: B batch, H query heads, K key/value heads, M q_len, N kv_len, D head_dim, E v_head_dim.
Needs torch and triton only. Works on ROCm and CUDA devices, and on CPU tensors under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backward_launch import backward_launches, sink_gradient
from .forward_launch import forward_launches
from .launch import Tuning, run_all
from .tuned import decode
from .weights_launch import weights_launches


@functools.lru_cache(maxsize=1024)
def _tuning(text: str, opaque: bool) -> Tuning | None:
    return Tuning(chosen=decode(text), opaque=opaque) if text or opaque else None


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    q_ids: Tensor | None = None,
    kv_ids: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softmax_scale: float = 1.0,
    logits_soft_cap: float | None = None,
    band_lower: int | None = None,
    band_upper: int | None = None,
    dropout_p: float = 0.0,
    empty_rows: str = "nan",
    out_layout: str = "bhsd",
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    tuned: str = "",
    opaque: bool = False,
) -> tuple[Tensor, Tensor]:
    """Softmax attention; the arguments are those of the op, see rocm_attn_compile/ops, and `tuned` and `opaque`.

    No input is copied: any strides are taken, and broadcast dimensions are read in place. Loads are widest where the
    head dimension (or, for a transposed K, the key dimension) has unit stride.

    Returns:
        `out` `(B, H, M, E)` in the dtype of q, contiguous or, for out_layout "bshd", with the memory of a contiguous
        `(B, M, H, E)`;
        `lse` `(B, H, M)` float32, natural log, -inf for an empty row.

    Raises:
        ValueError, NotImplementedError: See launch.check and cache_launch.check_cache.
    """
    launches, out, lse = forward_launches(
        q, k, v, attn_bias, attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, sinks, dropout_seed, alibi_slopes,
        softmax_scale, logits_soft_cap, band_lower, band_upper, dropout_p, empty_rows, out_layout,
        tuning=_tuning(tuned, opaque), block_table=block_table, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    run_all(launches, q.device)
    return out, lse


def attention_with_weights(
    tensors: dict[str, Tensor | None],
    settings: dict[str, Any],
    weights_empty_rows: str,
    weights_dtype: torch.dtype,
    opaque: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output and softmax weights; arguments as weights_launch.weights_launches.

    Returns:
        `out` as of attention_forward; `weights` `(B, H, M, N)`, contiguous, without dropout.

    Raises:
        ValueError, NotImplementedError: See launch.check.
    """
    launches, out, weights = weights_launches(tensors, settings, weights_empty_rows, weights_dtype, _tuning("", opaque))
    q = tensors["q"]
    assert q is not None
    run_all(launches, q.device)
    return out, weights


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
    q_ids: Tensor | None,
    kv_ids: Tensor | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    logits_soft_cap: float | None,
    band_lower: int | None,
    band_upper: int | None,
    dropout_p: float,
    empty_rows: str,
    output_mask: Sequence[bool],
    tuned: str = "",
    opaque: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of attention_forward's `out`, deterministic.

    Args:
        grad_out: `(B, H, M, E)`, any strides.
        out, lse: What attention_forward returned.
        output_mask: Which of dq, dk, dv, dbias, dsinks are wanted.
        tuned: What tuning chose, see tuned.py.
        opaque: As in launch.Tuning.

    Returns:
        dq, dk, dv, dbias, dsinks: of the shape and dtype of q, k, v, attn_bias and sinks, with the strides of a dense
        tensor kept; shape (0,) where not wanted or not given.

    Raises:
        ValueError, NotImplementedError: See launch.check.
    """
    launches, tensors = backward_launches(
        grad_out, q, k, v, attn_bias, attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, sinks, dropout_seed,
        alibi_slopes, out, lse, softmax_scale, logits_soft_cap, band_lower, band_upper, dropout_p, empty_rows,
        output_mask, tuning=_tuning(tuned, opaque),
    )  # fmt: skip
    run_all(launches, q.device)
    if sinks is not None and output_mask[4]:
        dsinks = sink_gradient(sinks, lse, tensors["delta"], tensors["correction"])
    else:
        dsinks = q.new_empty((0,))
    return tensors["dq"], tensors["dk"], tensors["dv"], tensors["dbias"], dsinks
