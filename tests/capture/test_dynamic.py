"""Symbolic sizes: Dynamo's own symbols, no guard of ours, no data-dependent symbol of ours."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo as dynamo
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from rocm_attn_compile.capture import capture
from rocm_attn_compile.symbolic import to_expr


def plain(q, k, v):
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def causal(q, k, v):
    size = q.shape[-2]
    mask = torch.full((size, size), float("-inf")).triu(1)
    return (q @ k.transpose(-1, -2) * 0.3 + mask).softmax(-1) @ v


def einsum(q, k, v):
    return torch.einsum("bhqk,bhkd->bqhd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v).flatten(2)


def repeated_heads(q, k, v):
    k, v = (x[:, :2, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for x in (k, v))
    return plain(q, k, v)


def flat_heads(q, k, v):
    b, h, n, d = q.shape
    q, k, v = (x.reshape(b * h, n, d) for x in (q, k, v))
    bias = torch.empty(b * h, n, n)
    return torch.bmm(torch.baddbmm(bias, q, k.transpose(1, 2), beta=0, alpha=0.3).softmax(-1), v).view(b, h, n, d)


def cached(q, k, v):
    cache = torch.zeros_like(k).repeat(1, 1, 2, 1)
    cache[:, :, : k.shape[2]] = k
    cache[:, :, k.shape[2] :].copy_(k)
    return F.scaled_dot_product_attention(q, cache, cache)


def packed(q, k, v):
    x = q.transpose(1, 2).flatten(2)
    qkv = torch.cat([x, x, x], -1).view(*x.shape[:2], 3, 4, -1).permute(2, 0, 3, 1, 4)
    return plain(*qkv.unbind(0))


FUNCTIONS = [plain, causal, einsum, repeated_heads, flat_heads, cached, packed]


def qkv(batch=2, length=10, dim=8):
    return [torch.randn(batch, 4, length, dim) for _ in range(3)]


@pytest.mark.parametrize(
    ("function", "heads"), [*((function, "static") for function in FUNCTIONS), (plain, "dynamic"), (einsum, "dynamic")]
)
def test_no_guard_is_added(captured, function, heads):
    args = qkv()
    if heads == "static":
        for x in args:
            dynamo.mark_static(x, 3)
            dynamo.mark_static(x, 1)
    seen = captured(function, *args, dynamic=True)
    assert seen.new_guards == [] and not seen.codes
    symbols = {s for value in seen.trace.values for size in value.shape for s in to_expr(size).free_symbols}
    inputs = {s for node in seen.trace.tensors for s in _symbols(node) if node.op == "placeholder"}
    assert symbols and symbols <= inputs


def _symbols(node):
    return {s for size in node.meta["example_value"].shape for s in to_expr(size).free_symbols}


def test_a_guard_that_restates_dynamos_does_not_recompile():
    """Reshaping to literal sizes makes ATen's own view guard again, in the words of the already specialised sizes."""

    def function(x):
        return x.reshape(2, 16, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)[0]

    def count(with_capture):
        dynamo.reset()
        counter = CompileCounter()

        def backend(graph_module, inputs):
            if with_capture:
                capture(graph_module, inputs)
            return counter(graph_module, inputs)

        compiled = torch.compile(function, backend=backend, dynamic=True)
        compiled(torch.randn(2, 16, 96))
        compiled(torch.randn(2, 32, 48))
        compiled(torch.randn(2, 16, 96))
        return counter.frame_count

    assert count(with_capture=True) == count(with_capture=False)


def test_one_compilation_serves_all_lengths():
    traces = []

    def backend(graph_module, inputs):
        traces.append(capture(graph_module, inputs))
        return graph_module.forward

    compiled = torch.compile(causal, backend=backend, dynamic=True)
    for length in (7, 12, 33):
        args = qkv(length=length)
        torch.testing.assert_close(compiled(*args), causal(*args))
    assert len(traces) == 1


def test_numbers_are_dynamos_own(captured):
    seen = captured(lambda x, s: x * s + x.shape[0], torch.randn(3, 4), 0.3, dynamic=True)
    scale = seen.value("mul").args[1]
    assert isinstance(scale, torch.SymFloat)
    item = next(node for node in seen.trace.order if node.target == "item")
    assert item.meta["example_value"] is scale
    assert isinstance(seen.value("add").args[1], torch.SymInt)


def test_unbacked_sizes(captured):
    def function(q, k, v, n):
        length = (n + 2).item()
        torch._check(length >= 2)
        torch._check(length <= 10)
        return plain(q, k[:, :, :length], v[:, :, :length])

    with dynamo.config.patch(capture_scalar_outputs=True):
        seen = captured(function, *qkv(), torch.tensor(5))
    assert not seen.codes and seen.new_guards == []
    assert {str(s) for s in to_expr(seen.value("_softmax").shape[-1]).free_symbols} == {"u0"}


def test_sizes_that_depend_on_data_are_not_computed_again(captured):
    def function(k):
        rows = (k.sum(1) > 0).nonzero()[:, 0]
        return k[rows] * 2

    with dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        seen = captured(function, torch.randn(6, 4))
    assert seen.codes == ["data_dependent_shape"] and seen.new_guards == []
    symbols = {str(s) for value in seen.trace.values for size in value.shape for s in to_expr(size).free_symbols}
    assert symbols == {"u0"}


def test_shape_env_is_found_in_the_examples(captured):
    seen = captured(plain, *qkv(), dynamic=True)
    again = capture(seen.graph_module)
    assert [value.op for value in again.values] == [value.op for value in seen.trace.values]
