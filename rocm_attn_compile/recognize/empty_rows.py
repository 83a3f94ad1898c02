"""What a row without keys gives: part of the meaning of a site, see `EmptyRows`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..capture.trace import Value
from ..reasons import Refusal
from ..spec import EmptyRows
from ..symbolic import is_one
from . import mask as prover
from .axes import Dim, resolve
from .proof import Proof
from .region import Operand


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

    @property
    def is_finite(self) -> bool:
        """True if a score of -inf elsewhere in the row can be lower than this fill."""
        return not all(math.isinf(fill) for fill in self.fills)


def score_dtype(proof: Proof) -> torch.dtype:
    """The dtype of the scores that the softmax sees."""
    return proof.anchor.args[0].dtype if proof.anchor.op != "sdpa" else proof.q.value.dtype


def aligned(dims: list[Dim], value: Value) -> list[Dim]:
    """The axes of a tensor that is broadcast against a tensor with axes `dims` (aligned right)."""
    offset = len(dims) - value.ndim
    return [() if is_one(size) else dims[offset + i] for i, size in enumerate(value.shape)]


def empty_rows(
    proof: Proof, replaced: list[Term], added: list[Term], closed: prover.ClosedForm, has_bias: bool, low_biases: bool
) -> EmptyRows | None:
    """What a row without keys gives; None if it is nothing the op knows.

    `has_bias`: a tensor stays a bias. `low_biases`: it may be as low as a fill.
    """
    if not proof.shifted and has_bias:
        raise Refusal("unshifted_softmax", "exp / sum without the maximum subtracted is NaN where a bias is very low")
    terms = [*replaced, *added]
    never_empty = closed.every_row_keeps_a_key() and not any(t.form is None for t in terms)
    fills = {fill for t in terms for fill in t.fills}
    is_finite = not all(math.isinf(fill) for fill in fills)
    if not proof.normalized and (low_biases or (is_finite and not never_empty)):
        raise Refusal("logsumexp_of_fills", "exp(x - logsumexp(x)) is 1, not 1/N, in rows of nothing but finite fills")
    if proof.safe and not is_finite:
        return EmptyRows.IMPOSSIBLE if never_empty and not low_biases else EmptyRows.ZERO
    if never_empty:
        return EmptyRows.NAN_ADDED if low_biases else EmptyRows.IMPOSSIBLE
    if not is_finite or not proof.shifted:
        # Without the maximum subtracted, exp underflows to 0 everywhere and 0 / 0 is NaN.
        return EmptyRows.NAN_ADDED if added or low_biases else EmptyRows.NAN
    if len(fills) > 1 or (added and len(terms) > 1):
        return None  # the row is uniform over some of its keys only, or two fills were added up
    (fill,) = fills
    if added:
        absorbed = prover.absorbs(fill, score_dtype(proof)) and not low_biases
        return EmptyRows.MEAN_ADDED if absorbed else None
    # A bias added to the fill gets a gradient that the scores do not: no mode says that.
    return None if any(term.moved for term in terms) else EmptyRows.MEAN


def account_for_zeroed(
    proof: Proof, mode: EmptyRows, closed: prover.ClosedForm, requires_grad: bool, replaced: list[Term]
) -> EmptyRows:
    """Account for weights that were set to 0 after the softmax."""
    is_nan = mode in (EmptyRows.NAN, EmptyRows.NAN_ADDED)
    if proof.zeroed is None:
        return mode
    if proof.zeroed == "nan_to_num":
        if is_nan and requires_grad:
            raise Refusal("masked_rows_grad", "nan_to_num hides NaN rows whose gradient is NaN in eager")
        return EmptyRows.ZERO if is_nan else mode
    if len(replaced) != 1 or replaced[0].operand.value is not proof.zeroed or replaced[0].keeps:
        raise Refusal("weights_changed", "masked_fill(weights, mask, 0) with another mask than that of the scores")
    assert proof.zeroed_at is not None
    where = aligned(proof.labels.of(proof.zeroed_at), proof.zeroed)
    if [resolve(dim) for dim in where] != [resolve(dim) for dim in replaced[0].operand.dims]:
        raise Refusal("weights_changed", "masked_fill(weights, mask, 0) along other axes than those of the scores")
    if closed.predicate is not True and (replaced[0].form is None or closed.predicate != replaced[0].form.predicate):
        raise Refusal("weights_changed", "masked_fill(weights, mask, 0) covers only part of the masks")
    if mode is EmptyRows.IMPOSSIBLE:
        return mode
    if mode is EmptyRows.NAN_ADDED:
        raise Refusal("weights_changed", "masked_fill(weights, mask, 0) does not cover what a float tensor masks")
    if is_nan and requires_grad:
        raise Refusal(
            "masked_rows_grad", "masked rows are set to 0 after the softmax, but their gradient is NaN in eager"
        )
    return EmptyRows.ZERO
