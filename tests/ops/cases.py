"""Calls of the op that cover every feature, each with a readable name; odd lengths, mostly q_len != kv_len; float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from oracle import INF, Call
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def qkv(B: int = 2, H: int = 2, K: int = 2, M: int = 7, N: int = 9, D: int = 8, E: int = 8) -> tuple[Tensor, ...]:
    return randn(B, H, M, D), randn(B, K, N, D), randn(B, K, N, E)


def make(tensors: dict[str, Tensor] | None = None, layout: Callable | None = None, **settings) -> Call:
    """A call with sizes (B, H, K, M, N, D, E) and settings by name."""
    sizes = {name: settings.pop(name) for name in ("B", "H", "K", "M", "N", "D", "E") if name in settings}
    q, k, v = qkv(**sizes)
    if layout is not None:
        q, k, v = layout(q, k, v)
    settings.setdefault("softmax_scale", 0.37)
    return Call(q, k, v, tensors or {}, settings)


def as_bshd(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors)


def packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Views of one (B, L, 3, H, D) buffer."""
    return torch.stack([q, k, v], 0).permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4).unbind(0)


def transposed_k(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return q, k.mT.contiguous().mT, v


def keys_shared(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return q, k[:, :1].expand_as(k), v[:, :, :1].expand_as(v)


def bool_mask(*shape: int, keep: float = 0.6) -> Tensor:
    mask = torch.rand(*shape) < keep
    mask[..., 0] = True  # no empty row
    return mask


def slopes(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


CASES: dict[str, Callable[[], Call]] = {
    "plain": lambda: make(),
    "one-by-one": lambda: make(M=1, N=1),
    "causal-square": lambda: make(M=9, band_upper=0),
    "causal-topleft-wide": lambda: make(band_upper=0),
    "causal-topleft-tall": lambda: make(M=11, N=5, band_upper=0),
    "causal-bottomright-wide": lambda: make(band_upper=2),
    "window": lambda: make(M=9, band_lower=-2, band_upper=0),
    "window-both-sides": lambda: make(M=9, band_lower=-2, band_upper=1),
    "lower-bound-only": lambda: make(M=5, band_lower=-1),
    "bands-without-effect": lambda: make(band_lower=-6, band_upper=8),
    "long-causal": lambda: make(B=1, H=1, K=1, M=201, N=701, band_upper=500),
    "long-causal-topleft": lambda: make(B=1, M=301, N=301, band_upper=0),
    "negative-scale-causal": lambda: make(softmax_scale=-0.4, band_upper=0),
    "zero-scale-causal": lambda: make(softmax_scale=0.0, band_upper=0),
    "gqa": lambda: make(H=6),
    "gqa-causal": lambda: make(H=6, band_upper=0),
    "mqa-causal": lambda: make(H=3, K=1, band_upper=2),
    "gqa-decode": lambda: make(H=6, M=1, band_upper=8),
    "gqa-decode-key-mask": lambda: make({"key_mask": bool_mask(2, 9)}, H=6, M=1),
    "gqa-decode-bias-heads": lambda: make({"attn_bias": randn(2, 6, 1, 9)}, H=6, M=1),
    "gqa-decode-causal-topleft": lambda: make(H=6, M=1, band_upper=0),
    "gqa-mask-batch": lambda: make({"attn_mask": bool_mask(2, 1, 7, 9)}, H=6),
    "gqa-mask-heads": lambda: make({"attn_mask": bool_mask(1, 6, 7, 9)}, H=6, band_upper=0),
    "decode": lambda: make(M=1, band_upper=8),
    "small-v-heads": lambda: make(E=4, H=4),
    "large-v-heads": lambda: make(D=4, E=12, band_upper=0),
    "small-v-heads-decode": lambda: make(D=12, E=8, M=1, H=4),
    "bias": lambda: make({"attn_bias": randn(2, 2, 7, 9)}),
    "bias-heads": lambda: make({"attn_bias": randn(1, 2, 7, 9)}, band_upper=0),
    "bias-keys": lambda: make({"attn_bias": randn(2, 1, 1, 9)}, H=4),
    "bias-rows": lambda: make({"attn_bias": randn(1, 1, 7, 1)}),
    "bias-transposed": lambda: make({"attn_bias": randn(1, 2, 9, 7).mT}),
    "bias-holes": lambda: make({"attn_bias": randn(2, 1, 7, 9).masked_fill(~bool_mask(2, 1, 7, 9), -INF)}),
    "bias-finfo-min": lambda: make({"attn_bias": torch.where(bool_mask(2, 1, 7, 9), 0.0, LOWEST).double()}),
    "mask": lambda: make({"attn_mask": bool_mask(2, 2, 7, 9)}),
    "mask-row": lambda: make({"attn_mask": bool_mask(1, 1, 1, 9)}),
    "mask-transposed": lambda: make({"attn_mask": bool_mask(1, 1, 7, 9).mT.contiguous().mT}),
    "key-mask": lambda: make({"key_mask": bool_mask(2, 9)}),
    "key-mask-one-batch": lambda: make({"key_mask": bool_mask(1, 9)}, H=4),
    "key-mask-causal": lambda: make({"key_mask": bool_mask(2, 9)}, M=9, band_upper=0),
    "key-mask-bias-causal": lambda: make({"key_mask": bool_mask(2, 9), "attn_bias": randn(1, 2, 7, 9)}, band_upper=0),
    "kv-start": lambda: make({"kv_start": torch.randint(-2, 8, (2, 7))}),
    "kv-end": lambda: make({"kv_end": torch.randint(1, 12, (2, 7), dtype=torch.int32)}),
    "kv-range-batch": lambda: make({"kv_start": torch.tensor([[0], [3]]), "kv_end": torch.tensor([[5], [9]])}),
    "chunks": lambda: make({"kv_start": torch.arange(9)[None] // 4 * 4}, M=9, band_upper=0),
    "documents": lambda: make(
        {"q_ids": torch.tensor([[0] * 4 + [1] * 5, [0] * 9]), "kv_ids": torch.tensor([[0] * 4 + [1] * 5, [0] * 9])},
        M=9,
        band_upper=0,
    ),
    "documents-one-batch": lambda: make(
        {"q_ids": torch.tensor([[0, 0, 1, 1, 1, 2, 2]], dtype=torch.int32), "kv_ids": torch.arange(9)[None] % 3}
    ),
    "sinks": lambda: make({"sinks": randn(2)}),
    "sinks-window-gqa": lambda: make({"sinks": randn(6)}, H=6, M=9, band_lower=-3, band_upper=0),
    "sinks-none": lambda: make({"sinks": torch.full((2,), -INF, dtype=torch.float64)}),
    "sinks-decode": lambda: make({"sinks": randn(6)}, H=6, M=1),
    "alibi": lambda: make({"alibi_slopes": slopes(2)}),
    "alibi-causal-gqa": lambda: make({"alibi_slopes": slopes(6)}, H=6, band_upper=2),
    "alibi-batch-sinks": lambda: make({"alibi_slopes": slopes(2, 2), "sinks": randn(2)}, M=11, N=5),
    "alibi-bias-soft-cap": lambda: make(
        {"alibi_slopes": slopes(2), "attn_bias": randn(2, 1, 7, 1)}, logits_soft_cap=1.5
    ),
    "alibi-decode": lambda: make({"alibi_slopes": slopes(6)}, H=6, M=1),
    "soft-cap": lambda: make(logits_soft_cap=1.5),
    "soft-cap-gqa-window": lambda: make(H=6, M=9, logits_soft_cap=1.5, band_lower=-2, band_upper=0),
    "soft-cap-bias-sinks": lambda: make({"attn_bias": randn(1, 2, 1, 9), "sinks": randn(2)}, logits_soft_cap=2.0),
    "layout-bshd": lambda: make(layout=as_bshd, band_upper=0),
    "layout-packed": lambda: make(M=9, layout=packed, band_upper=0),
    "layout-packed-sinks": lambda: make({"sinks": randn(6)}, H=6, K=6, M=9, layout=packed),
    "layout-k-transposed": lambda: make(layout=transposed_k),
    "layout-k-transposed-gqa": lambda: make(H=4, layout=transposed_k, band_upper=0),
    "layout-keys-shared": lambda: make(layout=keys_shared),
    "everything": lambda: make(
        {
            "attn_bias": randn(1, 4, 7, 9),
            "attn_mask": bool_mask(1, 1, 7, 9, keep=0.9),
            "key_mask": bool_mask(2, 9, keep=0.9),
            "kv_start": torch.zeros(1, 1, dtype=torch.int64),
            "kv_end": torch.full((2, 7), 8),
            "q_ids": torch.zeros(1, 7, dtype=torch.int32),
            "kv_ids": torch.zeros(2, 9, dtype=torch.int32),
            "sinks": randn(4),
            "alibi_slopes": slopes(2, 4),
        },
        H=4,
        E=6,
        logits_soft_cap=3.0,
        band_lower=-5,
        band_upper=3,
    ),
}

# Some rows keep no key; each is run in every mode.
EMPTY_CASES: dict[str, Callable[..., Call]] = {
    "mask": lambda **s: make({"attn_mask": bool_mask(2, 1, 7, 9) & (torch.arange(7) % 3 != 1)[:, None]}, **s),
    "key-mask": lambda **s: make({"key_mask": torch.tensor([[True] * 9, [False] * 9])}, H=4, **s),
    "left-padding-causal": lambda **s: make(
        {"key_mask": torch.arange(9)[None] >= torch.tensor([[0], [4]])}, M=9, band_upper=0, **s
    ),
    "band-tall": lambda **s: make(M=9, N=5, band_upper=-4, **s),
    "kv-end": lambda **s: make({"kv_end": torch.tensor([[0, 3, -1, 9, 10, 2, 1]])}, H=6, **s),
    "ids": lambda **s: make({"q_ids": torch.arange(7)[None], "kv_ids": torch.arange(9)[None] // 3}, **s),
    "soft-cap": lambda **s: make({"kv_end": torch.tensor([[0], [9]])}, logits_soft_cap=2.0, **s),
    "two-keys": lambda **s: make({"key_mask": torch.tensor([[True] * 2, [False] * 2])}, N=2, **s),
    "decode": lambda **s: make({"key_mask": torch.tensor([[True] * 9, [False] * 9])}, H=6, M=1, **s),
    "unequal-heads": lambda **s: make({"kv_end": torch.tensor([[0, 3, -1, 9, 10, 2, 1]])}, H=4, E=4, **s),
}


def seeded(build: Callable[..., Call], **settings) -> Call:
    torch.manual_seed(0)
    return build(**settings)
