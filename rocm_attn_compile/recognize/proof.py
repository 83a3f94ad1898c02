"""What an anchor (softmax or SDPA) yields before roles are assigned: labelled tensors and a list of steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..capture.trace import Value
from .axes import Dim
from .labels import Labels
from .scores import Step
from .weights import Zeroing


@dataclass(eq=False)
class Factor:
    """A factor of a contraction, and the labels in which this use of it is known."""

    value: Value
    labels: Labels


@dataclass(eq=False)
class Proof:
    """One attention with its axes labelled.

    Attributes:
        anchor: The softmax or "sdpa" value.
        output: The value of p v, labelled.
        labels: Labels of the scores, the weights and the output.
        q, k, v: Factors of the two contractions.
        second: Further (q, k, factor) whose product is added to q k^T before the first step.
        score_dims: Axes of the softmax input.
        key: The softmax axis.
        depth: The axis contracted by q k^T.
        query_free: Axes that only the q factor brings into q k^T, in its order.
        steps: What is done to the scores, inner to outer.
        operand_labels: id(step) -> labels of the step's tensor for this use.
        shifted: The softmax subtracts the row maximum (else underflow makes empty rows NaN).
        normalized: See SoftmaxAnchor.
        safe: Rows of -inf give 0.
        zeroed: See WeightsPath.
        returned: The value of the weights that something else reads, too, or None; `zeroed_in_returned` says how many
            of `zeroed` come before that.
        dropout_p: Dropout of the weights.
        shared: Other softmaxes of the same scores.
        values: All values of the site.
    """

    anchor: Value
    output: Value
    labels: Labels
    q: Factor
    k: Factor
    v: Factor
    score_dims: list[Dim]
    key: Dim
    depth: Dim
    query_free: Dim
    second: list[tuple[Factor, Factor, Any, Dim]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    operand_labels: dict[int, Labels] = field(default_factory=dict)
    shifted: bool = True
    normalized: bool = True
    safe: bool = False
    zeroed: list[Zeroing] = field(default_factory=list)
    returned: Value | None = None
    zeroed_in_returned: int = 0
    dropout_p: float = 0.0
    cuts_sink: str | None = None
    shared: list[Value] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)

    def factors(self) -> list[Factor]:
        """q, k, v and the factors of further products."""
        return [self.q, self.k, self.v, *[t for q, k, _, _ in self.second for t in (q, k)]]

    def labels_of(self, step: Step) -> Labels:
        """The labels in which the step's tensor is known."""
        return self.operand_labels.get(id(step), self.labels)
