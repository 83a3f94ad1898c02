"""The gradient of a table that a bias is looked up in, on a GPU, under Inductor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rocm_attn_compile
from rocm_attn_compile.testing import assert_as_accurate_as_eager

pytestmark = pytest.mark.gpu

HEADS, LENGTH, ROWS = 16, 512, 32


def program(x: Tensor, table: Tensor, index: Tensor) -> Tensor:
    scores = x @ x.transpose(-1, -2) * 0.1 + F.embedding(index, table).permute(2, 0, 1)[None]
    return torch.softmax(scores, -1) @ x


def with_gradients(function, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, HEADS, LENGTH, 64, generator=generator).bfloat16().to("cuda", dtype).requires_grad_()
    table = torch.randn(ROWS, HEADS, generator=generator).bfloat16().to("cuda", dtype).requires_grad_()
    index = torch.randint(0, ROWS, (LENGTH, LENGTH), generator=generator).cuda()
    out = function(x, table, index)
    return (out, *torch.autograd.grad((out.float() * out.detach().float().roll(1, -1)).sum(), (x, table)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_a_table(dtype):
    rocm_attn_compile.reset_reports()
    torch._dynamo.reset()
    compiled = torch.compile(program, backend="rocm_attn", fullgraph=True, dynamic=False)
    actual, again = with_gradients(compiled, dtype), with_gradients(compiled, dtype)
    exact = tuple(tensor.double() for tensor in with_gradients(program, torch.float64))
    assert_as_accurate_as_eager(actual, with_gradients(program, dtype), exact)
    assert torch.equal(actual[-1], again[-1])
    (report,) = rocm_attn_compile.reports()
    assert report.sites[0].replaced and any("by a product" in note for note in report.notes)


def test_an_index_on_the_cpu_is_left_alone():
    def program(x: Tensor, table: Tensor, index: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(-1, -2) * 0.1 + table[index].permute(2, 0, 1)[None], -1) @ x

    def run(function) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, HEADS, LENGTH, 64, generator=generator).cuda().requires_grad_()
        table = torch.randn(ROWS, HEADS, generator=generator).cuda().requires_grad_()
        index = torch.randint(0, ROWS, (LENGTH, LENGTH), generator=generator)
        return torch.autograd.grad(function(x, table, index).square().sum(), (x, table))

    rocm_attn_compile.reset_reports()
    torch._dynamo.reset()
    compiled = torch.compile(program, backend="rocm_attn", fullgraph=True, dynamic=False)
    torch.testing.assert_close(run(compiled), run(program), atol=2e-2, rtol=1e-3)
    assert not any("by a product" in note for report in rocm_attn_compile.reports() for note in report.notes)
