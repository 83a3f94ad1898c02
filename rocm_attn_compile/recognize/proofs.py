"""What was proved is remembered, so that the equal layers of a model are proved once.

A mask's proof depends on how its tensor is computed, on its index and on the sizes, and on nothing else. So it holds
for every tensor that is computed by the same ops from the same tensors: each layer of a model makes its own causal
mask, or all are given one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from ..capture.trace import Value
from ..symbolic import to_expr
from .labels import number_of

_DEPTH_LIMIT = 60
"""A tensor that is computed in more steps is equal to itself only."""

T = TypeVar("T")


class Proofs:
    """Numbers values, equal ones alike, and keeps results by key. Made once per trace."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._by_key: dict[Hashable, int] = {}
        self._results: dict[Hashable, Any] = {}

    def once(self, key: Hashable, prove: Callable[[], T]) -> T:
        """The result for `key`, computed when it is asked for first."""
        if key not in self._results:
            self._results[key] = prove()
        return self._results[key]

    def number(self, value: Value) -> int:
        """The same for two values if they are computed alike from the same values."""
        return self._number(value, 0)

    def _number(self, value: Value, depth: int) -> int:
        if value.id not in self._numbers:
            key = self._key(value, depth)
            self._numbers[value.id] = self._by_key.setdefault(key, value.id)
        return self._numbers[value.id]

    def _key(self, value: Value, depth: int) -> Hashable:
        number = number_of(value) if value.shape == () else None
        if isinstance(number, (bool, int, float)):
            return "number", value.dtype, str(number)
        is_drawn = not isinstance(value.op, str) and torch.Tag.nondeterministic_seeded in value.op.tags
        if isinstance(value.op, str) or is_drawn or "empty" in value.name or depth > _DEPTH_LIMIT:
            return value.id
        leaves, structure = pytree.tree_flatten((list(value.args), value.kwargs))
        parts = [self._part(leaf, depth) for leaf in leaves]
        return value.op, value.output_index, value.dtype, value.device, str(structure), tuple(parts)

    def _part(self, leaf: Any, depth: int) -> Hashable:
        if isinstance(leaf, Value):
            return "value", self._number(leaf, depth + 1)
        if isinstance(leaf, torch.SymInt):
            return "size", to_expr(leaf)
        # 1, 1.0 and True are equal to Python, and other arguments to an op.
        return type(leaf).__name__, str(leaf)
