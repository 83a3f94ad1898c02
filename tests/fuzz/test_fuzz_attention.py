"""Random attention programs: what is rewritten equals eager, and what only looks different is rewritten.

The random generator is hypothesis's, so that a failure shrinks; the examples are the same in every run. Many more:
`benchmarks/fuzz.py`.
"""

from __future__ import annotations

import random

import pytest
from fuzz_check import Case, check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FAILURES = ("wrong", "crash", "missed")


def assert_fine(case: Case) -> None:
    outcome = check(case)
    assert outcome.kind not in FAILURES, f"{outcome.kind}\n{case.listing()}\n{outcome.text}"


@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
@given(st.randoms(use_true_random=False))
def test_programs_that_shrink(rng):
    assert_fine(Case.draw(rng))


@pytest.mark.parametrize("first", [0, 20, 40])
def test_programs_by_seed(first):
    """Hypothesis prefers small examples; these are as large as they come."""
    for seed in range(first, first + 20):
        assert_fine(Case.draw(random.Random(seed)))


def test_most_programs_are_rewritten():
    """A fuzzer whose programs eager refuses, or that we all refuse, tests nothing."""
    kinds = [check(Case.draw(random.Random(seed))).kind for seed in range(1000, 1030)]
    assert kinds.count("replaced") >= 12
    assert kinds.count("invalid") <= 8
