"""All that docs/coverage.md is made of: which case in which setting, and in which order."""

from __future__ import annotations

from collections import defaultdict
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
_WAYS = (
    ("huggingface", "eager", True, True, True),
    ("huggingface", "eager", True, False, False),
    ("huggingface", "sdpa", True, False, False),
    ("huggingface", "sdpa", True, True, False),
    ("vision", "eager", False, True, True),
    ("vision", "eager", False, False, False),
    ("vision", "sdpa", False, True, False),
    ("others", "eager", False, True, True),
    ("others", "eager", False, False, False),
    ("others", "sdpa", False, True, False),
)
_IF_TIME_IS_LEFT = ("huggingface", "eager", False, False, True)


def setting_of(attention: str, padded: bool, gradients: bool, lowering: str = "eager") -> dict[str, Any]:
    """As it is in a row."""
    return {"attention": attention, "padded": padded, "gradients": gradients, "lowering": lowering}


def everything(names: dict[str, list[str]], kept: list[Row]) -> list[Task]:
    """Every case in every setting: first what had a problem, then what takes longest; last what never ran.

    Args:
        names: Of the cases, by source.
        kept: Rows of earlier runs, which say how long each takes and what was not replaced.
    """
    longest: dict[str, float] = defaultdict(float)
    troubled = set()
    for row in kept:
        if row["status"] == "run":
            longest[row["name"]] = max(longest[row["name"]], row.get("wall", 0.0))
        if row.get("missed") or not row.get("accuracy", {"ok": True})["ok"] or row["status"] in ("timeout", "died"):
            troubled.add(row["name"])

    def order(task: Task) -> tuple:
        name = task.name
        return name not in longest, name not in troubled, -longest[name]

    def of(source: str, attention: str, padded: bool, gradients: bool, with_peer: bool) -> list[Task]:
        setting = setting_of(attention, padded, gradients)
        written_out = "vit-pytorch" if attention == "sdpa" else None
        return [Task(source, name, setting, with_peer) for name in names[source] if name.split("/")[0] != written_out]

    first = sorted((task for way in _WAYS for task in of(*way)), key=order)
    return first + sorted(of(*_IF_TIME_IS_LEFT), key=order)
