"""Plans the launches of one backward call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from . import configs
from .backward import backward_rows_kernel
from .backward_bias import backward_bias_kernel
from .backward_dkdv import backward_dkdv_kernel
from .backward_dq import backward_dq_kernel
from .backward_hopper_launch import hopper_launches, refusal
from .backward_large_launch import large_launches
from .backward_large_launch import refusal as large_refusal
from .forward_launch import feature, forward_descriptors
from .launch import (
    EMPTY_ROWS,
    Launch,
    Rope,
    Tuning,
    aligned,
    bias_kind,
    bias_storage,
    cap_kind,
    check,
    choose,
    descriptor,
    device_arch,
    dot_precision,
    layout,
    min_tma_scores,
    rope_arguments,
    static_arguments,
    takes_tma,
    takes_tma_rope,
)
from .mask_ranges_launch import is_ranged, ranges_launch
from .sizes import has_symbols, known, likely, remembering


def of_rope(name: str, stride: str, gradient: Tensor | None, letters: str) -> dict[str, Any]:
    """The arguments for the gradient of a piece that lies elsewhere: the tensor and its outer strides."""
    strides = (None,) * 3 if gradient is None else gradient.stride()[:3]
    return {name: gradient, **{stride + letter: value for letter, value in zip(letters, strides)}}


def empty_gradient(tensor: Tensor) -> Tensor:
    """An uninitialised gradient of `tensor`: with its strides if it is dense, else contiguous."""
    gradient = torch.empty_like(tensor)
    is_same = all(known(ours == its) for ours, its in zip(gradient.stride(), tensor.stride()))
    return gradient if is_same else tensor.new_empty(tensor.shape)


def _is_broadcast(size: int, length: int) -> bool:
    return known(size == 1) and not known(length == 1)


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor, correction: Tensor | None) -> Tensor:
    """`-(weight of the sink) * delta`, summed over batch and queries; `(H,)` in the dtype of `sinks`."""
    weight = torch.exp(sinks.float()[None, :, None] - lse)
    if correction is not None:
        weight = weight * torch.exp2(-correction)
    # lse is -inf only where the sink is -inf too: no weight there.
    weight = torch.where(lse == -math.inf, 0.0, weight)
    return -(weight * delta).sum((0, 2)).to(sinks.dtype)


def backward_launches(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
    q_ids: Tensor | None,
    kv_ids: Tensor | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    logits_soft_cap: float | None,
    band_lower: int | None,
    band_upper: int | None,
    dropout_p: float,
    empty_rows: str,
    output_mask: Sequence[bool],
    tuning: Tuning | None = None,
    rope: Rope = None,
) -> tuple[list[Launch], dict[str, Any]]:
    """Allocate the gradients and describe the launches that fill them. Arguments as attention.attention_backward.

    Returns:
        The launches in order, and the tensors: "dq", "dk", "dv", "dbias" (shape (0,) where not wanted), "shift",
        "delta" and "correction" (`(B, H, M)` float32, the last None without a bias). With `rope` (see
        forward_launches) also "dq_pe" and "dk_pe", the latter float32 `(B, H, N, R)`: the part of each head.
    """
    check(q, k, v, empty_rows)
    tuning = tuning or Tuning()
    hint = tuning.hint
    batch, num_heads, q_len, head_dim = q.shape
    _, kv_heads, kv_len, v_head_dim = v.shape
    lse = lse.contiguous()
    arch, num_units = device_arch(q.device)
    arch = tuning.arch or arch
    is_amd = arch.startswith("gfx")

    names = ("dq", "dk", "dv", "dbias")
    wanted = [bool(flag) and t is not None for flag, t in zip(output_mask, (q, k, v, attn_bias, sinks))]
    # dk and dv come from one kernel.
    computed = [wanted[0], wanted[1] or wanted[2], wanted[1] or wanted[2], wanted[3]]
    tensors: dict[str, Any] = {
        name: empty_gradient(t) if need and t is not None else q.new_empty((0,))
        for name, t, need in zip(names, (q, k, v, attn_bias), computed)
    }
    tensors["delta"] = torch.empty((batch, num_heads, q_len), dtype=torch.float32, device=q.device)
    tensors["shift"] = torch.empty_like(tensors["delta"])
    if rope:
        tensors["dq_pe"] = torch.empty_like(rope[0]) if computed[0] else None
        part = (batch, kv_heads, kv_len, rope[1].shape[2])
        tensors["dk_pe"] = torch.empty(part, dtype=torch.float32, device=q.device) if computed[1] else None
    tensors["correction"] = None if attn_bias is None else torch.empty_like(tensors["delta"])
    if grad_out.numel() == 0 or kv_len == 0:
        for tensor in tensors.values():
            if tensor is not None:
                tensor.zero_()
        return [], tensors

    itemsize = q.element_size()
    if rope:
        blocks = configs.rope_blocks(arch, itemsize, head_dim, rope[1].shape[2], v_head_dim)
    else:
        blocks = configs.head_blocks(arch, itemsize, head_dim, v_head_dim)
    rope_layouts = (layout(rope[0]), layout(rope[1])) if rope else (None, None)
    arguments: dict[str, Any] = dict(
        remembering(static_arguments, hint)(
            layout(q), layout(k), layout(v), layout(attn_bias), layout(attn_mask), layout(key_mask), layout(kv_start),
            layout(kv_end), layout(q_ids), layout(kv_ids), layout(alibi_slopes), softmax_scale, logits_soft_cap,
            band_lower, band_upper, dropout_p, blocks,
        )
    )  # fmt: skip
    arguments.update(
        q=q, k=k, v=v, attn_bias=attn_bias, attn_mask=attn_mask, key_mask=key_mask, kv_start=kv_start, kv_end=kv_end,
        q_ids=q_ids, kv_ids=kv_ids, dropout_seed=dropout_seed if dropout_p > 0.0 else None, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    empty = EMPTY_ROWS[empty_rows] if sinks is None else EMPTY_ROWS["zero"]
    arguments.update(zip(("stride_gb", "stride_gh", "stride_gm", "stride_ge"), grad_out.stride()))
    arguments.update(
        grad_out=grad_out,
        lse=lse,
        shift=tensors["shift"],
        delta=tensors["delta"],
        correction=tensors["correction"],
        any_empty=torch.zeros((batch * num_heads,), dtype=torch.int32, device=q.device) if empty else None,
        EMPTY_ROWS=empty,
        PRECISION=dot_precision(q.dtype, arch),
        SOFT_CAP=cap_kind(logits_soft_cap, q.dtype, arch),
    )
    head_block = configs.head_size(blocks, v_head_dim)
    # The two small kernels read a head dimension in one piece.
    whole = {**arguments, "BLOCK_D": blocks[0] if not blocks[1] else 2 * blocks[0]}
    del whole["BLOCK_REST"]
    scores = hint(batch) * num_heads * likely(q_len, hint) * likely(kv_len, hint)
    is_describable = (
        tuning.tma is not False
        and aligned(q, k, v, grad_out, *(rope or ()), traced=tuning.traced)
        and all(takes_tma(layout(tensor), itemsize) for tensor in (q, k, v, grad_out))
        and takes_tma_rope(rope_layouts, itemsize)
    )
    can_tma = is_describable and (tuning.in_flight or scores >= min_tma_scores(tuning))

    bias_itemsize, bias_is_aligned = bias_storage(attn_bias, tuning.traced)
    tables: dict[tuple[int, int, bool], Tensor] = {}

    def launch(kernel: Any, direction: str, grid: Any, **extra: Any) -> Launch:
        config = tuning.config or configs.select(arch, direction, head_block, itemsize)
        tiles = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        return Launch(kernel, grid(config), {**whole, **extra, **tiles}, config.options(is_amd))

    def add_main(kernel: Any, direction: str, grid: Any, **extra: Any) -> None:
        """Add dk/dv or dq, through tensor descriptors where those can be had, behind the table of its ranges."""
        special = feature(arguments, q.dtype, arch, forward=False)
        config, faster = choose(tuning, arch, direction, head_block, itemsize, special, can_tma)
        found = {
            **arguments, **extra, **rope_arguments(*rope_layouts), "q_rest": rope[0] if rope else None,
            "k_rest": rope[1] if rope else None, "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n, "TMA": faster, "MERGED": config.merged, "batch_size": batch,
            "BIAS": bias_kind(layout(attn_bias), bias_itemsize, faster and bias_is_aligned),
            "heads_at_once": configs.heads_at_once(
                arch, arguments["HAS_UPPER"], batch * kv_heads,
                likely(kv_len if direction == "backward_q" else q_len, hint) * (head_dim + v_head_dim) * itemsize,
                direction != "backward_q", hint=hint,
            ),
            "ROUND_BITS": configs.rounds_bits(arch), "ranges": None,
        }  # fmt: skip
        ranged = is_ranged(arguments, scores, tuning, direction != "backward_q")
        found["ONLY_EMPTY"] = in_one
        found["RANGED"] = ranged and not in_one
        if found["RANGED"]:
            key = (config.block_m, config.block_n, direction != "backward_q")
            if key not in tables:
                launches.append(ranges_launch(found, *key))
                tables[key] = launches[-1].arguments["ranges"]
            found["ranges"] = tables[key]
        if faster:
            found.update(
                forward_descriptors(q, k, v, attn_bias, found, rope),
                grad_out=descriptor(grad_out, config.block_m, found["BLOCK_E"]),
            )
        # What only rows without keys need is not worth tuning.
        tuned = () if in_one else (direction, config)
        launches.append(Launch(kernel, grid(config), found, config.options(is_amd), *tuned))

    launches = [
        launch(
            backward_rows_kernel,
            "backward_q",
            lambda c: batch * num_heads * triton.cdiv(q_len, c.block_m),
            out=out,
            sinks=sinks,
            HAS_SINKS=sinks is not None,
            **dict(zip(("stride_ob", "stride_oh", "stride_om", "stride_oe"), out.stride())),
        )
    ]
    # Hopper's own kernels know no symbols, see traced.leave_to_hopper.
    in_one = is_describable and tuning.config is None and all(computed[:3]) and not has_symbols(hint)
    if in_one and not rope and not refusal(arch, itemsize, blocks, arguments, tuning.in_flight):
        launches += hopper_launches(grad_out, q, k, v, arguments, tensors, num_units)
    elif in_one and not large_refusal(arch, itemsize, blocks, arguments, tuning.in_flight):
        launches += large_launches(grad_out, q, k, v, rope, blocks, arguments, tensors, num_units)
    else:
        in_one = False
    # Hopper's own kernels leave it to the others to add what rows without keys give.
    has_ds = not in_one or empty in (EMPTY_ROWS["mean_added"], EMPTY_ROWS["nan_added"])
    if computed[1] and (not in_one or empty):
        dk, dv = tensors["dk"], tensors["dv"]
        outputs = {
            "grad_k": dk, "grad_v": dv, **of_rope("grad_k_rest", "stride_dkp", tensors.get("dk_pe"), "bhn"),
            **dict(zip(("stride_dkb", "stride_dkh", "stride_dkn", "stride_dkd"), dk.stride())),
            **dict(zip(("stride_dvb", "stride_dvh", "stride_dvn", "stride_dve"), dv.stride())),
        }  # fmt: skip
        # For large heads the two accumulators do not fit together: one launch for dk and one for dv, where the table
        # has rows for that.
        separate = (
            tuning.separate
            if tuning.config
            else can_tma and configs.select_tma(arch, "backward_k_tma", head_block, itemsize)
        )
        pieces = (
            [("backward_k", True, False), ("backward_v", False, True)] if separate else [("backward_kv", True, True)]
        )
        for direction, want_dk, want_dv in pieces if has_ds else pieces[-1:]:
            add_main(
                backward_dkdv_kernel,
                direction,
                lambda c: batch * kv_heads * triton.cdiv(kv_len, c.block_n),
                **outputs,
                WANT_DK=want_dk and has_ds,
                WANT_DV=want_dv,
            )
    if computed[0] and (not in_one or (empty and has_ds)):
        dq = tensors["dq"]
        add_main(
            backward_dq_kernel,
            "backward_q",
            lambda c: batch * num_heads * triton.cdiv(q_len, c.block_m),
            grad_q=dq,
            **of_rope("grad_q_rest", "stride_dqp", tensors.get("dq_pe"), "bhm"),
            **dict(zip(("stride_dqb", "stride_dqh", "stride_dqm", "stride_dqd"), dq.stride())),
        )
    if computed[3]:
        dbias = tensors["dbias"]
        bias_batch, bias_heads, bias_m, bias_n = dbias.shape
        reduce_m, reduce_n = _is_broadcast(bias_m, q_len), _is_broadcast(bias_n, kv_len)
        launches.append(
            launch(
                backward_bias_kernel,
                "backward_bias",
                lambda c: (
                    bias_batch
                    * bias_heads
                    * (1 if reduce_m else triton.cdiv(q_len, c.block_m))
                    * (1 if reduce_n else triton.cdiv(kv_len, c.block_n))
                ),
                grad_bias=dbias,
                bias_heads=bias_heads,
                repeat_batch=batch // bias_batch,
                repeat_heads=num_heads // bias_heads,
                REDUCE_M=reduce_m,
                REDUCE_N=reduce_n,
                **dict(zip(("stride_dbb", "stride_dbh", "stride_dbm", "stride_dbn"), dbias.stride())),
            )
        )
    for name, want in zip(names, wanted):
        if not want:
            # Filled, but not asked for: the op's contract is an empty tensor.
            tensors[name] = q.new_empty((0,))
    return launches, tensors
