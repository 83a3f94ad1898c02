"""Attention in models that nobody here wrote: which sites are replaced, and are the results right?

    python benchmarks/zoo.py run --results FILE [--attention eager] [--padded] [--gradients] [--jobs N]
    python benchmarks/zoo.py table --results FILE ...

`run` builds a tiny random model of every architecture in processes of its own, counts its attention sites by
watching it run, and compares what the package and Inductor's matcher make of it. Finished cases in FILE, one JSON
object a line, are skipped, so an interrupted run goes on where it was. `table` merges the files into
results/zoo.jsonl, which is kept, and writes docs/coverage.md from it.

Packages other than transformers are optional. They must not change the torch that is there:

    pip install --no-deps --target DIR timm torchvision diffusers x-transformers einops einx loguru frozendict \\
        torch-einops-utils vit-pytorch pillow
    PYTHONPATH=DIR python benchmarks/zoo.py run --source vision --results FILE
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from zoo_lib.children import in_children
from zoo_lib.rows import compact, read, recogniser

ROOT = Path(__file__).resolve().parent
KEPT = ROOT / "results" / "zoo.jsonl"
PAGE = ROOT.parent / "docs" / "coverage.md"
_PACKAGES = {
    "huggingface": ("transformers",),
    "vision": ("timm", "vit-pytorch"),
    "others": ("diffusers", "x-transformers"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--results", type=Path, required=True)
    run.add_argument("--source", default="huggingface", choices=("huggingface", "vision", "others"))
    run.add_argument("--attention", default="eager", choices=("eager", "sdpa"))
    run.add_argument("--padded", action="store_true")
    run.add_argument("--gradients", action="store_true")
    run.add_argument("--no-peer", action="store_true")
    run.add_argument("--lowering", default="eager", choices=("eager", "aot_eager", "inductor"))
    run.add_argument("--only", nargs="*", default=[], help="patterns of names")
    run.add_argument("--again", action="store_true", help="also what FILE has")
    run.add_argument("--timeout", type=int, default=60, help="seconds of processor time per model")
    run.add_argument("--jobs", type=int, default=1, help="models at a time")
    run.add_argument("--seconds", type=float, help="stop after so long; the next run goes on")
    table = commands.add_parser("table")
    table.add_argument("--results", type=Path, nargs="+", default=[KEPT])
    options = parser.parse_args()
    if options.command == "run":
        run_all(options)
    else:
        write_table(options.results)


def write_table(paths: list[Path]) -> None:
    """Merge the files into the kept one and write the page."""
    from zoo_lib.judge import FACTOR
    from zoo_lib.rows import newest
    from zoo_lib.table import page

    rows = newest([row for path in paths for row in read(path)], recogniser())
    KEPT.write_text("".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: row["name"])))
    PAGE.write_text(page(rows, FACTOR))


def run_all(options: argparse.Namespace) -> None:
    """All cases that FILE lacks; progress on stderr."""
    source = importlib.import_module(f"zoo_lib.{options.source}")
    setting = {"attention": options.attention, "padded": options.padded, "gradients": options.gradients}
    setting["lowering"] = options.lowering
    names = chosen(source.names(), options.only)
    done = set() if options.again else finished(options.results, setting)
    seen = {row["name"] for row in read(options.results)}
    todo = sorted((name for name in names if name not in done), key=lambda name: name in seen)  # what is new first
    tasks = ((name, partial(one, options.source, name, setting, not options.no_peer)) for name in todo)
    limits = {"jobs": options.jobs, "timeout": options.timeout, "seconds": options.seconds}
    results = in_children(tasks, prepare=partial(prepare, options.gradients), **limits)
    made_by = {"versions": versions(options.source), "recogniser": recogniser()}
    for number, (name, result) in enumerate(results, 1):
        result = {"name": name, **setting, **made_by, **result}
        with options.results.open("a") as file:
            file.write(json.dumps(compact(result)) + "\n")
        print(f"[{number}/{len(todo)}] {name:32s} {in_words(result)}", file=sys.stderr, flush=True)


def chosen(names: list[str], patterns: list[str]) -> list[str]:
    """The names that a pattern matches, in the order of the patterns; all if there is none."""
    matching = [name for pattern in patterns for name in fnmatch.filter(names, pattern)]
    return list(dict.fromkeys(matching)) if patterns else names


def finished(path: Path, setting: dict[str, Any]) -> set[str]:
    """Models that ran in this setting; those that could not be built are tried again."""
    rows = read(path)
    return {row["name"] for row in rows if row["status"] == "run" and all(row[k] == v for k, v in setting.items())}


def prepare(gradients: bool) -> None:
    """What every process does first."""
    import types
    import warnings

    # Its compiled ops fit one exact torch and do not load beside others; no model here needs them.
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
    import torch
    import transformers
    from zoo_lib import huggingface, judge, peer

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # one fused op that no compiler sees: it is eager's alone
    peer.prepare()
    # What Dynamo imports and caches when it first compiles must not count as time of a model.
    case, _ = huggingface.case("llama", "eager", True, gradients)
    judge.judge(case)


def one(source: str, name: str, setting: dict[str, Any], with_peer: bool) -> dict[str, Any]:
    """One model, judged."""
    import torch
    from zoo_lib.judge import judge

    torch.set_default_dtype(torch.float32)  # whatever a model that failed has left
    try:
        case, about = importlib.import_module(f"zoo_lib.{source}").case(
            name, setting["attention"], setting["padded"], setting["gradients"]
        )
    except Exception as error:
        return {"status": "not built", "error": str(error)[:1500]}
    start = time.perf_counter()
    found = judge(case, with_peer=with_peer, lowering=setting["lowering"])
    if failed := found.get("eager_error") or found.get("watch_error"):
        return {"status": "fails in eager", "error": failed}
    return {"status": "run", **about, **found, "wall": round(time.perf_counter() - start, 1)}


def versions(source: str) -> dict[str, str]:
    """Of the packages that a row depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("torch", *_PACKAGES[source]):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def in_words(result: dict[str, Any]) -> str:
    if result["status"] != "run":
        return f"{result['status']}: {result.get('error', '')[:150]}"
    errors = [f"{k} {v[:150]}" for k, v in result.items() if k.endswith("_error")]
    sites = sum(result["softmax"].values()) + sum(result["sdpa"].values())
    replaced = sum(result.get("replaced", {}).values())
    accurate = result.get("accuracy", {})
    refused = ", ".join(sorted({r[1] for r in result.get("refused", [])}))
    return (
        f"{replaced}/{sites} sites, Inductor {result.get('peer_fused')}, "
        f"graphs {result.get('graphs')}/{result.get('peer_graphs')}, "
        f"{'right' if accurate.get('ok') else 'WRONG ' + accurate.get('text', '')[:150]} {accurate.get('worst')} "
        f"{refused} {' '.join(errors)} {result['wall']} s"
    )


if __name__ == "__main__":
    main()
