"""Plans the launches of one forward call: tile shapes, packing of query heads, splitting of the keys."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import configs
from .forward import attention_combine_kernel, attention_forward_kernel
from .launch import EMPTY_ROWS, Launch, Tuning, check, device_arch, dot_precision, layout, static_arguments

PACK_ROWS = 64
"""Up to this many (query, head of a group) rows, a group's query heads share one tile."""
MAX_DECODE_M = 32
"""Tallest packed tile. Not 64, which on Hopper would take the warp-group matrix instructions for a few rows; see also
configs.smallest_head_block."""
MIN_SPLIT_KEYS = 256
"""A split gets at least this many keys: below, the combine step costs more than it saves."""
MAX_SPLITS = 128


def choose_splits(tiles: int, kv_len: int, num_units: int) -> int:
    """How many programs share the keys of one tile: enough to fill the device about twice, 1 if the tiles do already.

    Depends on sizes only, so results are reproducible and nothing is read back from the device.
    """
    if tiles >= num_units:
        return 1
    return max(1, min(2 * num_units // tiles, kv_len // MIN_SPLIT_KEYS, MAX_SPLITS))


def forward_launches(
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
    softmax_scale: float,
    logits_soft_cap: float | None,
    band_lower: int | None,
    band_upper: int | None,
    dropout_p: float,
    empty_rows: str,
    out_layout: str,
    tuning: Tuning | None = None,
) -> tuple[list[Launch], Tensor, Tensor]:
    """Allocate the outputs and describe the launches that fill them. Arguments as attention.attention_forward.

    Returns:
        The launches in order, `out` and `lse`.
    """
    check(q, k, v, empty_rows, out_layout)
    batch, num_heads, q_len, _ = q.shape
    _, _, kv_len, v_head_dim = v.shape
    if out_layout == "bhsd":
        out = torch.empty((batch, num_heads, q_len, v_head_dim), dtype=q.dtype, device=q.device)
    else:
        # With its strides, not as a view of another tensor, so that autograd lets it be changed in place.
        out_strides = (q_len * num_heads * v_head_dim, v_head_dim, num_heads * v_head_dim, 1)
        out = q.new_empty_strided((batch, num_heads, q_len, v_head_dim), out_strides)
    lse = torch.empty((batch, num_heads, q_len), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return [], out, lse
    if kv_len == 0:
        # A sum over no keys is 0 in eager, whatever the mode; there is nothing to launch for.
        out.zero_()
        lse.fill_(float("-inf")) if sinks is None else lse.copy_(sinks[None, :, None].expand_as(lse))
        return [], out, lse

    if dropout_p > 0.0 and dropout_seed is None:
        raise ValueError("dropout_p > 0 needs dropout_seed, an int64 tensor of one element on the same device")
    arch, num_units = device_arch(q.device)
    if tuning is not None and tuning.arch is not None:
        arch = tuning.arch
    plan = forward_plan(
        (layout(q), layout(k), layout(v), layout(attn_bias), layout(attn_mask), layout(key_mask), layout(kv_start),
         layout(kv_end), layout(q_ids), layout(kv_ids)),
        (softmax_scale, logits_soft_cap, band_lower, band_upper, dropout_p),
        out.stride(), arch, num_units, q.element_size(), dot_precision(q.dtype, arch), sinks is not None, empty_rows,
        tuning,
    )  # fmt: skip
    tensors = {
        "q": q, "k": k, "v": v, "out": out, "lse": lse, "partial": None, "attn_bias": attn_bias,
        "attn_mask": attn_mask, "key_mask": key_mask, "kv_start": kv_start, "kv_end": kv_end, "q_ids": q_ids,
        "kv_ids": kv_ids, "sinks": sinks, "dropout_seed": dropout_seed if dropout_p > 0.0 else None,
    }  # fmt: skip
    if plan.num_splits > 1:
        elements = lse.numel() * plan.num_splits * (v.shape[3] + 2)
        tensors["partial"] = torch.empty((elements,), dtype=torch.float32, device=q.device)
    launches = [Launch(attention_forward_kernel, plan.grid, {**plan.arguments, **tensors}, plan.options)]
    if plan.num_splits > 1:
        combined = {name: tensors[name] for name in ("partial", "v", "out", "lse", "sinks")}
        launches.append(
            Launch(
                attention_combine_kernel, lse.numel(), {**plan.combine, **combined}, {"num_warps": 1, "num_stages": 1}
            )
        )
    return launches, out, lse


class ForwardPlan(NamedTuple):
    """What one forward call launches, without its tensors. Shared between calls: do not modify."""

    arguments: dict[str, Any]
    options: dict[str, int]
    grid: int
    num_splits: int
    combine: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def forward_plan(
    layouts: tuple[Any, ...],
    scalars: tuple[Any, ...],
    out_strides: tuple[int, ...],
    arch: str,
    num_units: int,
    itemsize: int,
    precision: str,
    has_sinks: bool,
    empty_rows: str,
    tuning: Tuning | None,
) -> ForwardPlan:
    """Choose tiles, packing and splits. Remembered per shapes and strides: planning costs more than launching.

    Args:
        layouts: Of q, k, v and the mask tensors in the order of launch.static_arguments.
        scalars: softmax_scale, logits_soft_cap, band_lower, band_upper, dropout_p.
        out_strides: Strides of the output.
        arch, num_units: From launch.device_arch.
        itemsize: Bytes of one element of q.
        precision: From launch.dot_precision.
        has_sinks, empty_rows: As the op's arguments.
        tuning: Overrides, or None.
    """
    tuning = tuning or Tuning()
    arguments = dict(static_arguments(*layouts, *scalars, configs.smallest_head_block(arch, itemsize)))
    (batch, num_heads, q_len, _), (_, kv_heads, kv_len, _) = layouts[0][0], layouts[1][0]
    group = num_heads // kv_heads
    pack = tuning.pack or (group if q_len * group <= PACK_ROWS else 1)
    rows = q_len * pack
    decode = rows <= PACK_ROWS
    head_block = max(arguments["BLOCK_D"], arguments["BLOCK_E"])
    config = tuning.config or configs.select(arch, "decode" if decode else "forward", head_block, itemsize)
    block_m = config.block_m
    if decode and tuning.config is None:
        block_m = max(block_m, min(MAX_DECODE_M, triton.next_power_of_2(rows)))
    tiles = batch * (num_heads // pack) * triton.cdiv(rows, block_m)
    # Splits would each need the whole row's dropout mask in the combine step for empty rows; not worth it.
    num_splits = tuning.num_splits or (choose_splits(tiles, kv_len, num_units) if scalars[-1] == 0.0 else 1)
    arguments.update(zip(("stride_ob", "stride_oh", "stride_om", "stride_oe"), out_strides))
    arguments.update(
        num_splits=num_splits,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        PACK=pack,
        SPLIT=num_splits > 1,
        HAS_SINKS=has_sinks,
        # With a sink no row can be empty: the sink takes all the weight.
        EMPTY_ROWS=EMPTY_ROWS["zero" if has_sinks else empty_rows],
        PRECISION=precision,
    )
    combine = {
        name: arguments[name]
        for name in (
            "stride_vb", "stride_vh", "stride_vn", "stride_ve", "stride_ob", "stride_oh", "stride_om", "stride_oe",
            "num_heads", "gqa_group_size", "q_len", "kv_len", "num_splits", "V_HEAD_DIM", "BLOCK_E",
            "HAS_BIAS", "HAS_SINKS", "EMPTY_ROWS",
        )
    }  # fmt: skip
    combine.update(BLOCK_S=triton.next_power_of_2(num_splits), BLOCK_N=16)
    options = config.options(arch.startswith("gfx"))
    return ForwardPlan(arguments, options, tiles * num_splits, num_splits, combine)
