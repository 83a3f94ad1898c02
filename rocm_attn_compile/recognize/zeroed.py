"""Weights set to 0 after the softmax: allowed where that changes nothing but rows that keep no key.

    softmax(masked scores).masked_fill(drop, 0)         softmax(masked scores) * keep         nan_to_num(softmax(...))

Beside a kept key, what the scores' masks drop has weight exactly 0 already. So a mask that drops only what they drop
changes nothing in such a row; to empty rows it gives 0 if it drops all that they drop.

The gradient of an empty row of -inf is NaN behind the softmax. Where -inf took the place of the scores it ends there:
`masked_fill` and `where` give a replaced score no gradient. Where it was added, or a bias was added later, it goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..capture.trace import Value
from ..reasons import Refusal
from ..spec import EmptyRows
from . import mask as prover
from .axes import resolve
from .labels import aligned
from .proof import Proof
from .weights import Zeroing

if TYPE_CHECKING:
    from .empty_rows import Term
    from .symbols import Symbols


def account_for_zeroed(
    proof: Proof,
    zeroed: Sequence[Zeroing],
    symbols: Symbols,
    mode: EmptyRows,
    closed: prover.ClosedForm,
    terms: list[Term],
    requires_grad: bool,
    low_biases: bool,
) -> EmptyRows:
    """What empty rows give after `zeroed`, which sets weights to 0.

    Args:
        mode: What they give right after the softmax.
        closed: The conjunction of the closed forms of `terms`, the scores' masks.
        requires_grad: A gradient flows through the site.
        low_biases: A tensor that stays a bias may mask as well.

    Raises:
        Refusal: More than empty rows may change, or an empty row's gradient would.
    """
    for zeroing in zeroed:
        if zeroing.mask is None:
            if mode in (EmptyRows.NAN, EmptyRows.NAN_ADDED):
                if requires_grad and not _nan_ends_at_the_mask(proof, mode, terms):
                    raise Refusal("masked_rows_grad", "nan_to_num hides NaN rows whose gradient is NaN in eager")
                mode = EmptyRows.ZERO
            continue
        drops_all = _drops_what_the_scores_drop(proof, symbols, zeroing, closed, terms)
        if mode in (EmptyRows.IMPOSSIBLE, EmptyRows.ZERO):
            continue
        is_nan = mode in (EmptyRows.NAN, EmptyRows.NAN_ADDED)
        if is_nan and (zeroing.is_factor or (closed.every_row_keeps_a_key() and not _opaque(terms))):
            continue  # 0 times NaN is NaN; NaN that is not a mask's but a bias's is also on keys that stay
        if is_nan and low_biases:
            raise Refusal("weights_changed", "a mask after the softmax does not cover what a float tensor masks")
        if not drops_all:
            raise Refusal("weights_changed", "a mask after the softmax covers only part of the masks before it")
        if is_nan and requires_grad and not _nan_ends_at_the_mask(proof, mode, terms):
            raise Refusal(
                "masked_rows_grad", "masked rows are set to 0 after the softmax, but their gradient is NaN in eager"
            )
        mode = EmptyRows.ZERO
    return mode


def _nan_ends_at_the_mask(proof: Proof, mode: EmptyRows, terms: list[Term]) -> bool:
    """True if no score or bias gets the NaN gradient of an empty row."""
    # A maximum over several rows, subtracted by hand, carries it into the others.
    is_by_row = proof.anchor.name in ("_softmax", "exp") and not any(s.kind == "row_shift" for s in proof.steps)
    return mode is EmptyRows.NAN and is_by_row and not any(term.moved for term in terms)


def _drops_what_the_scores_drop(
    proof: Proof, symbols: Symbols, zeroing: Zeroing, closed: prover.ClosedForm, terms: list[Term]
) -> bool:
    """Whether the zeroing mask drops exactly what the scores' masks do; raises Refusal if it drops more."""
    assert zeroing.mask is not None
    value, keeps, dims = zeroing.mask, zeroing.keeps, proof.labels.of(zeroing.at)
    opaque = _opaque(terms)
    if not zeroing.is_factor and len(terms) == len(opaque) == 1:
        (term,) = terms
        same_axes = [*map(resolve, term.operand.dims)] == [*map(resolve, aligned(dims, value))]
        (before, keeps_before), (after, keeps_after) = (
            _positive(term.operand.value, term.keeps),
            _positive(value, keeps),
        )
        if same_axes and keeps_before == keeps_after and symbols.are_equal(before, after):
            return True
    prove = prover.prove_zero_one if zeroing.is_factor else prover.prove_keep if keeps else prover.prove_drop
    kept = symbols.prove(prove, value, symbols.index(dims, zeroing.at.shape, value))
    if isinstance(kept, prover.OpaqueMask):
        raise Refusal("weights_changed", f"the attention weights are masked after the softmax by {kept.reason.text}")
    logic = prover.make_evaluator(symbols.context).logic
    if logic.all_of([closed.predicate, kept.predicate]) != closed.predicate:
        raise Refusal("weights_changed", "a mask after the softmax sets weights to 0 that the scores' masks keep")
    return not opaque and kept.predicate == closed.predicate


def _opaque(terms: list[Term]) -> list[Term]:
    return [term for term in terms if term.form is None]


def _positive(mask: Value, keeps: bool) -> tuple[Value, bool]:
    """The mask behind negations, and whether it keeps where it is True."""
    while (
        mask.name in ("bitwise_not", "logical_not")
        and not isinstance(mask.op, str)
        and mask.args[0].dtype == torch.bool
    ):
        mask, keeps = mask.args[0], not keeps
    return mask, keeps
