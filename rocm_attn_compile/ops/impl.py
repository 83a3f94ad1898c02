"""The op's `impl` argument: `"<backend>@<hash>~<what tuning chose>+inline"`; all but the backend may be absent.

The hash stands for everything the result may depend on (backends/fingerprint.py); nothing reads it but compile caches.
What tuning chose is the backend's own text, so a graph that a cache on disk holds runs with what it was compiled with.
"""

from __future__ import annotations

from typing import NamedTuple

MARK = "+inline"
"""What an `impl` argument ends with if the op is to be written out while a graph is traced."""


class Impl(NamedTuple):
    """The parts that are read."""

    backend: str
    tuned: str
    inline: bool


def parse(impl: str) -> Impl:
    """Take an `impl` argument apart."""
    text = impl.removesuffix(MARK)
    head, _, tuned = text.partition("~")
    return Impl(head.partition("@")[0], tuned, text != impl)


def with_tuning(impl: str, tuned: str) -> str:
    """The same argument with what tuning chose."""
    text = impl.removesuffix(MARK)
    assert "~" not in text, impl
    return f"{text}~{tuned}" + (MARK if text != impl else "")
