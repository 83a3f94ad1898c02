"""From the softmax forward to the product with V: the weights may be cast, viewed, dropped out, and nothing else.

p = softmax(...)  ->  cast / view / dropout / zeroed empty rows / sink column cut off  ->  p @ v
                        |
                        +-> at one place on the way others may read them, too: they are returned, averaged, printed

Those others then read a second result of the op.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

from ..capture.trace import Value
from ..normalize.softmax import SoftmaxAnchor
from ..reasons import Refusal
from ..symbolic import is_one, same_size, to_expr
from .labels import CONTRACTION_NAMES, is_cast, is_contraction, is_view, number_of, product_under_sum
from .live import LiveUsers


@dataclass(frozen=True, eq=False)
class Zeroing:
    """Weights set to 0; `at` is the value after it.

    Attributes:
        mask: Where; None is nan_to_num.
        keeps: The mask is True (nonzero) where weights are kept.
        is_factor: The weights are multiplied with the mask, a number that must be 0 or 1.
    """

    at: Value
    mask: Value | None = None
    keeps: bool = False
    is_factor: bool = False


@dataclass(eq=False)
class WeightsPath:
    """The way of the weights to their product with V.

    Attributes:
        contraction: The value of p v.
        operand: The factor of the contraction that is the weights.
        values: From the softmax (included) to the operand (included).
        dropout_p: 0.0 if off.
        zeroed: All that sets weights to 0, in order.
        cuts_sink: The column that is sliced off, by `cut_at`: "first", "last" or None.
        returned: The one of `values` that something else reads, too, or None.
        zeroed_in_returned: How many of `zeroed` come before that.
    """

    contraction: Value
    operand: Value
    values: list[Value] = field(default_factory=list)
    dropout_p: float = 0.0
    zeroed: list[Zeroing] = field(default_factory=list)
    cuts_sink: str | None = None
    cut_at: Value | None = None
    returned: Value | None = None
    zeroed_in_returned: int = 0


def follow_weights(anchor: SoftmaxAnchor, live: LiveUsers) -> WeightsPath:
    """The single path from the softmax to p v; raises Refusal if the weights go elsewhere from several places of it."""
    return _follow(WeightsPath(anchor.weights, anchor.weights, [anchor.weights]), anchor, live)


def _follow(path: WeightsPath, anchor: SoftmaxAnchor, live: LiveUsers) -> WeightsPath:
    while path.contraction is anchor.weights:
        value = path.values[-1]
        users, outside = live.readers(value)
        if len(users) > 1 or outside:
            return _branch(path, anchor, live, users)
        if not users:
            raise Refusal("no_value_product", "the softmax result never meets a V: " + live.describe(value))
        _advance(path, anchor, live, users[0])
    return path


def _branch(path: WeightsPath, anchor: SoftmaxAnchor, live: LiveUsers, users: Sequence[Value]) -> WeightsPath:
    """From a place where the weights have several readers, along the one of them that leads to V."""
    value = path.values[-1]
    found: list[WeightsPath] = []
    if path.returned is None and not path.dropout_p:
        for user in users:
            way = copy(path)
            way.values, way.zeroed = list(path.values), list(path.zeroed)
            way.returned, way.zeroed_in_returned = value, len(path.zeroed)
            try:
                _advance(way, anchor, live, user)
                found.append(_follow(way, anchor, live))
            except Refusal:
                continue
    found = [way for way in found if not way.dropout_p]  # the op that gives the weights drops none
    # A sum over the keys, such as an entropy's, is a product with something, too, where there is a matrix product.
    found = [way for way in found if way.contraction.name in CONTRACTION_NAMES] or found
    if len(found) == 1:
        return found[0]
    live.users(value, "weights_used_elsewhere")  # says so if they are returned
    names = ", ".join(sorted({u.name for u in users}))
    raise Refusal("weights_used_elsewhere", f"the attention weights have {len(users)} uses ({names})")


def _advance(path: WeightsPath, anchor: SoftmaxAnchor, live: LiveUsers, user: Value) -> None:
    """One step further, to `user`."""
    value = path.values[-1]
    if is_contraction(user):
        path.contraction, path.operand = user, value
        return
    if user.name == "mul" and not isinstance(user.op, str):
        product = live.users(user, "weights_used_elsewhere")
        if len(product) == 1 and product_under_sum(product[0]) is user:
            path.contraction, path.operand = product[0], value
            return
    if path.returned is not None and user.in_place:
        raise Refusal("weights_used_elsewhere", "the attention weights are read elsewhere, and then written over")
    _step(path, anchor, value, user)
    path.values.append(user)


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
            path.zeroed.append(Zeroing(user))
            return
        if user.name == "masked_fill" and user.args[0] is value and number_of(user.args[2]) == 0:
            path.zeroed.append(Zeroing(user, user.args[1]))
            return
        if user.name == "where" and (zeroing := _where_zero(value, user)) is not None:
            path.zeroed.append(zeroing)
            return
        if user.name == "mul" and (other := _other_of_two(value, user)) is not None:
            path.zeroed.append(Zeroing(user, other, keeps=True, is_factor=True))
            return
        if user.name == "slice" and user.args[0] is value and (column := _cut_column(value, user)) is not None:
            if path.cuts_sink:
                raise Refusal("weights_changed", "the attention weights are sliced twice")
            if any(zeroing.mask is not None for zeroing in path.zeroed):
                raise Refusal("weights_changed", "the attention weights are masked together with a column of sinks")
            path.cuts_sink, path.cut_at = column, user
            return
        if user.name == "detach":
            raise Refusal("weights_detached", "the attention weights are detached from autograd before they meet V")
    if user.op == "opaque":
        raise Refusal("weights_used_elsewhere", f"the attention weights go into {user.place}")
    raise Refusal("weights_changed", f"{user.name} changes the attention weights after the softmax")


def _where_zero(value: Value, user: Value) -> Zeroing | None:
    """`where(mask, p, 0)` or `where(mask, 0, p)`."""
    if len(user.args) != 3:
        return None
    mask, left, right = user.args
    if left is value and number_of(right) == 0:
        return Zeroing(user, mask, keeps=True)
    if right is value and number_of(left) == 0:
        return Zeroing(user, mask, keeps=False)
    return None


def _other_of_two(value: Value, user: Value) -> Value | None:
    """The other factor of a product, if it is a tensor of several numbers."""
    left, right = user.args[:2]
    other = right if left is value else left
    return other if isinstance(other, Value) and other is not value and number_of(other) is None else None


def _nan_becomes_zero(value: Value) -> bool:
    nan = value.args[1] if len(value.args) > 1 else value.kwargs.get("nan")
    return nan is None or nan == 0


def _cut_column(source: Value, value: Value) -> str | None:
    """ "last" if `value = source[..., :-1]` along the last dimension, "first" if `source[..., 1:]`."""
    dim = (value.args[1] if len(value.args) > 1 else 0) % source.ndim
    start = value.args[2] if len(value.args) > 2 else None
    step = value.args[4] if len(value.args) > 4 else 1
    if dim != source.ndim - 1 or not is_one(step) or not same_size(to_expr(value.shape[dim]) + 1, source.shape[dim]):
        return None
    if start is None or same_size(start, 0):
        return "last"
    return "first" if same_size(start, 1) else None
