"""Values of one site and those in the same places of another, one to one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..capture.questions import Record
from ..capture.trace import Value
from ..reasons import Refusal

Look = tuple[Any, ...]


class Pairing:
    """Grows as answers are compared. `look` gives what a value is, apart from its surroundings: see `look_of`.

    Attributes:
        partner: Value of the one site -> value of the other.
    """

    def __init__(self, look: Callable[[Value], Look]) -> None:
        self.partner: dict[Value, Value] = {}
        self._paired: set[Value] = set()
        self._look = look

    def answers_alike(self, record: Record, reader: Any) -> bool:
        """True if the partners, asked through `reader`, give every answer that is on the record.

        A question to a value that is no partner's came from nowhere, and is answered by none.
        """
        for (ask, *arguments), answer in record.answers.items():
            partners = [self.partner.get(a) if isinstance(a, Value) else a for a in arguments]
            if None in partners or not self.fits(answer, _answer(ask, reader, partners)):
                return False
        # Whatever is done in the order of execution is done in the same order.
        in_order = [self.partner[value].id for value in sorted(self.partner, key=lambda value: value.id)]
        return in_order == sorted(in_order)

    def fits(self, left: Any, right: Any) -> bool:
        """True if two answers are equal but for values, and those are partners, or become partners here."""
        kind = type(left)
        if kind is not type(right):
            return False
        if kind is Value:
            return self._pair(left, right)
        if kind is tuple or kind is list:
            return len(left) == len(right) and all(map(self.fits, left, right))
        if kind is dict:
            return [*left] == [*right] and all(map(self.fits, left.values(), right.values()))
        if kind is Refusal:  # its text has names, see `again`
            return (left.reason.code, left.needs_numbers) == (right.reason.code, right.needs_numbers)
        return left is right or _plain(left) == _plain(right)

    def _pair(self, left: Value, right: Value) -> bool:
        known = self.partner.get(left)
        if known is not None or right in self._paired:
            return known is right
        if left is not right and self._look(left) != self._look(right):
            return False
        self.partner[left] = right
        self._paired.add(right)
        return True


def look_of(value: Value) -> Look:
    """Everything that a value is without its surroundings."""
    look = (value.op, value.output_index, value.dtype, value.device, value.grad_mode, value.in_place)
    return (*look, tuple(map(_plain, value.shape)), tuple(map(_plain, value.stride)))


def _plain(x: Any) -> Any:
    """Two things are the same if these are equal. No guard is added; -0.0 is not 0.0, and nan is nan."""
    kind = type(x)
    if kind is int or kind is torch.device:
        return x
    if kind in (torch.SymInt, torch.SymFloat, torch.SymBool):
        return kind, x.node.expr
    return kind, repr(x) if kind in (bool, float, complex, str) else id(x)


def _answer(ask: Callable[..., Any], reader: Any, arguments: list) -> Any:
    try:
        return ask(reader, *arguments)
    except Refusal as refusal:
        return refusal
