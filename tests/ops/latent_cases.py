"""Calls of the ops of latent attention, and the same computed as a naive model does: the oracle, einsums and a softmax.

Letters as in ops/mla_schemas.py. Odd lengths; all sizes differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from oracle import INF, weights_of
from torch import Tensor


@dataclass
class Latent:
    """Arguments of a call of `rocm_attn::mla`, by name, contiguous cache; float tensors in one dtype."""

    tensors: dict[str, Tensor]
    masks: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Tensor | None:
        return self.__dict__["tensors"].get(name)

    def to(self, dtype: torch.dtype, requires_grad: bool = False) -> Latent:
        tensors = {name: t.to(dtype).detach().requires_grad_(requires_grad) for name, t in self.tensors.items()}
        return replace(self, tensors=tensors)

    @property
    def whole(self) -> tuple:
        """Positional arguments of `mla` up to the block table."""
        return tuple(self.tensors.get(name) for name in ("q_nope", "q_pe", "kv_c", "k_pe", "w_uk", "w_uv"))

    @property
    def prefill(self) -> tuple:
        """Positional arguments of `mla_prefill` up to the masks, computed from the latent."""
        return self.q_nope, self.q_pe, expand(self.kv_c, self.w_uk), self.k_pe, expand(self.kv_c, self.w_uv)

    @property
    def decode(self) -> tuple:
        """Positional arguments of `mla_decode` up to the block table."""
        return torch.einsum("bhmp,hpc->bhmc", self.q_nope, self.w_uk), self.q_pe, self.kv_c, self.k_pe

    @property
    def kwargs(self) -> dict[str, Any]:
        return {**self.masks, **self.settings}


def expand(kv_c: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("bnc,hxc->bhnx", kv_c, weight)


def latent(
    masks: dict[str, Tensor] | None = None,
    B: int = 2, H: int = 3, M: int = 5, N: int = 9, P: int = 8, R: int = 6, C: int = 12, E: int = 10,
    **settings: Any,
) -> Latent:  # fmt: skip
    sizes = {"q_nope": (B, H, M, P), "kv_c": (B, N, C), "w_uk": (H, P, C), "w_uv": (H, E, C)}
    if R:
        sizes |= {"q_pe": (B, H, M, R), "k_pe": (B, N, R)}
    tensors = {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}
    for name in ("w_uk", "w_uv"):
        tensors[name] /= C**0.5
    settings.setdefault("softmax_scale", 0.31)
    return Latent(tensors, masks or {}, settings)


def keep_of(call: Latent) -> Tensor:
    """The mask, bool `(B, 1, M, N)`, from one comparison per pair."""
    B, M, N = call.q_nope.shape[0], call.q_nope.shape[2], call.kv_c.shape[1]
    keep = torch.ones(B, 1, M, N, dtype=torch.bool)
    row, column = torch.meshgrid(torch.arange(M), torch.arange(N), indexing="ij")
    for name, compare in (("band_lower", torch.ge), ("band_upper", torch.le)):
        if call.settings.get(name) is not None:
            keep &= compare(column - row, call.settings[name])
    if "key_mask" in call.masks:
        keep &= call.masks["key_mask"].view(-1, 1, 1, N)
    for name, compare in (("kv_start", torch.ge), ("kv_end", torch.lt)):
        if name in call.masks:
            keep &= compare(column, call.masks[name][:, None, :, None])
    return keep


def attend(call: Latent) -> tuple[Tensor, Tensor]:
    """out and lse as a naive model computes them, in the dtype of its tensors; gradients by autograd."""
    q_nope, q_pe, k_nope, k_pe, v = call.prefill
    wide = torch.float64 if q_nope.dtype == torch.float64 else torch.float32
    scores = torch.einsum("bhmp,bhnp->bhmn", q_nope, k_nope)
    if q_pe is not None:
        scores = scores + torch.einsum("bhmr,bnr->bhmn", q_pe, k_pe)
    scores = (scores * call.settings["softmax_scale"]).to(wide)
    keep = keep_of(call)
    mode = call.settings.get("empty_rows", "nan")
    lse = scores.detach().masked_fill(~keep, -INF).logsumexp(-1)
    p = weights_of(scores, keep, mode)
    return torch.einsum("bhmn,bhne->bhme", p.to(v.dtype), v), lse


def paged(call: Latent, block_size: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """kv_c and k_pe in shuffled blocks with NaN in all that is not a key, and the block table."""
    B, N = call.kv_c.shape[:2]
    most = -(-N // block_size)
    table = torch.randperm(B * most + 3)[: B * most].view(B, most).to(torch.int32)
    pages = []
    for cache in (call.kv_c, call.k_pe):
        if cache is None:
            pages.append(None)
            continue
        padded = torch.nn.functional.pad(cache, (0, 0, 0, most * block_size - N), value=float("nan"))
        page = cache.new_full((B * most + 3, block_size, cache.shape[2]), float("nan"))
        page[table] = padded.unflatten(1, (most, block_size))
        pages.append(page)
    return pages[0], pages[1], table


def rows(*numbers: int) -> Tensor:
    return torch.tensor(numbers)[:, None]


MASKS: dict[str, Callable[[], Latent]] = {
    "none": latent,
    "causal": lambda: latent(M=9, band_upper=0),
    "causal-bottomright": lambda: latent(band_upper=4),
    "window": lambda: latent(M=9, band_lower=-2, band_upper=0),
    "key-mask": lambda: latent({"key_mask": torch.arange(9)[None] >= rows(0, 3)}, band_upper=8),
    "key-mask-one": lambda: latent({"key_mask": torch.arange(9)[None] % 3 != 1}),
    "kv-start": lambda: latent({"kv_start": rows(2, 0)}),
    "kv-end": lambda: latent({"kv_end": rows(4, 9).int()}),
    "kv-end-rows": lambda: latent({"kv_end": torch.arange(1, 6)[None] + 3}),
    "kv-range": lambda: latent({"kv_start": rows(1, 0), "kv_end": rows(5, 7)}, band_lower=-3),
}
SIZES: dict[str, Callable[[], Latent]] = {
    "decode": lambda: latent({"kv_end": rows(5, 9)}, M=1),
    "one-head": lambda: latent(H=1, band_upper=4),
    "128-heads": lambda: latent(B=1, H=128, M=3, P=4, R=2, E=4, C=8, band_upper=6),
    "no-rope": lambda: latent(R=0, band_upper=4),
    "no-rope-decode": lambda: latent(R=0, M=1),
    "v-equals-nope": lambda: latent(P=8, E=8),
    "v-wider-than-latent": lambda: latent(E=20),
    "rope-wider-than-latent": lambda: latent(R=20, C=6, band_upper=4),
    "one-key": lambda: latent(M=3, N=1),
    "negative-scale": lambda: latent(softmax_scale=-0.4, band_upper=4),
}
EMPTY: dict[str, Callable[..., Latent]] = {
    "key-mask": lambda **s: latent({"key_mask": torch.tensor([[True] * 9, [False] * 9])}, **s),
    "kv-end": lambda **s: latent({"kv_end": torch.tensor([[0, 3, -1, 9, 10]])}, **s),
    "decode": lambda **s: latent({"kv_end": rows(0, 9)}, M=1, **s),
    "left-padding-causal": lambda **s: latent({"kv_start": rows(0, 4)}, M=9, band_upper=0, **s),
}


def seeded(build: Callable[..., Latent], **settings: Any) -> Latent:
    torch.manual_seed(0)
    return build(**settings)
