"""A bias that may hold a mask's fill, subtracted: the lowest number minus the lowest is 0, without the score."""

from __future__ import annotations

import pytest
import torch
from recorder import Recorder

import rocm_attn_compile
from rocm_attn_compile.testing import assert_as_accurate_as_eager

B, N, D = 2, 9, 8
LOWEST = torch.finfo(torch.float64).min


def causal():
    return torch.arange(N)[None, :] <= torch.arange(N)[:, None]


def filled_twice(q, bias, keep):
    scores = (q @ q.mT).masked_fill(~causal(), LOWEST)
    return (scores - bias.tanh().masked_fill(~keep, LOWEST)).softmax(-1) @ q


def added_twice(q, bias, keep):
    scores = q @ q.mT + torch.zeros(N, N, dtype=q.dtype).masked_fill(~causal(), LOWEST)
    return (scores - bias.tanh().masked_fill(~keep, LOWEST)).softmax(-1) @ q


def negated_and_zeroed(q, bias, keep):
    scores = -(q @ q.mT + bias.tanh().masked_fill(~keep, -torch.inf))
    return scores.softmax(-1).nan_to_num() @ q


def moderate(q, bias, keep):
    return ((q @ q.mT).masked_fill(~causal(), LOWEST) - bias.tanh()).softmax(-1) @ q


def alone(q, bias, keep):
    """No other fill that it could meet: it is added as it is, and is as high in eager."""
    return (q @ q.mT - bias.tanh().masked_fill(~keep, LOWEST)).softmax(-1) @ q


def padding(q, bias, keep):
    """What is subtracted is a number times a mask: that is high where the mask drops."""
    return ((q @ q.mT).masked_fill(~causal(), LOWEST) - (~keep).to(q.dtype) * 1e9).softmax(-1) @ q


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("function", "calls"),
    [(filled_twice, 0), (added_twice, 0), (negated_and_zeroed, 0), (moderate, 1), (alone, 1), (padding, 1)],
)
def test_it_is_refused_where_it_meets_a_fill(function, calls, dynamic):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, N, D, dtype=torch.float64, generator=generator)
    bias = torch.randn(N, N, dtype=torch.float64, generator=generator)
    # Every row and column drops something, and none everything, beside the diagonal.
    keep = (torch.arange(N)[:, None] + torch.arange(N)[None, :]) % 3 != 1
    eager = function(q, bias, keep)
    torch._dynamo.reset()
    recorder = Recorder(lowering="eager")
    actual = torch.compile(function, backend=recorder, fullgraph=True, dynamic=dynamic)(q, bias, keep)
    torch.testing.assert_close(actual, eager, rtol=1e-12, atol=1e-12)
    assert recorder.calls == calls
    codes = {reason.code for report in rocm_attn_compile.reports() for s in report.sites for reason in s.reasons}
    assert ("bias_subtracted" in codes) == (calls == 0)


def test_the_highest_number_of_half_absorbs_scores():
    """In float16 65504 + 1 is 65504: keys that are raised so far weigh the same, though the op adds in float32."""

    def raised(q, bias, keep):
        lowest = torch.finfo(q.dtype).min
        return (torch.tanh(q @ q.mT) - bias.tanh().masked_fill(~keep, lowest)).softmax(-1) @ q

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, N, D, generator=generator).half().requires_grad_()
    bias = torch.randn(N, N, generator=generator).half().requires_grad_()
    keep = (torch.arange(N)[:, None] + torch.arange(N)[None, :]) % 3 != 1
    torch._dynamo.reset()
    rocm_attn_compile.reset_reports()
    compiled = torch.compile(raised, backend="rocm_attn", fullgraph=True)
    wide = [x.detach().double().requires_grad_() for x in (q, bias)]
    results = []
    for function, inputs in ((compiled, (q, bias)), (raised, (q, bias)), (raised, wide)):
        out = function(*inputs, keep)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    assert_as_accurate_as_eager(*results, factor=4.0)
    (site,) = (site for report in rocm_attn_compile.reports() for site in report.sites)
    assert site.replaced
