"""Exponentials over a sum of exponentials that is not theirs: near a softmax, and none.

e / (1 + e.sum(d))        a softmax with one more score of 0 (softmax-plus-one)
e * mask / (e * mask).sum(d)       rows without a key are 0 / 0, or what is added to the sum
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils import _pytree as pytree

from ..capture.trace import Trace, Value
from .softmax import SoftmaxAnchor

_REACH = 12
_POINTWISE = frozenset(
    ["add", "sub", "mul", "masked_fill", "where", "clamp", "clamp_min", "maximum", "_to_copy", "unsqueeze", "expand"]
)


def find_quotients(trace: Trace, known: list[SoftmaxAnchor]) -> Iterator[tuple[Value, Value]]:
    """`(quotient, exponential)` of each that is no softmax of `known`."""
    softmaxes = {anchor.weights.id for anchor in known}
    for value in trace.values:
        if isinstance(value.op, str) or value.id in softmaxes or value.name not in ("div", "mul"):
            continue
        above, below = value.args[:2]
        if value.name == "mul":
            above, below = (above, below) if _is_reciprocal(below) else (below, above)
            if not _is_reciprocal(below):
                continue
            below = below.args[0]
        if isinstance(above, Value) and isinstance(below, Value):
            sums = [one for one in _sources(below) if one.name == "sum"]
            summed = {one.id for total in sums for one in _sources(total.args[0])}
            exponential = next((one for one in _sources(above) if one.name == "exp" and one.id in summed), None)
            if exponential is not None:
                yield value, exponential


def _is_reciprocal(value: object) -> bool:
    return isinstance(value, Value) and not isinstance(value.op, str) and value.name == "reciprocal"


def _sources(value: Value) -> Iterator[Value]:
    """The value, and what it is computed from element by element: the first that are not are still named."""
    seen, queue = {value.id}, [value]
    while queue and len(seen) <= _REACH:
        value = queue.pop(0)
        if isinstance(value.op, str):
            continue
        yield value
        if value.name in _POINTWISE:
            for one in pytree.tree_leaves(list(value.args)):
                if isinstance(one, Value) and one.id not in seen:
                    seen.add(one.id)
                    queue.append(one)
