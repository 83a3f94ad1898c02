"""What is put in the place of masked scores, as a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..capture.trace import Value
from .labels import is_cast, is_view, number_of, scaled
from .numbers import rounded


def filled_with(value: Any) -> Any:
    """The number that is every element of an operand, as in `-9e15 * torch.ones_like(scores)`, else None."""
    number = number_of(value)
    if number is not None or not isinstance(value, Value) or isinstance(value.op, str):
        return number
    if value.name in _FILLS:
        number = _FILLS[value.name](value)
    elif is_view(value) or is_cast(value):
        number = filled_with(value.args[0])
    elif step := scaled(value):
        number = filled_with(step[0])
        number = None if number is None else number * step[1]
    return rounded(number, value.dtype)


_FILLS: dict[str, Callable[[Value], Any]] = {
    **dict.fromkeys(("full", "full_like"), lambda value: value.args[1]),
    "new_full": lambda value: value.args[2],
    **dict.fromkeys(("ones", "ones_like", "new_ones"), lambda value: 1.0),
}
