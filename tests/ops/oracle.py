"""Attention as people write it in eager PyTorch: the oracle of the op's tests, not sharing a line with the package.

Run in float64 it is the truth; run in the dtype under test it says how exact eager code is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

INF = math.inf


@dataclass
class Call:
    """Arguments of one call of the op, by name; `q`, `k`, `v` and the optional tensors in one dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    tensors: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def kwargs(self) -> dict[str, Any]:
        return {**self.tensors, **self.settings}

    def differentiable(self) -> dict[str, Tensor]:
        """What can have a gradient, by name."""
        named = {"q": self.q, "k": self.k, "v": self.v, **self.tensors}
        return {name: t for name, t in named.items() if name in ("q", "k", "v", "attn_bias", "sinks")}

    def to(self, dtype: torch.dtype) -> Call:
        """The same with every float tensor in `dtype`, strides kept, as new leaves that require grad."""

        def convert(t: Tensor, name: str = "") -> Tensor:
            if name == "alibi_slopes":
                return t.to(torch.promote_types(dtype, torch.float32))
            if not t.is_floating_point():
                return t
            new = torch.empty_strided(t.shape, t.stride(), dtype=dtype) if is_injective(t) else t.to(dtype)
            if is_injective(t):
                new.copy_(t)
            return new.detach().requires_grad_()

        tensors = {name: convert(t, name) for name, t in self.tensors.items()}
        return replace(self, q=convert(self.q), k=convert(self.k), v=convert(self.v), tensors=tensors)


def is_injective(t: Tensor) -> bool:
    """No two indices share memory."""
    return all(stride != 0 or size == 1 for stride, size in zip(t.stride(), t.shape))


def keep_of(call: Call) -> Tensor:
    """The mask of a call, bool `(B, H, M, N)`, from one comparison per pair."""
    B, H, M, N = *call.q.shape[:3], call.k.shape[2]
    keep = torch.ones(B, H, M, N, dtype=torch.bool)
    row, column = torch.meshgrid(torch.arange(M), torch.arange(N), indexing="ij")
    if call.settings.get("band_lower") is not None:
        keep &= column - row >= call.settings["band_lower"]
    if call.settings.get("band_upper") is not None:
        keep &= column - row <= call.settings["band_upper"]
    given = call.tensors
    if "attn_mask" in given:
        keep &= given["attn_mask"]
    if "key_mask" in given:
        keep &= given["key_mask"].view(-1, 1, 1, N)
    if "kv_start" in given:
        keep &= column >= given["kv_start"][:, None, :, None]
    if "kv_end" in given:
        keep &= column < given["kv_end"][:, None, :, None]
    if "q_ids" in given:
        keep &= given["q_ids"][:, None, :, None] == given["kv_ids"][:, None, None, :]
    return keep


def attend(call: Call, dropout_keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out and lse of a call, in the dtype of its tensors; gradients by autograd."""
    q, k, v, given, settings = call.q, call.k, call.v, call.tensors, call.settings
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.einsum("bhmd,bhnd->bhmn", q, k) * settings["softmax_scale"]
    cap = settings.get("logits_soft_cap")
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    scores = scores.to(wide)
    if "attn_bias" in given:
        scores = scores + given["attn_bias"].to(wide)
    if "alibi_slopes" in given:
        M, N = scores.shape[2:]
        to_the_left = torch.arange(M)[:, None] + (N - M) - torch.arange(N)
        scores = scores - given["alibi_slopes"].to(wide).view(-1, q.shape[1], 1, 1) * to_the_left.abs()
    keep = keep_of(call)
    mode = settings.get("empty_rows", "nan")
    hidden = scores.detach().masked_fill(~keep, -INF)
    if "sinks" in given:
        sinks = given["sinks"].to(wide).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        joined = torch.cat([scores.masked_fill(~keep, -INF), sinks], -1)
        lse = joined.detach().logsumexp(-1)
        p = torch.softmax(joined, -1)[..., :-1]
    else:
        lse = hidden.logsumexp(-1)
        p = weights_of(scores, keep, mode)
    if dropout_keep is not None:
        p = p * dropout_keep / (1 - settings["dropout_p"])
    return torch.einsum("bhmn,bhne->bhme", p.to(v.dtype), v), lse


def weights_of(scores: Tensor, keep: Tensor, mode: str) -> Tensor:
    """The softmax without sinks, as eager code of each kind of `empty_rows` writes it."""
    lowest = torch.finfo(scores.dtype).min
    if mode == "nan":
        return torch.softmax(scores.masked_fill(~keep, -INF), -1)
    if mode == "nan_added":
        return torch.softmax(scores + torch.where(keep, 0.0, -INF).to(scores.dtype), -1)
    if mode == "mean":
        return torch.softmax(scores.masked_fill(~keep, lowest), -1)
    if mode == "mean_added":
        return torch.softmax(scores + torch.zeros_like(scores).masked_fill(~keep, lowest), -1)
    return torch.nan_to_num(torch.softmax(scores.masked_fill(~keep, -INF), -1), 0.0)


def grads_of(out: Tensor, call: Call, grad_out: Tensor) -> tuple[Tensor, ...]:
    """Gradients of everything differentiable in the call."""
    return torch.autograd.grad(out, tuple(call.differentiable().values()), grad_out.to(out.dtype))
