"""Masks as ATen's fused CPU attention takes them: a causal flag and one float tensor that is added to the scores."""

from __future__ import annotations

import torch
from torch import Tensor

from rocm_attn_compile import _torch_private
from rocm_attn_compile.ops.checks import DTYPES
from rocm_attn_compile.ops.reference import NEG_INF, alibi_bias, keep_mask
from rocm_attn_compile.ops.schemas import lse_dtype

_KEPT_DROPPED = {dtype: (torch.tensor(0.0, dtype=dtype), torch.tensor(NEG_INF, dtype=dtype)) for dtype in DTYPES}


def with_alibi(attn_bias: Tensor | None, alibi_slopes: Tensor | None, q_len: int, kv_len: int) -> Tensor | None:
    """All that is added to the scores as one tensor; None if nothing is."""
    if alibi_slopes is None:
        return attn_bias
    alibi = alibi_bias(alibi_slopes, q_len, kv_len)
    return alibi if attn_bias is None else attn_bias.to(alibi.dtype) + alibi


def fused_mask(
    q: Tensor,
    k: Tensor,
    attn_bias: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
    q_ids: Tensor | None,
    kv_ids: Tensor | None,
    softmax_scale: float,
    band_lower: int | None,
    band_upper: int | None,
) -> tuple[bool, Tensor | None]:
    """`(is_causal, mask)` for the ATen kernel; `mask` is 4-D, broadcast and not expanded, with -inf where dropped.

    The two are a conjunction, and causal means top-left, also where q_len != kv_len. The kernel fills -inf before it
    multiplies by the scale, so a scale of 0 or less must not use the flag. Nor does q_len == 1, so that the rows can
    be used for the heads of a group.
    """
    q_len, kv_len = q.shape[2], k.shape[2]
    if band_lower is not None and band_lower <= 1 - q_len:
        band_lower = None  # below every k - q
    if band_upper is not None and band_upper >= kv_len - 1:
        band_upper = None  # above every k - q
    is_causal = band_upper == 0 and softmax_scale > 0 and q_len > 1
    if is_causal:
        band_upper = None
    masks = (attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, band_lower, band_upper)
    keep = keep_mask(q_len, kv_len, q.device, *masks)
    if attn_bias is None and keep is None:
        return is_causal, None
    # The kernel reads the mask in the dtype of q or, for half precision, in float32; -inf exists in all of them.
    if attn_bias is None:
        assert keep is not None
        # In a trace without constant tensors, which it would have to keep.
        traced = _torch_private.is_traced(keep)
        mask = torch.where(keep, 0.0, NEG_INF).to(q.dtype) if traced else torch.where(keep, *_KEPT_DROPPED[q.dtype])
    else:
        mask = attn_bias if attn_bias.dtype == q.dtype else attn_bias.to(lse_dtype(q.dtype))
        if keep is not None:
            mask = torch.where(keep, mask, NEG_INF)
    # The kernel assumes a last stride of 1, or 0 where that size is 1.
    if mask.shape[3] != 1 and mask.stride(3) != 1:
        mask = mask.contiguous()
    return is_causal, mask


def empty_rows_of(mask: Tensor, is_causal: bool, q_len: int, kv_len: int) -> Tensor:
    """Rows for which the mask keeps nothing: bool, broadcastable to `(B, H, M)`."""
    if is_causal:
        later = torch.arange(kv_len) > torch.arange(q_len)[:, None]
        mask = mask.expand(*mask.shape[:2], q_len, kv_len).masked_fill(later, NEG_INF)
    return mask.amax(3) == NEG_INF
