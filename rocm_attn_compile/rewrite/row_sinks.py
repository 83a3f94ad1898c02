"""Emit sinks that vary with the query as one more key; see `recognize.row_sinks`."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from ..recognize.region import Operand, Region
from ..symbolic import is_one, product
from .builder import GraphBuilder
from .canonical import to_layout

aten = torch.ops.aten


def with_row_sinks(
    builder: GraphBuilder, region: Region, sinks: Operand, k: fx.Node, v: fx.Node, bias: Any
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """k (B,K,N+1,D) and v (B,K,N+1,E) with a last row of zeros, and the bias with a last column of sinks."""
    roles = region.roles
    groups: list = [roles.batch, roles.heads, roles.query, []]
    column = to_layout(builder, builder.tensor(sinks.value), sinks.dims, groups, [False] * 4)
    kv_len = builder.size(product(atom.size for atom in roles.key))
    if bias is None:
        bias = builder.call(aten.zeros.default, [1, 1, 1, 1], dtype=builder.look(column).dtype, device=builder.device)
    dtype = torch.promote_types(builder.look(bias).dtype, builder.look(column).dtype)
    shapes = zip(builder.look(bias).shape, builder.look(column).shape, groups[:3])
    leading = [1 if is_one(a) and is_one(b) else builder.size(product(x.size for x in group)) for a, b, group in shapes]
    parts = []
    for part, length in ((bias, kv_len), (column, 1)):
        if builder.look(part).dtype != dtype:
            part = builder.call(aten._to_copy.default, part, dtype=dtype)
        parts.append(builder.call(aten.expand.default, part, [*leading, length]))
    return _with_zeros(builder, k), _with_zeros(builder, v), builder.call(aten.cat.default, parts, 3)


def _with_zeros(builder: GraphBuilder, tensor: fx.Node) -> fx.Node:
    return builder.call(aten.constant_pad_nd.default, tensor, [0, 0, 0, 1])
