"""Attack the recogniser with random attention programs; each failure is printed with its seed and source.

    python benchmarks/fuzz.py --count 5000 --jobs 16  # seeds 0 to 4999, on 16 processes
    python benchmarks/fuzz.py --only caches           # of these, the programs with a KV cache
    python benchmarks/fuzz.py --seed 4217             # one program again, with its listing

A program is drawn from a grammar of layouts, spellings, masks, caches and edits (tests/fuzz), run in eager and through
the pipeline, and compared: result, gradients, and what it wrote into its inputs. One with a KV cache is called several
times. The exit status is 1 if one was wrong, crashed, or was left alone without a reason that its edits give. The
counts go to results/fuzz.json after every few programs, so that an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import multiprocessing
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fuzz"))

from fuzz_check import Case, check

FAILURES = ("wrong", "crash", "missed", "fuzzer")
RESULTS = Path(__file__).parent / "results" / "fuzz.json"
CHUNK = 5
"""Programs that a process takes at a time."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000, help="number of programs")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    parser.add_argument("--seconds", type=float, help="stop after so long, whatever has run until then")
    parser.add_argument("--only", choices=("caches", "attention"), help="programs with a KV cache, or without")
    parser.add_argument("--seed", type=int, help="only this one, with its listing")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where to write the counts")
    args = parser.parse_args()
    _prepare()
    if args.seed is not None:
        return _one(args.seed)
    seeds = range(args.first, args.first + args.count)
    chunks = {chunk[0]: chunk for chunk in (seeds[i : i + CHUNK] for i in range(0, len(seeds), CHUNK))}
    counts = Counts()
    start = time.perf_counter()
    _on_interruption(signal.default_int_handler)
    # Spawned: a fork of a process that has threads, or a GPU, may hang.
    with multiprocessing.get_context("spawn").Pool(args.jobs, _prepare) as pool:
        finished = pool.imap_unordered(_Chunk(args.only), list(chunks.values()))
        while chunks:
            left = None if args.seconds is None else args.seconds - (time.perf_counter() - start)
            try:
                first, outcomes = finished.next(None if left is None else max(left, 0))
            except (multiprocessing.TimeoutError, KeyboardInterrupt):
                _on_interruption(signal.SIG_IGN)  # `timeout` sends two
                break  # the pool ends its processes
            del chunks[first]
            counts.add(outcomes)
            seconds = time.perf_counter() - start
            number = counts.kinds.total()
            print(f"[{number}] {dict(counts.kinds)}, {number / seconds:.1f} per second", file=sys.stderr, flush=True)
            _write(args, counts, chunks, seconds)
    print(_write(args, counts, chunks, time.perf_counter() - start))
    return int(bool(counts.failed))


class Counts:
    """What became of the programs so far; failures are printed as they come."""

    def __init__(self) -> None:
        self.kinds: collections.Counter[str] = collections.Counter()
        self.refusals: collections.Counter[str] = collections.Counter()
        self.caches: collections.Counter[str] = collections.Counter()
        self.failed: dict[int, str] = {}

    def add(self, outcomes: list[Ran]) -> None:
        for ran in outcomes:
            self.kinds[ran.kind] += 1
            if ran.is_cache:
                self.caches.update([ran.kind, *ran.notes])
            if ran.kind == "refused":
                self.refusals.update(ran.codes)
            if ran.kind in FAILURES:
                self.failed[ran.seed] = ran.kind
                print(f"=== seed {ran.seed}: {ran.kind}\n{ran.text}", flush=True)


class Ran(NamedTuple):
    """What became of one program; `text` is its listing and what was wrong, of a failure."""

    seed: int
    is_cache: bool
    kind: str
    codes: set[str]
    notes: set[str]
    text: str


def _write(args: argparse.Namespace, counts: Counts, chunks: dict[int, range], seconds: float) -> str:
    summary = {
        "torch": torch.__version__,
        "first": args.first,
        "programs": counts.kinds.total(),
        "kinds": dict(counts.kinds.most_common()),
        "with_a_cache": dict(counts.caches.most_common()),
        "refusals": dict(counts.refusals.most_common()),
        "failed_seeds": counts.failed,
        "seeds_not_run": _ranges(chunks.values()),
        "seconds": round(seconds),
        "jobs": args.jobs,
    }
    text = json.dumps(summary, indent=2)
    args.json.write_text(text + "\n")
    return text


def _on_interruption(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _prepare() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for the first process, which ends the others
    logging.disable(logging.CRITICAL)  # refusals by defects of ours are in the outcome


def _ranges(chunks: Iterable[range]) -> list[str]:
    """Chunks in order, those that follow each other as one."""
    joined: list[list[int]] = []
    for chunk in chunks:
        if joined and joined[-1][1] + 1 == chunk[0]:
            joined[-1][1] = chunk[-1]
        else:
            joined.append([chunk[0], chunk[-1]])
    return [f"{first}-{last}" for first, last in joined]


class _Chunk:
    """Run some programs, in a process of the pool."""

    def __init__(self, only: str | None) -> None:
        self.only = only

    def __call__(self, seeds: range) -> tuple[int, list[Ran]]:
        return seeds[0], [ran for seed in seeds if (ran := self._run(seed)) is not None]

    def _run(self, seed: int) -> Ran | None:
        case = None
        try:
            case = Case.draw(random.Random(seed))
            if self.only is not None and case.is_cache != (self.only == "caches"):
                return None
            outcome = check(case)
        except Exception:  # a fault of the fuzzer itself must not end the run of all others
            listing = "" if case is None else case.listing()
            return Ran(seed, False, "fuzzer", set(), set(), f"{listing}\n{traceback.format_exc()}")
        text = f"{case.listing()}\n{outcome.text}" if outcome.kind in FAILURES else ""
        return Ran(seed, case.is_cache, outcome.kind, outcome.codes, outcome.notes, text)


def _one(seed: int) -> int:
    case = Case.draw(random.Random(seed))
    outcome = check(case)
    print(case.listing(), outcome.kind, outcome.text, sep="\n")
    return int(outcome.kind in FAILURES)


if __name__ == "__main__":
    sys.exit(main())
