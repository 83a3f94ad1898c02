"""A bias whose heads lie side by side, as T5 makes it, is handed over with its keys side by side, copied once."""

from __future__ import annotations

import pytest
import torch
from recorder import Recorder
from torch import Tensor

from rocm_attn_compile.testing import Float64Everywhere, assert_as_accurate_as_eager

HEADS, LENGTH, WIDTH = 3, 20, 8


def program(x: Tensor, table: Tensor, buckets: Tensor, contiguous: bool) -> Tensor:
    bias = table.T[:, buckets][None] if contiguous else table[buckets].permute(2, 0, 1)[None]
    for _ in range(2):
        scores = x @ x.transpose(-1, -2) + bias
        x = x + torch.softmax(scores.float(), -1).to(x.dtype) @ x
    return x


def with_gradients(function, x: Tensor, table: Tensor, buckets: Tensor, contiguous: bool) -> tuple[Tensor, ...]:
    out = function(x, table, buckets, contiguous)
    return (out, *torch.autograd.grad(out.square().sum(), (x, table)))


def inputs(dtype: torch.dtype, rounded_to: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, HEADS, LENGTH, WIDTH, generator=generator).mul(0.3).to(rounded_to).to(dtype)
    table = torch.randn(11, HEADS, generator=generator).to(rounded_to).to(dtype)
    buckets = torch.randint(0, 11, (LENGTH, LENGTH), generator=generator)
    return x.requires_grad_(), table.requires_grad_(), buckets


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("contiguous", [False, True], ids=["heads side by side", "keys side by side"])
def test_keys_lie_side_by_side(contiguous, dynamic):
    with Float64Everywhere():
        exact = with_gradients(program, *inputs(torch.float64, torch.float32), contiguous)
    eager = with_gradients(program, *inputs(torch.float32, torch.float32), contiguous)
    recorder = Recorder(lowering="aot_eager")
    compiled = torch.compile(program, backend=recorder, fullgraph=True, dynamic=dynamic)
    actual = with_gradients(compiled, *inputs(torch.float32, torch.float32), contiguous)
    assert_as_accurate_as_eager(actual, eager, tuple(t.double() for t in exact))
    (graph,) = recorder.graphs
    calls = [n for n in graph.graph.nodes if n.target is torch.ops.rocm_attn.attention.default]
    assert len(calls) == 2
    for call in calls:
        bias = call.args[3].meta["example_value"]
        assert tuple(bias.shape) == (1, HEADS, LENGTH, LENGTH) and bias.stride(-1) == 1
    copies = [call.args[3] for call in calls if call.args[3].target is torch.ops.aten.clone.default]
    assert len(copies) == (0 if contiguous else 2)  # AOTAutograd joins the two: they are of equal views
