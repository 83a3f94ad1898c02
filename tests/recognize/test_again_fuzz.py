"""Random programs and near misses of them, stacked in one graph: what is found is what recognition in full finds."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest
import torch
from again_harness import Both
from fuzz_case import Case

_EDITS = [
    (r"(?<![\w.])0\.\d+", lambda text: str(float(text) + 0.125)),
    (r"(?<=[ (,-])\d(?=[,)\]])", lambda text: str(max(int(text) - 1, 0))),
    (r"\.mT", lambda text: ""),
    (r" <= ", lambda text: " < "),
    (r"-math\.inf|float\('-inf'\)|-1e9", lambda text: "-3e4"),
    (r"\.float\(\)", lambda text: ""),
    (r"(?<=return \().*(?=,\))", lambda text: f"{text.split(',')[0]} * 1.0, {text}"),
]
"""Pattern and what becomes of one match of it. Most change the meaning, and some of the programs are none."""


def edited(source: str, rng: random.Random) -> str:
    places = [(match, edit) for pattern, edit in _EDITS for match in re.finditer(pattern, source)]
    if not places:
        return source
    match, edit = rng.choice(places)
    return source[: match.start()] + edit(match.group()) + source[match.end() :]


def compare(seed: int) -> Both:
    rng = random.Random(seed)
    case = Case.draw(rng)
    both, functions = Both(), []
    sources = [case.source, edited(case.source, rng), case.source, edited(case.source, rng), case.source]
    for case.source in sources:
        if _runs(case, case.function()):  # some edits make no program
            functions.append((case.function(), rng.random() < 0.7))

    def stacked(*inputs):
        results = [f(*(map(_clone, inputs) if has_own else inputs)) for f, has_own in functions]
        return tuple(x for result in results for x in result)

    torch._dynamo.reset()
    if functions and _runs(case, stacked):
        case.run(torch.compile(stacked, backend=both, dynamic=case.dynamic), case.dtype)
    return both


def _clone(x):
    return x.clone() if isinstance(x, torch.Tensor) else x


def _runs(case: Case, function: Callable) -> bool:
    try:
        case.run(function, case.dtype)
        return True
    except (RuntimeError, IndexError, ValueError, TypeError):
        return False


@pytest.mark.parametrize("first", [0, 12])
def test_programs_and_near_misses(first):
    found = [compare(seed).counts for seed in range(first, first + 12)]
    assert sum(counts["equal"] > 0 for counts in found) >= 6
    assert sum(counts["in_full"] > 1 for counts in found) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 2000, 100))
def test_many_more_programs_and_near_misses(first):
    for seed in range(first, first + 100):
        compare(seed)
