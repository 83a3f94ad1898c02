"""Bring a labelled tensor into the op's layout with views: (batch, heads, row, column), each a product of atoms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from ..reasons import Refusal
from ..recognize.axes import Atom, Dim, atoms_of, resolve
from ..symbolic import product
from .builder import GraphBuilder

aten = torch.ops.aten


def is_in_layout(dims: Sequence[Dim], groups: Sequence[Sequence[Atom]]) -> bool:
    """True if a tensor with axes `dims` has exactly one dimension per group already."""
    return [resolve(dim) for dim in dims] == [resolve(group) for group in groups]


def to_layout(
    builder: GraphBuilder,
    tensor: fx.Node,
    dims: Sequence[Dim],
    groups: Sequence[Sequence[Atom]],
    expand: Sequence[bool],
) -> fx.Node:
    """Rearrange `tensor` (axes `dims`) to one dimension per group of atoms.

    An atom the tensor does not have becomes a broadcast: a group it lacks entirely is a dimension of size 1, or is
    expanded (stride 0, no copy) where `expand` says so; a group it has in part must be expanded.

    Raises:
        Refusal: `axis_left_over` if the tensor has an atom in none of the groups.
    """
    if is_in_layout(dims, groups):
        return tensor
    have = atoms_of(dims)
    wanted = [list(resolve(group)) for group in groups]
    flat = [atom for group in wanted for atom in group]
    if not set(have) <= set(flat):
        raise Refusal("axis_left_over", "a tensor varies along an axis that its place in the op does not have")
    if [len(resolve(dim)) for dim in dims] != [1] * len(dims):
        tensor = builder.call(aten.reshape.default, tensor, [builder.size(atom.size) for atom in have])
    order = [have.index(atom) for atom in flat if atom in have]
    if order != list(range(len(order))):
        tensor = builder.call(aten.permute.default, tensor, order)
    for position, atom in enumerate(flat):
        if atom not in have:
            tensor = builder.call(aten.unsqueeze.default, tensor, position)
    fill = [
        bool(set(group) & set(have)) or grow for group, grow in zip(wanted, expand)
    ]  # groups that must reach their full size
    targets = [
        builder.size(atom.size) if atom not in have and fill[i] else -1
        for i, group in enumerate(wanted)
        for atom in group
    ]
    if any(not isinstance(t, int) or t != -1 for t in targets):
        tensor = builder.call(aten.expand.default, tensor, targets)
    if [len(group) for group in wanted] != [1] * len(wanted):
        shape = [builder.size(product(a.size for a in group)) if fill[i] else 1 for i, group in enumerate(wanted)]
        tensor = builder.call(aten.reshape.default, tensor, shape)
    return tensor


def from_layout(
    builder: GraphBuilder, tensor: fx.Node, groups: Sequence[Sequence[Atom]], dims: Sequence[Dim], shape: Sequence[Any]
) -> fx.Node:
    """The inverse: from one dimension per group to the axes `dims` of a tensor of `shape`."""
    if is_in_layout(dims, groups):
        return tensor
    atoms = [atom for group in groups for atom in resolve(group)]
    if [len(resolve(group)) for group in groups] != [1] * len(groups):
        tensor = builder.call(aten.reshape.default, tensor, [builder.size(atom.size) for atom in atoms])
    wanted = atoms_of(dims)
    order = [atoms.index(atom) for atom in wanted]
    if order != list(range(len(order))):
        tensor = builder.call(aten.permute.default, tensor, order)
    if [len(resolve(dim)) for dim in dims] != [1] * len(dims):
        tensor = builder.call(aten.reshape.default, tensor, [builder.size(size) for size in shape])
    return tensor
