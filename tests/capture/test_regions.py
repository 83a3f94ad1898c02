"""Higher-order ops and autograd functions: opaque, and captured as graphs of their own where that is safe."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rocm_attn_compile.capture import dump


def attention(q, k, v):
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


@pytest.fixture
def qkv():
    return [torch.randn(2, 4, 8, requires_grad=True) for _ in range(3)]


def names(trace):
    return [value.name for value in trace.values]


def test_checkpoint(captured, qkv):
    seen = captured(lambda q, k, v: checkpoint(attention, q, k, v, use_reentrant=False) * 2, *qkv)
    assert seen.names == ["opaque", "mul"] and seen.codes == ["higher_order_op"]
    ((node, attribute),) = seen.trace.subgraphs
    subtrace = seen.trace.subtraces[attribute]
    assert node.name == "tag_activation_checkpoint" and subtrace.graph_module is getattr(seen.graph_module, attribute)
    assert "_softmax" in names(subtrace) and "_softmax" not in seen.names
    assert f"region {attribute}:" in dump(seen.trace)


def test_a_region_is_captured_in_the_modes_of_its_call(captured, qkv):
    def function(q, k, v):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return checkpoint(attention, q, k, v, use_reentrant=False)

    seen = captured(function, *qkv)
    (subtrace,) = seen.trace.subtraces.values()
    assert names(subtrace).count("_to_copy") == 3
    assert {value.grad_mode for value in subtrace.values} == {False} and not subtrace.not_executed


def test_regions_that_only_read_leave_their_operands_alone(captured, qkv):
    def function(q, k, v):
        mask = (q @ k.mT) > 0
        out = checkpoint(lambda q, m: q * m.sum(), q, mask, use_reentrant=False)
        return out, mask | True

    seen = captured(function, *qkv)
    assert seen.output(1).args[0].name == "gt"
    assert not any(tensor.storage.history for tensor in seen.trace.tensors.values())


def test_a_region_that_writes_an_operand(captured):
    def function(x):
        y, z = x * 1, x * 2
        out = checkpoint(lambda a, b: a.add_(1) + b, y, z, use_reentrant=False)
        return out, y * 1, z * 1

    seen = captured(function, torch.randn(3, 4))
    assert seen.output(1).args[0].op == "opaque" and seen.output(2).args[0].name == "mul"


def test_a_region_that_returns_a_view_of_an_operand(captured):
    def function(x):
        y, z = x * 1, x * 2
        view = checkpoint(lambda a, b: a.view(-1), y, z, use_reentrant=False)
        view.add_(1)
        return y * 1, z * 1

    seen = captured(function, torch.randn(3, 4))
    assert seen.output(0).args[0].op == "opaque" and seen.output(1).args[0].name == "mul"


def test_operands_that_share_memory_do_so_in_the_body(captured):
    def function(x):
        y = x * 1
        return checkpoint(lambda a, b: (a.add_(1), b * 1)[1], y, y[:, 1:], use_reentrant=False)

    seen = captured(function, torch.randn(3, 4))
    (subtrace,) = seen.trace.subtraces.values()
    inputs = [tensor for tensor in subtrace.tensors.values() if tensor.node.op == "placeholder"]
    assert all(tensor.storage.shared_input for tensor in inputs)
    assert subtrace.values[-1].args[0].op == "opaque"


def test_cond_has_two_bodies(captured, qkv):
    def function(q, k, v):
        return torch.cond(q.sum() > 0, attention, lambda q, k, v: q @ k.mT @ v, (q, k, v))

    seen = captured(function, *qkv)
    assert len(seen.trace.subgraphs) == 2
    assert sorted("_softmax" in names(subtrace) for subtrace in seen.trace.subtraces.values()) == [False, True]


def test_a_body_called_twice_is_captured_once(captured, qkv):
    region = torch.compiler.nested_compile_region(attention)
    seen = captured(lambda q, k, v: region(q, k, v) + region(k, q, v), *qkv)
    assert len(seen.trace.subgraphs) == len(seen.trace.subtraces) == 1
    assert seen.codes == ["higher_order_op"] * 2


def test_a_body_called_in_two_modes_is_left_alone():
    """Dynamo makes two bodies of it; a graph that shares one body must not be rewritten for one mode only."""
    from torch._higher_order_ops import invoke_subgraph

    from rocm_attn_compile.capture import capture

    inner = torch.fx.symbolic_trace(lambda x: (x.softmax(-1),))
    for node in inner.graph.nodes:
        if node.op != "output":
            node.meta["example_value"] = torch.empty(3, 4)
    outer = torch.fx.Graph()
    x = outer.placeholder("x")
    for grad_mode in (True, False):
        outer.call_function(torch._C._set_grad_enabled, (grad_mode,))
        body = outer.get_attr("body")
        call = outer.call_function(invoke_subgraph, (body, "body", x))
        call.meta["example_value"] = (torch.empty(3, 4),)
    outer.output((x,))
    module = torch.nn.Module()
    module.body = inner
    trace = capture(torch.fx.GraphModule(module, outer), [torch.randn(3, 4)])
    assert [code for _, code, _ in trace.not_executed] == ["higher_order_op"] * 2
    assert trace.subgraphs == [] and trace.subtraces == {}


def test_autograd_functions_are_opaque_and_may_write(captured, qkv):
    class Exp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.exp()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    def function(q, k, v):
        y = q * 1
        return Exp.apply(y), y * 1

    seen = captured(function, *qkv)
    assert seen.codes == ["higher_order_op"] and seen.trace.subgraphs == []
    assert seen.output(1).args[0].op == "opaque"


def test_flex_attention_is_opaque_and_reads_only(captured):
    from torch.nn.attention.flex_attention import flex_attention

    def function(q, k, v):
        q = q * 1
        return flex_attention(q, k, v), q * 1

    q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
    seen = captured(function, q, k, v)
    assert seen.codes[-1] == "higher_order_op", "the block mask before it is made under vmap"
    assert seen.output(1).args[0].name == "mul"
