"""The reference as an implementation of the ops: checks arguments, draws the dropout mask, promises strides."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rocm_attn_compile.ops import reference
from rocm_attn_compile.ops.schemas import check_backward_inputs, check_inputs, dropout_keep_mask, empty_grad, empty_out


def forward(
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
    *,
    dropout_p: float = 0.0,
    empty_rows: str = "nan",
    out_layout: str = "bhsd",
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """The op `attention` without impl."""
    optionals = (attn_bias, attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, sinks)
    check_inputs(q, k, v, *optionals, dropout_seed, alibi_slopes, dropout_p, empty_rows, out_layout)
    keep = _dropout_keep(q, k, dropout_seed, dropout_p)
    out, lse = reference.forward(
        q, k, v, *optionals, keep, alibi_slopes, dropout_p=dropout_p, empty_rows=empty_rows, **settings
    )
    return empty_out(q, v, out_layout).copy_(out), lse.contiguous()


def backward(
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
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op `attention_backward` without impl; out and lse are not used."""
    optionals = (attn_bias, attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, sinks)
    check_inputs(q, k, v, *optionals, dropout_seed, alibi_slopes, dropout_p, empty_rows)
    check_backward_inputs(grad_out, q, v, out, lse)
    grads = reference.backward(
        grad_out,
        q,
        k,
        v,
        *optionals,
        _dropout_keep(q, k, dropout_seed, dropout_p),
        alibi_slopes,
        softmax_scale=softmax_scale,
        logits_soft_cap=logits_soft_cap,
        band_lower=band_lower,
        band_upper=band_upper,
        dropout_p=dropout_p,
        empty_rows=empty_rows,
    )
    dq, dk, dv, dbias, dsinks = (
        empty_grad(tensor).copy_(grad) if wanted and grad is not None and tensor is not None else q.new_empty((0,))
        for grad, tensor, wanted in zip(grads, (q, k, v, attn_bias, sinks), output_mask)
    )
    return dq, dk, dv, dbias, dsinks


def _dropout_keep(q: Tensor, k: Tensor, dropout_seed: Tensor | None, dropout_p: float) -> Tensor | None:
    if dropout_seed is None or dropout_p == 0.0:
        return None
    return dropout_keep_mask(dropout_seed, dropout_p, (*q.shape[:3], k.shape[2]))
