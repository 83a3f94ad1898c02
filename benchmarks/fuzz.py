"""Attack the recogniser with random attention programs; each failure is printed with its seed and source.

    python benchmarks/fuzz.py --count 5000 --jobs 16  # seeds 0 to 4999, on 16 processes
    python benchmarks/fuzz.py --seed 4217             # one program again, with its listing

A program is drawn from a grammar of layouts, spellings, masks, caches and edits (tests/fuzz), run in eager and through
the pipeline, and compared: result, gradients, and what it wrote into its inputs. The exit status is 1 if one was wrong,
crashed, or was left alone without a reason that its edits give. The counts go to results/fuzz.json.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import multiprocessing
import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fuzz"))

from fuzz_check import Case, check

FAILURES = ("wrong", "crash", "missed")
RESULTS = Path(__file__).parent / "results" / "fuzz.json"
CHUNK = 20
"""Programs that a process takes at a time."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000, help="number of programs")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    parser.add_argument("--seconds", type=float, help="stop after so long, whatever has run until then")
    parser.add_argument("--seed", type=int, help="only this one, with its listing")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where to write the counts")
    args = parser.parse_args()
    _prepare()
    if args.seed is not None:
        return _one(args.seed)
    seeds = range(args.first, args.first + args.count)
    chunks = {chunk[0]: chunk for chunk in (seeds[i : i + CHUNK] for i in range(0, len(seeds), CHUNK))}
    kinds: collections.Counter[str] = collections.Counter()
    refusals: collections.Counter[str] = collections.Counter()
    failed: dict[int, str] = {}
    start = time.perf_counter()
    # Spawned: a fork of a process that has threads, or a GPU, may hang.
    with multiprocessing.get_context("spawn").Pool(args.jobs, _prepare) as pool:
        finished = pool.imap_unordered(_chunk, chunks.values())
        while chunks:
            left = None if args.seconds is None else args.seconds - (time.perf_counter() - start)
            try:
                first, outcomes = finished.next(None if left is None else max(left, 0))
            except multiprocessing.TimeoutError:
                break  # the pool ends its processes
            del chunks[first]
            for seed, kind, codes, text in outcomes:
                kinds[kind] += 1
                if kind == "refused":
                    refusals.update(codes)
                if kind in FAILURES:
                    failed[seed] = kind
                    print(f"=== seed {seed}: {kind}\n{text}", flush=True)
            number = kinds.total()
            rate = number / (time.perf_counter() - start)
            print(f"[{number}/{args.count}] {dict(kinds)}, {rate:.1f} per second", file=sys.stderr, flush=True)
    summary = {
        "torch": torch.__version__,
        "first": args.first,
        "programs": kinds.total(),
        "kinds": dict(kinds.most_common()),
        "refusals": dict(refusals.most_common()),
        "failed_seeds": failed,
        "seeds_not_run": [f"{chunk[0]}-{chunk[-1]}" for chunk in chunks.values()],
        "seconds": round(time.perf_counter() - start),
        "jobs": args.jobs,
    }
    print(json.dumps(summary, indent=2))
    args.json.write_text(json.dumps(summary, indent=2) + "\n")
    return int(bool(failed))


def _prepare() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)  # refusals by defects of ours are in the outcome


def _chunk(seeds: range) -> tuple[int, list[tuple[int, str, set[str], str]]]:
    """What became of some programs: seed, kind, codes, and for a failure its listing and what was wrong."""
    outcomes = []
    for seed in seeds:
        case = Case.draw(random.Random(seed))
        outcome = check(case)
        text = f"{case.listing()}\n{outcome.text}" if outcome.kind in FAILURES else ""
        outcomes.append((seed, outcome.kind, outcome.codes, text))
    return seeds[0], outcomes


def _one(seed: int) -> int:
    case = Case.draw(random.Random(seed))
    outcome = check(case)
    print(case.listing(), outcome.kind, outcome.text, sep="\n")
    return int(outcome.kind in FAILURES)


if __name__ == "__main__":
    sys.exit(main())
