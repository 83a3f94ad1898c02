"""Latent attention in its absorbed spelling: every head reads one cache, of which the values are a part.

    scores = q_latent c^T + q_pe k_pe^T        out = p c        two caches, or one of which c is a range of columns

DeepSeek's reference inference code, and kernels' tests, which call it MQA with head_dim 576 and v_head_dim 512.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..capture.trace import Value
from ..reasons import Refusal
from .axes import Dim, resolve, unify
from .descent import descend, label
from .labels import Labels
from .latent_terms import Attempt, Term
from .pieces import Piece
from .region import Cut, Latent, Operand, Region, Roles


@dataclass(frozen=True, eq=False)
class Shared:
    """A piece of k and the values as ranges of the columns of one tensor, whose dimensions have the axes `dims`."""

    value: Value
    dims: list[Dim]
    axis: int
    of_k: tuple[int, int]
    of_v: tuple[int, int]


def find_absorbed(region: Region, attempt: Attempt) -> Latent | None:
    """The latent that is both key and value; None if they share none. Raises Refusal for what comes near."""
    roles = attempt.frame.roles
    heads = set(resolve(roles.heads))
    for index, term in enumerate(attempt.terms):
        if term.varies_with(roles.heads):
            return None
        shared = _shared(term.k, region.v, attempt)
        if shared is None:
            continue
        rope = [other for i, other in enumerate(attempt.terms) if i != index] + _rest(term, shared)
        if len(rope) > 1 or not (rope or heads):
            return None
        if any(other.varies_with(roles.heads) for other in rope):
            attempt.is_near = True
            raise Refusal("latent_pe_per_head", "the part of the keys beside the latent differs from head to head")
        return _latent(term, shared, rope, roles, attempt)
    return None


def _latent(term: Term, shared: Shared, rope: list[Term], roles: Roles, attempt: Attempt) -> Latent:
    first, length = shared.of_v
    kv_c, rank = Piece(shared.value, shared.dims, shared.axis, first, length).operand()
    q_latent, q_axis = term.q_range(first - shared.of_k[0], length).operand()
    unify(rank, q_axis)
    q_latent.factor = term.factor
    latent = Latent(
        roles=Roles(roles.batch, roles.kv_heads, roles.groups, roles.query, roles.key, [], list(rank)),
        rank=list(rank),
        rope=[],
        kv_c=kv_c,
        q_latent=q_latent,
    )
    if rope:
        latent.q_pe, latent.k_pe, latent.rope = rope[0].rope_operands()
    return latent


def _rest(term: Term, shared: Shared) -> list[Term]:
    """What the piece of k has before and after the values."""
    (k_first, k_length), (first, length) = shared.of_k, shared.of_v
    end, k_end = first + length, k_first + k_length
    ranges = [(k_first, first - k_first), (end, k_end - end)]
    tensor, dims, axis = shared.value, shared.dims, shared.axis
    return [
        Term(term.q_range(start - k_first, size), Piece(tensor, dims, axis, start, size), term.factor)
        for start, size in ranges
        if size
    ]


def _shared(k: Piece, v: Operand, attempt: Attempt) -> Shared | None:
    """The nearest tensor of which both are ranges of columns, with the same batch and key axes for both."""
    ways = [descend(k.value), descend(v.value)]
    ids = {value.id for value in ways[1]}
    meeting = next((value for value in ways[0] if value.id in ids), None)
    if meeting is None:
        return None
    v_dims, v_axis = attempt.frame.dims(v.dims), tuple(attempt.frame.roles.value_depth)
    found = []
    for way, dims, channels in ((ways[0], k.dims, k.dims[k.axis]), (ways[1], v_dims, v_axis)):
        way = way[: [value.id for value in way].index(meeting.id) + 1]
        columns = _columns(way, dims, channels)
        if columns is None:
            return None
        found.append(columns)
    (k_dims, k_at, k_start, _), (other, v_at, v_start, v_length) = found
    k_range = (k_start + k.start, k.length)
    inside = k_range[0] <= v_start and v_start + v_length <= k_range[0] + k_range[1]
    if k_at != v_at or not inside:
        return None
    if any(resolve(a) != resolve(b) for i, (a, b) in enumerate(zip(k_dims, other)) if i != k_at):
        return None
    return Shared(meeting, k_dims, k_at, k_range, (v_start, v_length))


def _columns(way: Sequence[Value], dims: list[Dim], channels: Dim) -> tuple[list[Dim], int, int, int] | None:
    """The axes of the last tensor of a `descend`, and which of its columns the first one is."""
    labels = Labels()
    cuts: list[Cut] = label(labels, way)
    try:
        for own, given in zip(labels.of(way[0]), dims):
            unify(given, own)
        labels.check_distinct()
    except Refusal:
        return None
    base = labels.of(way[-1])
    if len(cuts) > 1:
        return None
    wanted = resolve(cuts[0].before if cuts else channels)
    at = [i for i, dim in enumerate(base) if resolve(dim) == wanted]
    if len(at) != 1 or (cuts and resolve(cuts[0].after) != resolve(channels)):
        return None
    size = way[-1].shape[at[0]]
    if not isinstance(size, int):
        return None
    return (base, at[0], cuts[0].start, cuts[0].length) if cuts else (base, at[0], 0, size)
