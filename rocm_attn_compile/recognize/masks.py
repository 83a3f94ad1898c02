"""What the masks of a site mean together: the proved closed form, what stays a tensor, and what an empty row gives.

The fill is part of the meaning. A probability is exactly 0 beside any kept key only for a *hard* fill (-inf, or so low
that exp underflows); a row that keeps no key is NaN for -inf, uniform for a finite fill, 0 for SDPA. Where rows may be
empty and eager's result for them is none of these, the mask stays what it was: a bias tensor (exact), or the site is
refused.

Where a finite fill masks keys and a bias puts as low a number on every key that is left, eager spreads the row over the
masked keys too. If a bias that stays a tensor can do that (`is_moderate`), the fill is put into the bias, as a tensor.

A row of -inf is NaN either way, but its scores have no gradient where -inf took their place and a gradient of NaN where
it was added. Where both kinds meet in a site, or a bias stays a tensor that may hold -inf, every score of such a row
gets NaN, also those that eager gives none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import sympy

from ..capture.trace import Value
from ..reasons import Reason, Refusal
from ..spec import EmptyRows, MaskSpec
from . import mask as prover
from .biases import holds_nan, is_moderate_bias, refuse_casts, refuse_raised
from .compose import Logits, MaskStep
from .empty_rows import Term, empty_rows, score_dtype
from .labels import aligned
from .live import LiveUsers
from .masked_bias import take_apart
from .numbers import rounded
from .proof import Proof
from .region import Bias, MaskTerm, Operand, Roles
from .symbols import Symbols
from .zeroed import account_for_zeroed


@dataclass(eq=False)
class ProvedMasks:
    """Result for one site; see `Region` for the fields.

    `returned`: what empty rows give in the weights that something else reads, if another thing than in the result.
    """

    spec: MaskSpec
    closed: Any
    context: Any
    terms: list[MaskTerm]
    biases: list[Bias]
    notes: list[Reason] = field(default_factory=list)
    returned: EmptyRows | None = None


def prove_masks(
    proof: Proof,
    roles: Roles,
    logits: Logits,
    requires_grad: bool,
    live: LiveUsers,
    tracks: Callable[[Value], bool],
) -> ProvedMasks:
    """Prove all masks of a site; raises Refusal where eager's meaning cannot be kept.

    `requires_grad`: a gradient flows through the site; `tracks`: whether a value gets one.
    """
    symbols = Symbols(roles, live)
    notes: list[Reason] = []
    replaced = [_boolean(symbols, step, notes) for step in logits.masks]
    for step, term in zip(logits.masks, replaced):
        if not prover.is_hard(term.fills[0], step.dtype):
            raise Refusal(
                "finite_fill", f"masked scores become {term.fills[0]:g}, which is not low enough to count as masked"
            )
    biases, added = _take_masks(proof, symbols, logits, notes, live, tracks)
    refuse_raised(proof, logits, biases, symbols, live)
    low = not all(is_moderate_bias(bias, symbols, live) for bias in biases)
    found = None
    if not (low and any(t.is_finite for t in added)):
        found = _together(proof, logits, symbols, replaced, added, biases, low)
    if found is None and added:  # the additive masks stay the tensors they are, which is always exact
        notes.append(Reason("mask_kept_as_bias", "a row may keep no key, and finite masks would not make it uniform"))
        biases, added, low = list(logits.biases), [], True
        found = _together(proof, logits, symbols, replaced, added, biases, low)
    if low and logits.bias_cast_after_shift:  # -inf, but in a row of nothing but fills 0
        raise Refusal("cast_after_shift", "scores with a bias are cast after a maximum was subtracted")
    if low:
        refuse_casts(proof, logits)
    is_filled = low and any(t.is_finite for t in replaced)
    if is_filled and not (found is None and requires_grad):
        return _filled_biases(proof, logits, symbols, replaced, requires_grad, notes)
    if found is None:
        raise Refusal("mixed_fills", "masks with different fills meet, and a row may keep no key")
    closed, mode = found
    if logits.is_floored:
        _check_floor(mode, [*replaced, *added], low, requires_grad)
    mode = _with_sinks(logits, mode)
    if any(zeroing.mask is None for zeroing in proof.zeroed) and any(map(holds_nan, biases)):
        raise Refusal("nan_in_bias", "nan_to_num hides rows whose bias is NaN: a factor of it is infinite, also of 0")
    returned, mode = (
        account_for_zeroed(proof, zeroed, symbols, mode, closed, [*replaced, *added], requires_grad, low)
        for zeroed in (proof.zeroed[: proof.zeroed_in_returned], proof.zeroed)
    )
    dense = [MaskTerm(t.operand, t.keeps) for t in replaced if t.stays_dense]
    if not low:
        for bias in biases:
            bias.added_in = None  # nothing in it is as low as the lowest number
    return ProvedMasks(_spec(closed, bool(dense), mode), closed, symbols.context, dense, [*biases], notes, returned)


def _together(
    proof: Proof,
    logits: Logits,
    symbols: Symbols,
    replaced: list[Term],
    added: list[Term],
    biases: list[Operand],
    low_biases: bool,
) -> tuple[prover.ClosedForm, EmptyRows] | None:
    """The conjunction of all closed forms and what empty rows give; None if that is nothing the op knows."""
    forms = [t.form for t in (*replaced, *added) if t.form is not None]
    key = ("together", logits.is_causal, *map(id, forms))  # forms are remembered, too: an id is of one only
    closed = symbols.once(key, lambda: _conjunction(forms, logits.is_causal, symbols.context))
    mode = empty_rows(proof, replaced, added, closed, bool(biases), low_biases)
    return None if mode is None else (closed, mode)


def _conjunction(forms: list[prover.ClosedForm], is_causal: bool, context: prover.MaskContext) -> prover.ClosedForm:
    evaluator = prover.make_evaluator(context)
    predicates = [form.predicate for form in forms]
    if is_causal:
        predicates.append(evaluator.logic.le(context.k - context.q))
    return prover.classify(evaluator, evaluator.logic.all_of(predicates), context)


def _filled_biases(
    proof: Proof, logits: Logits, symbols: Symbols, replaced: list[Term], requires_grad: bool, notes: list[Reason]
) -> ProvedMasks:
    """All masks as numbers in the bias: the op then adds up what eager adds up, and no row is empty."""
    if logits.is_floored:
        raise Refusal("floor_of_bias", "a float tensor is added that may hold -inf, which is then raised to a number")
    if requires_grad or proof.zeroed:
        raise Refusal(
            "bias_beside_finite_fill",
            "a finite fill masks scores to which a float tensor is added that may mask the rest of a row; "
            "fill with -inf, or combine both masks",
        )
    if not all(prover.absorbs(step.fill, step.dtype) for step in logits.masks):
        raise Refusal(
            "bias_beside_finite_fill",
            "a fill that is not the lowest number masks scores to which a float tensor is added; fill with -inf",
        )
    notes.append(Reason("mask_in_bias", "a float tensor beside a finite fill may mask the rest of a row"))
    biases: list[Bias] = list(logits.biases)
    for step, term in reversed(list(zip(logits.masks, replaced))):
        biases.insert(step.biases_before, MaskTerm(term.operand, term.keeps, step.fill, step.dtype))
    evaluator = prover.make_evaluator(symbols.context)
    closed = prover.classify(evaluator, True, symbols.context)
    mode = _with_sinks(logits, EmptyRows.NAN_ADDED)
    return ProvedMasks(_spec(closed, False, mode), closed, symbols.context, [], biases, notes)


def _check_floor(mode: EmptyRows, terms: list[Term], low_biases: bool, requires_grad: bool) -> None:
    """Raises Refusal unless raising scores to the lowest number changes nothing.

    A key that is masked beside a kept one has probability 0 either way. In a row that keeps none, -inf becomes a
    number, and the gradient of `maximum` is shared between score and number where they are equal.
    """
    if low_biases:
        raise Refusal("floor_of_bias", "a float tensor is added that may hold -inf, which is then raised to a number")
    if mode is EmptyRows.IMPOSSIBLE:
        return
    if not all(term.is_finite for term in terms):
        raise Refusal("floor_of_fills", "a row may keep no key, and its -inf is raised to a number")
    if requires_grad:
        raise Refusal("floor_grad", "a row may keep no key, and maximum() gives its scores half of their gradient")


def _with_sinks(logits: Logits, mode: EmptyRows) -> EmptyRows:
    """What empty rows give where sinks take all the weight; raises Refusal where those only rescale NaN."""
    if logits.sinks is None or mode is EmptyRows.IMPOSSIBLE:
        return mode
    if logits.sinks_rescale and mode in (EmptyRows.NAN, EmptyRows.NAN_ADDED):
        raise Refusal("sinks_after_nan", "a row may keep no key, and its NaN is rescaled by the sinks, not replaced")
    return EmptyRows.ZERO


def _boolean(symbols: Symbols, step: MaskStep, notes: list[Reason]) -> Term:
    index = symbols.index(step.dims, step.shape, step.value)
    prove = prover.prove_keep if step.keeps else prover.prove_drop
    found = symbols.prove(prove, step.value, index)
    form = None if isinstance(found, prover.OpaqueMask) else found
    notes.extend([found.reason] if isinstance(found, prover.OpaqueMask) else found.notes)
    operand = Operand(step.value, aligned(step.dims, step.value))
    return Term(form, (step.fill,), False, operand, step.keeps, moved=step.is_followed_by_bias)


def _take_masks(
    proof: Proof,
    symbols: Symbols,
    logits: Logits,
    notes: list[Reason],
    live: LiveUsers,
    tracks: Callable[[Value], bool],
) -> tuple[list[Operand], list[Term]]:
    """The biases without the masks among them and in them, and these masks."""
    dtype = score_dtype(proof)
    is_alone = len(logits.biases) == 1 and not (logits.masks or logits.is_causal)
    biases: list[Operand] = []
    added: list[Term] = []
    for bias in logits.biases:
        apart: tuple[Operand | None, Term] | None = None
        if (term := _additive(proof, symbols, logits, bias, notes)) is not None:
            apart = None, term
        elif not (bias.rounded_to is not None and logits.bias_cast_after_shift):
            is_hard = partial(prover.is_hard, dtype=bias.added_in or dtype)
            is_small = partial(is_moderate_bias, symbols=symbols, live=live)
            apart = take_apart(bias, symbols, is_hard, is_small, tracks, is_alone)
        rest, term = apart or (bias, None)
        biases += [rest] if rest is not None else []
        added += [term] if term is not None else []
    return biases, added


def _additive(proof: Proof, symbols: Symbols, logits: Logits, bias: Operand, notes: list[Reason]) -> Term | None:
    """A bias that is a mask as a whole, with a closed form; None if it is (also) something else."""
    if bias.factor not in (1, -1) or (bias.rounded_to is not None and logits.bias_cast_after_shift):
        return None
    index = [symbols.of(dim) for dim in bias.dims]
    found = symbols.prove(prover.prove_additive, bias.value, index, subtracted=bias.factor == -1)
    if isinstance(found, prover.OpaqueMask):
        notes.append(found.reason)
        return None
    fills = tuple(rounded(fill, bias.rounded_to or bias.value.dtype) for fill, _ in found.fills)
    if found.keep.residual or not all(prover.is_hard(fill, bias.added_in or score_dtype(proof)) for fill in fills):
        return None
    return Term(found.keep, fills, True, bias, True)


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
        has_attn_mask=has_residual or len(closed.segment_ids) > 1,
        empty_rows=mode,
        text=prover.mask_in_words(closed),
    )
