"""Sizes that are symbols: one program that PyTorch compiles for many of them.

A plan (forward_launch.py and its like) then asks of a size one of three things. What a kernel is given, and how many
programs there are, is computed with the symbol. What is only faster or slower, such as a tile, follows the value that
the symbol has in the call that is compiled (`Tuning.hint`); it must be right for any other value, too. What has to hold
for all of them, such as an alignment, counts only where it is `known`. An ordinary `if` would make PyTorch guard on the
answer, and compile again where it changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Hint = Callable[[Any], int]
"""From a number to its value in the call at hand; `int` where there are no symbols."""


def has_symbols(hint: Hint) -> bool:
    """Whether sizes of the call at hand may be symbols."""
    return hint is not int


def known(condition: bool | torch.SymBool) -> bool:
    """Whether it holds whatever the symbols in it are. An ordinary condition is itself."""
    if not isinstance(condition, torch.SymBool):
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


LATER = 2048
"""What a length is at least planned for while it is a symbol: caches grow, and the second prompt may be a short one."""


def likely(length: Any, hint: Hint) -> int:
    """A length for choices that are only faster or slower."""
    return length if is_number(length) else max(hint(length), LATER)


def is_number(*values: Any) -> bool:
    """False if one of them is a symbol."""
    return not any(isinstance(value, torch.SymInt) for value in values)


def clamped(number: Any, least: Any, most: Any) -> Any:
    """The number, or `least` or `most`, if it is outside of them; of symbols a symbol."""
    return torch.sym_max(least, torch.sym_min(number, most))


def remembering(function: Any, hint: Hint) -> Any:
    """A function decorated with functools.cache, or what it decorates: symbols cannot be looked up."""
    return function.__wrapped__ if has_symbols(hint) else function
