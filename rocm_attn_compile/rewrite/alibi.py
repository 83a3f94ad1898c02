"""Emit ALiBi: slopes for the op, or one number per head and key; see `recognize.alibi`."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from ..recognize.axes import atoms_of
from ..recognize.region import Alibi, PositionBias, Region
from ..symbolic import to_expr
from .builder import GraphBuilder
from .canonical import to_layout

aten = torch.ops.aten


def emit_slopes(builder: GraphBuilder, region: Region) -> Any:
    """The op's `alibi_slopes`, `(H,)` or `(B, H)`; None without ALiBi."""
    total: Any = None
    for bias in region.biases:
        if isinstance(bias, Alibi):
            slopes = _slopes(builder, region, bias)
            total = slopes if total is None else builder.call(aten.add.Tensor, total, slopes)
    return total


def _slopes(builder: GraphBuilder, region: Region, bias: Alibi) -> fx.Node:
    roles = region.roles
    dtype = torch.promote_types(region.spec.dtype, torch.float32)
    if bias.slopes is None:
        heads = [builder.size(region.spec.num_heads)]
        return builder.call(aten.full.default, heads, bias.factor, dtype=dtype, device=builder.device)
    groups = [roles.heads]
    if {*roles.batch} & {*atoms_of(bias.slopes.dims)}:
        groups = [roles.batch, roles.heads]
    node = to_layout(builder, builder.tensor(bias.slopes.value), bias.slopes.dims, groups, [True] * len(groups))
    if builder.look(node).dtype != dtype:
        node = builder.call(aten._to_copy.default, node, dtype=dtype)
    return node if bias.factor == 1 else builder.call(aten.mul.Tensor, node, bias.factor)


def emit_positions(builder: GraphBuilder, region: Region, bias: PositionBias) -> fx.Node:
    """`(1, 1, 1, N)` or, with slopes, up to `(B, H, 1, N)` in float32: the last key is at 0."""
    roles = region.roles
    first = builder.size(1 - to_expr(region.spec.kv_len))
    node = builder.call(aten.arange.start, first, 1, dtype=torch.float32, device=builder.device)
    node = builder.call(aten.mul.Tensor, node, bias.factor)
    node = builder.call(aten.view.default, node, [1, 1, 1, -1])
    if bias.slopes is None:
        return node
    groups: list = [roles.batch, roles.heads, [], []]
    slopes = to_layout(builder, builder.tensor(bias.slopes.value), bias.slopes.dims, groups, [False] * 4)
    slopes = builder.call(aten._to_copy.default, slopes, dtype=torch.float32)
    return builder.call(aten.mul.Tensor, slopes, node)
