"""Tables and plots of docs/performance.md from the CSV of benchmarks/attention.py.

    python benchmarks/report.py [benchmarks/results/nvidia-h200-attention.csv]

Replaces what stands between the markers in docs/performance.md, and writes docs/plots/*.svg (needs matplotlib).
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("ours", "cudnn", "flash", "flex", "efficient", "eager")
TITLES = {"ours": "ours", "cudnn": "cuDNN", "flash": "FlashAttention-2", "flex": "FlexAttention",
          "efficient": "SDPA efficient", "eager": "eager"}  # fmt: skip
Results = dict[tuple[str, str], dict[str, dict[str, str]]]
"""(case, pass) -> peer -> row of the CSV, in the order measured."""


def read(path: Path) -> Results:
    """The CSV's rows, grouped."""
    found: Results = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            found.setdefault((row["case"], row["pass"]), {})[row["peer"]] = row
    return found


def is_decode(row: dict[str, str]) -> bool:
    """Whether the case is one of a few queries, for which bandwidth counts."""
    return int(row["M"]) <= 16


def speed(rows: dict[str, dict[str, str]], peer: str) -> float | None:
    """TFLOP/s, or GB/s of decode; None where the peer cannot or was wrong."""
    if peer not in rows or rows[peer]["ms"] == "nan":
        return None
    return float(rows[peer]["gb_per_s" if is_decode(rows[peer]) else "tflops"])


def table(results: Results, decode: bool) -> str:
    """One Markdown table of speeds."""
    unit = "GB/s" if decode else "TFLOP/s"
    lines = [f"| case (B, H, K, M, N, D/E) | pass | ours, ms | {' | '.join(f'{TITLES[p]}, {unit}' for p in PEERS)} |",
             "| --- | --- |" + " ---: |" * (len(PEERS) + 1)]  # fmt: skip
    for (case, direction), rows in results.items():
        mine = rows["ours"]
        if is_decode(mine) != decode:
            continue
        sizes = (
            ", ".join(mine[x] for x in "BHKMN") + f", {mine['D']}" + (f"/{mine['E']}" if mine["E"] != mine["D"] else "")
        )
        cells = [f"{s:.0f}" if (s := speed(rows, peer)) is not None else "" for peer in PEERS]
        lines.append(f"| {case} ({sizes}) | {direction} | {float(mine['ms']):.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: Results, name: str, decode: bool, direction: str, dark: bool) -> None:
    """Bars of the issue's rows, one group per case."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    prefix = "decode" if decode else "table"
    chosen = [(case, rows) for (case, d), rows in results.items() if case.startswith(prefix) and d == direction]
    peers = [peer for peer in PEERS[:4] if any(speed(rows, peer) for _, rows in chosen)]
    with pyplot.style.context(["dark_background" if dark else "default", {"svg.hashsalt": name}]):  # reproducible files
        figure, axes = pyplot.subplots(figsize=(10, 4))
        for index, peer in enumerate(peers):
            at = [i + (index - (len(peers) - 1) / 2) * 0.8 / len(peers) for i in range(len(chosen))]
            axes.bar(at, [speed(rows, peer) or 0 for _, rows in chosen], 0.8 / len(peers), label=TITLES[peer])
        labels = [", ".join(rows["ours"][x] for x in ("B", "H", "K", "N", "D")) for _, rows in chosen]
        axes.set_xticks(range(len(chosen)), labels, rotation=20, ha="right", fontsize=8)
        axes.set_ylabel("GB/s of the cache" if decode else f"TFLOP/s {direction}")
        axes.set_xlabel("batch, heads, key/value heads, length, head size", fontsize=8)
        axes.legend(fontsize=8, ncols=len(peers), loc="upper center", bbox_to_anchor=(0.5, 1.12), frameon=False)
        figure.tight_layout()
        target = ROOT / "docs" / "plots" / f"{name}-{'dark' if dark else 'light'}.svg"
        target.parent.mkdir(exist_ok=True)
        figure.savefig(target, transparent=True, metadata={"Date": None})
        pyplot.close(figure)


def main() -> None:
    """Write the tables and the plots."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "results" / "nvidia-h200-attention.csv"
    results = read(path)
    page = ROOT / "docs" / "performance.md"
    text = page.read_text()
    for name, decode in (("prefill", False), ("decode", True)):
        block = f"<!-- {name} -->\n{table(results, decode)}\n<!-- end {name} -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- end {name} -->", lambda _, block=block: block, text, flags=re.DOTALL)
    page.write_text(text)
    for dark in (False, True):
        plot(results, "forward", False, "forward", dark)
        plot(results, "backward", False, "backward", dark)
        plot(results, "decode", True, "forward", dark)


if __name__ == "__main__":
    main()
