"""The op on CPU tensors in separate torch operations, done in place, so that it costs what eager code costs. (On any
tensors, in truth: short calls of attention_with_weights take it on a GPU.)

For what ATen's fused kernel cannot do (soft cap, dropout, a bias that wants its gradient) or does slowly. Matrix
products run in the dtype of q, as in eager code; everything between them in float32, or float64 for float64 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rocm_attn_compile import _torch_private
from rocm_attn_compile.ops.reference import NEG_INF, group_rows, keep_mask
from rocm_attn_compile.ops.schemas import dropout_keep_mask, lse_dtype

Masks = tuple  # attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, band_lower, band_upper


def _softmax(
    q: Tensor,
    k: Tensor,
    attn_bias: Tensor | None,
    masks: Masks,
    sinks: Tensor | None,
    softmax_scale: float,
    logits_soft_cap: float | None,
    empty_rows: str,
    keep_tanh: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Weights `(B, H, M, N)` after masks and sinks, lse, which rows are empty (None: none), and tanh if asked for."""
    B, H, M, _ = q.shape
    K, N = k.shape[1:3]
    s = torch.matmul(group_rows(q, K), k.mT).to(lse_dtype(q.dtype)).view(B, H, M, N)
    tanh = None
    if logits_soft_cap is None:
        s.mul_(softmax_scale)
    else:
        tanh = s.mul_(softmax_scale / logits_soft_cap).tanh_()
        s = tanh * logits_soft_cap if keep_tanh else tanh.mul_(logits_soft_cap)
    if attn_bias is not None:
        s.add_(attn_bias)
    keep = keep_mask(M, N, q.device, *masks)
    if keep is not None:
        s.masked_fill_(~keep, NEG_INF)
    p = torch.softmax(s, -1)
    # The largest weight is exp(largest - lse): two reductions instead of logsumexp's exponentials.
    largest = s.amax(-1)
    lse = largest - p.amax(-1).log()
    is_empty = None
    if attn_bias is not None or keep is not None:
        is_empty = largest == NEG_INF
        if may_be_true(is_empty):
            lse.masked_fill_(is_empty, NEG_INF)
            p.masked_fill_(is_empty[..., None], _empty_weight(N, sinks, empty_rows))
        else:
            is_empty = None
    if sinks is not None:
        share, lse = sink_share(lse, sinks)
        p.mul_(share[..., None])
    return p, lse, is_empty, tanh


def _empty_weight(kv_len: int, sinks: Tensor | None, empty_rows: str) -> float:
    """Each weight of a row without a key."""
    if sinks is not None or empty_rows == "zero":
        return 0.0
    return 1.0 / kv_len if empty_rows in ("mean", "mean_added") else float("nan")


def may_be_true(flags: Tensor) -> bool:
    """`flags.any()`; True in a trace, where no value is known yet, and on a GPU, for which nothing waits."""
    return _torch_private.is_traced(flags) or flags.is_cuda or bool(flags.any())


def sink_share(lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """What the sink leaves of every weight of a softmax done without it, `(B, H, M)`, and the lse with it."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
    # NaN where lse and sink are both -inf: those rows are 0 already.
    return torch.exp(lse - total).nan_to_num_(nan=0.0), total


def _dropout_factor(p: Tensor, dropout_seed: Tensor | None, dropout_p: float) -> Tensor | None:
    if dropout_seed is None or dropout_p == 0.0:
        return None
    return dropout_keep_mask(dropout_seed, dropout_p, tuple(p.shape)).to(p.dtype).div_(1.0 - dropout_p)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Tensor | None,
    masks: Masks,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    softmax_scale: float,
    logits_soft_cap: float | None,
    dropout_p: float,
    empty_rows: str,
) -> tuple[Tensor, Tensor]:
    """`out` `(B, H, M, E)` contiguous, in q's dtype, and `lse`."""
    K = k.shape[1]
    p, lse, _, _ = _softmax(q, k, attn_bias, masks, sinks, softmax_scale, logits_soft_cap, empty_rows, keep_tanh=False)
    factor = _dropout_factor(p, dropout_seed, dropout_p)
    if factor is not None:
        p.mul_(factor)
    out = torch.matmul(group_rows(p.to(q.dtype), K), v)
    return out.view(*q.shape[:3], v.shape[3]), lse


def forward_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Tensor | None,
    masks: Masks,
    sinks: Tensor | None,
    softmax_scale: float,
    logits_soft_cap: float | None,
    empty_rows: str,
    weights_empty_rows: str,
    weights_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`out` as of `forward`, and the weights `(B, H, M, N)`, contiguous; see returned_weights.py."""
    p, _, is_empty, _ = _softmax(
        q, k, attn_bias, masks, sinks, softmax_scale, logits_soft_cap, weights_empty_rows, keep_tanh=False
    )
    weights = p.to(weights_dtype)
    used = weights if weights_dtype == q.dtype else p
    if is_empty is not None and empty_rows != weights_empty_rows:
        used = used.masked_fill(is_empty[..., None], _empty_weight(k.shape[2], sinks, empty_rows))
    out = torch.matmul(group_rows(used.to(q.dtype), k.shape[1]), v)
    return out.view(*q.shape[:3], v.shape[3]), weights


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Tensor | None,
    masks: Masks,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    out: Tensor,
    softmax_scale: float,
    logits_soft_cap: float | None,
    dropout_p: float,
    empty_rows: str,
    wants_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv, dbias, dsinks (None where not given or not wanted); the softmax is computed anew, not from lse."""
    dtype, K = q.dtype, k.shape[1]
    p, lse, is_empty, tanh = _softmax(
        q, k, attn_bias, masks, sinks, softmax_scale, logits_soft_cap, empty_rows, keep_tanh=True
    )
    factor = _dropout_factor(p, dropout_seed, dropout_p)
    grad = group_rows(grad_out, K)
    dv = torch.matmul(group_rows((p if factor is None else p * factor).to(dtype), K).mT, grad)
    dp = torch.matmul(grad, v.mT).to(p.dtype).view(p.shape)
    if factor is not None:
        dp.mul_(factor)
    dsinks = None
    if sinks is not None:
        delta = (grad_out.to(p.dtype) * out.to(p.dtype)).sum(-1)
        weight = torch.exp(sinks.to(p.dtype)[None, :, None] - lse).nan_to_num_(nan=0.0)
        dsinks = -(weight * delta).sum((0, 2)).to(sinks.dtype)
    # p * (dp - sum(p * dp)) in one pass; it does not need the weights to sum to 1.
    ds = _torch_private.softmax_backward(dp, p, -1, p.dtype)
    if is_empty is not None and empty_rows in ("nan", "mean") and sinks is None:
        ds.masked_fill_(is_empty[..., None], 0.0)
    dbias = None
    if wants_dbias and attn_bias is not None:
        dbias = ds.sum_to_size(attn_bias.shape).to(attn_bias.dtype)
    if tanh is not None:
        ds = torch.ops.aten.tanh_backward(ds, tanh)
    # Not in place if ds may be dbias itself.
    ds = ds.mul_(softmax_scale) if dbias is None else ds * softmax_scale
    ds = group_rows(ds.to(dtype), K)
    dq = torch.matmul(ds, k).view(q.shape)
    dk = torch.matmul(ds.mT, group_rows(q, K))
    return dq, dk, dv, dbias, dsinks
