"""Random mask programs: whatever is proved must equal what the program computes, at every index.

The programs are captured by make_fx, since Dynamo would take most of the time. The random generator is hypothesis's, so
that a failure shrinks; the examples are the same in every run.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mask_harness import Recorded, assert_exact, context_of, points, scalar
from programs import Generator, Inputs, make_inputs

from rocm_attn_compile.recognize.mask import AdditiveMask, ClosedForm, make_evaluator, prove_additive, prove_keep

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def fuzz(examples: int):
    return settings(max_examples=examples, derandomize=True, deadline=None, suppress_health_check=QUIET, database=None)


def check_truth(rng, dynamic: bool) -> None:
    term = Generator(rng).truth(rng.randint(1, 3))
    inputs = make_inputs(rng, rng.randint(2, 5), rng.randint(2, 6))

    def mask(*tensors: torch.Tensor) -> torch.Tensor:
        made = Inputs(*tensors)
        return made.full(term(made))

    captured = Recorded(mask, *inputs, dynamic=dynamic)
    index, context = context_of(captured)
    form = prove_keep(captured.value, index, context)
    if isinstance(form, ClosedForm):
        assert_exact(form, captured, captured.real)
    else:
        # The opaque result claims nothing, but the element must still be what the evaluator says.
        element = make_evaluator(context).at(captured.value, index)
        for env, at in points(captured, context):
            assert scalar(element, env, captured) == captured.real[at].item()


@fuzz(80)
@given(st.randoms(use_true_random=False))
def test_static_programs(rng):
    check_truth(rng, dynamic=False)


@fuzz(20)
@given(st.randoms(use_true_random=False))
def test_dynamic_programs(rng):
    check_truth(rng, dynamic=True)


@fuzz(40)
@given(st.randoms(use_true_random=False), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_numbers_and_additive_masks(rng, dtype):
    generator = Generator(rng)
    number, first, second = generator.number(2), generator.truth(1), generator.truth(1)
    fill = rng.choice([float("-inf"), -1e9, -10000.0, torch.finfo(dtype).min, -0.5])
    kind = rng.randrange(5)

    def mask(*tensors: torch.Tensor) -> torch.Tensor:
        made = Inputs(*tensors)
        zeros = made.full(torch.zeros(1, 1, dtype=dtype))
        dropped = made.full(first(made))
        if kind == 0:
            return made.full(number(made)).to(dtype)
        if kind == 1:
            return zeros.masked_fill(dropped, max(fill, torch.finfo(dtype).min) if fill > -1e30 else fill)
        if kind == 2:
            return (1.0 - dropped.to(dtype)) * torch.finfo(dtype).min
        if kind == 3:
            return torch.where(dropped, 0.0, torch.finfo(torch.float32).min).to(dtype)
        both = torch.where(dropped, 0.0, -3e38) + torch.where(made.full(second(made)), 0.0, -3e38)
        return both.to(dtype)

    if kind == 1 and fill == -1e9 and dtype == torch.float16:
        return  # eager refuses a fill that does not fit
    captured = Recorded(mask, *make_inputs(rng, 3, 4))
    index, context = context_of(captured)
    element = make_evaluator(context).at(captured.value, index)
    for env, at in points(captured, context):
        assert scalar(element, env, captured) == captured.real[at].item(), element
    result = prove_additive(captured.value, index, context)
    if isinstance(result, AdditiveMask):
        assert_exact(result.keep, captured, captured.real == 0)
        for env, at in points(captured, context):
            here = [number for number, where in result.fills if scalar(where, env, captured)]
            assert here == ([] if captured.real[at] == 0 else [captured.real[at].item()])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_many_more_programs(seed):
    import random

    for i in range(50):
        check_truth(random.Random(1000 * seed + i), dynamic=i % 5 == 0)
