"""Attack the recogniser with random attention programs; each failure is printed with its seed and source.

    python benchmarks/fuzz.py --count 5000            # seeds 0 to 4999
    python benchmarks/fuzz.py --seed 4217             # one program again, with its listing

A program is drawn from a grammar of layouts, spellings, masks, caches and edits (tests/fuzz), run in eager and through
the pipeline, and compared: result, gradients, and what it wrote into its inputs. The exit status is 1 if one was wrong,
crashed, or was left alone without a reason that its edits give.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fuzz"))

from fuzz_check import Case, check

FAILURES = ("wrong", "crash", "missed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000, help="number of programs")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--seed", type=int, help="only this one, with its listing")
    parser.add_argument("--json", type=Path, help="where to write the counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)  # refusals by defects of ours are in the outcome
    if args.seed is not None:
        return _one(args.seed)
    kinds: collections.Counter[str] = collections.Counter()
    refusals: collections.Counter[str] = collections.Counter()
    start = time.perf_counter()
    for number, seed in enumerate(range(args.first, args.first + args.count), 1):
        case = Case.draw(random.Random(seed))
        outcome = check(case)
        kinds[outcome.kind] += 1
        if outcome.kind == "refused":
            refusals.update(outcome.codes)
        if outcome.kind in FAILURES:
            print(f"=== seed {seed}: {outcome.kind}\n{case.listing()}\n{outcome.text}", flush=True)
        if number % 100 == 0 or number == args.count:
            rate = number / (time.perf_counter() - start)
            print(f"[{number}/{args.count}] {dict(kinds)}, {rate:.1f} per second", file=sys.stderr, flush=True)
    summary = {
        "torch": torch.__version__,
        "first": args.first,
        "count": args.count,
        "kinds": dict(kinds.most_common()),
        "refusals": dict(refusals.most_common()),
    }
    print(json.dumps(summary, indent=2))
    if args.json:
        args.json.write_text(json.dumps(summary, indent=2) + "\n")
    return int(any(kinds[kind] for kind in FAILURES))


def _one(seed: int) -> int:
    case = Case.draw(random.Random(seed))
    outcome = check(case)
    print(case.listing(), outcome.kind, outcome.text, sep="\n")
    return int(outcome.kind in FAILURES)


if __name__ == "__main__":
    sys.exit(main())
