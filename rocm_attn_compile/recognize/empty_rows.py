"""What a row without keys gives: part of the meaning of a site, see `EmptyRows`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..reasons import Refusal
from ..spec import EmptyRows
from . import mask as prover
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
        # SDPA's kernels add the mask in float32 whatever the inputs are.
        dtype = added[0].operand.added_in or torch.promote_types(score_dtype(proof), torch.float32)
        absorbed = prover.absorbs(fill, dtype) and not low_biases
        return EmptyRows.MEAN_ADDED if absorbed else None
    # A bias added to the fill gets a gradient that the scores do not: no mode says that.
    return None if any(term.moved for term in terms) else EmptyRows.MEAN
