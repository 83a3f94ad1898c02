"""Tell an attention that could not be proved from a softmax that has nothing to do with one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.utils import _pytree as pytree

from ..capture.trace import Value
from .labels import is_contraction

_REACH = 40
"""Values looked at in each direction; attention is a small neighbourhood."""


def stands_between_products(scores: Value, weights: Value) -> bool:
    """True if a matrix product lies behind the scores and another one ahead of the weights."""
    return _reaches(scores, _arguments) and _reaches(weights, lambda value: value.users)


def _arguments(value: Value) -> list[Value]:
    return [a for a in pytree.tree_leaves((list(value.args), value.kwargs)) if isinstance(a, Value)]


def _reaches(start: Value, neighbours: Callable[[Value], Iterable[Value]]) -> bool:
    seen, queue = {start.id}, [start]
    while queue and len(seen) <= _REACH:
        value = queue.pop(0)
        if is_contraction(value):
            return True
        for other in neighbours(value):
            if other.id not in seen:
                seen.add(other.id)
                queue.append(other)
    return False
