"""Attention in models that nobody here wrote: which sites are replaced, and are the results right?

    python benchmarks/zoo.py run --results FILE [--attention eager] [--padded] [--gradients] [--jobs N]
    python benchmarks/zoo.py all --results FILE [--jobs N] [--seconds S]
    python benchmarks/zoo.py table --results FILE ...

`run` builds a tiny random model of every architecture in processes of its own, counts its attention sites by
watching it run, and compares what the package and Inductor's matcher make of it. Finished cases in FILE, one JSON
object a line, are skipped, so an interrupted run goes on where it was. `all` runs every case in every setting of the
page, by one state of the recogniser. `table` merges the files into results/zoo.jsonl, which is kept, and writes
docs/coverage.md from it.

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
from zoo_lib.plan import Task, everything, setting_of
from zoo_lib.rows import SETTING, Row, compact, read, recogniser

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
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--results", type=Path, required=True)
    shared.add_argument("--only", nargs="*", default=[], help="patterns of names")
    shared.add_argument("--timeout", type=int, default=60, help="seconds of processor time per model")
    shared.add_argument("--jobs", type=int, default=1, help="models at a time")
    shared.add_argument("--seconds", type=float, help="stop after so long; the next run goes on")
    run = commands.add_parser("run", parents=[shared])
    run.add_argument("--source", default="huggingface", choices=("huggingface", "vision", "others"))
    run.add_argument("--attention", default="eager", choices=("eager", "sdpa"))
    run.add_argument("--padded", action="store_true")
    run.add_argument("--gradients", action="store_true")
    run.add_argument("--no-peer", action="store_true")
    run.add_argument("--lowering", default="eager", choices=("eager", "aot_eager", "inductor"))
    run.add_argument("--again", action="store_true", help="also what FILE has")
    whole = commands.add_parser("all", parents=[shared])
    whole.add_argument("--kept", type=Path, default=KEPT, help="rows that say what is slow and what had a problem")
    table = commands.add_parser("table")
    table.add_argument("--results", type=Path, nargs="+", default=[KEPT])
    options = parser.parse_args()
    if options.command == "run":
        run_one_setting(options)
    elif options.command == "all":
        run_all_settings(options)
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


def run_one_setting(options: argparse.Namespace) -> None:
    """All cases of one source that FILE lacks."""
    setting = setting_of(options.attention, options.padded, options.gradients, options.lowering)
    names = chosen(names_of(options.source), options.only)
    rows = read(options.results)
    done = set() if options.again else {row["name"] for row in rows if is_finished(row, setting)}
    seen = {row["name"] for row in rows}
    todo = sorted((name for name in names if name not in done), key=lambda name: name in seen)  # what is new first
    run_tasks([Task(options.source, name, setting, not options.no_peer) for name in todo], options)


def run_all_settings(options: argparse.Namespace) -> None:
    """All cases in all settings that FILE lacks from this state of the recogniser."""
    state = recogniser()
    rows = [row for row in read(options.results) if row.get("recogniser") == state]
    done = {(row["name"], *(row[part] for part in SETTING)) for row in rows if row["status"] in ("run", "not built")}
    names = {source: chosen(names_of(source), options.only) for source in _PACKAGES}
    tasks = everything(names, read(options.kept))
    run_tasks([task for task in tasks if (task.name, *(task.setting[part] for part in SETTING)) not in done], options)


def run_tasks(tasks: list[Task], options: argparse.Namespace) -> None:
    """Rows are added to FILE as they come; progress on stderr."""
    functions = ((task, partial(one, task.source, task.name, task.setting, task.with_peer)) for task in tasks)
    limits = {"jobs": options.jobs, "timeout": options.timeout, "seconds": options.seconds}
    results = in_children(functions, prepare=partial(prepare, any(t.setting["gradients"] for t in tasks)), **limits)
    made_by = {source: {"versions": versions(source), "recogniser": recogniser()} for source in _PACKAGES}
    for number, (task, result) in enumerate(results, 1):
        result = {"name": task.name, **task.setting, **made_by[task.source], **result}
        with options.results.open("a") as file:
            file.write(json.dumps(compact(result)) + "\n")
        print(f"[{number}/{len(tasks)}] {task.name:32s} {in_words(result)}", file=sys.stderr, flush=True)


def names_of(source: str) -> list[str]:
    """All cases that a source knows."""
    return importlib.import_module(f"zoo_lib.{source}").names()


def chosen(names: list[str], patterns: list[str]) -> list[str]:
    """The names that a pattern matches, in the order of the patterns; all if there is none."""
    matching = [name for pattern in patterns for name in fnmatch.filter(names, pattern)]
    return list(dict.fromkeys(matching)) if patterns else names


def is_finished(row: Row, setting: dict[str, Any]) -> bool:
    """Whether it ran in this setting; what could not be built is tried again."""
    return row["status"] == "run" and all(row[key] == value for key, value in setting.items())


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
    from zoo_lib.overrides import captures_scalars

    torch.set_default_dtype(torch.float32)  # whatever a model that failed has left
    try:
        case, about = importlib.import_module(f"zoo_lib.{source}").case(
            name, setting["attention"], setting["padded"], setting["gradients"]
        )
    except Exception as error:
        return {"status": "not built", "error": str(error)[:1500]}
    start = time.perf_counter()
    with torch._dynamo.config.patch(capture_scalar_outputs=captures_scalars(name, setting["gradients"])):
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
