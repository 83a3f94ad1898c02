"""What the masks of a site mean together: the proved closed form, what stays a tensor, and what an empty row gives.

The fill is part of the meaning. A probability is exactly 0 beside any kept key only for a *hard* fill (-inf, or so low
that exp underflows); a row that keeps no key is NaN for -inf, uniform for a finite fill, 0 for SDPA. Where rows may be
empty and eager's result for them is none of these, the mask stays what it was: a bias tensor (exact), or the site is
refused.

One assumption is made of biases that stay tensors: where a finite fill masks keys, the bias does not put -inf on every
key that the mask keeps (eager would then spread the row over the masked keys, or, where masked weights are set to 0
after the softmax, give NaN).

A row of -inf is NaN either way, but its scores have no gradient where -inf took their place and a gradient of NaN where
it was added. Where both kinds meet in a site, or a bias stays a tensor that may hold -inf, every score of such a row
gets NaN, also those that eager gives none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from ..capture.trace import Value
from ..reasons import Reason, Refusal
from ..spec import EmptyRows, MaskSpec
from ..symbolic import is_one, product
from . import mask as prover
from .axes import Atom, Dim, resolve
from .compose import Logits, MaskStep
from .labels import aligned
from .mask.integers import FloorDiv, modulo
from .proof import Proof
from .region import MaskTerm, Operand, Roles
from .zeroed import account_for_zeroed


@dataclass(eq=False)
class ProvedMasks:
    """Result for one site; see `Region` for the fields."""

    spec: MaskSpec
    closed: Any
    context: Any
    terms: list[MaskTerm]
    biases: list[Operand]
    notes: list[Reason] = field(default_factory=list)


@dataclass(eq=False)
class Term:
    """One mask: its closed form (None if opaque), how it fills, and the tensor it came from."""

    form: prover.ClosedForm | None
    fills: tuple[float, ...]
    added: bool
    operand: Operand
    keeps: bool
    moved: bool = False

    @property
    def stays_dense(self) -> bool:
        return self.form is None or bool(self.form.residual)


class Symbols:
    """Index symbols for the atoms of a site, as `recognize.mask` wants them."""

    def __init__(self, roles: Roles) -> None:
        self._of: dict[Atom, sympy.Expr] = {}
        # Dynamo's shape symbols are s0, u1, ...: these names must stay apart from them
        q, k = (prover.index_symbol(name) for name in ("q", "k"))
        self._spread(q, roles.query)
        self._spread(k, roles.key)
        batch, heads = self._each("b", roles.batch), self._each("h", roles.heads)
        self.context = prover.MaskContext(
            q=q,
            k=k,
            q_len=product(a.size for a in roles.query),
            kv_len=product(a.size for a in roles.key),
            batch=batch,
            heads=heads,
        )

    def _each(self, prefix: str, atoms: list[Atom]) -> dict[sympy.Symbol, sympy.Expr]:
        sizes = {}
        for i, atom in enumerate(atoms):
            symbol = prover.index_symbol(f"{prefix}{i}" if len(atoms) > 1 else prefix)
            self._of[atom] = symbol
            sizes[symbol] = atom.size
        return sizes

    def _spread(self, symbol: sympy.Symbol, atoms: list[Atom]) -> None:
        """One symbol for a whole axis; its atoms are quotients and remainders of it."""
        if len(atoms) == 1:
            self._of[atoms[0]] = symbol
            return
        rest: sympy.Expr = symbol
        for atom in reversed(atoms):
            is_first = atom is atoms[0]
            self._of[atom] = rest if is_first else modulo(rest, atom.size)
            rest = FloorDiv(rest, atom.size)

    def index(self, dims: list[Dim], shape: tuple, value: Value) -> list[sympy.Expr]:
        """Index of `value`, broadcast against a tensor with axes `dims` (aligned right)."""
        offset = len(dims) - value.ndim
        return [sympy.Integer(0) if is_one(s) else self.of(dims[offset + i]) for i, s in enumerate(value.shape)]

    def of(self, dim: Dim) -> sympy.Expr:
        """Row-major index of a dimension."""
        total: sympy.Expr = sympy.Integer(0)
        for atom in resolve(dim):
            if atom not in self._of:
                raise Refusal("axis_left_over", "a mask varies along an axis that is no axis of the scores")
            total = total * atom.size + self._of[atom]
        return total


def prove_masks(proof: Proof, roles: Roles, logits: Logits, requires_grad: bool) -> ProvedMasks:
    """Prove all masks of a site; raises Refusal where eager's meaning cannot be kept."""
    symbols = Symbols(roles)
    notes: list[Reason] = []
    replaced = [_boolean(symbols, step, notes) for step in logits.masks]
    for term in replaced:
        if not prover.is_hard(term.fills[0], _score_dtype(proof)):
            raise Refusal(
                "finite_fill", f"masked scores become {term.fills[0]:g}, which is not low enough to count as masked"
            )
    added = [mask for bias in logits.biases if (mask := _additive(proof, symbols, bias, notes)) is not None]
    found = _together(proof, logits, symbols, replaced, added)
    if found is None and added:  # the additive masks stay the tensors they are, which is always exact
        notes.append(Reason("mask_kept_as_bias", "a row may keep no key, and finite masks would not make it uniform"))
        added = []
        found = _together(proof, logits, symbols, replaced, added)
    if found is None:
        raise Refusal("mixed_fills", "masks with different fills meet, and a row may keep no key")
    closed, mode = found
    if logits.sinks is not None and mode is not EmptyRows.IMPOSSIBLE:
        if logits.sinks_rescale and mode in (EmptyRows.NAN, EmptyRows.NAN_ADDED):
            raise Refusal(
                "sinks_after_nan", "a row may keep no key, and its NaN is rescaled by the sinks, not replaced"
            )
        mode = EmptyRows.ZERO  # the sink takes all the weight
    mode = account_for_zeroed(proof, symbols, mode, closed, [*replaced, *added], requires_grad)
    dense = [MaskTerm(t.operand, t.keeps) for t in replaced if t.stays_dense]
    masks = {id(t.operand) for t in added}
    biases = [bias for bias in logits.biases if id(bias) not in masks]
    return ProvedMasks(_spec(closed, bool(dense), mode), closed, symbols.context, dense, biases, notes)


def _together(
    proof: Proof, logits: Logits, symbols: Symbols, replaced: list[Term], added: list[Term]
) -> tuple[prover.ClosedForm, EmptyRows] | None:
    """The conjunction of all closed forms and what empty rows give; None if that is nothing the op knows."""
    forms = [t.form for t in (*replaced, *added) if t.form is not None]
    evaluator = prover.make_evaluator(symbols.context)
    predicates = [form.predicate for form in forms]
    if logits.is_causal:
        predicates.append(evaluator.logic.le(symbols.context.k - symbols.context.q))
    closed = prover.classify(evaluator, evaluator.logic.all_of(predicates), symbols.context)
    opaque_biases = len(logits.biases) - len(added)
    mode = _empty_rows(proof, replaced, added, closed, opaque_biases)
    return None if mode is None else (closed, mode)


def _boolean(symbols: Symbols, step: MaskStep, notes: list[Reason]) -> Term:
    index = symbols.index(step.dims, step.shape, step.value)
    prove = prover.prove_keep if step.keeps else prover.prove_drop
    found = prove(step.value, index, symbols.context)
    form = None if isinstance(found, prover.OpaqueMask) else found
    notes.extend([found.reason] if isinstance(found, prover.OpaqueMask) else found.notes)
    operand = Operand(step.value, aligned(step.dims, step.value))
    return Term(form, (step.fill,), False, operand, step.keeps, moved=step.is_followed_by_bias)


def _additive(proof: Proof, symbols: Symbols, bias: Operand, notes: list[Reason]) -> Term | None:
    """A bias that is a mask as a whole, with a closed form; None if it is (also) something else."""
    if bias.factor not in (1, -1):
        return None
    index = [symbols.of(dim) for dim in bias.dims]
    found = prover.prove_additive(bias.value, index, symbols.context, subtracted=bias.factor == -1)
    if isinstance(found, prover.OpaqueMask):
        notes.append(found.reason)
        return None
    fills = tuple(fill for fill, _ in found.fills)
    if found.keep.residual or not all(prover.is_hard(fill, _score_dtype(proof)) for fill in fills):
        return None
    return Term(found.keep, fills, True, bias, True)


def _score_dtype(proof: Proof) -> torch.dtype:
    return proof.anchor.args[0].dtype if proof.anchor.op != "sdpa" else proof.q.value.dtype


def _empty_rows(
    proof: Proof, replaced: list[Term], added: list[Term], closed: prover.ClosedForm, opaque_biases: int
) -> EmptyRows | None:
    """What a row without keys gives; None if it is nothing the op knows."""
    if not proof.shifted and opaque_biases:
        raise Refusal("unshifted_softmax", "exp / sum without the maximum subtracted is NaN where a bias is very low")
    terms = [*replaced, *added]
    never_empty = closed.every_row_keeps_a_key() and not any(t.form is None for t in terms)
    if proof.safe:
        return EmptyRows.IMPOSSIBLE if never_empty and not opaque_biases else EmptyRows.ZERO
    if never_empty:
        return EmptyRows.NAN_ADDED if opaque_biases else EmptyRows.IMPOSSIBLE
    fills = {fill for t in terms for fill in t.fills}
    if all(math.isinf(fill) for fill in fills) or not proof.shifted:
        # Without the maximum subtracted, exp underflows to 0 everywhere and 0 / 0 is NaN.
        return EmptyRows.NAN_ADDED if added or opaque_biases else EmptyRows.NAN
    if len(fills) > 1 or (added and len(terms) > 1):
        return None  # the row is uniform over some of its keys only, or two fills were added up
    (fill,) = fills
    if added:
        absorbed = prover.absorbs(fill, _score_dtype(proof)) and not opaque_biases
        return EmptyRows.MEAN_ADDED if absorbed else None
    # A bias added to the fill gets a gradient that the scores do not: no mode says that.
    return None if any(term.moved for term in terms) else EmptyRows.MEAN


def _spec(closed: prover.ClosedForm, has_residual: bool, mode: EmptyRows) -> MaskSpec:
    def bound(expr: sympy.Expr | None) -> int | sympy.Expr | None:
        return None if expr is None else (int(expr) if expr.is_number else expr)

    return MaskSpec(
        band_lower=bound(closed.band_lower),
        band_upper=bound(closed.band_upper),
        has_kv_start=bool(closed.kv_start),
        has_kv_end=bool(closed.kv_end),
        has_key_mask=bool(closed.key_masks),
        has_segment_ids=bool(closed.segment_ids),
        has_attn_mask=has_residual,
        empty_rows=mode,
        text=prover.mask_in_words(closed),
    )
