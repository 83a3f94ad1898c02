"""What was proved is remembered, so that a mask is proved once, however many sites it serves.

A mask's proof depends on how its tensor is computed, on its index and on the sizes, and on nothing else. So it holds
for every tensor that is computed by the same ops from the same tensors: each layer of a model makes its own causal
mask, or all are given one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from ..capture.questions import Questions, Record
from ..capture.trace import Value
from ..symbolic import to_expr
from .labels import number_of

_DEPTH_LIMIT = 60
"""A tensor that is computed in more steps is equal to itself only."""

T = TypeVar("T")


class Proofs:
    """Knows values that are computed alike, and keeps results by key. Made once per trace."""

    def __init__(self, questions: Questions) -> None:
        self._questions = questions
        self._first: dict[int, Value] = {}
        self._by_key: dict[Hashable, Value] = {}
        self._results: dict[Hashable, tuple[Any, Record]] = {}

    def once(self, key: Hashable, prove: Callable[[], T]) -> T:
        """The result for `key`, computed when it is asked for first; what was asked then is asked again."""
        if key not in self._results:
            with self._questions.recorded() as record:
                result = prove()
            self._results[key] = result, record
        result, record = self._results[key]
        if self._questions.record is not None:
            self._questions.record.add(record)
        return result

    def first(self, value: Value) -> Value:
        """The same for two values if they are computed alike from the same values: the one that was asked for first.

        What it reads is on no record: see `LiveUsers.first_alike`.
        """
        with self._questions.unrecorded():
            return self._first_alike(value, 0)

    def _first_alike(self, value: Value, depth: int) -> Value:
        if value.id not in self._first:
            key = self._key(value, depth)
            self._first[value.id] = self._by_key.setdefault(key, value)
        return self._first[value.id]

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
            return "value", self._first_alike(leaf, depth + 1).id
        if isinstance(leaf, torch.SymInt):
            return "size", to_expr(leaf)
        # 1, 1.0 and True are equal to Python, and other arguments to an op.
        return type(leaf).__name__, str(leaf)
