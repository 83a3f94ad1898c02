"""Random programs and near misses of them, stacked in one graph: what is found is what recognition in full finds."""

from __future__ import annotations

import random
import re
import warnings

import pytest
import torch
from again_harness import Both, layers
from fuzz_check import Case

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
    both, functions, arguments = Both(), [], []
    shared = case.make_inputs(case.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for source in (case.source, edited(case.source, rng), case.source, edited(case.source, rng), case.source):
            own = shared if rng.random() < 0.3 else case.make_inputs(case.dtype)
            own = [t.clone() if t.requires_grad else t for t in own]
            case.source = source
            function = case.function()
            try:
                function(*[t.clone() for t in own])
            except (RuntimeError, IndexError, ValueError, TypeError):
                continue
            functions.append(function)
            arguments.append(own)
        torch._dynamo.reset()
        torch.compile(layers(*functions), backend=both, dynamic=case.dynamic)(*[tuple(own) for own in arguments])
    return both


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
