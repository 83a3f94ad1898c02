"""From the softmax back to q k^T: what was done to the scores on the way, in order.

    scores = mask(bias(cap(scale(q @ k^T))))      each step optional, several of each, views and casts between

The walk names its steps and judges nothing; `attention` composes them and refuses what the op cannot express.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..capture.trace import Value
from ..reasons import Refusal
from ..symbolic import is_one, same_size
from .fills import filled_with
from .labels import cuts_gradient, is_cast, is_contraction, is_view, number_of
from .maximum import maximum_chain


@dataclass(frozen=True, eq=False)
class Step:
    """One thing done to the scores; `at` is the value after it (masks and biases are aligned with its shape).

    kind: "cast", "scale" (number), "tensor_scale" (Value; `invert` divides), "tanh", "bias" (Value, `factor`),
    "mask" (Value, `keeps` polarity, number fill), "shift" (number), "row_shift", "second" (ScorePath),
    "sinks" (Value; `factor` is the axis along which it is one column, the first one if `invert`, else the last; None
    if it rescales the output instead: see `rescale`), "floor" (number that lower scores are raised to), "clamp" (pair
    of numbers or None).
    """

    kind: str
    at: Value
    operand: Any = None
    factor: Any = 1
    keeps: bool = False
    fill: Any = None
    invert: bool = False


@dataclass(eq=False)
class ScorePath:
    """The contraction and the steps from it outwards.

    Attributes:
        contraction: The value of q k^T.
        steps: Inner to outer.
        values: Every value from the contraction (excluded) to the walk's start (included), inner to outer.
    """

    contraction: Value
    steps: list[Step] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)

    @property
    def is_direct(self) -> bool:
        """Only views, casts and scalar factors lie on the path."""
        return all(step.kind in ("scale", "cast") for step in self.steps)


class ScoreWalk:
    """Walks back from softmax inputs. `choice` decides an addition of two matrix products: which one is the score.

    "concat" joins both (MLA: content plus rotary scores), "left"/"right" takes one and treats the other as a bias, but
    "left" a right one to which nothing was added yet; "first" takes the left one always, as where several biases that
    are products are added one after the other (MViT).
    `ambiguous` is set when such an addition was met.
    """

    def __init__(self, choice: str = "concat") -> None:
        self.choice = choice
        self.ambiguous = False
        self._memo: dict[int, ScorePath | Refusal] = {}

    def walk(self, value: Value) -> ScorePath:
        """The path to `value`; raises Refusal with the op that stopped it."""
        found = self._memo.get(value.id)
        if found is None:
            try:
                found = self._walk(value)
            except Refusal as refusal:
                found = refusal
            self._memo[value.id] = found
        if isinstance(found, Refusal):
            raise found
        return ScorePath(found.contraction, list(found.steps), list(found.values))

    def reaches(self, value: Any) -> bool:
        """True if `value` is a score: a contraction lies behind it."""
        if not isinstance(value, Value):
            return False
        try:
            self.walk(value)
            return True
        except Refusal:
            return False

    def _walk(self, value: Value) -> ScorePath:
        if is_contraction(value):
            return self._contraction(value)
        if isinstance(value.op, str):
            if value.op == "dropout" and (value.args[1] == 0 or not value.args[2]):
                return self._through(value, value.args[0])
            hint = "; if that is q k^T, a graph break has cut it off" if value.op == "input" else ""
            kind = repr(value.name)
            if "linear" in value.kwargs:
                kind, hint = "a linear layer", "; one behind q k^T mixes the scores of several heads"
            text = f"the softmax input comes from {kind} at {_where(value)}, not from q k^T{hint}"
            raise Refusal("no_contraction", text)
        if is_view(value):
            return self._through(value, value.args[0])
        if is_cast(value):
            return self._through(value, value.args[0], Step("cast", value))
        handler = getattr(self, f"_{value.name}", None)
        if handler is None:
            raise Refusal("score_op", f"{value.name} between q k^T and softmax has no equal in the attention op")
        return handler(value)

    def _through(self, value: Value, inner: Value, *steps: Step) -> ScorePath:
        path = self.walk(inner)
        path.steps.extend(steps)
        path.values.append(value)
        return path

    def _contraction(self, value: Value) -> ScorePath:
        path = ScorePath(value)
        if value.name in ("baddbmm", "addmm"):
            alpha, beta = value.kwargs.get("alpha", 1), value.kwargs.get("beta", 1)
            if alpha != 1:
                path.steps.append(Step("scale", value, alpha))
            if beta != 0:
                path.steps.append(Step("bias", value, value.args[0], factor=beta))
        return path

    def _mul(self, value: Value) -> ScorePath:
        left, right = value.args[:2]
        for score, other in ((left, right), (right, left)):
            factor = number_of(other)
            if factor is not None and isinstance(score, Value):
                return self._through(value, score, Step("scale", value, factor))
        for score, other in ((left, right), (right, left)):
            if self.reaches(score) and not self.reaches(other):
                return self._through(value, score, Step("tensor_scale", value, other))
        raise Refusal("score_op", "the scores are multiplied by something that is not a scale")

    def _div(self, value: Value) -> ScorePath:
        if value.kwargs.get("rounding_mode"):
            raise Refusal("score_op", "the scores are divided with rounding")
        score, other = value.args[:2]
        factor = number_of(other)
        if factor is not None:
            return self._through(value, score, Step("scale", value, 1.0 / factor if factor != 0 else float("nan")))
        return self._through(value, score, Step("tensor_scale", value, other, invert=True))

    def _neg(self, value: Value) -> ScorePath:
        return self._through(value, value.args[0], Step("scale", value, -1.0))

    def _tanh(self, value: Value) -> ScorePath:
        return self._through(value, value.args[0], Step("tanh", value))

    def _add(self, value: Value) -> ScorePath:
        left, right = value.args[:2]
        alpha = value.kwargs.get("alpha", 1)
        if number_of(right) is not None:
            return self._through(value, left, Step("shift", value, number_of(right)))
        left_is, right_is = self.reaches(left), self.reaches(right)
        if left_is and right_is and alpha == 1:
            return self._sum_of_two(value, left, right)
        if left_is:
            return self._through(value, left, *bias_steps(value, right, alpha))
        if right_is and alpha == 1:
            return self._through(value, right, *bias_steps(value, left, 1))
        return self._through(value, left)

    def _sum_of_two(self, value: Value, left: Value, right: Value) -> ScorePath:
        self.ambiguous = True
        first, second = self.walk(left), self.walk(right)
        if self.choice == "concat" and first.is_direct and second.is_direct:
            return self._through(value, left, Step("second", value, second))
        if self.choice == "right" or (
            self.choice != "first" and first.values and not first.is_direct and second.is_direct
        ):
            return self._through(value, right, Step("bias", value, left))
        return self._through(value, left, Step("bias", value, right))

    def _sub(self, value: Value) -> ScorePath:
        left, right = value.args[:2]
        alpha = value.kwargs.get("alpha", 1)
        if number_of(right) is not None:
            return self._through(value, left, Step("shift", value, number_of(right)))
        if not isinstance(left, Value):
            raise Refusal("score_op", "the scores are subtracted from a number")
        if maximum_chain(right, left):
            return self._through(value, left, Step("row_shift", value, right))
        return self._through(value, left, Step("bias", value, right, factor=-alpha))

    def _maximum(self, value: Value) -> ScorePath:
        """`maximum(scores, finfo.min)`, as XGLM and OPT write it after adding a mask."""
        left, right = value.args[:2]
        for score, other in ((left, right), (right, left)):
            lowest = number_of(other)
            if isinstance(lowest, (int, float)) and isinstance(score, Value):
                return self._through(value, score, Step("floor", value, lowest))
        raise Refusal("score_op", "the scores are compared with another tensor, of which the larger is taken")

    def _clamp(self, value: Value) -> ScorePath:
        lowest = value.args[1] if len(value.args) > 1 else value.kwargs.get("min")
        highest = value.args[2] if len(value.args) > 2 else value.kwargs.get("max")
        lowest, highest = number_of(lowest), number_of(highest) if highest is not None else None
        if not value.dtype.is_floating_point:
            raise Refusal("score_op", f"{str(value.dtype).removeprefix('torch.')} numbers are clamped to a range")
        if highest is None and isinstance(lowest, (int, float)) and lowest <= torch.finfo(value.dtype).min:
            return self._through(value, value.args[0], Step("floor", value, lowest))
        if not all(bound is None or isinstance(bound, (int, float)) for bound in (lowest, highest)):
            raise Refusal("score_op", "the scores are clamped to a range that is not known at compile time")
        return self._through(value, value.args[0], Step("clamp", value, (lowest, highest)))

    _clamp_min = _clamp

    def _masked_fill(self, value: Value) -> ScorePath:
        score, mask, fill = value.args
        number = number_of(fill)
        if number is None:
            raise Refusal("fill_unknown", "masked_fill with a value that is not known at compile time")
        return self._through(value, score, Step("mask", value, mask, keeps=False, fill=number))

    def _where(self, value: Value) -> ScorePath:
        if len(value.args) != 3:
            raise Refusal("score_op", "where with one argument")
        condition, left, right = value.args
        for score, other, keeps in ((left, right, True), (right, left, False)):
            if self.reaches(score):
                # A tensor of the fill must not make the scores wider.
                is_plain = all(map(same_size, score.shape, value.shape)) and score.ndim == value.ndim
                fill = filled_with(other) if is_plain else number_of(other)
                if fill is None and filled_with(other) is not None:
                    raise Refusal("fill_unknown", "where() puts a number in place of scores and makes more of them")
                if fill is None:
                    raise Refusal("fill_unknown", "where() puts a tensor, not a number, in place of masked scores")
                return self._through(value, score, Step("mask", value, condition, keeps=keeps, fill=fill))
        raise Refusal("no_contraction", "neither side of where() comes from q k^T")

    def _copy(self, value: Value) -> ScorePath:
        target, source = value.args[:2]
        if len(target.shape) != len(source.shape):
            raise Refusal("score_op", "copy_ broadcasts the scores")
        return self._through(value, source)

    def _cat(self, value: Value) -> ScorePath:
        pieces, dim = value.args[0], (value.args[1] if len(value.args) > 1 else 0) % value.ndim
        scores = [p for p in pieces if self.reaches(p)]
        if len(pieces) == 2 and len(scores) == 1:
            first = pieces[1] is scores[0]
            column = pieces[0 if first else 1]
            if is_one(column.shape[dim]):
                return self._through(value, scores[0], Step("sinks", value, column, factor=dim, invert=first))
        raise Refusal("score_op", f"scores are concatenated with other scores along dimension {dim}")


def bias_steps(at: Value, bias: Value, factor: Any) -> list[Step]:
    """One step per term of a sum: `scores + (position_bias + mask)` adds a bias and a mask."""
    if is_cast(bias) and bias.args[0].dtype == torch.float32 and bias.dtype == at.dtype == torch.bfloat16:
        whole = bias.args[0]  # of one range: what is infinite in the sum is so in a term
        return bias_steps(at, whole, factor) if len(bias_steps(at, whole, 1)) > 1 else [Step("bias", at, bias, factor)]
    is_sum = bias.name == "add" and not isinstance(bias.op, str) and bias.kwargs.get("alpha", 1) == 1
    # Beside -1e9 the other term vanishes in float32, and would not in float64.
    is_narrow = at.dtype == torch.float64 and bias.dtype != torch.float64
    if is_sum and not is_narrow and not cuts_gradient(bias):
        terms = bias.args[:2]
        if all(isinstance(t, Value) and t.dtype == bias.dtype and number_of(t) is None for t in terms):
            return [step for term in terms for step in bias_steps(at, term, factor)]
    return [Step("bias", at, bias, factor=factor)]


def _where(value: Value) -> str:
    return value.place or "the graph's start"
