"""When the one backward kernel for Hopper takes a call, and its launches."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import configs
from .backward_finish import backward_finish_kernel
from .common import CAP_FAST, NO_CAP
from .forward_hopper_launch import Blocks, products
from .launch import NO_SWIZZLE, Descriptor, Launch, layout, swizzled, takes_tma
from .mask_ranges_launch import key_ranges_launch, ranges_launch

BLOCK_N, PART = 128, 16
"""As in backward_hopper_parts.py."""

FASTER: dict[Blocks, int] = {(64, 0, 64): 2**36, (128, 0, 128): 2**36, (128, 64, 128): 2**35, (256, 0, 256): 2**35}
"""From how many products on (B H M N (D + E), see forward_hopper_launch.products) a call is given to Hopper's own
kernels: where they save more than an opaque call costs, for Inductor cannot launch them (docs/kernels.md)."""

_FEATURES = ("HAS_BIAS", "HAS_ATTN_MASK", "HAS_DROPOUT", "HAS_ALIBI")


def refusal(
    arch: str, itemsize: int, blocks: tuple[int, int, int], arguments: dict[str, Any], any_size: bool = False
) -> str:
    """Why the kernel cannot, or should not, compute a call's gradients; "" where it should.

    That tensor descriptors can be made of q, k, v and grad_out is for the caller to see.

    Args:
        arch: "sm90", ...
        itemsize: Bytes of an element of q.
        blocks: From configs.head_blocks.
        arguments: What the other backward kernels are given; RAW says that the scores are a plain product.
        any_size: Also where it is not worth it.
    """
    if not configs.has_hopper_kernels(arch):
        return "written for Hopper, in Gluon, which is experimental, as two releases of Triton have it"
    if itemsize != 2 or blocks not in ((64, 0, 64), (128, 0, 128)):
        return "it takes 16-bit heads of at most 64, or of 97 to 128 numbers"
    if is_short(blocks, arguments) and not any_size:
        return "short, so that the host's time counts"
    return mask_refusal(arguments)


def is_short(blocks: Blocks, arguments: dict[str, Any]) -> bool:
    """Whether a call has fewer products than FASTER asks for."""
    batch, num_heads, q_len, _ = arguments["q"].shape
    return products(batch, num_heads, q_len, arguments["k"].shape[2], sum(blocks)) < FASTER[blocks]


def mask_refusal(arguments: dict[str, Any]) -> str:
    """The reasons of `refusal` that lie in masks, soft cap and rows; those of backward_large_launch, too."""
    if not arguments["RAW"] or any(arguments[name] for name in _FEATURES):
        return "it knows no mask with a number a pair, no bias and no dropout"
    if arguments["SOFT_CAP"] not in (NO_CAP.value, CAP_FAST.value):
        return "of soft caps it knows the one by NVIDIA's tanh instruction, for bfloat16"
    if arguments["q"].shape[2] % 4:
        return "rows of row statistics do not start at multiples of 16 bytes, as the copy engine needs them"
    return ""


def hopper_launches(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any], tensors: dict[str, Any],
    num_units: int,
) -> list[Launch]:  # fmt: skip
    """The launches that fill "dq", "dk" and "dv" of `tensors`.

    They need float32 memory of the size of dq, and 4 bytes for 64 rows.

    Args:
        grad_out, q, k, v: Tensors that descriptors can be made of.
        arguments: As for `refusal`.
        tensors: The gradients, and "shift" and "delta", which backward_rows_kernel fills before.
        num_units: Multiprocessors.
    """
    # Here, since Gluon is experimental, and only Hopper needs it.
    from .backward_hopper import backward_hopper_kernel

    batch, num_heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    width = arguments["BLOCK_E"]
    # As the kernel has it.
    block_m = 128 * 64 // width
    num_row_blocks, kv_blocks = triton.cdiv(q_len, block_m), triton.cdiv(kv_len, BLOCK_N)
    tiles = batch * num_heads * num_row_blocks
    dq, dk, dv = (tensors[name] for name in ("dq", "dk", "dv"))
    partial = torch.empty((tiles * 2 * PART, 64 * 64 // PART), dtype=torch.float32, device=q.device)
    # Cleared by a memset, which CUDA graphs capture. The first one numbers the programs.
    counters = torch.zeros((1 + tiles,), dtype=torch.int32, device=q.device)
    # A program of 64 columns and one query head has half as many steps, of which it waits a larger part for its turn.
    share = 0.25 if width == 64 and num_heads == kv_heads and arguments["HAS_UPPER"] else 0.5
    shared = {name: arguments[name] for name in ("num_heads", "q_len", "softmax_scale", "HEAD_DIM")}
    before, tables = tables_of_ranges(arguments, block_m, BLOCK_N)
    given = {
        **arguments,
        **tables,
        "q": swizzled(q, block_m, width),
        "k": swizzled(k, BLOCK_N // 2, width),
        "v": swizzled(v, BLOCK_N // 2, width),
        "grad_out": swizzled(grad_out, block_m, width),
        "grad_k": dk,
        "grad_v": dv,
        **gradient_boxes({"k_boxes": (dk, width), "v_boxes": (dv, width)}, BLOCK_N // 2),
        "shift": row_statistics(tensors["shift"], block_m),
        "delta": row_statistics(tensors["delta"], block_m),
        "partial": of_rows(partial, PART, partial.shape[1], NO_SWIZZLE),
        "turns": counters[1:],
        "ticket": counters,
        "batch_size": batch,
        "WIDTH": width,
        "heads_at_once": configs.backward_heads_at_once(batch * kv_heads, kv_blocks, num_units, share),
        **dict(zip(("stride_dkb", "stride_dkh", "stride_dkn", "stride_dkd"), dk.stride())),
        **dict(zip(("stride_dvb", "stride_dvh", "stride_dvn", "stride_dve"), dv.stride())),
    }
    names = [parameter.name for parameter in backward_hopper_kernel.params]
    main = Launch(
        backward_hopper_kernel,
        batch * kv_heads * kv_blocks,
        {name: given[name] for name in names},
        {"num_warps": 4, "num_stages": 1},
    )
    strides = dict(zip(("stride_dqb", "stride_dqh", "stride_dqm", "stride_dqd"), dq.stride()))
    found = {**shared, **strides, "partial": partial, "turns": counters[1:], "ticket": counters, "grad_q": dq,
             "num_row_blocks": num_row_blocks, "WIDTH": width}  # fmt: skip
    return [*before, main, Launch(backward_finish_kernel, tiles, found, {"num_warps": 4, "num_stages": 1})]


def tables_of_ranges(arguments: dict[str, Any], block_m: int, block_n: int) -> tuple[list[Launch], dict[str, Any]]:
    """Where masks stand in tensors, the launches that make `ranges` and `key_ranges`, and these; else neither."""
    if not any(arguments[name] for name in ("HAS_KEY_MASK", "HAS_START", "HAS_END", "HAS_IDS")):
        return [], {"ranges": None, "key_ranges": None}
    of_rows = ranges_launch({**arguments, "batch_size": arguments["q"].shape[0]}, block_m, block_n)
    of_keys = key_ranges_launch(of_rows)
    return [of_rows, of_keys], {name: of_keys.arguments[name] for name in ("ranges", "key_ranges")}


def gradient_boxes(gradients: dict[str, tuple[Tensor | None, int]], rows: int) -> dict[str, Any]:
    """Descriptors of `rows` x columns by which a kernel stores gradients, and BOXES, whether it does: all or none.

    Args:
        gradients: Argument's name -> gradient, if there is one, and columns.
    """
    fits = all(grad is None or takes_tma(layout(grad), grad.element_size()) for grad, _ in gradients.values())
    found = {
        name: swizzled(grad, rows, n) if fits and grad is not None else None for name, (grad, n) in gradients.items()
    }
    return {**found, "BOXES": fits}


def row_statistics(tensor: Tensor, rows: int) -> Descriptor:
    """A descriptor of 1 x `rows` numbers of a `(B, H, M)` tensor of row statistics."""
    return of_rows(tensor.view(-1, tensor.shape[2]), 1, rows, NO_SWIZZLE)


def of_rows(tensor: Tensor, rows: int, columns: int, swizzle: int) -> Descriptor:
    """A descriptor of `rows` x `columns` of a contiguous matrix."""
    return Descriptor(tensor, tuple(tensor.shape), tensor.stride(), (rows, columns), swizzle)
