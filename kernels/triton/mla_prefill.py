"""Launches of latent attention in its expanded form: keys of a head are `[k_nope | k_pe]`, k_pe shared by all heads.

The kernels are those of TRITON_ATTN, which read a head dimension in two pieces; here the second piece lies in a tensor
of its own, so no concatenated key exists. The gradient of k_pe is a sum over heads: each head's part is written
(float32), then they are added in order. Where the pieces are wider than the kernels take, they are concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import configs
from .attention import attention_backward, attention_forward
from .backward_launch import backward_launches
from .forward_launch import forward_launches
from .launch import MAX_HEAD_DIM, Launch, Tuning, device_arch
from .mla_decode_launch import rows_adjacent

Masks = tuple[Tensor | None, Tensor | None, Tensor | None]
"""key_mask, kv_start, kv_end."""


def check(q_nope: Tensor, q_pe: Tensor | None, k_nope: Tensor, k_pe: Tensor | None) -> None:
    """Raise on sizes and types of q_pe and k_pe that do not fit; launch.check looks at the rest.

    Raises:
        ValueError: Wrong ranks or sizes.
        NotImplementedError: Different dtypes.
    """
    if (q_pe is None) != (k_pe is None):
        raise ValueError("q_pe and k_pe belong together: give both or neither")
    if q_pe is None or k_pe is None:
        return
    width = k_pe.shape[-1]
    wanted = (*q_nope.shape[:3], width), (k_nope.shape[0], k_nope.shape[2], width)
    if (tuple(q_pe.shape), tuple(k_pe.shape)) != wanted:
        raise ValueError(f"q_pe and k_pe must be {wanted}; got {tuple(q_pe.shape)} and {tuple(k_pe.shape)}")
    if q_pe.dtype != q_nope.dtype or k_pe.dtype != q_nope.dtype:
        raise NotImplementedError(
            f"q_nope, q_pe, k_pe must share one dtype; got {q_nope.dtype}, {q_pe.dtype}, {k_pe.dtype}"
        )


def in_pieces(q_nope: Tensor, k_pe: Tensor, v: Tensor, arch: str | None = None) -> bool:
    """Whether the kernels take both pieces as they are; else they are concatenated."""
    arch = arch or device_arch(q_nope.device)[0]
    blocks = configs.rope_blocks(arch, q_nope.element_size(), q_nope.shape[3], k_pe.shape[2], v.shape[3])
    return blocks[1] <= blocks[0] and blocks[0] + blocks[1] <= MAX_HEAD_DIM


def concatenated(q_nope: Tensor, q_pe: Tensor, k_nope: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
    """q and k of a plain attention."""
    shared = k_pe.unsqueeze(1).expand(*k_nope.shape[:3], k_pe.shape[2])
    return torch.cat((q_nope, q_pe), -1), torch.cat((k_nope, shared), -1)


def prefill_launches(
    q_nope: Tensor, q_pe: Tensor, k_nope: Tensor, k_pe: Tensor, v: Tensor, masks: Masks, softmax_scale: float,
    band_lower: int | None, band_upper: int | None, empty_rows: str, out_layout: str, tuning: Tuning | None = None,
) -> tuple[list[Launch], Tensor, Tensor]:  # fmt: skip
    """The launches of one forward, `out` and `lse`, in pieces."""
    rope = rows_adjacent(q_pe), rows_adjacent(k_pe)
    return forward_launches(
        q_nope, k_nope, v, None, None, *masks, None, None, None, None, None, softmax_scale, None, band_lower,
        band_upper, 0.0, empty_rows, out_layout, tuning, rope,
    )  # fmt: skip


def prefill_backward_launches(
    grad_out: Tensor, q_nope: Tensor, q_pe: Tensor, k_nope: Tensor, k_pe: Tensor, v: Tensor, masks: Masks, out: Tensor,
    lse: Tensor, softmax_scale: float, band_lower: int | None, band_upper: int | None, empty_rows: str,
    output_mask: Sequence[bool], tuning: Tuning | None = None,
) -> tuple[list[Launch], dict[str, Tensor]]:  # fmt: skip
    """The launches of one backward, in pieces, and what they fill: see backward_launches, and `gradients`.

    Args:
        output_mask: Which of the gradients of q_nope, q_pe, k_nope, k_pe, v are wanted.
    """
    rope = rows_adjacent(q_pe), rows_adjacent(k_pe)
    wanted = (output_mask[0] or output_mask[1], output_mask[2] or output_mask[3], output_mask[4])
    return backward_launches(
        grad_out, q_nope, k_nope, v, None, None, *masks, None, None, None, None, None, out, lse, softmax_scale, None,
        band_lower, band_upper, 0.0, empty_rows, [*wanted, False, False], tuning, rope,
    )  # fmt: skip


def gradients(tensors: dict[str, Tensor], k_pe: Tensor, output_mask: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Those of q_nope, q_pe, k_nope, k_pe, v, from what such launches fill; None where not wanted."""
    dk_pe = tensors["dk_pe"].sum(1).to(k_pe.dtype) if output_mask[3] else None
    found = tensors["dq"], tensors["dq_pe"], tensors["dk"], dk_pe, tensors["dv"]
    return tuple(gradient if wanted else None for gradient, wanted in zip(found, output_mask))


def expanded_forward(
    q_nope: Tensor, q_pe: Tensor | None, k_nope: Tensor, k_pe: Tensor | None, v: Tensor, masks: Masks,
    softmax_scale: float, band_lower: int | None, band_upper: int | None, empty_rows: str, out_layout: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The forward without pieces: no k_pe, or concatenated."""
    q, k = (q_nope, k_nope) if q_pe is None or k_pe is None else concatenated(q_nope, q_pe, k_nope, k_pe)
    return attention_forward(
        q, k, v, None, None, *masks, softmax_scale=softmax_scale, band_lower=band_lower, band_upper=band_upper,
        empty_rows=empty_rows, out_layout=out_layout,
    )  # fmt: skip


def expanded_backward(
    grad_out: Tensor, q_nope: Tensor, q_pe: Tensor | None, k_nope: Tensor, k_pe: Tensor | None, v: Tensor, masks: Masks,
    out: Tensor, lse: Tensor, softmax_scale: float, band_lower: int | None, band_upper: int | None, empty_rows: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """The gradients for expanded_forward, of q_nope, q_pe, k_nope, k_pe and v."""
    q, k = (q_nope, k_nope) if q_pe is None or k_pe is None else concatenated(q_nope, q_pe, k_nope, k_pe)
    wanted = [output_mask[0] or output_mask[1], output_mask[2] or output_mask[3], output_mask[4], False, False]
    dq, dk, dv, _, _ = attention_backward(
        grad_out, q, k, v, None, None, *masks, None, None, None, None, None, out, lse, softmax_scale, None, band_lower,
        band_upper, 0.0, empty_rows, wanted,
    )  # fmt: skip
    if q_pe is None:
        return dq, None, dk, None, dv
    nope = q_nope.shape[3]
    dq_pe, dk_pe = (dq[..., nope:] if wanted[0] else None), None
    if output_mask[3]:
        dk_pe = dk[..., nope:].float().sum(1).to(dk.dtype)
    return dq[..., :nope] if wanted[0] else dq, dq_pe, dk[..., :nope] if wanted[1] else dk, dk_pe, dv
