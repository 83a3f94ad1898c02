"""Latent attention through an implementation of plain attention: the halves of q and k are put side by side.

With `reference.forward` this is the specification of the ops, float64-capable and differentiable; with the CPU's
attention it is their CPU implementation. `attend` and `attend_backward` take the arguments of the op `attention` and of
its backward without impl.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rocm_attn_compile.ops.schemas import lse_dtype

Attend = Callable[..., tuple[Tensor, Tensor]]


def prefill(
    attend: Attend,
    q_nope: Tensor,
    q_pe: Tensor | None,
    k_nope: Tensor,
    k_pe: Tensor | None,
    v: Tensor,
    key_mask: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """The op `mla_prefill`: `out` `(B, H, M, E)` and `lse` `(B, H, M)`."""
    masks = {"key_mask": key_mask, "kv_start": kv_start, "kv_end": kv_end}
    return attend(_joined(q_nope, q_pe), _joined(k_nope, _per_head(k_pe)), v, **masks, **settings)


def prefill_backward(
    attend_backward: Callable[..., tuple],
    grad_out: Tensor,
    q_nope: Tensor,
    q_pe: Tensor | None,
    k_nope: Tensor,
    k_pe: Tensor | None,
    v: Tensor,
    key_mask: Tensor | None,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    output_mask: list[bool],
    **settings: Any,
) -> tuple[Tensor | None, ...]:
    """The op `mla_prefill_backward`: gradients of q_nope, q_pe, k_nope, k_pe, v; None where not given or not wanted."""
    P = q_nope.shape[3]
    dq, dk, dv, _, _ = attend_backward(
        grad_out=grad_out,
        q=_joined(q_nope, q_pe),
        k=_joined(k_nope, _per_head(k_pe)),
        v=v,
        attn_bias=None,
        attn_mask=None,
        key_mask=key_mask,
        kv_start=kv_start,
        kv_end=kv_end,
        q_ids=None,
        kv_ids=None,
        sinks=None,
        dropout_seed=None,
        alibi_slopes=None,
        out=out,
        lse=lse,
        logits_soft_cap=None,
        dropout_p=0.0,
        output_mask=[output_mask[0] or output_mask[1], output_mask[2] or output_mask[3], output_mask[4], False, False],
        **settings,
    )
    wants_k_pe = output_mask[3] and k_pe is not None
    return (
        dq[..., :P] if output_mask[0] else None,
        dq[..., P:] if output_mask[1] and q_pe is not None else None,
        dk[..., :P] if output_mask[2] else None,
        dk[..., P:].sum(1, dtype=lse_dtype(dk.dtype)).to(dk.dtype) if wants_k_pe else None,
        dv if output_mask[4] else None,
    )


def decode(
    attend: Attend,
    q_latent: Tensor,
    q_pe: Tensor | None,
    kv_c: Tensor,
    k_pe: Tensor | None,
    block_table: Tensor | None = None,
    key_mask: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    *,
    empty_rows: str = "nan",
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """The op `mla_decode`: `out_latent` `(B, H, M, C)` and `lse` `(B, H, M)`; one key/value head for all heads."""
    if block_table is not None:
        kv_c, k_pe = gathered(kv_c, k_pe, block_table, kv_end, empty_rows)
    masks = {"key_mask": key_mask, "kv_start": kv_start, "kv_end": kv_end}
    k = _joined(kv_c, k_pe)[:, None]
    return attend(_joined(q_latent, q_pe), k, kv_c[:, None], **masks, empty_rows=empty_rows, **settings)


def gathered(
    kv_c: Tensor, k_pe: Tensor | None, block_table: Tensor, kv_end: Tensor | None, empty_rows: str
) -> tuple[Tensor, Tensor | None]:
    """A paged cache as one sequence per batch: `(B, N, C)` and `(B, N, R)`.

    What lies behind every row's kv_end becomes 0, whatever block the table names there: it is never read, and a NaN of
    an unwritten block would get through a weight of 0. Only a mean over all keys reads it.
    """
    blocks = block_table.clamp(0, kv_c.shape[0] - 1)
    pages = [None if cache is None else cache[blocks].flatten(1, 2) for cache in (kv_c, k_pe)]
    if empty_rows not in ("mean", "mean_added"):
        assert kv_end is not None and pages[0] is not None
        position = torch.arange(pages[0].shape[1], device=kv_c.device)
        is_behind = (position >= kv_end.amax(1, keepdim=True))[..., None]
        pages = [None if page is None else page.masked_fill(is_behind, 0.0) for page in pages]
    latent, rope = pages
    assert latent is not None
    return latent, rope


def expanded(kv_c: Tensor, weight: Tensor) -> Tensor:
    """`(B, N, C)` by `(H, X, C)` to `(B, H, N, X)`: the latent of every key as the head's k_nope or v, bshd memory."""
    H, X, C = weight.shape
    return (kv_c @ weight.reshape(H * X, C).mT).unflatten(-1, (H, X)).transpose(1, 2)


def per_head(rows: Tensor, weight: Tensor) -> Tensor:
    """`(B, H, M, X)` by `(H, X, Y)` to `(B, H, M, Y)`: each head's rows by its own matrix, read once for the batch."""
    B, H, M, X = rows.shape
    return (rows.transpose(0, 1).reshape(H, B * M, X) @ weight).unflatten(1, (B, M)).transpose(0, 1)


def _joined(left: Tensor, right: Tensor | None) -> Tensor:
    """Two halves of the channels side by side; the right one may be missing, or have one head for all."""
    if right is None:
        return left
    return torch.cat([left, right.expand(*left.shape[:-1], -1)], -1)


def _per_head(k_pe: Tensor | None) -> Tensor | None:
    return None if k_pe is None else k_pe[:, None]
