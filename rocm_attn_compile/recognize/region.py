"""A recognised attention: its spec, and where its tensors are in the captured program."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from ..capture.trace import Value
from ..reasons import Reason
from ..spec import AttentionSpec
from .axes import Atom, Dim
from .labels import Labels


@dataclass(frozen=True, eq=False)
class Cut:
    """A range of the indices of one axis: `before` becomes `after`, the `length` indices from `start` on."""

    before: Dim
    start: int
    length: int
    after: Dim


@dataclass(eq=False)
class Operand:
    """A tensor the op reads: a captured value and the axes of its dimensions.

    Attributes:
        value: The captured value.
        dims: One tuple of atoms for each of its dimensions.
        factors: Tensors to multiply it with before the op, (Operand, divide) pairs; gradients flow through them.
        factor: Number to multiply it with, or 1.
        added_in: Of a bias: the dtype of the sum with the scores.
        rounded_to: Narrower dtype it is cast to after that, where what it holds may become infinite; or None.
        cuts: Ranges to take of it, one after the other, before it is brought into a layout.
    """

    value: Value
    dims: list[Dim]
    factors: list[tuple[Operand, bool]] = field(default_factory=list)
    factor: Any = 1
    rounded_to: torch.dtype | None = None
    added_in: torch.dtype | None = None
    cuts: list[Cut] = field(default_factory=list)


@dataclass(eq=False)
class MaskTerm:
    """A mask that stays a tensor: `keeps` says whether True means attend; `fill` is what dropped scores become.

    `dtype` is that of these scores, where the fill is a number.
    """

    operand: Operand
    keeps: bool
    fill: float = -math.inf
    dtype: torch.dtype | None = None


@dataclass(eq=False)
class Alibi:
    """`-factor * slopes * |k - q - (kv_len - q_len)|` for every pair that is kept; see `alibi`.

    Attributes:
        slopes: A tensor over batch and heads, or None.
        factor: A number.
    """

    slopes: Operand | None
    factor: float


@dataclass(eq=False)
class PositionBias:
    """`factor * slopes * (k - (kv_len - 1))`, plus something that is the same for all keys of a row; see `alibi`.

    Attributes:
        slopes: A tensor over batch and heads, or None.
        factor: A number.
    """

    slopes: Operand | None
    factor: float


Bias: TypeAlias = Operand | MaskTerm | Alibi | PositionBias


@dataclass(eq=False)
class Roles:
    """Which atoms play which part. H = kv_heads x groups, in that order; each list is row-major."""

    batch: list[Atom]
    kv_heads: list[Atom]
    groups: list[Atom]
    query: list[Atom]
    key: list[Atom]
    depth: list[Atom]
    value_depth: list[Atom]

    @property
    def heads(self) -> list[Atom]:
        return [*self.kv_heads, *self.groups]


@dataclass(frozen=True, eq=False)
class Tail:
    """The product with W_uv that follows an attention written in its absorbed form.

    Attributes:
        value, labels: Its result, and the axes of that and of the way to it, in the latent's copies.
        depth: The axis of the channels, E.
        values: From after the attention to the product.
    """

    value: Value
    labels: Labels
    depth: list[Atom]
    values: list[Value]


@dataclass(eq=False)
class Latent:
    """How an attention reads keys and values from one latent per token (MLA). Axes are copies, see `latent.Frame`.

    Attributes:
        roles: The axes of the attention; `depth` is that of q_nope and k_nope, or empty if only q_latent is known.
        rank, rope: The axes of the latent, and of q_pe and k_pe (empty: no rotary half).
        kv_c, k_pe: Read by all heads, over (batch, key, rank) and (batch, key, rope). Paged: over (block, row of the
            block, rank or rope), see `block_table`.
        q_pe: Over (batch, heads, query, rope).
        q_nope, k_nope, v: Of the expanded spelling, over (batch, heads, query or key, depth or value_depth).
        w_uk, w_uv: Of the expanded spelling, over (heads, depth or value_depth, rank).
        q_latent: Of the absorbed spelling, over (batch, heads, query, rank). Where its weights are found, too, q_nope,
            w_uk, w_uv are given and the `tail`, which another form replaces; `q_values` is the product with W_uk.
        block_table: Over (batch, blocks), or None; then `block` has the axes (block, row of the block) of the caches.
        leaves: What old and new code both start from, for `verify`.
        opened: The linear layers between leaves and attention, for `verify`.
        values: What only served the expansion, for dead-code removal.
    """

    roles: Roles
    rank: list[Atom]
    rope: list[Atom]
    kv_c: Operand
    k_pe: Operand | None = None
    q_pe: Operand | None = None
    q_nope: Operand | None = None
    k_nope: Operand | None = None
    v: Operand | None = None
    w_uk: Operand | None = None
    w_uv: Operand | None = None
    q_latent: Operand | None = None
    tail: Tail | None = None
    q_values: list[Value] = field(default_factory=list)
    block_table: Operand | None = None
    block: tuple[list[Atom], list[Atom]] | None = None
    leaves: list[Value] = field(default_factory=list)
    opened: list[Value] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)


@dataclass(eq=False)
class CacheRead:
    """Keys or values as they lie in a cache.

    Attributes:
        operand: The cache.
        factors: Tensors over the heads, or of one element, that it is multiplied with: (Operand, divide) pairs.
        number: A number that it is multiplied with, or 1.
    """

    operand: Operand
    factors: list[tuple[Operand, bool]]
    number: Any = 1


@dataclass(eq=False)
class KvCache:
    """The cache that an attention's keys and values are read from. Axes are copies, see `latent_terms.Frame`.

    Attributes:
        roles: The axes of the attention.
        k, v: What is read.
        table: The block table over (batch, blocks), or None; then `block` has the axes (block, row of the block) of
            the caches.
        values: What only served the gathering, for dead-code removal.
    """

    roles: Roles
    k: CacheRead
    v: CacheRead
    table: Operand | None
    block: tuple[list[Atom], list[Atom]] | None
    values: list[Value]


@dataclass(eq=False)
class Region:
    """One attention, proved.

    Attributes:
        spec: What it computes.
        roles: Its axes.
        q, k, v: Operands; `second` holds further (q, k, depth) whose scores are added (concatenated along head_dim).
        biases: Float tensors added to the scores, in order; a mask among them replaces what was added before it.
        masks: Masks without closed form.
        closed_mask: The proved closed form (recognize.mask.ClosedForm) or None.
        symbols: The sympy symbols of the proof: atom -> expression.
        sinks: Learned extra logit per head, or None.
        row_sinks: The same over batch, heads and queries, which is given to the op as one more key.
        output: The value the op's result replaces, with its axes.
        weights: The value of the weights that something else reads, too, with its axes, or None.
        anchor: The softmax (or the "sdpa" value).
        labels: Axes of every value of the site.
        values: All values the site consists of, for provenance and dead-code removal.
        notes: Facts for the report that are not reasons to refuse.
        latent: Its latent form, if `spec.kind` is "mla"; q, k, v are what the graph computes, all the same.
        latent_note: Why something near latent attention is a plain one.
        cache: The cache that k and v are gathered or dequantised from, or None.
        cache_note: Why what is near a cache is read after it was gathered or dequantised.
        bias_note: Why a bias stays a tensor over all pairs.
        shared: Other softmaxes of the same scores, see `shared_scores`.
        equal_to: The anchor of the equal site that it was translated from, see `again`; None: recognised in full.
    """

    spec: AttentionSpec
    roles: Roles
    q: Operand
    k: Operand
    v: Operand
    output: Operand
    anchor: Value
    labels: Labels
    second: list[tuple[Operand, Operand, list[Atom]]] = field(default_factory=list)
    biases: list[Bias] = field(default_factory=list)
    masks: list[MaskTerm] = field(default_factory=list)
    closed_mask: Any = None
    mask_context: Any = None
    sinks: Operand | None = None
    row_sinks: Operand | None = None
    weights: Operand | None = None
    values: list[Value] = field(default_factory=list)
    notes: list[Reason] = field(default_factory=list)
    latent: Latent | None = None
    latent_note: Reason | None = None
    cache: KvCache | None = None
    cache_note: Reason | None = None
    bias_note: Reason | None = None
    shared: list[Value] = field(default_factory=list)
    equal_to: Value | None = None


@dataclass(eq=False)
class LookAlike:
    """A softmax that was looked at and left alone.

    Attributes:
        anchor: The softmax or "sdpa" value.
        reason: What stopped the proof.
        needs_numbers: Symbolic sizes that would have to be numbers for the proof.
        is_attention: It stands between two matrix products (or is SDPA): an attention, but one we cannot prove.
        equal_to: As in `Region`.
    """

    anchor: Value
    reason: Reason
    is_attention: bool = False
    needs_numbers: tuple[Any, ...] = ()
    equal_to: Value | None = None
