"""Emit the ops of latent attention: the form that the spec names, from the tensors that were proved."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from .. import ops
from ..recognize.axes import Dim, resolve
from ..recognize.region import Latent, Operand, Region
from .builder import GraphBuilder
from .canonical import to_layout
from .masks import MaskArguments

aten = torch.ops.aten

Emit = Callable[[GraphBuilder, Operand, list, torch.dtype], fx.Node]
"""`Rewriter._operand`: a tensor in the layout of groups of axes, in a dtype."""


def emit_latent(
    builder: GraphBuilder, region: Region, latent: Latent, masks: MaskArguments, layout: str, impl: str, emit: Emit
) -> fx.Node:
    """The op's result, over (batch, heads, query, value_depth) of the attention as it is written."""
    assert masks.attn_mask is None
    assert masks.q_ids is None
    assert region.spec.latent is not None
    spec, form = region.spec, region.spec.latent.form
    roles, heads = latent.roles, latent.roles.heads

    def tensor(operand: Operand | None, *groups: list) -> Any:
        return None if operand is None else emit(builder, operand, list(groups), spec.dtype)

    q_pe = tensor(latent.q_pe, roles.batch, heads, roles.query, latent.rope)
    q_nope = tensor(latent.q_nope, roles.batch, heads, roles.query, roles.depth)
    settings = {
        "softmax_scale": spec.softmax_scale,
        "band_lower": masks.band_lower,
        "band_upper": masks.band_upper,
        "empty_rows": spec.mask.empty_rows.value,
        "out_layout": layout,
        "impl": impl,
    }
    if form == "prefill":
        k_nope = tensor(latent.k_nope, roles.batch, heads, roles.key, roles.depth)
        k_pe = tensor(latent.k_pe, roles.batch, roles.key, latent.rope)
        v = tensor(latent.v, roles.batch, heads, roles.key, roles.value_depth)
        bounds = (masks.key_mask, masks.kv_start, masks.kv_end)
        call = builder.call(ops.mla_prefill, q_nope, q_pe, k_nope, k_pe, v, *bounds, **settings)
        return builder.call(operator.getitem, call, 0)

    rows = (roles.batch, roles.key) if latent.block is None else latent.block
    caches = (tensor(latent.kv_c, *rows, latent.rank), tensor(latent.k_pe, *rows, latent.rope))
    table, kv_end = _table(builder, latent), masks.kv_end
    if table is not None and kv_end is None:
        length = builder.size(spec.kv_len)
        kv_end = builder.call(aten.full.default, [1, 1], length, dtype=torch.int32, device=builder.device)
    rest = (table, masks.key_mask, masks.kv_start, kv_end)
    w_uk = tensor(latent.w_uk, heads, roles.depth, latent.rank)
    w_uv = tensor(latent.w_uv, heads, roles.value_depth, latent.rank)
    if form == "runtime":
        call = builder.call(ops.mla, q_nope, q_pe, caches[0], caches[1], w_uk, w_uv, *rest, **settings)
        return builder.call(operator.getitem, call, 0)

    q_latent = tensor(latent.q_latent, roles.batch, heads, roles.query, latent.rank)
    if q_latent is None:
        q_latent = builder.call(torch.einsum, "bhmp,hpc->bhmc", q_nope, w_uk)
    call = builder.call(ops.mla_decode, q_latent, q_pe, *caches, *rest, **settings)
    out = builder.call(operator.getitem, call, 0)
    return out if w_uv is None else builder.call(torch.einsum, "bhmc,hec->bhme", out, w_uv)


def _table(builder: GraphBuilder, latent: Latent) -> Any:
    """The block table as the op wants it; a negative number counts from the end, as in an index."""
    if latent.block_table is None or latent.block is None:
        return None
    operand, (blocks, _) = latent.block_table, latent.block
    groups = [latent.roles.batch, list(resolve(operand.dims[1]))]
    node = to_layout(builder, builder.tensor(operand.value), operand.dims, groups, [True, True])
    node = builder.call(aten.remainder.Scalar, node, builder.size(blocks[0].size))
    return builder.call(aten._to_copy.default, node, dtype=torch.int32)


def take_cuts(builder: GraphBuilder, tensor: fx.Node, operand: Operand) -> tuple[fx.Node, Sequence[Dim]]:
    """The ranges of an operand's `cuts`, and the axes of what is left."""
    dims: list[Dim] = list(operand.dims)
    for cut in operand.cuts:
        wanted = resolve(cut.before)
        at = [i for i, dim in enumerate(dims) if resolve(dim) == wanted]
        if not at:  # the axis is a part of a dimension, or spread over several
            own = [(atom,) for dim in dims for atom in resolve(dim) if atom not in wanted]
            tensor = to_layout(builder, tensor, dims, [*own, wanted], [False] * (len(own) + 1))
            dims, at = [*own, wanted], [len(own)]
        tensor = builder.call(aten.slice.Tensor, tensor, at[0], cut.start, cut.start + cut.length)
        dims[at[0]] = cut.after
    return tensor, dims
