"""Plans the launches of one forward call: tile shapes, packing of query heads, splitting of the keys."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import configs
from .forward import attention_combine_kernel, attention_forward_kernel
from .launch import EMPTY_ROWS, Launch, Tuning, check, common_arguments, device_arch, dot_precision, padded

PACK_ROWS = 64
"""Up to this many (query, head of a group) rows, a group's query heads share one tile."""
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
    tuning = tuning or Tuning()
    batch, num_heads, q_len, head_dim = q.shape
    _, kv_heads, kv_len, v_head_dim = v.shape
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

    arch, num_units = device_arch(q.device)
    arch = tuning.arch or arch
    group = num_heads // kv_heads
    pack = tuning.pack or (group if q_len * group <= PACK_ROWS else 1)
    rows = q_len * pack
    decode = rows <= PACK_ROWS
    config = tuning.config or configs.select(
        arch, "decode" if decode else "forward", max(padded(head_dim), padded(v_head_dim)), q.element_size()
    )
    block_m = config.block_m
    if decode and tuning.config is None:
        block_m = max(block_m, min(PACK_ROWS, triton.next_power_of_2(rows)))
    tiles = batch * (num_heads // pack) * triton.cdiv(rows, block_m)
    num_splits = tuning.num_splits or (choose_splits(tiles, kv_len, num_units) if dropout_p == 0.0 else 1)

    arguments = common_arguments(
        q, k, v, attn_bias, attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, dropout_seed, softmax_scale,
        logits_soft_cap, band_lower, band_upper, dropout_p,
    )  # fmt: skip
    # With a sink no row can be empty: the sink takes all the weight.
    empty = EMPTY_ROWS[empty_rows] if sinks is None else EMPTY_ROWS["zero"]
    out_arguments = dict(zip(("stride_ob", "stride_oh", "stride_om", "stride_oe"), out.stride()))
    partial = None
    if num_splits > 1:
        partial = torch.empty((lse.numel() * num_splits * (v_head_dim + 2),), dtype=torch.float32, device=q.device)
    arguments.update(
        out_arguments,
        out=out,
        lse=lse,
        partial=partial,
        sinks=sinks,
        num_splits=num_splits,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        PACK=pack,
        SPLIT=num_splits > 1,
        HAS_SINKS=sinks is not None,
        EMPTY_ROWS=empty,
        PRECISION=dot_precision(q.dtype, arch),
    )
    is_amd = arch.startswith("gfx")
    launches = [Launch(attention_forward_kernel, tiles * num_splits, arguments, config.options(is_amd))]
    if num_splits > 1:
        combine = {
            name: arguments[name]
            for name in (
                "partial", "v", "out", "lse", "sinks", "stride_vb", "stride_vh", "stride_vn", "stride_ve",
                "num_heads", "gqa_group_size", "q_len", "kv_len", "num_splits", "V_HEAD_DIM", "BLOCK_E",
                "HAS_BIAS", "HAS_SINKS", "EMPTY_ROWS",
            )
        }  # fmt: skip
        combine.update(out_arguments, BLOCK_S=triton.next_power_of_2(num_splits), BLOCK_N=16)
        launches.append(Launch(attention_combine_kernel, lse.numel(), combine, {"num_warps": 1, "num_stages": 1}))
    return launches, out, lse
