"""Biases that are looked up in a small table: the gradient of the table is a product, and as right as eager's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from recorder import Recorder
from torch import Tensor

import rocm_attn_compile
from rocm_attn_compile.ops import lookup
from rocm_attn_compile.ops.bias_table import table_gradient
from rocm_attn_compile.rewrite import bias_table as rewriting
from rocm_attn_compile.testing import Float64Everywhere, assert_as_accurate_as_eager

HEADS, LENGTH, WIDTH, ROWS = 3, 24, 8, 7

SPELLINGS = {
    "F.embedding": lambda table, index: F.embedding(index, table),
    "torch.embedding": torch.embedding,
    "getitem": lambda table, index: table[index],
    "negative": lambda table, index: table[index - ROWS],
    "flat": lambda table, index: table[index.view(-1)].view(*index.shape, -1),
}
ELSEWHERE = {
    "padding": lambda table, index: F.embedding(index, table, padding_idx=3),
    "scaled": lambda table, index: F.embedding(index, table, scale_grad_by_freq=True),
    "second dim": lambda table, index: table.T[:, index].permute(1, 2, 0),
    "detached": lambda table, index: F.embedding(index, table.detach()) + 0 * table.sum(),
    "no attention": lambda table, index: F.embedding(index, table.detach()),
}


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    monkeypatch.setattr(rewriting, "_MIN_NUMBERS", 1024)


def program(x: Tensor, table: Tensor, index: Tensor, look_up) -> tuple[Tensor, ...]:
    bias = look_up(table, index).permute(2, 0, 1)[None]
    scores = x @ x.transpose(-1, -2) * 0.3 + bias.masked_fill(index > ROWS - 2, -torch.inf)
    return torch.softmax(scores, -1) @ x, F.embedding(index, table).sum(-1)  # and another lookup, no bias


def with_gradients(function, x: Tensor, table: Tensor, index: Tensor, look_up) -> tuple[Tensor, ...]:
    results = function(x, table, index, look_up)
    loss = results[0].square().sum() + results[1].square().sum() / LENGTH
    return (*results, *torch.autograd.grad(loss, (x, table)))


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, HEADS, LENGTH, WIDTH, generator=generator).to(torch.bfloat16).to(dtype)
    table = torch.randn(ROWS, HEADS, generator=generator).to(torch.bfloat16).to(dtype)
    index = torch.randint(0, ROWS, (LENGTH, LENGTH), generator=generator)
    index.fill_diagonal_(0)  # no row without a key
    return x.requires_grad_(), table.requires_grad_(), index


def check(look_up, dtype: torch.dtype = torch.float32, lowering: str = "aot_eager") -> torch.fx.GraphModule:
    with Float64Everywhere():
        exact = with_gradients(program, *inputs(torch.float64), look_up)
    eager = with_gradients(program, *inputs(dtype), look_up)
    recorder = Recorder(lowering=lowering)
    compiled = torch.compile(program, backend=recorder, fullgraph=True, dynamic=False)
    actual = with_gradients(compiled, *inputs(dtype), look_up)
    again = with_gradients(compiled, *inputs(dtype), look_up)
    assert_as_accurate_as_eager(actual, eager, tuple(t.double() for t in exact))
    assert all(torch.equal(one, other) for one, other in zip(actual, again))
    assert recorder.calls == 1
    return recorder.graphs[0]


def lookups(graph: torch.fx.GraphModule) -> int:
    return sum(node.target is lookup for node in graph.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SPELLINGS)
def test_the_gradient_of_a_table_is_a_product(name, dtype):
    rocm_attn_compile.reset_reports()
    assert lookups(check(SPELLINGS[name], dtype)) == 1
    (note,) = rocm_attn_compile.reports()[-1].notes
    assert f"{LENGTH * LENGTH * HEADS} numbers in {ROWS} rows: their gradient is added up by a product" in note


def test_under_inductor():
    assert lookups(check(SPELLINGS["F.embedding"], lowering="inductor")) == 1


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_left_alone(name):
    assert lookups(check(ELSEWHERE[name])) == 0


def test_small_lookups_are_left_alone(monkeypatch):
    monkeypatch.setattr(rewriting, "_MIN_NUMBERS", 2**20)
    assert lookups(check(SPELLINGS["F.embedding"])) == 0


@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
def test_symbolic_sizes(lowering, monkeypatch):
    """The second length makes a program for all, in one piece; left alone where that piece would be large."""

    def cut(arguments: tuple[Tensor, ...], length: int) -> tuple[Tensor, ...]:
        x, table, index = arguments
        return x.detach()[:, :, :length].clone().requires_grad_(), table, index[:length, :length].clone()

    recorder = Recorder(lowering=lowering)
    compiled = torch.compile(program, backend=recorder, fullgraph=True)
    look_up = SPELLINGS["F.embedding"]
    for length in (LENGTH, LENGTH - 2, LENGTH - 7):
        with Float64Everywhere():
            exact = with_gradients(program, *cut(inputs(torch.float64), length), look_up)
        eager = with_gradients(program, *cut(inputs(torch.float32), length), look_up)
        actual = with_gradients(compiled, *cut(inputs(torch.float32), length), look_up)
        assert_as_accurate_as_eager(actual, eager, tuple(t.double() for t in exact))
    assert len(recorder.graphs) == recorder.calls == 2 and all(lookups(graph) == 1 for graph in recorder.graphs)
    monkeypatch.setattr(rewriting, "MAX_ONES", 512)
    torch._dynamo.reset()
    for length in (LENGTH, LENGTH - 2):
        with_gradients(compiled, *cut(inputs(torch.float32), length), look_up)
    assert [lookups(graph) for graph in recorder.graphs] == [1, 1, 1, 0]


@pytest.mark.parametrize(("shape", "extra"), [((), ()), ((50,), (4,)), ((5, 6), (2, 3)), ((2, 3, 4), ())])
def test_table_gradient_in_pieces(shape, extra, monkeypatch):
    index = torch.randint(0, ROWS, shape)
    grad = torch.randn((*shape, *extra), dtype=torch.float64)
    expected = torch.zeros(ROWS, *extra, dtype=torch.float64).index_add(0, index.reshape(-1), grad.reshape(-1, *extra))
    assert torch.allclose(table_gradient(grad, index, ROWS), expected)
    monkeypatch.setattr("rocm_attn_compile.ops.bias_table.MAX_ONES", 64)
    assert torch.allclose(table_gradient(grad, index, ROWS), expected)


def test_forward_mode_and_second_derivatives_are_those_of_the_lookup():
    table, index = torch.randn(ROWS, 2, dtype=torch.float64), torch.randint(0, ROWS, (9, 4))
    tangent = torch.randn_like(table)
    _, along = torch.func.jvp(lambda t: lookup(t, index).square(), (table,), (tangent,))
    assert torch.allclose(along, 2 * table[index] * tangent[index])
    assert torch.autograd.gradgradcheck(lambda t: lookup(t, index).square(), table.requires_grad_())
