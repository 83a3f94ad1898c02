"""Emit what is added to the scores: biases, and masks that stay numbers, added up as eager does."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx as fx

from ..recognize.region import Alibi, MaskTerm, PositionBias, Region
from .alibi import emit_positions
from .builder import GraphBuilder
from .canonical import to_layout
from .layout import keys_side_by_side

aten = torch.ops.aten


def emit_bias(builder: GraphBuilder, region: Region) -> Any:
    """All that is added to the scores as one tensor over (batch, heads, query, key); None if nothing is."""
    roles, total, in_half = region.roles, None, False
    scores = region.anchor.args[:1]  # SDPA has none: terms of a mask are added as they are
    groups = [roles.batch, roles.heads, roles.query, roles.key]
    for bias in region.biases:
        if isinstance(bias, Alibi):
            continue
        if isinstance(bias, PositionBias):
            total = _add(builder, total, emit_positions(builder, region, bias), torch.float32)
            continue
        operand = bias.operand if isinstance(bias, MaskTerm) else bias
        node = to_layout(builder, builder.tensor(operand.value), operand.dims, groups, [False] * 4)
        if isinstance(bias, MaskTerm):
            dtype = bias.dtype or scores[0].dtype
            total = _fill(builder, total, node, bias, dtype)
            in_half |= dtype == torch.float16
            continue
        added_in = bias.added_in or (scores[0].dtype if scores else builder.look(node).dtype)
        if builder.look(node).dtype == torch.bool:
            node = builder.call(aten._to_copy.default, node, dtype=added_in)
        if bias.factor != 1:
            wide = torch.promote_types(builder.look(node).dtype, added_in)  # eager scales the sum
            node = builder.call(aten.mul.Tensor, _to(builder, node, wide), bias.factor)
        if bias.rounded_to is not None:
            node = builder.call(aten._to_copy.default, node, dtype=bias.rounded_to)
        total = _add(builder, total, node, added_in)
        in_half |= bias.added_in == torch.float16
    if total is None:
        return None
    return keys_side_by_side(builder, _absorbing(builder, total) if in_half else total)


def _add(builder: GraphBuilder, total: Any, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Eager adds one after the other to the scores: what two narrower biases would lose to one another it keeps."""
    if total is None:
        return node
    dtype = torch.promote_types(builder.look(total).dtype, dtype)
    return builder.call(aten.add.Tensor, _to(builder, total, dtype), node)


def _to(builder: GraphBuilder, node: Any, dtype: torch.dtype) -> Any:
    """The tensor in a dtype, in which it may be already."""
    return node if builder.look(node).dtype == dtype else builder.call(aten._to_copy.default, node, dtype=dtype)


def _absorbing(builder: GraphBuilder, bias: fx.Node) -> fx.Node:
    """float16's lowest number, and subtracted its highest, absorb the scores in float16; the op adds in float32.

    There float32's absorb them. They are added, so that what else is in the bias keeps its gradient. What is rounded to
    them counts, and what is rounded to infinity, as two masks are: Inductor computes in float32, and does not round.
    """
    found = wide = _to(builder, bias, torch.float32)
    highest, step = torch.finfo(torch.float16).max, 2**15 * torch.finfo(torch.float16).eps
    ends = (highest - step / 2, torch.finfo(torch.float32).max), (highest + step / 2, math.inf)
    for reaches, sign in ((aten.le.Scalar, -1), (aten.ge.Scalar, 1)):
        for end, number in ends:
            is_end = builder.call(reaches, wide, sign * end)
            further = builder.call(aten.where.Scalar, is_end, sign * number, 0.0)
            # float32, whatever the default dtype is
            found = builder.call(aten.add.Tensor, found, _to(builder, further, torch.float32))
    return found


def _fill(builder: GraphBuilder, total: Any, mask: fx.Node, term: MaskTerm, dtype: torch.dtype) -> fx.Node:
    """The bias with a number in the place of what a mask drops; the number is one of the scores' dtype."""
    if total is None:
        other = builder.call(aten.full.default, [], 0.0, dtype=dtype, device=builder.device)
    else:
        dtype = torch.promote_types(dtype, builder.look(total).dtype)
        other = _to(builder, total, dtype)
    fill = builder.call(aten.full.default, [], term.fill, dtype=dtype, device=builder.device)
    return builder.call(aten.where.self, mask, *((other, fill) if term.keeps else (fill, other)))
