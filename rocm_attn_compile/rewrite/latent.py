"""Emit the ops of latent attention: the form that the spec names, from the tensors that were proved."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from .. import ops
from ..backends.rules import MLA
from ..capture.trace import Value
from ..recognize.axes import Atom, Dim, resolve
from ..recognize.labels import Labels
from ..recognize.region import Latent, Operand, Region
from .builder import GraphBuilder
from .canonical import to_layout
from .masks import MaskArguments

aten = torch.ops.aten

Emit = Callable[[GraphBuilder, Operand, list, torch.dtype], fx.Node]
"""`Rewriter._operand`: a tensor in the layout of groups of axes, in a dtype."""


@dataclass(frozen=True, eq=False)
class Output:
    """What the op's result replaces: the value, its axes, and those of the result (batch, heads, query, channels)."""

    value: Value
    labels: Labels
    groups: list[list[Atom]]


def is_latent(impl: str) -> bool:
    """True if the backend that `impl` names computes the MLA ops."""
    return impl.split("@")[0] in MLA


def output_of(region: Region, impl: str) -> Output:
    """The product with V; or that with W_uv after it, which a form that the model is not written in takes along."""
    latent, spec, roles = region.latent, region.spec.latent, region.roles
    if latent is not None and spec is not None and is_latent(impl) and latent.tail and spec.form != "absorbed":
        tail, roles = latent.tail, latent.roles
        return Output(tail.value, tail.labels, [roles.batch, roles.heads, roles.query, tail.depth])
    groups = [roles.batch, roles.heads, roles.query, roles.value_depth]
    return Output(region.output.value, region.labels, groups)


def emit_latent(
    builder: GraphBuilder, region: Region, latent: Latent, masks: MaskArguments, layout: str, impl: str, emit: Emit
) -> fx.Node:
    """The op's result, over the groups of axes that `output_of` gives."""
    assert masks.attn_mask is None
    assert masks.q_ids is None
    assert region.spec.latent is not None
    spec, form = region.spec, region.spec.latent.form
    roles, heads = latent.roles, latent.roles.heads
    channels = roles.value_depth if latent.tail is None else latent.tail.depth

    def tensor(operand: Operand | None, *groups: list) -> Any:
        return None if operand is None else emit(builder, operand, list(groups), spec.dtype)

    q_pe = tensor(latent.q_pe, roles.batch, heads, roles.query, latent.rope)
    q_nope = None
    if form != "absorbed" or latent.q_latent is None:
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
        k_pe = tensor(latent.k_pe, roles.batch, roles.key, latent.rope)
        if latent.tail is None:
            k_nope = tensor(latent.k_nope, roles.batch, heads, roles.key, roles.depth)
            v = tensor(latent.v, roles.batch, heads, roles.key, channels)
        else:
            kv_c = tensor(latent.kv_c, roles.batch, roles.key, latent.rank)
            w_uk = tensor(latent.w_uk, heads, roles.depth, latent.rank)
            w_uv = tensor(latent.w_uv, heads, channels, latent.rank)
            k_nope, v = (builder.call(torch.einsum, "bnc,hxc->bhnx", kv_c, weight) for weight in (w_uk, w_uv))
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
    if form == "runtime" or latent.q_latent is None:
        w_uk = tensor(latent.w_uk, heads, roles.depth, latent.rank)
        w_uv = tensor(latent.w_uv, heads, channels, latent.rank)
    if form == "runtime":
        call = builder.call(ops.mla, q_nope, q_pe, caches[0], caches[1], w_uk, w_uv, *rest, **settings)
        return builder.call(operator.getitem, call, 0)

    if latent.q_latent is not None:  # W_uk is in it, and W_uv follows in the graph
        q_latent = tensor(latent.q_latent, roles.batch, heads, roles.query, latent.rank)
    else:
        q_latent = builder.call(torch.einsum, "bhmp,hpc->bhmc", q_nope, w_uk)
    call = builder.call(ops.mla_decode, q_latent, q_pe, *caches, *rest, **settings)
    out = builder.call(operator.getitem, call, 0)
    return out if latent.q_latent is not None else builder.call(torch.einsum, "bhmc,hec->bhme", out, w_uv)


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
