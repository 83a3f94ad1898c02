"""The op on CPU tensors: ATen's fused CPU attention wherever that is exact, else unfused torch operations.

ATen's kernel has no soft cap, no dropout, no grouped heads, one head size for k and v, no empty inputs (it divides by
zero), reads the last dimension as contiguous whatever its stride, tells empty rows from none by nothing, and without a
mask gives 0 for a query of NaN beside fewer keys than a vector register holds. All that is handled here;
`tests/ops/test_op_cpu.py` holds each of these facts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rocm_attn_compile import _torch_private
from rocm_attn_compile.ops import cpu_unfused
from rocm_attn_compile.ops.checks import DTYPES, EMPTY_ROWS, OUT_LAYOUTS
from rocm_attn_compile.ops.cpu_mask import empty_rows_of, fused_mask, with_alibi
from rocm_attn_compile.ops.cpu_unfused import may_be_true, sink_share
from rocm_attn_compile.ops.reference import NEG_INF
from rocm_attn_compile.ops.reference import forward as reference_forward
from rocm_attn_compile.ops.schemas import check_inputs, lse_dtype

_fused = _torch_private.cpu_flash_attention
_HALF = (torch.float16, torch.bfloat16)
_SMALL_SCORES = 1 << 24
_FEW_KEYS = 16
_no_view_tracking = _torch_private.below_autograd_and_views


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
    softmax_scale: float,
    logits_soft_cap: float | None = None,
    band_lower: int | None = None,
    band_upper: int | None = None,
    dropout_p: float = 0.0,
    empty_rows: str = "nan",
    out_layout: str = "bhsd",
) -> tuple[Tensor, Tensor]:
    """The op `attention`; see schemas.py for arguments and reference.py for the meaning."""
    masks = (attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids)
    # The usual call is kept short: no tensor but q, k, v, and at most a causal mask.
    if (
        attn_mask is None
        and key_mask is None
        and kv_start is None
        and kv_end is None
        and q_ids is None
        and kv_ids is None
        and attn_bias is None
        and sinks is None
        and dropout_seed is None
        and alibi_slopes is None
        and logits_soft_cap is None
        and not dropout_p
        and empty_rows in EMPTY_ROWS
        and out_layout in OUT_LAYOUTS
        and k.shape[2] >= _FEW_KEYS
        and can_fuse(q, k, v)
        and not unfused_is_faster(q, k, v)
    ):
        is_causal = simple_band(q.shape[2], k.shape[2], softmax_scale, band_lower, band_upper)
        if is_causal is not None:
            out, lse = _fused(q, k, v, 0.0, is_causal, scale=softmax_scale)
            return with_layout(out, out_layout), lse.contiguous()
    check_inputs(q, k, v, attn_bias, *masks, sinks, dropout_seed, alibi_slopes, dropout_p, empty_rows, out_layout)
    attn_bias = with_alibi(attn_bias, alibi_slopes, q.shape[2], k.shape[2])
    # Views made below are returned: they must not be tracked as views of a hidden base, or in-place changes would fail.
    with _no_view_tracking():
        if q.numel() == 0 or k.numel() == 0:
            out, lse = reference_forward(
                q, k, v, attn_bias, *masks, sinks, softmax_scale=softmax_scale, empty_rows=empty_rows
            )
        elif not takes_fused(q, k, v, logits_soft_cap, dropout_p):
            numbers = (softmax_scale, logits_soft_cap, dropout_p)
            bands = (band_lower, band_upper)
            out, lse = cpu_unfused.forward(
                q, k, v, attn_bias, (*masks, *bands), sinks, dropout_seed, *numbers, empty_rows
            )
        else:
            is_causal, mask = fused_mask(q, k, attn_bias, *masks, softmax_scale, band_lower, band_upper)
            out, lse = fused_forward(q, k, v, is_causal, mask, softmax_scale)
            # The kernel gives an empty row lse 0; only then is the mask itself looked at.
            if mask is not None and (empty_rows != "impossible" or sinks is not None) and not known_full(lse):
                is_empty = empty_rows_of(mask, is_causal, q.shape[2], k.shape[2]).expand(lse.shape)
                if may_be_true(is_empty):
                    lse.masked_fill_(is_empty, NEG_INF)
                    _fill_empty(out, v, is_empty, empty_rows, has_sinks=sinks is not None)
            if sinks is not None:
                share, lse = sink_share(lse, sinks)
                out.mul_(share[..., None])
        return with_layout(out, out_layout), lse.contiguous()


def takes_fused(q: Tensor, k: Tensor, v: Tensor, logits_soft_cap: float | None, dropout_p: float) -> bool:
    """True if ATen's kernel is to be used for inputs that are not empty: it has no soft cap and no dropout."""
    return logits_soft_cap is None and dropout_p == 0.0 and not unfused_is_faster(q, k, v)


def unfused_is_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """True if separate operations beat ATen's kernel, by measurement (benchmarks/cpu_compiled.py).

    In half precision its matrix products are slower than eager's; for the sake of memory it is taken all the same for
    big scores. One query with unequal head sizes is not worth padding all of v.
    """
    if q.dtype in _HALF:
        return q.numel() // q.shape[3] * k.shape[2] <= _SMALL_SCORES
    return q.shape[2] == 1 and q.shape[3] != v.shape[3]


def simple_band(
    q_len: int, kv_len: int, softmax_scale: float, band_lower: int | None, band_upper: int | None
) -> bool | None:
    """The kernel's causal flag for a band that it can express; None if the band needs a mask."""
    if band_lower is not None and band_lower > 1 - q_len:
        return None
    if band_upper is None or band_upper >= kv_len - 1:
        return False
    return True if band_upper == 0 and softmax_scale > 0 and q_len > 1 else None


def can_fuse(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """True if q, k, v are well-formed and ATen's kernel takes them as they are. Cheap."""
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if not (len(q_shape) == 4 and k_shape == v_shape and len(k_shape) == 4):
        return False
    B, H, M, D = q_shape
    dtype = q.dtype
    return (
        k_shape[0] == B
        and k_shape[1] == H
        and k_shape[3] == D
        and dtype in DTYPES
        and k.dtype == dtype
        and v.dtype == dtype
        and q.stride(3) == 1
        and k.stride(3) == 1
        and v.stride(3) == 1
        and B * H * M * D != 0
        and k_shape[2] != 0
    )


def fused_forward(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, mask: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """ATen's kernel, with k and v of grouped heads never expanded in memory and head sizes made equal by zeros.

    Returns:
        `out` `(B, H, M, E)` and `lse` `(B, H, M)`, any strides; empty rows give 0 and 0.
    """
    B, H, M, D = q.shape
    K, N, E = v.shape[1:]
    q, k, v = pad_heads(q, k, v)
    if mask is None and N < _FEW_KEYS:
        mask = q.new_zeros((1, 1, 1, 1))
    if H == K:
        out, lse = _fused(q, k, v, 0.0, is_causal, attn_mask=mask, scale=softmax_scale)
    elif M == 1:
        # Decode: the query heads of one kv head become rows of one query block. (fused_mask never says causal here.)
        group = H // K
        if mask is not None and mask.shape[1] != 1:
            mask = mask.reshape(mask.shape[0], K, group, mask.shape[3])
        out, lse = _fused(q.reshape(B, K, group, -1), k, v, 0.0, False, attn_mask=mask, scale=softmax_scale)
    else:
        q, k, v, mask = fold_groups(q, k, v, mask)
        out, lse = _fused(q, k, v, 0.0, is_causal, attn_mask=mask, scale=softmax_scale)
    return out.reshape(B, H, M, -1)[..., :E], lse.reshape(B, H, M)


def pad_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with unit last stride and one head size: the smaller of D and E is padded with zeros."""
    D, E = q.shape[3], v.shape[3]
    if D < E:
        q, k = (torch.nn.functional.pad(t, (0, E - D)) for t in (q, k))
    elif E < D:
        v = torch.nn.functional.pad(v, (0, D - E))
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    return q, k, v


def fold_groups(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Grouped heads as batch B * K with H // K heads that share k and v by a stride of 0."""
    B, H, M, D = q.shape
    K, N = k.shape[1:3]
    group = H // K
    if mask is not None and mask.shape[:2] != (1, 1):
        masks_h = mask.shape[1]
        mask = mask.expand(B, K if masks_h == 1 else H, *mask.shape[2:])
        mask = mask.reshape(B * K, 1 if masks_h == 1 else group, *mask.shape[2:])
    k, v = (t.reshape(B * K, 1, N, D).expand(-1, group, -1, -1) for t in (k, v))
    return q.reshape(B * K, group, M, D), k, v, mask


def with_layout(out: Tensor, out_layout: str) -> Tensor:
    """`out` `(B, H, M, E)` in the strides that the fake kernel promised; the kernel's follow those of q."""
    if out_layout == "bhsd":
        return out.contiguous()
    B, H, M, E = out.shape
    strides = (M * H * E, E, H * E, 1)
    return out if out.stride() == strides else out.new_empty_strided(out.shape, strides).copy_(out)


def known_full(lse: Tensor) -> bool:
    """True if no row is empty, by ATen's lse of 0 for such rows; False in a trace, where no value is known yet."""
    return not _torch_private.is_traced(lse) and bool(lse.all())


def _fill_empty(out: Tensor, v: Tensor, is_empty: Tensor, empty_rows: str, has_sinks: bool) -> None:
    """Put into the empty rows of `out`, in place, what `empty_rows` says; they are 0 now."""
    if has_sinks or empty_rows in ("zero", "impossible"):
        return
    if empty_rows in ("nan", "nan_added"):
        out.masked_fill_(is_empty[..., None], float("nan"))
        return
    mean = v.mean(2, keepdim=True, dtype=lse_dtype(v.dtype)).repeat_interleave(out.shape[1] // v.shape[1], 1)
    out.copy_(torch.where(is_empty[..., None], mean.to(out.dtype), out))
