"""Plans the launch that writes the softmax weights, see weights.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import configs
from .forward_launch import forward_launches
from .launch import (
    EMPTY_ROWS,
    Launch,
    Tuning,
    aligned,
    cap_kind,
    choose,
    descriptor,
    device_arch,
    dot_precision,
    layout,
    min_tma_scores,
    static_arguments,
    takes_tma,
)
from .weights import attention_weights_kernel

MIN_BLOCKS = 4
"""Blocks of keys of a program: with fewer, reading its queries weighs more than that all units are busy."""


def weights_launches(
    tensors: dict[str, Tensor | None],
    settings: dict[str, Any],
    weights_empty_rows: str,
    weights_dtype: torch.dtype,
    tuning: Tuning | None = None,
) -> tuple[list[Launch], Tensor, Tensor]:
    """Allocate output and weights, and describe the launches that fill them.

    Args:
        tensors: q, k, v and the optional tensors of attention.attention_forward by name, without dropout_seed.
        settings: softmax_scale, logits_soft_cap, band_lower, band_upper, empty_rows, out_layout.
        weights_empty_rows: The mode of the weights.
        weights_dtype: Their dtype.
        tuning: As in launch.Tuning; `config` is that of this kernel alone.

    Returns:
        The launches in order, `out`, and `weights` `(B, H, M, N)`.
    """
    tuning = tuning or Tuning()
    q, k = tensors["q"], tensors["k"]
    assert q is not None
    assert k is not None
    forward = Tuning(arch=tuning.arch, traced=tuning.traced, opaque=tuning.opaque, chosen=tuning.chosen)
    launches, out, lse = forward_launches(**tensors, **settings, dropout_seed=None, dropout_p=0.0, tuning=forward)
    batch, num_heads, q_len, _ = q.shape
    weights = torch.empty((batch, num_heads, q_len, k.shape[2]), dtype=weights_dtype, device=q.device)
    if weights.numel() == 0:
        return launches, out, weights
    return [*launches, weights_launch(tensors, settings, lse, weights, weights_empty_rows, tuning)], out, weights


def weights_launch(
    tensors: dict[str, Any], settings: dict[str, Any], lse: Tensor, weights: Tensor, empty_rows: str, tuning: Tuning
) -> Launch:
    """The launch of the weights' kernel; arguments as weights_launches."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    (batch, num_heads, q_len, head_dim), (_, kv_heads, kv_len, _) = q.shape, k.shape
    arch, num_units = device_arch(q.device)
    arch = tuning.arch or arch
    blocks = configs.head_blocks(arch, q.element_size(), head_dim, 1)
    names = ("attn_bias", "attn_mask", "key_mask", "kv_start", "kv_end", "q_ids", "kv_ids", "alibi_slopes")
    numbers = (settings[name] for name in ("softmax_scale", "logits_soft_cap", "band_lower", "band_upper"))
    arguments = dict(
        static_arguments(layout(q), layout(k), layout(v), *(layout(tensors[x]) for x in names), *numbers, 0.0, blocks)
    )
    can_tma = (
        tuning.tma is not False
        and blocks[1] == 0
        and batch * num_heads * q_len * kv_len >= min_tma_scores(tuning)
        and aligned(q, k, traced=tuning.traced)
        and all(takes_tma(layout(tensor), q.element_size()) for tensor in (q, k))
    )
    config, tma = choose(tuning, arch, "weights", blocks[0] + blocks[1], q.element_size(), "", can_tma)
    row_blocks, key_blocks = triton.cdiv(q_len, config.block_m), triton.cdiv(kv_len, config.block_n)
    tiles = batch * num_heads * row_blocks
    # Two programs a unit at least, as far as the keys go.
    ranges = max(1, min(2 * num_units // tiles, key_blocks // MIN_BLOCKS))
    blocks_each = triton.cdiv(key_blocks, ranges)
    sinks = tensors["sinks"]
    arguments.update({name: tensors[name] for name in ("q", "k", *names)})
    arguments.update(
        lse=lse,
        weights=weights,
        sinks=sinks,
        stride_wm=kv_len,
        batch_size=batch,
        blocks_each=blocks_each,
        heads_at_once=configs.heads_at_once(
            arch, arguments["HAS_UPPER"], batch * kv_heads, kv_len * head_dim * q.element_size()
        ),
        WIDE=arguments["WIDE"] or 256 * kv_len >= 2**31,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SOFT_CAP=cap_kind(settings["logits_soft_cap"], q.dtype, arch),
        HAS_SINKS=sinks is not None,
        EMPTY_ROWS=EMPTY_ROWS["zero" if sinks is not None else empty_rows],
        TRANSPOSE_KEYS=configs.transposes_keys(arch),
        TMA=tma,
        PRECISION=dot_precision(q.dtype, arch),
    )
    values = ("stride_vb", "stride_vh", "stride_vn", "stride_ve", "V_HEAD_DIM", "BLOCK_E", "HAS_DROPOUT", "dropout_p")
    for name in values:
        del arguments[name]
    if tma:
        arguments.update(
            q=descriptor(q, config.block_m, blocks[0]),
            k=descriptor(k, config.block_n, blocks[0]),
        )
    grid = tiles * triton.cdiv(key_blocks, blocks_each)
    return Launch(attention_weights_kernel, grid, arguments, config.options(arch.startswith("gfx")), "weights", config)
