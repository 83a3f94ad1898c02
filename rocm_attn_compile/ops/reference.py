"""The specification of the ops in plain torch: any device, float64-capable, differentiable any number of times.

Everything is computed in float32, or in float64 for float64 inputs. No kernel is faster or slower than this file says;
every kernel must give what this file gives.

Letters: B batch, H query heads, K key/value heads (query head h reads h // (H // K)), M q_len, N kv_len, D head_dim,
E v_head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rocm_attn_compile.ops.schemas import lse_dtype

NEG_INF = -float("inf")


class Weights(NamedTuple):
    """Softmax of the logits.

    Attributes:
        p: `(B, H, M, N)`.
        sink: `(B, H, M)`, the weight of the sink, or None.
        lse: `(B, H, M)`, detached.
        is_empty: `(B, H, M)` bool, rows without a kept finite logit.
    """

    p: Tensor
    sink: Tensor | None
    lse: Tensor
    is_empty: Tensor


def group_rows(x: Tensor, num_kv_heads: int) -> Tensor:
    """`(B, H, M, X)` to `(B, K, H // K * M, X)`: the rows that read one kv head, so that k and v need no expanding."""
    B, H, M, X = x.shape
    # No view if none is needed: views of forward-mode duals fail inside torch.compile.
    return x if num_kv_heads == H else x.reshape(B, num_kv_heads, H // num_kv_heads * M, X)


def ungroup_rows(x: Tensor, num_heads: int) -> Tensor:
    """The inverse of `group_rows`: `(B, K, H // K * M, X)` to `(B, H, M, X)`."""
    B, K, rows, X = x.shape
    return x if num_heads == K else x.reshape(B, num_heads, rows * K // num_heads, X)


def scores(q: Tensor, k: Tensor, softmax_scale: float, logits_soft_cap: float | None) -> Tensor:
    """`cap(softmax_scale * q k^T)`, `(B, H, M, N)`, with `cap(s) = c * tanh(s / c)`."""
    dtype = lse_dtype(q.dtype)
    s = ungroup_rows(group_rows(q.to(dtype), k.shape[1]) @ k.to(dtype).mT, q.shape[1]) * softmax_scale
    return s if logits_soft_cap is None else logits_soft_cap * torch.tanh(s / logits_soft_cap)


def logits(capped: Tensor, attn_bias: Tensor | None, alibi_slopes: Tensor | None = None) -> Tensor:
    """Scores with the biases added, after the cap and before the masks."""
    s = capped if attn_bias is None else capped + attn_bias.to(capped.dtype)
    return s if alibi_slopes is None else s + alibi_bias(alibi_slopes.to(s.dtype), s.shape[2], s.shape[3])


def alibi_bias(slopes: Tensor, q_len: int, kv_len: int) -> Tensor:
    """`-slopes * |k - q - (kv_len - q_len)|`, `(B|1, H, M, N)`: the last query is at the last key.

    Args:
        slopes: `(H,)` or `(B, H)`, in the dtype of the result.
        q_len, kv_len: Sizes.
    """
    key = torch.arange(kv_len, device=slopes.device)
    query = torch.arange(kv_len - q_len, kv_len, device=slopes.device)
    distance = (key - query[:, None]).abs().to(slopes.dtype)
    slopes = slopes[None, :, None, None] if slopes.dim() == 1 else slopes[:, :, None, None]
    return distance * -slopes


def keep_mask(
    q_len: int,
    kv_len: int,
    device: torch.device,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    q_ids: Tensor | None = None,
    kv_ids: Tensor | None = None,
    band_lower: int | None = None,
    band_upper: int | None = None,
) -> Tensor | None:
    """Conjunction of all masks given, bool, broadcastable to `(B, H, M, N)`, True keeps; None keeps everything."""
    keep = attn_mask

    def both(a: Tensor | None, b: Tensor) -> Tensor:
        return b if a is None else a & b

    if key_mask is not None:
        keep = both(keep, key_mask[:, None, None, :])
    if kv_start is not None or kv_end is not None or band_lower is not None or band_upper is not None:
        key = torch.arange(kv_len, device=device)
        if kv_start is not None:
            keep = both(keep, key >= kv_start[:, None, :, None])
        if kv_end is not None:
            keep = both(keep, key < kv_end[:, None, :, None])
        if band_lower is not None or band_upper is not None:
            offset = (key - torch.arange(q_len, device=device)[:, None])[None, None]
            if band_lower is not None:
                keep = both(keep, offset >= band_lower)
            if band_upper is not None:
                keep = both(keep, offset <= band_upper)
    if q_ids is not None and kv_ids is not None:
        keep = both(keep, q_ids[:, None, :, None] == kv_ids[:, None, None, :])
    return keep


def weights(s: Tensor, keep: Tensor | None, sinks: Tensor | None, empty_rows: str) -> Weights:
    """Softmax over the kept keys and the sink; rows without a kept finite score get what `empty_rows` says.

    Args:
        s: Logits `(B, H, M, N)` before masks; N is at least 1.
        keep: From `keep_mask`.
        sinks: `(H,)` or None.
        empty_rows: "impossible", "nan", "nan_added", "zero", "mean" or "mean_added"; with sinks an empty row is 0
            whatever it says.
    """
    masked = s if keep is None else torch.where(keep, s, NEG_INF)
    N = s.shape[3]
    is_empty = masked.detach().amax(-1) == NEG_INF
    empty = is_empty[..., None]
    if sinks is not None:
        column = sinks.to(s.dtype)[None, :, None, None].expand(*s.shape[:3], 1)
        every = torch.cat([masked, column], -1)
        lse = torch.logsumexp(every.detach(), -1)
        # Zeros, not -inf, where the row is empty: no NaN even if the sink is -inf too. The result there is replaced.
        p = torch.softmax(torch.where(empty, 0.0, every), -1)
        return Weights(torch.where(empty, 0.0, p[..., :N]), torch.where(is_empty, 1.0, p[..., N]), lse, is_empty)
    lse = torch.logsumexp(masked.detach(), -1)
    if empty_rows == "impossible":
        return Weights(torch.softmax(masked, -1), None, lse, is_empty)
    if empty_rows == "mean_added":
        # Zero in value, but still a function of the scores: the fill was added to them and they lost all their bits.
        # (Only where they are finite: a bias of -inf beside such a fill has no use, and no second derivative here.)
        finite = torch.where(s == NEG_INF, 0.0, s)
        return Weights(torch.softmax(torch.where(empty, finite - finite.detach(), masked), -1), None, lse, is_empty)
    if empty_rows == "nan":
        # The -inf took the place of the score, and no gradient gets through it: the outer where gives the scores 0.
        return Weights(torch.softmax(torch.where(empty, NEG_INF, masked), -1), None, lse, is_empty)
    p = torch.softmax(torch.where(empty, 0.0, masked), -1)
    if empty_rows == "nan_added":
        # NaN in value and in every derivative; the inner where keeps 0 * NaN out of the other rows' gradients.
        return Weights(torch.where(empty, torch.where(empty, s, 0.0) * float("nan"), p), None, lse, is_empty)
    return Weights(torch.where(empty, 1.0 / N if empty_rows == "mean" else 0.0, p), None, lse, is_empty)


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
    dropout_keep: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    *,
    softmax_scale: float,
    logits_soft_cap: float | None = None,
    band_lower: int | None = None,
    band_upper: int | None = None,
    dropout_p: float = 0.0,
    empty_rows: str = "nan",
) -> tuple[Tensor, Tensor]:
    """Attention as the op computes it, with the dropout mask given: `dropout_keep` bool `(B, H, M, N)`, True keeps.

    Returns:
        `out` `(B, H, M, E)` in q's dtype, 0 where there are no keys at all (N == 0); `lse` `(B, H, M)`, natural log,
        with the sink, -inf for empty rows; not differentiable.
    """
    s = logits(scores(q, k, softmax_scale, logits_soft_cap), attn_bias, alibi_slopes)
    if k.shape[2] == 0:
        return _no_keys(q, v, s, sinks)
    masks = (attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, band_lower, band_upper)
    p, _, lse, _ = weights(s, keep_mask(q.shape[2], k.shape[2], q.device, *masks), sinks, empty_rows)
    if dropout_keep is not None:
        p = p * (dropout_keep.to(p.dtype) / (1.0 - dropout_p))  # a product, so that NaN stays NaN
    out = ungroup_rows(group_rows(p, v.shape[1]) @ v.to(p.dtype), q.shape[1])
    return out.to(q.dtype), lse


def backward(
    grad_out: Tensor,
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
    dropout_keep: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    *,
    softmax_scale: float,
    logits_soft_cap: float | None = None,
    band_lower: int | None = None,
    band_upper: int | None = None,
    dropout_p: float = 0.0,
    empty_rows: str = "nan",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `forward`'s out with respect to q, k, v, attn_bias, sinks (None where not given), written out.

    The softmax is computed anew, not from lse: where all logits of a row are huge (finfo.min), lse has lost log N.
    """
    dtype = lse_dtype(q.dtype)
    K = k.shape[1]
    if k.shape[2] == 0:
        dbias = None if attn_bias is None else torch.zeros_like(attn_bias)
        dsinks = None if sinks is None else torch.zeros_like(sinks)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), dbias, dsinks
    capped = scores(q, k, softmax_scale, logits_soft_cap)
    s = logits(capped, attn_bias, alibi_slopes)
    masks = (attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, band_lower, band_upper)
    p, sink, _, is_empty = weights(s, keep_mask(q.shape[2], k.shape[2], q.device, *masks), sinks, empty_rows)
    grad = group_rows(grad_out.to(dtype), K)
    dp = ungroup_rows(grad @ v.to(dtype).mT, q.shape[1])
    dropped = p
    if dropout_keep is not None:
        factor = dropout_keep.to(dtype) / (1.0 - dropout_p)
        dropped, dp = p * factor, dp * factor
    dv = group_rows(dropped, K).mT @ grad
    delta = (p * dp).sum(-1, keepdim=True)
    ds = p * (dp - delta)
    if empty_rows in ("nan", "mean") or sinks is not None:
        ds = torch.where(is_empty[..., None], 0.0, ds)
    dbias = None if attn_bias is None else ds.sum_to_size(attn_bias.shape).to(attn_bias.dtype)
    dsinks = None if sinks is None or sink is None else -(sink * delta[..., 0]).sum((0, 2)).to(sinks.dtype)
    if logits_soft_cap is not None:
        ds = ds * (1.0 - (capped / logits_soft_cap) ** 2)
    ds = group_rows(ds, K) * softmax_scale
    dq = ungroup_rows(ds @ k.to(dtype), q.shape[1])
    dk = ds.mT @ group_rows(q.to(dtype), K)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias, dsinks


def _no_keys(q: Tensor, v: Tensor, s: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a softmax over no key gives in torch: no weight, hence 0, whatever `empty_rows` says."""
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    if sinks is None:
        return out, s.new_full(q.shape[:3], NEG_INF)
    return out, sinks.detach().to(s.dtype)[None, :, None].expand(q.shape[:3]).clone()


def philox_keep_mask(dropout_seed: Tensor, dropout_p: float, B: int, H: int, M: int, N: int) -> Tensor:
    """Dropout mask `(B, H, M, N)` of the Triton kernel: keep iff `tl.rand(seed, ((b*H + h)*M + q)*N + k) >= dropout_p`.

    Philox-4x32 with 10 rounds in int64 arithmetic; the same bits on every device.
    """
    mask = 0xFFFFFFFF

    def multiply(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """High and low 32 bits of the 64-bit product of two unsigned 32-bit numbers, in signed int64 steps."""
        low, high = (x & 0xFFFF) * a, (x >> 16) * a
        middle = high + (low >> 16)  # below 2 ** 49: no overflow
        return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)

    seed = dropout_seed.reshape(())
    offset = torch.arange(B * H * M * N, device=seed.device)
    c0, c1 = offset & mask, (offset >> 32) & mask
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        high_b, low_b = multiply(0xCD9E8D57, c2)
        high_a, low_a = multiply(0xD2511F53, c0)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    # As tl.rand: the bits as a signed number, folded to be positive, times just below 2 ** -31 in float32.
    signed = torch.where(c0 >= 1 << 31, c0 - (1 << 32), c0)
    folded = torch.where(signed < 0, -signed - 1, signed)
    uniform = folded.to(torch.float32) * torch.tensor(4.6566127342e-10, dtype=torch.float32, device=seed.device)
    return (uniform >= dropout_p).view(B, H, M, N)
