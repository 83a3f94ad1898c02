"""The tensors of a KV cache as the op takes them: views of the cache, the table, and one scale each."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from ..recognize.axes import resolve
from ..recognize.region import CacheRead, KvCache
from ..spec import AttentionSpec
from .builder import GraphBuilder
from .canonical import to_layout
from .latent import take_cuts

aten = torch.ops.aten


def emit_cache(
    builder: GraphBuilder, cache: KvCache, spec: AttentionSpec, kv_end: Any
) -> tuple[fx.Node, fx.Node, dict[str, Any], Any]:
    """k and v, the op's further arguments, and kv_end, which pages need."""
    roles = cache.roles
    outer, rows = (roles.batch, roles.key) if cache.block is None else cache.block
    k, v = (
        _tensor(builder, read, [outer, roles.kv_heads, rows, width])
        for read, width in ((cache.k, roles.depth), (cache.v, roles.value_depth))
    )
    more: dict[str, Any] = {}
    for name, read in (("k_scale", cache.k), ("v_scale", cache.v)):
        if (scale := _scale(builder, read, roles.kv_heads, spec)) is not None:
            more[name] = scale
    if cache.table is not None:
        batch = list(resolve(roles.batch))
        blocks = [atom for dim in cache.table.dims for atom in resolve(dim) if atom not in batch]
        table = builder.tensor(cache.table.value)
        more["block_table"] = to_layout(builder, table, cache.table.dims, [batch, blocks], [True, True])
        if kv_end is None:
            length = builder.size(spec.kv_len)
            kv_end = builder.call(aten.full.default, [1, 1], length, dtype=torch.int32, device=builder.device)
    return k, v, more, kv_end


def _tensor(builder: GraphBuilder, read: CacheRead, groups: list) -> fx.Node:
    node, dims = take_cuts(builder, builder.tensor(read.operand.value), read.operand)
    return to_layout(builder, node, dims, groups, [True] * len(groups))


def _scale(builder: GraphBuilder, read: CacheRead, kv_heads: list, spec: AttentionSpec) -> fx.Node | None:
    """Float32, one per head or one for all; None where a cache of the attention's own dtype has none."""
    total: fx.Node | None = None
    for factor, divides in read.factors:
        node = to_layout(builder, builder.tensor(factor.value), factor.dims, [kv_heads], [False])
        node = builder.call(aten._to_copy.default, node, dtype=torch.float32)
        if divides:
            node = builder.call(aten.reciprocal.default, node)
        total = node if total is None else builder.call(aten.mul.Tensor, total, node)
    if total is not None:
        return total if read.number == 1 else builder.call(aten.mul.Tensor, total, read.number)
    if read.number == 1 and read.operand.value.dtype == spec.dtype:
        return None
    return builder.call(aten.full.default, [1], read.number, dtype=torch.float32, device=builder.device)
