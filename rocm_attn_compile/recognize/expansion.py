"""Prove that keys or values are a linear map of one latent per token: k[b, h, n, :] = W[h] c[b, n].

    c    W
     \\  /                  one product: `F.linear` without bias, matmul, einsum
    product over the rank
      |
    view, split, transpose, slice        re-indexing and nothing else
      |
    k_nope or v

The weight may be a slice of a larger one, before the product or after it (one `kv_b_proj` for both).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..capture.trace import Value
from ..reasons import Refusal
from .axes import Dim, atoms_of, resolve, unify
from .descent import descend, label
from .labels import Labels, is_contraction, label_contraction, operands_of, source_of
from .region import Operand, Roles


@dataclass(eq=False)
class Expansion:
    """`latent` over (batch, key, rank), `weight` over (heads, channels, rank), and `values`, the way from both."""

    latent: Operand
    weight: Operand
    rank: Dim
    values: list[Value] = field(default_factory=list)

    @property
    def product(self) -> Value:
        return self.values[-1]


def prove_expansion(what: str, value: Value, dims: list[Dim], channels: Dim, roles: Roles) -> Expansion:
    """`value` with the axes `dims` as a linear map; raises Refusal naming what is in the way.

    Args:
        what: Name for messages, "the keys" or "the values".
        channels: The axes of `dims` that are neither batch, nor head, nor key.
        roles: The axes of the attention.
    """
    path = descend(value)
    labels, base = Labels(), path[-1]
    left, right, rank = _factors(what, base, labels)
    cuts = label(labels, path)
    for own, given in zip(labels.of(value), dims):
        unify(given, own)
    operands = [_source(tensor, own) for tensor, own in (left, right)]
    key, batch, heads = (set(resolve(group)) for group in (roles.key, roles.batch, roles.heads))
    inner, free = set(resolve(rank)), set(resolve(channels))
    if any(set(resolve(cut.after)) & (key | batch) for cut in cuts):
        raise Refusal("latent_sliced", f"a part of the tokens is cut off after {what} were expanded")
    latents = [operand for operand in operands if key & set(atoms_of(operand.dims))]
    if len(latents) != 1:
        raise Refusal("latent_not_linear", f"{what} are no product of a latent per key with a weight")
    latent = latents[0]
    weight = operands[1] if latent is operands[0] else operands[0]
    have = set(atoms_of(latent.dims))
    if have & heads:
        raise Refusal("latent_per_head", f"{what} are computed from a tensor that has heads: no latent they share")
    weight.cuts = cuts
    of_weight = set(atoms_of(weight.dims))
    for cut in cuts:
        before = set(resolve(cut.before))
        if not before <= of_weight:
            raise Refusal("latent_axes", f"{what} are cut along an axis that is none of the weight")
        of_weight = (of_weight - before) | set(resolve(cut.after))
    if of_weight & batch:
        raise Refusal("latent_weight_varies", f"the weight that expands {what} depends on the batch")
    outer = batch | key | heads | free
    if not (have <= batch | key | inner and of_weight <= heads | free | inner) or inner & outer:
        raise Refusal("latent_axes", f"{what} are expanded along other axes than head and channel")
    return Expansion(latent, weight, rank, path)


def _factors(what: str, base: Value, labels: Labels) -> tuple[tuple[Value, Labels], tuple[Value, Labels], Dim]:
    """The two factors of the product that gives `base`, each in its own labels, and the axis it sums over."""
    left_labels, right_labels = Labels(), Labels()
    if base.op == "opaque" and "linear" in base.kwargs:
        left, right, bias = base.kwargs["linear"]
        if bias is not None:
            raise Refusal("latent_bias", f"{what} are expanded by a linear layer with a bias")
        if right.ndim != 2:
            raise Refusal("latent_not_linear", f"{what} are expanded by a vector")
        *rows, depth = left_labels.of(left)
        columns, other = right_labels.of(right)
        unify(depth, other)
        labels.set(base, [*rows, columns])
        return (left, left_labels), (right, right_labels), depth
    if not is_contraction(base):
        at = base.place or base.name
        raise Refusal("latent_not_linear", f"{what} come from {base.name} ({at}), not from a product with a weight")
    left, right = operands_of(base)
    if base.name in ("addmm", "baddbmm") and (base.kwargs.get("beta", 1) != 0 or base.kwargs.get("alpha", 1) != 1):
        raise Refusal("latent_bias", f"{what} are expanded by a product to which something is added")
    rank = label_contraction(labels, base, left_labels, right_labels)
    return (left, left_labels), (right, right_labels), rank


def _source(value: Value, labels: Labels) -> Operand:
    labels.of(value)
    labels.check_distinct()
    source = source_of(value)
    return Operand(source, labels.of(source))


def same_axes(left: list[Dim], right: list[Dim]) -> bool:
    """True if two tensors of one shape lie along the same axes."""
    return [resolve(dim) for dim in left] == [resolve(dim) for dim in right]
