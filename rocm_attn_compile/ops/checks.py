"""Checks of an op's arguments that hold for sizes that are numbers and for symbolic ones; each raises ValueError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EMPTY_ROWS = ("impossible", "nan", "nan_added", "zero", "mean", "mean_added")
OUT_LAYOUTS = ("bhsd", "bshd")


def check(condition: Any, message: Callable[[], str]) -> None:
    """The condition must hold; a symbolic one becomes a guard."""
    # torch._check costs 1 us; only symbolic conditions need it.
    if condition is not True:
        torch._check_value(condition, message)


def check_shape(name: str, tensor: Tensor, sizes: tuple, broadcast: int = 0) -> None:
    """The shape must be `sizes`, but the first `broadcast` of them may be 1."""
    shape = tensor.shape

    def message() -> str:
        need = ", ".join(f"{size} or 1" if i < broadcast else str(size) for i, size in enumerate(sizes))
        return f"{name} is {tuple(shape)}; need ({need})"

    if len(shape) != len(sizes):
        raise ValueError(message())
    for i, got in enumerate(shape):
        # A static 1 first, so that a symbolic size is not compared (and guarded) without need.
        if not (i < broadcast and isinstance(got, int) and got == 1):
            check(got == sizes[i], message)


def check_dtype(name: str, tensor: Tensor, is_allowed: bool, allowed: str) -> None:
    """`is_allowed`, which is about the tensor's dtype, must hold."""
    if not is_allowed:
        raise ValueError(f"{name} is {tensor.dtype}; need {allowed}")


def check_row_masks(
    batch: Any, q_len: Any, kv_len: Any, key_mask: Tensor | None, kv_start: Tensor | None, kv_end: Tensor | None
) -> None:
    """key_mask must be bool `(B|1, N)`, kv_start and kv_end integers `(B|1, M|1)`."""
    if key_mask is not None:
        check_shape("key_mask", key_mask, (batch, kv_len), broadcast=1)
        check_dtype("key_mask", key_mask, key_mask.dtype == torch.bool, "bool, True keeps")
    for name, bound in (("kv_start", kv_start), ("kv_end", kv_end)):
        if bound is not None:
            check_shape(name, bound, (batch, q_len), broadcast=2)
            check_dtype(name, bound, bound.dtype in INTEGERS, "int32 or int64")


def check_words(empty_rows: str, out_layout: str) -> None:
    """The two settings that are words must be among those that there are."""
    if empty_rows not in EMPTY_ROWS:
        raise ValueError(f"empty_rows is {empty_rows!r}; allowed are {', '.join(EMPTY_ROWS)}")
    if out_layout not in OUT_LAYOUTS:
        raise ValueError(f"out_layout is {out_layout!r}; allowed are {', '.join(OUT_LAYOUTS)}")
