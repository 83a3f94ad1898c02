"""Scores that are clamped to a range after their largest was subtracted, as in Grounding DINO.

    s = q k^T;  s = clamp(s - s.max(), -50000, 50000)         max over the whole tensor
    t = s^T;    t = clamp(t - t.max(-1), -50000, 50000)       the other direction clamps twice

Nothing is above 0 once its maximum is subtracted: the upper bound does nothing. The lower one raises scores to a
number below the largest of all, `AttentionSpec.score_floor`; the gradient of that number goes to the largest score.
Then nothing is below that bound, nor is it once the maximum of a row, which is 0 or less, is subtracted as well: a
second clamp to no higher a bound does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..capture.trace import Value
from ..reasons import Refusal
from .maximum import is_of_all, maximum_chain
from .scores import Step


def fold_clamp(steps: Sequence[Step], step: Step, score_floor: float | None) -> float | None:
    """The `score_floor` after one more clamp; raises Refusal where the clamp has no equal.

    `compose` has checked of the subtracted maximum that it includes each score's own row.
    """
    lowest, highest = step.operand
    shift = _shift_before(steps, step)
    if shift is None:
        raise Refusal("score_op", "the scores are clamped to a range")
    if highest is not None and not highest >= 0:
        raise Refusal("score_op", f"scores without their maximum are clamped to at most {highest:g}, which is below 0")
    if lowest is None:
        return score_floor
    if not lowest < 0:
        raise Refusal("score_op", f"scores without their maximum are clamped to at least {lowest:g}")
    if score_floor is not None:
        if not lowest <= score_floor:
            raise Refusal("score_op", f"scores are clamped to at least {score_floor:g}, and again to {lowest:g}")
        return score_floor
    scores: Value = shift.at.args[0]
    chain = maximum_chain(shift.operand, scores)
    if not is_of_all(chain, scores):
        raise Refusal("score_op", "scores are clamped to a range below the maximum of a row, or of a part of all rows")
    if scores.grad_mode and any(value.name == "detach" or not value.grad_mode for value in chain):
        raise Refusal("mixed_grad_mode", "scores are clamped to a range below a maximum that gets no gradient of it")
    return float(lowest)


def _shift_before(steps: Sequence[Step], step: Step) -> Step | None:
    """The subtraction of a maximum right before the clamp, or None."""
    before = steps[: next(i for i, other in enumerate(steps) if other is step)]
    return before[-1] if before and before[-1].kind == "row_shift" else None
