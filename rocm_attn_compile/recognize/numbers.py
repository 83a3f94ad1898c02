"""Numbers as a tensor of some dtype holds them."""

from __future__ import annotations

from typing import Any

import torch


def rounded(number: Any, dtype: torch.dtype) -> Any:
    """A Python number as an element of `dtype`: -1e9 is -inf in float16, finfo(float32).min is -inf in bfloat16.

    A symbolic number is returned as it is.
    """
    if not isinstance(number, (bool, int, float)):
        return number
    return torch.tensor(float(number), dtype=torch.float64).to(dtype).item() if dtype.is_floating_point else number


def narrows(source: torch.dtype, target: torch.dtype) -> bool:
    """True if a finite number of `source`, a float type or bool, may be infinite in `target`."""
    return source != torch.bool and torch.finfo(target).max < torch.finfo(source).max
