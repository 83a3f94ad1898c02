"""What is kept of one case: counts, reasons and errors, small enough for the repository."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SETTING = ("attention", "padded", "gradients", "lowering")


def recogniser() -> str:
    """A digest of the stages that decide what is replaced, and by what: rows of one digest are of one state."""
    import rocm_attn_compile

    package = Path(rocm_attn_compile.__file__).parent
    files = [
        path for stage in ("capture", "normalize", "recognize", "rewrite") for path in (package / stage).rglob("*.py")
    ]
    text = "".join(f"{path.relative_to(package)}\n{path.read_text()}" for path in sorted(files))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def read(path: Path) -> list[Row]:
    """Rows of a file, oldest first."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def newest(rows: list[Row], state: str = "") -> list[Row]:
    """One row of each case in each setting.

    One that ran wins over one that did not; then one by the recogniser `state`; then one with the peer; then the newest
    torch; then the last.
    """
    found: dict[tuple, Row] = {}
    for row in rows:
        key = (row["name"], *(row[part] for part in SETTING))
        if key not in found or _rank(row, state) >= _rank(found[key], state):
            found[key] = row
    return list(found.values())


def _rank(row: Row, state: str) -> tuple:
    torch = [int(number) for number in re.findall(r"\d+", row.get("versions", {}).get("torch", ""))[:2]]
    return row["status"] == "run", row.get("recogniser") == state, "peer_graphs" in row, torch


def compact(result: Row) -> Row:
    """A result of `judge` with the sites of each line settled.

    `softmax`, `sdpa` and their `_replaced` count sites; `missed` has [line, sites, code, text] of those not replaced;
    `extra` counts replaced sites that the watch did not take for attention.
    """
    kept = {
        key: result[key]
        for key in ("name", *SETTING, "versions", "recogniser", "status", "class", "error")
        if key in result
    }
    if result["status"] != "run":
        return kept | {"error": _short_path(str(result.get("error", "")))[:300]}
    replaced = Counter(result.get("replaced", {}))
    reasons = {line: (code, text) for line, code, text, _ in result.get("refused", [])}
    missed = []
    for kind in ("softmax", "sdpa"):
        seen = result[kind]
        kept[kind], kept[f"{kind}_replaced"] = sum(seen.values()), 0
        for line, count in seen.items():
            taken = min(count, replaced[line])
            replaced[line] -= taken
            kept[f"{kind}_replaced"] += taken
            if taken < count:
                code, text = reasons.get(line, _why_unseen(result))
                missed.append([_short_path(line), count - taken, code, _short_path(text)])
    kept |= {"missed": missed, "extra": replaced.total()}
    kept |= {key: result[key] for key in ("graphs", "peer_graphs", "peer_fused", "wall") if key in result}
    for key in ("accuracy", "peer_accuracy", "control_accuracy"):
        if key in result:
            kept[key] = {k: v for k, v in result[key].items() if k != "text" or v}
    return kept | {key: _short_path(text)[:300] for key, text in result.items() if key.endswith("_error")}


def _why_unseen(result: Row) -> tuple[str, str]:
    if "ours_error" in result:
        return "not_compiled", f"Dynamo or the program fails under torch.compile: {result['ours_error']}"[:300]
    return "not_in_a_graph", "the code runs outside every graph: Dynamo does not trace it"


def _short_path(text: str) -> str:
    return re.sub(r"/[^ :]*/(?=(transformers|timm|vit_pytorch|x_transformers|diffusers|torch)/)", "", text)
