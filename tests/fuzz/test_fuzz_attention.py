"""Random attention programs: what is rewritten equals eager, and what only looks different is rewritten.

The random generator is hypothesis's, so that a failure shrinks; the examples are the same in every run. Many more:
`benchmarks/fuzz.py`.
"""

from __future__ import annotations

import random
from itertools import count, islice

import pytest
from fuzz_check import Case, check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FAILURES = ("wrong", "crash", "missed")


def kind_of(case: Case) -> str:
    outcome = check(case)
    assert outcome.kind not in FAILURES, f"{outcome.kind}\n{case.listing()}\n{outcome.text}"
    return outcome.kind


def cases(first: int, is_cache: bool):
    """The programs of one kind, from a seed on."""
    drawn = (Case.draw(random.Random(seed)) for seed in count(first))
    return (case for case in drawn if case.is_cache == is_cache)


@settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
        HealthCheck.large_base_example,
    ],
)
@given(st.randoms(use_true_random=False))
def test_programs_that_shrink(rng):
    kind_of(Case.draw(rng))


@pytest.mark.parametrize("is_cache", [False, True], ids=["attention", "cache"])
@pytest.mark.parametrize("first", [200, 300])
def test_programs_by_seed(first, is_cache):
    """Hypothesis prefers small examples; these are as large as they come."""
    kinds = [kind_of(case) for case in islice(cases(first, is_cache), 20)]
    # A fuzzer whose programs eager refuses, or that we all refuse, tests nothing.
    assert kinds.count("replaced") >= 6
    assert kinds.count("invalid") <= 5


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 6000, 250))
def test_many_more_programs(first):
    for seed in range(first, first + 250):
        kind_of(Case.draw(random.Random(seed)))
