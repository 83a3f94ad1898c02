"""All that docs/coverage.md is made of: which case in which setting, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from .rows import Row


class Task(NamedTuple):
    """One case in one setting.

    Attributes:
        source: The module that knows the case: "huggingface", "vision" or "others".
        with_peer: Inductor's matcher is run, too.
    """

    source: str
    name: str
    setting: dict[str, Any]
    with_peer: bool


# source, attention, padded, gradients, with_peer
_TIERS = (
    (("huggingface", "eager", True, True, True),),
    (
        ("huggingface", "eager", True, False, False),
        ("huggingface", "sdpa", True, False, False),
        ("others", "eager", False, True, True),
        ("others", "eager", False, False, False),
        ("vision", "eager", False, True, False),
    ),
    (("huggingface", "sdpa", True, True, False),),
    (("vision", "eager", False, False, False), ("vision", "sdpa", False, True, False)),
    (("others", "sdpa", False, True, False), ("huggingface", "eager", False, False, True)),
)
"""All ways to run; if time is short, the later ones are left out."""


def setting_of(attention: str, padded: bool, gradients: bool, lowering: str = "eager") -> dict[str, Any]:
    """As it is in a row."""
    return {"attention": attention, "padded": padded, "gradients": gradients, "lowering": lowering}


def everything(names: dict[str, list[str]], kept: list[Row]) -> list[Task]:
    """Every case in every setting: in each tier what had a problem, then what takes longest; last what is never built.

    Args:
        names: Of the cases, by source.
        kept: Rows of earlier runs, which say how long each takes and what was not replaced.
    """
    longest: dict[str, float] = {}
    troubled = set()
    never_ran = {row["name"] for row in kept} - {row["name"] for row in kept if row["status"] == "run"}
    for row in kept:
        if row["status"] == "run":
            longest[row["name"]] = max(longest.get(row["name"], 0.0), row.get("wall", 0.0))
        if row.get("missed") or not row.get("accuracy", {"ok": True})["ok"] or row["status"] in ("timeout", "died"):
            troubled.add(row["name"])

    def tasks() -> Iterator[tuple[tuple, Task]]:
        for tier, ways in enumerate(_TIERS):
            for source, attention, padded, gradients, with_peer in ways:
                for name in names[source]:
                    if attention == "eager" or not name.startswith("vit-pytorch/"):  # which writes all attention out
                        order = name in never_ran, tier, name not in troubled, -longest.get(name, 0.0)
                        yield order, Task(source, name, setting_of(attention, padded, gradients), with_peer)

    return [task for _, task in sorted(tasks(), key=lambda pair: pair[0])]
