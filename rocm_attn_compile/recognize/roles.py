"""Assign a role to every axis of a proved attention, and check that nothing is left over."""

from __future__ import annotations

from ..reasons import Refusal
from .axes import Atom, Dim, atoms_of, resolve
from .proof import Factor, Proof
from .region import Roles


def assign_roles(proof: Proof, sink_atoms: list[Atom]) -> Roles:
    """Read the roles off the atoms; raises Refusal if an axis fits none.

    `sink_atoms` are the axes of the learned sinks: together they must be the heads.
    """
    labels = proof.labels
    labels.check_distinct()
    for factor in proof.factors():
        _atoms(factor)
        factor.labels.check_distinct()
    q, k, v = (set(_atoms(factor)) for factor in (proof.q, proof.k, proof.v))
    for q2, k2, _, depth2 in proof.second:
        q |= set(_atoms(q2)) - set(resolve(depth2))
        k |= set(_atoms(k2)) - set(resolve(depth2))
    key, depth = list(resolve(proof.key)), list(resolve(proof.depth))
    scores = atoms_of(proof.score_dims)
    _check_depth(depth, scores)
    query = _query_axis(proof, k | v)
    rest = [a for a in scores if a not in set(key) | set(query)]
    shared, groups = [a for a in rest if a in k or a in v], [a for a in rest if a not in k and a not in v]
    outermost = set(resolve(proof.score_dims[0]))
    batch, kv_heads, groups = _batch_and_heads(rest, shared, groups, sink_atoms, outermost)
    value_depth = [a for a in _atoms(proof.v) if a not in set(scores)]
    roles = Roles(batch, kv_heads, groups, query, key, depth, value_depth)
    _check_complete(proof, roles, q, k, v)
    return roles


def _atoms(factor: Factor) -> list[Atom]:
    """Axes of the tensor a factor is read from, before any expand."""
    return atoms_of(factor.labels.of(factor.labels.scaled_source_of(factor.value)[0]))


def _check_depth(depth: list[Atom], scores: list[Atom]) -> None:
    if set(depth) & set(scores):
        raise Refusal("depth_axis", "the axis contracted by q k^T also appears in the scores")
    if not depth:
        raise Refusal("depth_axis", "q k^T contracts an axis of one element")


def _query_axis(proof: Proof, in_keys_or_values: set[Atom]) -> list[Atom]:
    """The query axis: what only q brings into the product, as far as it stays one dimension of the scores."""
    free = [a for a in resolve(proof.query_free) if a not in in_keys_or_values]
    if not free:
        return []
    for dim in proof.score_dims:
        atoms = list(resolve(dim))
        if free[-1] in atoms:
            return [a for a in atoms if a in free]
    raise Refusal("query_axis", "the query axis is lost before the softmax")


def _batch_and_heads(
    rest: list[Atom], shared: list[Atom], groups: list[Atom], sinks: list[Atom], outermost: set[Atom]
) -> tuple[list[Atom], list[Atom], list[Atom]]:
    if sinks:
        if not set(sinks) <= set(rest) or not set(groups) <= set(sinks):
            raise Refusal("sink_axis", "the sinks vary along other axes than the query heads (one per query, say)")
        kv_heads = [a for a in sinks if a in shared]
        if [*kv_heads, *groups] != sinks:
            raise Refusal("sink_axis", "the order of the sinks' axes is not (kv head, group)")
        return [a for a in shared if a not in kv_heads], kv_heads, groups
    if len(shared) <= 1:
        # one axis: the batch if it stands alone in the first dimension, else the heads of a batch of one
        if set(shared) <= outermost and not set(groups) & outermost:
            return shared, [], groups
        return [], shared, groups
    if groups:
        before = [a for a in rest[: rest.index(groups[0])] if a in shared]
        head = before[-1] if len(before) > 1 else (None if before else shared[-1])
        if head is None:  # only the batch axis stands before the groups: MQA-like, unless another shared axis follows
            head = shared[-1]
    else:
        head = shared[-1]
    return [a for a in shared if a is not head], [head], groups


def _check_complete(proof: Proof, roles: Roles, q: set[Atom], k: set[Atom], v: set[Atom]) -> None:
    outer = {*roles.batch, *roles.kv_heads}
    allowed = {
        "q": (q, outer | {*roles.groups, *roles.query, *roles.depth}),
        "k": (k, outer | {*roles.key, *roles.depth}),
        "v": (v, outer | {*roles.key, *roles.value_depth}),
    }
    for name, (have, may) in allowed.items():
        if not have <= may:
            extra = " x ".join(str(a.size) for a in have - may)
            raise Refusal("axis_left_over", f"{name} has an axis (size {extra}) with no role in attention")
    expected = outer | {*roles.groups, *roles.query, *roles.value_depth}
    got: list[Dim] = proof.labels.of(proof.output)
    if set(atoms_of(got)) != expected:
        raise Refusal("output_axes", "the product with V does not have exactly the batch, head, query and value axes")
    if set(roles.value_depth) & ({*roles.depth} | {*roles.key}):
        raise Refusal("axis_left_over", "v's free axis is also contracted")
