"""Sinks that are applied after the product with V, from the logsumexp of the scores.

    (softmax(scores) @ v) * sigmoid(logsumexp(scores) - sink)

sigmoid(lse - a) = exp(lse) / (exp(lse) + exp(a)): the softmax with one more logit, a, in its sum. Granite's models with
sliding windows write it so.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..capture.trace import Value
from ..normalize.softmax import SoftmaxAnchor
from ..reasons import Refusal
from ..symbolic import is_one, same_size
from .axes import resolve
from .labels import Labels, is_cast, is_exact_cast, is_view
from .live import LiveUsers
from .scores import ScorePath, Step
from .weights import WeightsPath

_CODE = "scores_used_elsewhere"


@dataclass(eq=False)
class Rescale:
    """The way from the logsumexp to the product that rescales the output.

    Attributes:
        lse: logsumexp of the scores over the softmax axis.
        shifted: `lse - sinks`, behind views and casts of `lse`.
        sinks: What is subtracted.
        factor: The factor of the output: sigmoid(shifted), behind views and casts.
        output: The rescaled output.
        values: All values of both ways, `output` included.
    """

    lse: Value
    shifted: Value
    sinks: Value
    factor: Value
    output: Value
    values: list[Value]

    @property
    def step(self) -> Step:
        """The sinks as a step of the scores that adds no column."""
        return Step("sinks", self.shifted, self.sinks, factor=None)


def find_rescale(anchor: SoftmaxAnchor, path: ScorePath, weights: WeightsPath, live: LiveUsers) -> Rescale | None:
    """The rescaling of this attention's output, or None; the axes are proved by `label_rescale`."""
    scores = [anchor.scores]
    if is_exact_cast(anchor.scores):
        scores.append(anchor.scores.args[0])
    found = [user for value in scores for user in live.users(value, _CODE) if user.name == "logsumexp"]
    if len(found) != 1 or [dim % anchor.scores.ndim for dim in found[0].args[1]] != [anchor.dim % anchor.scores.ndim]:
        return None
    lse = found[0]
    values = [lse]
    shifted = _next(lse, values, live)
    if shifted is None or shifted.name != "sub" or shifted.kwargs.get("alpha", 1) != 1:
        return None
    left, sinks = shifted.args[:2]
    if left is not values[-2] or not isinstance(sinks, Value) or sinks.ndim != shifted.ndim:
        return None
    sigmoid = _next(shifted, values, live)
    if sigmoid is None or sigmoid.name != "sigmoid":
        return None
    product = _next(sigmoid, values, live)
    factor = values[-2]
    of_output: list[Value] = [weights.contraction]
    if product is None or product.name != "mul" or _next(weights.contraction, of_output, live) is not product:
        return None
    if {id(value) for value in product.args[:2]} != {id(factor), id(of_output[-2])}:
        return None
    return Rescale(lse, shifted, sinks, factor, product, [*values[:-1], *of_output[1:]])


def _next(value: Value, values: list[Value], live: LiveUsers) -> Value | None:
    """The only user behind views and casts, which are appended to `values` with it; None if there are several."""
    while True:
        users = live.users(value, _CODE)
        if len(users) != 1 or isinstance(users[0].op, str):
            return None
        values.append(users[0])
        if not (is_view(users[0]) or is_cast(users[0])) or users[0].args[0] is not value:
            return users[0]
        value = users[0]


def label_rescale(labels: Labels, rescale: Rescale, anchor: SoftmaxAnchor) -> None:
    """Label both ways and the rescaled output; raises Refusal if the factor lies along other axes than the output."""
    dims = list(labels.of(anchor.scores))
    axis = anchor.dim % len(dims)
    keepdim = len(rescale.lse.args) > 2 and rescale.lse.args[2]
    dims[axis : axis + 1] = [()] if keepdim else []
    labels.set(rescale.lse, dims)
    for value in (rescale.shifted, _sigmoid(rescale)):
        source = value.args[0]
        if not all(same_size(a, b) for a, b in zip(value.shape, source.shape)) or value.ndim != source.ndim:
            raise Refusal(_CODE, "the logsumexp of the scores is broadcast before it rescales the output")
        labels.set(value, labels.of(source))
    out = next(v for v in rescale.output.args[:2] if v is not rescale.factor)
    wide = labels.of(out)
    offset = len(wide) - rescale.factor.ndim
    same = offset >= 0 and all(
        is_one(size) or resolve(dim) == resolve(wide[offset + i])
        for i, (dim, size) in enumerate(zip(labels.of(rescale.factor), rescale.factor.shape))
    )
    if not same:
        raise Refusal(_CODE, "the logsumexp of the scores rescales the output along other axes than its own")
    labels.set(rescale.output, wide)


def _sigmoid(rescale: Rescale) -> Value:
    return next(value for value in rescale.values if value.name == "sigmoid")
