"""The weights that an absorbed spelling has moved out of the attention: where both are found, any form can be used.

q_latent = q_nope W_uk      before the attention      DeepSeek's inference code, which runs its prompts so, too
out      = out_latent W_uv  after it
"""

from __future__ import annotations

from ..capture.trace import Value
from ..reasons import Refusal
from .axes import atoms_of, resolve, unify
from .descent import descend, label
from .labels import Labels, is_contraction, is_exact_cast, is_view, label_contraction, operands_of, source_of
from .latent_terms import Attempt
from .live import LiveUsers
from .region import Latent, Operand, Region, Tail


def add_weights(region: Region, latent: Latent, attempt: Attempt, live: LiveUsers) -> None:
    """Fill in q_nope, w_uk, w_uv and the tail of an absorbed `latent`, or leave it as it is."""
    if latent.q_latent is None or not resolve(latent.roles.heads) or latent.q_latent.factor != 1:
        return
    try:
        q_nope, w_uk, depth = _query_side(latent)
        w_uv, tail = _value_side(region, latent, attempt, live)
    except Refusal:
        return
    modes = {value.grad_mode for value in (region.anchor, tail.values[-1], *latent.q_values)}
    dtypes = {operand.value.dtype for operand in (q_nope, w_uk, w_uv)} | {tail.value.dtype}
    if len(modes) > 1 or dtypes != {region.spec.dtype}:
        return
    if not region.spec.requires_grad and any(_wants_gradient(operand.value, live) for operand in (w_uk, w_uv)):
        return
    latent.q_nope, latent.w_uk, latent.w_uv, latent.tail = q_nope, w_uk, w_uv, tail
    latent.roles.depth = depth


def _query_side(latent: Latent) -> tuple[Operand, Operand, list]:
    """q_nope over (batch, heads, query, depth) and w_uk over (heads, depth, rank)."""
    operand = latent.q_latent
    assert operand is not None
    if operand.cuts:
        raise Refusal("latent_axes", "the queries are a part of another tensor")
    path, labels = descend(operand.value), Labels()
    product = path[-1]
    if not is_contraction(product) or product.name in ("addmm", "baddbmm"):
        raise Refusal("latent_not_linear", "the queries are no product with a weight")
    sides = [(factor, Labels()) for factor in operands_of(product)]
    depth = label_contraction(labels, product, sides[0][1], sides[1][1])
    if label(labels, path):
        raise Refusal("latent_axes", "the queries are a part of another tensor")
    for own, given in zip(labels.of(operand.value), operand.dims):
        unify(given, own)
    rank = set(resolve(latent.rank))
    operands = [_source(factor, own) for factor, own in sides]
    weights = [side for side in operands if rank <= set(atoms_of(side.dims))]
    if len(weights) != 1:
        raise Refusal("latent_not_linear", "the queries are no product with a weight")
    weight = weights[0]
    query = operands[1] if weight is operands[0] else operands[0]
    roles, inner = latent.roles, set(resolve(depth))
    _check_axes(weight, {*resolve(roles.heads), *rank, *inner})
    _check_axes(query, {*resolve(roles.batch), *resolve(roles.heads), *resolve(roles.query), *inner})
    latent.q_values = [product]
    return query, weight, list(resolve(depth))


def _value_side(region: Region, latent: Latent, attempt: Attempt, live: LiveUsers) -> tuple[Operand, Tail]:
    """w_uv over (heads, value_depth, rank), and the product with it."""
    labels, value = Labels(), region.output.value
    labels.set(value, attempt.frame.dims(region.labels.of(value)))
    values: list[Value] = []
    while True:
        user = _only_user(value, live)
        values.append(user)
        if is_contraction(user):
            break
        if not (is_view(user) or (is_exact_cast(user) and user.dtype == value.dtype)):
            raise Refusal("latent_not_linear", f"{user.name} follows the product with the latent")
        labels.of(user)
        value = user
    left, right = operands_of(user)
    if user.name in ("addmm", "baddbmm") or left is right:
        raise Refusal("latent_not_linear", "the result is no product with a weight")
    own, other, at = (labels, Labels(), right) if left is value else (Labels(), labels, left)
    summed = label_contraction(labels, user, own, other)
    weight = _source(at, other if left is value else own)
    rank = tuple(attempt.frame.roles.value_depth)
    if resolve(summed) != resolve(rank):
        raise Refusal("latent_axes", "the product sums over another axis than the latent's")
    unify(tuple(latent.rank), rank)
    roles = latent.roles
    outer = {*resolve(roles.batch), *resolve(roles.heads), *resolve(roles.query)}
    depth = [atom for atom in atoms_of(labels.of(user)) if atom not in outer]
    _check_axes(weight, {*resolve(roles.heads), *resolve(latent.rank), *depth})
    if not depth or set(atoms_of(labels.of(user))) != {*outer, *depth}:
        raise Refusal("latent_axes", "the result has other axes than heads, queries and channels")
    return weight, Tail(user, labels, depth, values)


def _only_user(value: Value, live: LiveUsers) -> Value:
    users = live.users(value, "latent_axes")
    if len(users) != 1:
        raise Refusal("latent_axes", "the product with the latent is read by others, too")
    return users[0]


def _wants_gradient(value: Value, live: LiveUsers) -> bool:
    return value.grad_mode and any(live.requires_grad(value))


def _check_axes(operand: Operand, allowed: set) -> None:
    if not set(atoms_of(operand.dims)) <= allowed:
        raise Refusal("latent_axes", "a factor has an axis that it should not have")


def _source(value: Value, labels: Labels) -> Operand:
    labels.of(value)
    labels.check_distinct()
    source = source_of(value)
    return Operand(source, labels.of(source))
