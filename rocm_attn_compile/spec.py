"""What the recogniser proved about one attention, in plain data: no graph, no backend.

Letters: B batch, H query heads, K key/value heads, M q_len, N kv_len, D head_dim, E v_head_dim.
A size is an `int`, or a sympy expression of Dynamo's shape symbols when it is dynamic.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import sympy
import torch


class EmptyRows(str, enum.Enum):
    """What eager returns for a query row whose every key is masked. Part of the meaning, so part of the op."""

    IMPOSSIBLE = "impossible"
    """Proved not to occur: every row keeps at least one key. Kernels need no special case."""
    NAN = "nan"
    """-inf put *instead of* the score (masked_fill, where): probability NaN on every key, gradient (NaN) to v only."""
    NAN_ADDED = "nan_added"
    """-inf *added* to the score (an additive mask, a bias): as NAN, but the scores get a gradient, too: NaN."""
    ZERO = "zero"
    """`F.scaled_dot_product_attention`'s safe softmax, `nan_to_num`, or sinks: the row is 0 and has no gradient."""
    MEAN = "mean"
    """A finite fill put *instead of* the score (masked_fill, where): probability 1/N for every key, gradient to v."""
    MEAN_ADDED = "mean_added"
    """A finite fill *added* to the score and absorbing it: as MEAN, but the scores get gradient p * (dp - delta)."""


@dataclass(frozen=True)
class MaskSpec:
    """Which (q, k) pairs attend; the conjunction of everything set here.

    Attributes:
        band_lower: Keep only `k - q >= band_lower`; None is no limit. A window of W keys, self included and
            top-left aligned, is `band_lower = 1 - W`.
        band_upper: Keep only `k - q <= band_upper`; None is no limit. 0 is causal aligned top-left,
            `kv_len - q_len` causal aligned bottom-right.
        has_kv_start: A tensor bounds each row from below: keep `k >= kv_start[b, q]`.
        has_kv_end: A tensor bounds each row from above: keep `k < kv_end[b, q]`.
        has_key_mask: A bool tensor `key_mask[b, k]`, True keeps.
        has_segment_ids: Two id tensors; keep `q_ids[b, q] == kv_ids[b, k]`.
        has_attn_mask: Something is left that has no closed form: a bool tensor over (b, h, q, k), True keeps.
        empty_rows: What a row without a kept key gives.
        text: The proved mask in words, for the report.
    """

    band_lower: int | sympy.Expr | None = None
    band_upper: int | sympy.Expr | None = None
    has_kv_start: bool = False
    has_kv_end: bool = False
    has_key_mask: bool = False
    has_segment_ids: bool = False
    has_attn_mask: bool = False
    empty_rows: EmptyRows = EmptyRows.IMPOSSIBLE
    text: str = "none"

    @property
    def is_none(self) -> bool:
        """True if every pair attends."""
        return (
            self.band_lower is None
            and self.band_upper is None
            and not (
                self.has_kv_start or self.has_kv_end or self.has_key_mask or self.has_segment_ids or self.has_attn_mask
            )
        )


@dataclass(frozen=True)
class LatentSpec:
    """The latent of an MLA attention: one vector per token, of which all heads' keys and values are linear maps.

    Attributes:
        kv_lora_rank: Its size, C.
        qk_nope_head_dim, v_head_dim: Sizes per head of what is expanded from it, P and E; None where the graph has only
            the absorbed form, in which they do not occur.
        qk_rope_head_dim: Size of the rotated key that all heads share, R; 0 is none.
        block_size: Rows of a block, if the cache is paged and read in blocks; None is a contiguous cache.
        form: "prefill", "absorbed", or "runtime" (the op chooses at every call).
        form_reason: Why, for the report.
    """

    kv_lora_rank: int | sympy.Expr
    qk_nope_head_dim: int | sympy.Expr | None
    qk_rope_head_dim: int | sympy.Expr
    v_head_dim: int | sympy.Expr | None
    block_size: int | sympy.Expr | None = None
    form: str = "prefill"
    form_reason: str = ""


@dataclass(frozen=True)
class CacheSpec:
    """Keys and values are read from a cache as it lies, instead of from what the graph makes of it.

    Attributes:
        block_size: Rows of a block, if a table says which blocks a sequence has; None is a contiguous cache.
        dtype: What it holds: the attention's dtype or a float8.
        has_scale: Keys or values are multiplied with a number, or one per head.
    """

    block_size: int | sympy.Expr | None
    dtype: torch.dtype
    has_scale: bool


@dataclass(frozen=True)
class AttentionSpec:
    """One softmax attention as the canonical op computes it.

    `out = softmax(cap(softmax_scale * q k^T) + attn_bias - alibi_slope * |distance|, masked) v`, per head;
    `cap(s) = c * tanh(s / c)`.

    Attributes:
        batch, num_heads, num_kv_heads, q_len, kv_len, head_dim, v_head_dim: Sizes of q (B,H,M,D), k (B,K,N,D),
            v (B,K,N,E).
        dtype: Of q, k, v and the output.
        device: Device type, "cuda" (also for ROCm) or "cpu".
        softmax_scale: Factor on the scores; a number (a dynamic scale was specialised).
        logits_soft_cap: tanh cap, or None.
        score_floor: The scaled scores are raised to at least the largest of them all plus this number, before bias and
            masks; or None.
        mask: Which pairs attend.
        has_bias: A float tensor is added to the capped scores.
        has_alibi: The distance |k - q - (kv_len - q_len)|, times a number per head, is subtracted from them.
        bias_requires_grad: Its gradient is wanted.
        has_sinks: A learned logit per head joins the softmax and is dropped after it.
        dropout_p: Probability of dropping a weight; 0.0 is off.
        requires_grad: Some of q, k, v, bias or sinks requires grad and grad mode was on.
        returned_weights: The weights are a result, too: what they are in a row without a key, which may be something
            else than in the sum with v; or None.
        is_decode: q_len is statically at most 16 and less than kv_len.
    """

    batch: int | sympy.Expr
    num_heads: int | sympy.Expr
    num_kv_heads: int | sympy.Expr
    q_len: int | sympy.Expr
    kv_len: int | sympy.Expr
    head_dim: int | sympy.Expr
    v_head_dim: int | sympy.Expr
    dtype: torch.dtype
    device: str
    softmax_scale: float
    logits_soft_cap: float | None = None
    score_floor: float | None = None
    mask: MaskSpec = field(default_factory=MaskSpec)
    has_bias: bool = False
    has_alibi: bool = False
    bias_requires_grad: bool = False
    has_sinks: bool = False
    dropout_p: float = 0.0
    requires_grad: bool = False
    returned_weights: EmptyRows | None = None
    kind: str = "attention"
    """"attention" or "mla": which family of backends may take it."""
    latent: LatentSpec | None = None
    """Of kind "mla": its latent. The sizes above are those of the attention as it is written."""
    cache: CacheSpec | None = None
    """The cache that keys and values are read from, if the op reads it itself."""

    @property
    def is_decode(self) -> bool:
        """True if q_len is known to be at most 16 and smaller than kv_len."""
        return isinstance(self.q_len, int) and self.q_len <= 16 and self.q_len != self.kv_len
