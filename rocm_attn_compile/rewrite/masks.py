"""Emit the op's mask arguments from a proved mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..recognize import mask as prover
from ..recognize.region import Region
from .builder import GraphBuilder
from .canonical import to_layout

aten = torch.ops.aten


@dataclass
class MaskArguments:
    """Nodes, numbers or None, named as the op's arguments."""

    attn_mask: Any = None
    key_mask: Any = None
    kv_start: Any = None
    kv_end: Any = None
    q_ids: Any = None
    kv_ids: Any = None
    band_lower: Any = None
    band_upper: Any = None


def emit_masks(builder: GraphBuilder, region: Region) -> MaskArguments:
    """All mask arguments of the op for one region."""
    out, closed = MaskArguments(), region.closed_mask
    roles = region.roles
    groups = [roles.batch, roles.heads, roles.query, roles.key]
    for term in region.masks:
        node = to_layout(builder, builder.tensor(term.operand.value), term.operand.dims, groups, [False] * 4)
        if not term.keeps:
            node = builder.call(aten.logical_not.default, node)
        out.attn_mask = node if out.attn_mask is None else builder.call(aten.logical_and.default, out.attn_mask, node)
    if closed is None:
        return out
    if closed.band_lower is not None:
        out.band_lower = builder.size(closed.band_lower)
    if closed.band_upper is not None:
        out.band_upper = builder.size(closed.band_upper)
    emitter = prover.MaskEmitter(builder, closed)
    out.kv_start, out.kv_end = emitter.rows(closed.kv_start, "max"), emitter.rows(closed.kv_end, "min")
    out.key_mask = emitter.key_mask(closed.key_masks)
    for pair in closed.segment_ids:
        if out.q_ids is None:
            out.q_ids, out.kv_ids = emitter.ids(pair)
            continue
        of_query, of_key = emitter.ids(pair)  # the op takes one pair
        of_query = builder.call(aten.unsqueeze.default, builder.call(aten.unsqueeze.default, of_query, 1), 3)
        of_key = builder.call(aten.unsqueeze.default, builder.call(aten.unsqueeze.default, of_key, 1), 2)
        node = builder.call(aten.eq.Tensor, of_query, of_key)
        out.attn_mask = node if out.attn_mask is None else builder.call(aten.logical_and.default, out.attn_mask, node)
    return out
