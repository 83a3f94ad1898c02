"""From the softmax forward to the product with V: the weights may be cast, viewed, dropped out, and nothing else.

p = softmax(...)  ->  cast / view / dropout / zeroed empty rows / sink column cut off  ->  p @ v
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..capture.trace import Value
from ..normalize.softmax import SoftmaxAnchor
from ..reasons import Refusal
from ..symbolic import same_size, to_expr
from .labels import is_cast, is_contraction, is_view, number_of, product_under_sum
from .live import LiveUsers


@dataclass(eq=False)
class WeightsPath:
    """The way of the weights to their product with V.

    Attributes:
        contraction: The value of p v.
        operand: The factor of the contraction that is the weights.
        values: From the softmax (included) to the operand (included).
        dropout_p: 0.0 if off.
        zeroed: How rows without keys become 0: None, "nan_to_num", or the mask Value of a masked_fill(p, mask, 0).
        zeroed_at: The result of that masked_fill, whose axes the mask is aligned with.
        cuts_sink: The last column is sliced off, by `cut_at`.
    """

    contraction: Value
    operand: Value
    values: list[Value] = field(default_factory=list)
    dropout_p: float = 0.0
    zeroed: object = None
    zeroed_at: Value | None = None
    cuts_sink: bool = False
    cut_at: Value | None = None


def follow_weights(anchor: SoftmaxAnchor, live: LiveUsers) -> WeightsPath:
    """The single path from the softmax to p v; raises Refusal if the weights go anywhere else."""
    path = WeightsPath(anchor.weights, anchor.weights, [anchor.weights])
    value = anchor.weights
    while True:
        users = live.users(value, "weights_used_elsewhere")
        if not users:
            raise Refusal("no_value_product", "the softmax result never meets a V: " + live.describe(value))
        if len(users) > 1:
            names = ", ".join(sorted({u.name for u in users}))
            raise Refusal("weights_used_elsewhere", f"the attention weights have {len(users)} uses ({names})")
        user = users[0]
        if is_contraction(user):
            path.contraction, path.operand = user, value
            return path
        if user.name == "mul" and not isinstance(user.op, str):
            product = live.users(user, "weights_used_elsewhere")
            if len(product) == 1 and product_under_sum(product[0]) is user:
                path.contraction, path.operand = product[0], value
                return path
        _step(path, anchor, value, user)
        path.values.append(user)
        value = user


def _step(path: WeightsPath, anchor: SoftmaxAnchor, value: Value, user: Value) -> None:
    if user.op == "dropout":
        p, training = user.args[1], user.args[2]
        if training and p:
            if path.dropout_p:
                raise Refusal("weights_changed", "the attention weights pass two dropouts")
            path.dropout_p = float(p)
        return
    if is_cast(user):
        return
    if not isinstance(user.op, str):
        if user.args[0] is value and (is_view(user) or user.name in ("clone", "contiguous")):
            return
        if user.name == "nan_to_num" and user.args[0] is value and _nan_becomes_zero(user):
            path.zeroed = "nan_to_num"
            return
        if user.name == "masked_fill" and user.args[0] is value and number_of(user.args[2]) == 0:
            if path.zeroed is not None:
                raise Refusal("weights_changed", "the attention weights are set to 0 twice")
            path.zeroed, path.zeroed_at = user.args[1], user
            return
        if user.name == "slice" and user.args[0] is value and _cuts_last(value, user):
            if path.cuts_sink:
                raise Refusal("weights_changed", "the attention weights are sliced twice")
            path.cuts_sink, path.cut_at = True, user
            return
        if user.name == "detach":
            raise Refusal("weights_detached", "the attention weights are detached from autograd before they meet V")
    if user.op == "opaque":
        raise Refusal("weights_used_elsewhere", f"the attention weights go into {user.node}")
    raise Refusal("weights_changed", f"{user.name} changes the attention weights after the softmax")


def _nan_becomes_zero(value: Value) -> bool:
    nan = value.args[1] if len(value.args) > 1 else value.kwargs.get("nan")
    return nan is None or nan == 0


def _cuts_last(source: Value, value: Value) -> bool:
    """True if `value = source[..., :-1]` along the last dimension."""
    dim = (value.args[1] if len(value.args) > 1 else 0) % source.ndim
    start = value.args[2] if len(value.args) > 2 else None
    step = value.args[4] if len(value.args) > 4 else 1
    if dim != source.ndim - 1 or step != 1 or not (start is None or same_size(start, 0)):
        return False
    return same_size(to_expr(value.shape[dim]) + 1, source.shape[dim])
