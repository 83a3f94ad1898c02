"""Gradients on CPU tensors: ATen's fused CPU attention backward wherever that is exact, else the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from rocm_attn_compile import _torch_private
from rocm_attn_compile.ops import cpu_unfused, reference_impl
from rocm_attn_compile.ops.cpu import (
    can_fuse,
    fold_groups,
    pad_heads,
    simple_band,
    takes_fused,
)
from rocm_attn_compile.ops.cpu_mask import fused_mask, with_alibi
from rocm_attn_compile.ops.cpu_unfused import may_be_true
from rocm_attn_compile.ops.reference import NEG_INF
from rocm_attn_compile.ops.schemas import as_promised, check_backward_inputs, check_inputs, lse_dtype

_fused_grads = _torch_private.cpu_flash_attention_backward

LSE_KEEPS_LOG_N = 1024.0
"""exp(s - lse) is as exact as a softmax up to about this |lse|; a row of finfo.min (or -1e9) has lost log N in lse."""


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
    """The op `attention_backward`; an unwanted gradient is an empty tensor."""
    masks = (attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids)
    shape = q.shape
    # As in cpu.forward: the usual call is kept short.
    if (
        attn_mask is None
        and key_mask is None
        and kv_start is None
        and kv_end is None
        and q_ids is None
        and kv_ids is None
        and attn_bias is None
        and sinks is None
        and alibi_slopes is None
        and can_fuse(q, k, v)
        and grad_out.shape == shape
        and out.shape == shape
        and out.stride(3) == 1
        and lse.shape == shape[:3]
        and output_mask[:3] == [True, True, True]
        and takes_fused_backward(q, k, v, logits_soft_cap, dropout_p)
    ):
        is_causal = simple_band(shape[2], k.shape[2], softmax_scale, band_lower, band_upper)
        if is_causal is not None:
            if _worth_folding(q, k, v, grad_out, out, lse):
                with _torch_private.below_autograd_and_views():
                    tensors = [_heads_as_batch(t) for t in (grad_out, q, k, v, out)]
                    safe_lse = lse.view(-1, 1, shape[2])
                    folded = _fused_grads(*tensors, safe_lse, 0.0, is_causal, scale=softmax_scale)
                    dq, dk, dv = (grad.view(t.shape) for grad, t in zip(folded, (q, k, v)))
            else:
                dq, dk, dv = _fused_grads(grad_out, q, k, v, out, lse, 0.0, is_causal, scale=softmax_scale)
            return as_promised(dq, q), as_promised(dk, k), as_promised(dv, v), q.new_empty((0,)), q.new_empty((0,))
    wants_dbias = output_mask[3] and attn_bias is not None
    with _torch_private.below_autograd_and_views():
        check_inputs(q, k, v, attn_bias, *masks, sinks, dropout_seed, alibi_slopes, dropout_p, empty_rows)
        check_backward_inputs(grad_out, q, v, out, lse)
        own_bias, attn_bias = attn_bias, with_alibi(attn_bias, alibi_slopes, q.shape[2], k.shape[2])
        is_empty_input = not (q.numel() and k.numel())
        if not is_empty_input and not wants_dbias and takes_fused_backward(q, k, v, logits_soft_cap, dropout_p):
            is_causal, mask = fused_mask(q, k, attn_bias, *masks, softmax_scale, band_lower, band_upper)
            grads = _fused_backward(
                grad_out, q, k, v, attn_bias, sinks, out, lse, is_causal, mask, softmax_scale, empty_rows
            )
            if grads is not None:
                return _wanted(grads, (q, k, v, own_bias, sinks), output_mask)
        if not is_empty_input:
            numbers = (softmax_scale, logits_soft_cap, dropout_p)
            all_masks = (*masks, band_lower, band_upper)
            dq, dk, dv, dbias, dsinks = cpu_unfused.backward(
                grad_out, q, k, v, attn_bias, all_masks, sinks, dropout_seed, out, *numbers, empty_rows, wants_dbias
            )
            if dbias is not None and own_bias is not None:
                dbias = dbias.sum_to_size(own_bias.shape)
            grads = (dq, dk, dv, dbias, dsinks)
            return _wanted(grads, (q, k, v, own_bias, sinks), output_mask)
        return reference_impl.backward(
            grad_out, q, k, v, own_bias, *masks, sinks, dropout_seed, alibi_slopes, out, lse, softmax_scale,
            logits_soft_cap, band_lower, band_upper, dropout_p, empty_rows, output_mask,
        )  # fmt: skip


def takes_fused_backward(q: Tensor, k: Tensor, v: Tensor, logits_soft_cap: float | None, dropout_p: float) -> bool:
    """True if ATen's kernel is to be used, for inputs that are not empty and without a gradient of a bias.

    Of one query the weights are small, and nothing is saved by computing them block by block.
    """
    return q.shape[2] != 1 and takes_fused(q, k, v, logits_soft_cap, dropout_p)


def _fused_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    mask: Tensor | None,
    softmax_scale: float,
    empty_rows: str,
) -> tuple[Tensor | None, ...] | None:
    """Gradients through ATen's kernel; None where it would not be exact."""
    B, H, M, _ = q.shape
    K, N, E = v.shape[1:]
    group = H // K
    is_empty = None
    if mask is not None:
        is_empty = lse == NEG_INF
        if may_be_true(is_empty):
            if empty_rows == "mean_added" and sinks is None:
                return None
            # The kernel computes exp(scores - lse): with 0, what is masked keeps weight exp(-inf) = 0.
            safe_lse = lse.masked_fill(is_empty, 0.0)
        else:
            is_empty, safe_lse = None, lse
    else:
        safe_lse = lse
    if attn_bias is not None and safe_lse.abs().amax() > LSE_KEEPS_LOG_N:
        return None

    dsinks = None
    if sinks is not None:
        delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        share = torch.exp(sinks.to(lse.dtype)[None, :, None] - lse).nan_to_num_(nan=0.0)
        dsinks = -(share * delta).sum((0, 2)).to(sinks.dtype)

    if sinks is not None:
        is_empty = None  # such rows are 0 and have no gradient, as the kernel gives it
    if is_empty is not None and empty_rows in ("nan", "nan_added"):
        out = out.masked_fill(is_empty[..., None], 0.0)
    q_, k_, v_ = pad_heads(q, k, v)
    width = v_.shape[3]
    grad_, out_ = (torch.nn.functional.pad(t, (0, width - E)) if width != E else t for t in (grad_out, out))
    if group > 1:
        q_, k_, v_, mask = fold_groups(q_, k_, v_, mask)
        grad_, out_ = (t.reshape(B * K, group, M, width) for t in (grad_, out_))
        safe_lse = safe_lse.reshape(B * K, group, M)
    out_ = out_ if out_.stride(3) == 1 else out_.contiguous()
    dq, dk, dv = _fused_grads(grad_, q_, k_, v_, out_, safe_lse, 0.0, is_causal, attn_mask=mask, scale=softmax_scale)
    if group > 1:
        dq = dq.reshape(B, H, M, width)
        dk, dv = (t.sum(1, dtype=lse_dtype(q.dtype)).reshape(B, K, N, width) for t in (dk, dv))
    if width != E:
        dv = dv[..., :E].contiguous()
    if width != q.shape[3]:
        dq, dk = (t[..., : q.shape[3]].contiguous() for t in (dq, dk))

    if is_empty is not None and empty_rows in ("nan", "nan_added", "mean"):
        rows = is_empty[..., None]
        if empty_rows != "mean":
            # Every key had weight NaN in that row.
            touched = is_empty.view(B, K, group * M).any(-1)[..., None, None]
            dv = dv.masked_fill(touched, float("nan"))
            if empty_rows == "nan_added":
                dq, dk = dq.masked_fill(rows, float("nan")), dk.masked_fill(touched, float("nan"))
        else:
            from_empty = torch.where(rows, grad_out.to(lse.dtype), 0.0)
            dv = dv + from_empty.reshape(B, K, group * M, E).sum(2, keepdim=True) / N
    return dq, dk, dv, None, dsinks


def _wanted(
    grads: tuple[Tensor | None, ...],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients as the op returns them."""
    dq, dk, dv, dbias, dsinks = (
        as_promised(grad, tensor) if wanted and grad is not None and tensor is not None else tensors[0].new_empty((0,))
        for grad, tensor, wanted in zip(grads, tensors, output_mask)
    )
    return dq, dk, dv, dbias, dsinks


def _worth_folding(*tensors: Tensor) -> bool:
    """True if the tensors are contiguous, and so big that views cost less than the copies they spare.

    The kernel writes `(batch, len, heads, head_dim)`: with every head as a batch of its own, that is bhsd.
    """
    return tensors[0].numel() >= 1 << 13 and all(t.is_contiguous() for t in tensors)


def _heads_as_batch(tensor: Tensor) -> Tensor:
    """Contiguous `(B, H, L, X)` as `(B * H, 1, L, X)`."""
    B, H, L, X = tensor.shape
    return tensor.view(B * H, 1, L, X)
