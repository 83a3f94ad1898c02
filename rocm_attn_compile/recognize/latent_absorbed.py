"""Latent attention in its absorbed spelling: every head reads one cache, of which the values are a part.

    scores = q_latent c^T + q_pe k_pe^T        out = p c        two caches, or one of which c is a range of columns

DeepSeek's reference inference code, and kernels' tests, which call it MQA with head_dim 576 and v_head_dim 512.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..capture.trace import Value
from ..reasons import Refusal
from ..symbolic import static
from .axes import Dim, resolve, unify
from .descent import descend, is_same_tensor, label
from .labels import Labels
from .latent_terms import Attempt, Term
from .pieces import Piece
from .region import Cut, Latent, Operand, Region, Roles


@dataclass(frozen=True, eq=False)
class Shared:
    """A piece of k and the values as ranges of the columns of one tensor.

    Attributes:
        value, dims: The tensor and its axes.
        rows: What is taken of it along other axes (the part of a cache that is filled).
        columns: The axis of which k has the indices `of_k` (start, length) and v has `of_v`.
    """

    value: Value
    dims: list[Dim]
    rows: list[Cut]
    columns: Dim
    of_k: tuple[int, int]
    of_v: tuple[int, int]

    def piece(self, start: int, length: int) -> tuple[Operand, Dim]:
        """Some of the columns, and the axis they are then."""
        operand, axis = Piece(self.value, self.dims, self.columns, start, length).operand()
        operand.cuts[:0] = self.rows
        return operand, axis


def find_absorbed(region: Region, attempt: Attempt) -> Latent | None:
    """The latent that is both key and value; None if they share none. Raises Refusal for what comes near."""
    found = _among(region, attempt.terms, attempt)
    if found is None and len(attempt.products) < len(attempt.terms):
        # [c | k_pe] was put together, and the values are columns of the whole.
        found = _among(region, attempt.products, attempt)
    return found


def _among(region: Region, terms: list[Term], attempt: Attempt) -> Latent | None:
    roles = attempt.frame.roles
    heads = set(resolve(roles.heads))
    for index, term in enumerate(terms):
        if term.varies_with(roles.heads):
            return None
        shared = _shared(term.k, region.v, attempt)
        if shared is None:
            continue
        rope = [other for i, other in enumerate(terms) if i != index] + _rest(term, shared)
        if len(rope) > 1 or not (rope or heads):
            return None
        if any(other.varies_with(roles.heads) for other in rope):
            attempt.is_near = True
            raise Refusal("latent_pe_per_head", "the part of the keys beside the latent differs from head to head")
        return _latent(term, shared, rope, roles)
    return None


def _latent(term: Term, shared: Shared, rope: list[Term], roles: Roles) -> Latent:
    first, length = shared.of_v
    kv_c, rank = shared.piece(first, length)
    q_latent, q_axis = term.q.range(first - shared.of_k[0], length).operand()
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
    # `shared.of_k` starts where the term's piece does.
    return [
        Term(term.q.range(start - k_first, size), term.k.range(start - k_first, size), term.factor)
        for start, size in ranges
        if size
    ]


def _shared(k: Piece, v: Operand, attempt: Attempt) -> Shared | None:
    """The nearest tensor of which both are ranges of columns, with the same batch and key axes for both."""
    of_k, of_v = descend(k.value), descend(v.value)
    meeting = next(((i, j) for i, a in enumerate(of_k) for j, b in enumerate(of_v) if is_same_tensor(a, b)), None)
    if meeting is None:
        return None
    v_dims, v_axis = attempt.frame.dims(v.dims), tuple(attempt.frame.roles.value_depth)
    left = _way(of_k[: meeting[0] + 1], k.dims, k.channels)
    right = _way(of_v[: meeting[1] + 1], v_dims, v_axis)
    if left is None or right is None or left.column != right.column or len(left.rows) != len(right.rows):
        return None
    of_k_range, of_v_range = (left.start + k.start, k.length), (right.start, right.length)
    if not (of_k_range[0] <= right.start and right.start + right.length <= of_k_range[0] + k.length):
        return None
    for mine, other in zip(left.rows, right.rows):
        if (mine.start, mine.length) != (other.start, other.length) or resolve(mine.after) != resolve(other.after):
            return None
    cut = [resolve(row.before) for row in (*left.rows, *right.rows)]
    for i, pair in enumerate(zip(left.dims, right.dims)):
        here, there = (resolve(dim) for dim in pair)
        if i != left.column and here != there and not (here in cut and there in cut):
            return None
    return Shared(of_k[meeting[0]], left.dims, left.rows, left.dims[left.column], of_k_range, of_v_range)


@dataclass(frozen=True, eq=False)
class _Way:
    """How a tensor is taken from another: `start`, `length` of dimension `column`, and ranges of rows."""

    dims: list[Dim]
    column: int
    start: int
    length: int
    rows: list[Cut]


def _way(way: Sequence[Value], dims: list[Dim], channels: Dim) -> _Way | None:
    """From the last tensor of a `descend` to the first, which has the axes `dims`."""
    labels = Labels()
    cuts = label(labels, way)
    try:
        for own, given in zip(labels.of(way[0]), dims):
            unify(given, own)
        labels.check_distinct()
    except Refusal:
        return None
    base, wanted = labels.of(way[-1]), resolve(channels)
    columns = [cut for cut in cuts if resolve(cut.after) == wanted]
    rows = [cut for cut in cuts if resolve(cut.after) != wanted]
    if len(columns) > 1 or not all(any(resolve(row.before) == resolve(dim) for dim in base) for row in rows):
        return None
    at = [i for i, dim in enumerate(base) if resolve(dim) == (resolve(columns[0].before) if columns else wanted)]
    if len(at) != 1:
        return None
    size = static(way[-1].shape[at[0]])
    if size is None:
        return None
    start, length = (columns[0].start, columns[0].length) if columns else (0, size)
    return _Way(base, at[0], start, length, rows)
