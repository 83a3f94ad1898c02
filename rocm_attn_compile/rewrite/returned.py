"""The weights that something else than the product with V reads: whose they become, and where.

    p = softmax(...)        <- the op is put here if another reader of p comes before the product with V,
    m = p.mean(1)
    out = p @ v             <- else here, where v is there in any case

All that reads the memory of p after that place, or writes to it, gets the op's tensor: the nodes that hold p, or held
it at some time, are its only ways in, since nothing but the attention reads what p is made of, or makes of p on its way
to V (`recognize.weights`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx as fx

from ..capture.trace import NodeTensor, Trace, Value
from ..ops.schemas import lse_dtype
from ..reasons import Refusal
from ..recognize.region import Region
from .builder import GraphBuilder
from .canonical import from_layout
from .layout import with_strides_of

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Returned:
    """The value of the weights, the nodes that have it at some time, and after which node the op is put."""

    value: Value
    holders: list[fx.Node]
    place: fx.Node

    def brought_back(self, builder: GraphBuilder, region: Region, weights: fx.Node) -> fx.Node:
        """The op's weights (batch, heads, query, key) as what the holders hold."""
        assert region.weights is not None
        roles = region.roles
        groups = [roles.batch, roles.heads, roles.query, roles.key]
        weights = from_layout(builder, weights, groups, region.weights.dims, self.value.shape)
        if builder.example(weights).dtype != self.value.dtype:
            weights = builder.call(aten._to_copy.default, weights, dtype=self.value.dtype)
        return with_strides_of(builder, weights, self.holders[0])

    def give(self, weights: fx.Node, emitted: set[fx.Node]) -> None:
        """Let all that comes later read `weights`."""
        for holder in self.holders:
            for user in list(holder.users):
                if user not in emitted and weights < user:
                    user.replace_input_with(holder, weights)


def dtype_of(region: Region) -> torch.dtype:
    """In which dtype the op gives the weights: that of the value, if it can."""
    assert region.weights is not None
    wide = lse_dtype(region.spec.dtype)
    return region.spec.dtype if region.weights.value.dtype == region.spec.dtype else wide


def find_returned(trace: Trace, region: Region, target: fx.Node) -> Returned | None:
    """Where the weights of `region` are, whose result is at `target`; None if nothing else reads them.

    Raises:
        Refusal: No node holds them.
    """
    if region.weights is None:
        return None
    value = region.weights.value
    holders = [node for node, tensor in trace.tensors.items() if _has_at_some_time(tensor, value)]
    if not holders or value.node is None:
        raise Refusal("output_hidden", "the weights that something else reads are inside a larger call")
    own = {*holders, *(value.node for value in region.values)}
    others = [user for holder in holders for user in holder.users if user not in own]
    comes_first = any(value.node < user < target for user in others)
    return Returned(value, holders, value.node if comes_first else target)


def _has_at_some_time(tensor: NodeTensor, value: Value) -> bool:
    past = (held for _, held in tensor.storage.history) if tensor.is_base else ()
    return any(held is value for held in (*tensor.held.values(), *past))


def refuse_read(builder: GraphBuilder, region: Region) -> None:
    """Raises Refusal if the op reads what is made of the weights or the scores: both would be computed."""
    own = {value.id for value in region.values}
    if any(value.id in own for value in (*builder.sources.values(), *builder.remade.values())):
        raise Refusal("weights_used_elsewhere", "keys, values or masks are made of the attention weights")
