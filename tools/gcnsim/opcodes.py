"""Which instructions the simulator implements, and which of them a run of the tests executed: `make opcodes`.

With GCNSIM_OPCODES set to a folder, every process writes the mnemonics that it executes to a file there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .build import mnemonics

_seen: set[str] = set()


def record(names: Iterable[str]) -> None:
    """Note mnemonics as executed, if asked to by the environment."""
    folder = os.environ.get("GCNSIM_OPCODES")
    if not folder or not (new := set(names) - _seen):
        return
    _seen.update(new)
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / f"{os.getpid()}.txt", "a") as file:
        file.write("".join(f"{name}\n" for name in sorted(new)))


def report(folder: Path) -> str:
    """All implemented mnemonics by group, those not executed in brackets; several names may be one function."""
    executed = {name for path in folder.glob("*.txt") for name in path.read_text().split()}
    groups: dict[str, list[str]] = {}
    for name in sorted(mnemonics()):
        prefix = name.split("_")[0]
        groups.setdefault(prefix if prefix != "v" or name[:4] != "v_cm" else "v_cmp", []).append(name)
    lines = [f"{len(executed & mnemonics())} of {len(mnemonics())} implemented mnemonics were executed"]
    lines.append(f"without effect in the simulator: {' '.join(sorted(executed - mnemonics()))}")
    for prefix, names in groups.items():
        lines.append(f"\n{prefix}: {sum(name in executed for name in names)} of {len(names)}")
        lines.append(" ".join(name if name in executed else f"[{name}]" for name in names))
    return "\n".join(lines)
