"""What tuning chose for one call, as text: it is part of the op's `impl` argument, and so of every compile cache's key.

`"forward=128.64.4.2.0.0.1.1.t;backward_q=..."`: per kernel block_m, block_n, num_warps, num_stages, waves_per_eu,
matrix_instr_nonkdim, merged, first_max, and "t" for tensor descriptors or "p" for pointers.
"""

from __future__ import annotations

from dataclasses import astuple

from .configs import KernelConfig

Chosen = tuple[tuple[str, KernelConfig, bool], ...]
"""Per direction (see configs.TABLES, without suffix) a configuration, and whether it reads through descriptors."""


def encode(chosen: Chosen) -> str:
    """The text of a choice."""
    return ";".join(f"{name}={encode_one(config, tma)}" for name, config, tma in chosen)


def decode(text: str) -> Chosen:
    """The inverse of encode.

    Raises:
        ValueError: Not such a text.
    """
    pairs = [item.partition("=") for item in text.split(";")] if text else []
    return tuple((name, *decode_one(numbers)) for name, _, numbers in pairs)


def encode_one(config: KernelConfig, tma: bool) -> str:
    """The text of one configuration."""
    return ".".join([*(str(int(value)) for value in astuple(config)), "t" if tma else "p"])


def decode_one(text: str) -> tuple[KernelConfig, bool]:
    """The inverse of encode_one.

    Raises:
        ValueError: Not such a text.
    """
    *numbers, kind = text.split(".")
    if len(numbers) != 8 or kind not in ("t", "p") or not all(number.isdigit() for number in numbers):
        raise ValueError(f"{text!r} is no launch configuration; need eight numbers and t or p, with dots between them")
    m, n, warps, stages, waves, nonkdim, merged, first = map(int, numbers)
    return KernelConfig(m, n, warps, stages, waves, nonkdim, bool(merged), bool(first)), kind == "t"
