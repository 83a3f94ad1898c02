"""Nested tensors, and other tensors that fakes cannot stand for: left alone, with a reason, and right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pipeline_harness import Pipeline, codes, qkv, reports, sites
from torch.testing._internal.two_tensor import TwoTensor

from rocm_attn_compile.pipeline import compile_graph

HEADS, DEPTH = 4, 8


def nested() -> torch.Tensor:
    """`(3, 3 or 5 or 7, width)`."""
    rows = [torch.randn(length, HEADS * DEPTH) for length in (3, 5, 7)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)


def heads_of(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (HEADS, DEPTH)).transpose(1, 2)


def attention(x):
    q = heads_of(x * 2)
    return F.scaled_dot_product_attention(q, q, q).transpose(1, 2)


def test_attention_of_nested_tensors_is_eagers():
    """On the CPU Dynamo breaks the graph at the attention, and PyTorch runs it."""
    x, pipeline = nested(), Pipeline("aot_eager")
    got, want = (f(x) for f in (torch.compile(attention, backend=pipeline), attention))
    assert pipeline.calls == 0
    torch.testing.assert_close(list(got.unbind()), list(want.unbind()))
    grads = [torch.autograd.grad(sum(t.square().sum() for t in out.unbind()), x)[0] for out in (got, want)]
    torch.testing.assert_close(*[list(grad.unbind()) for grad in grads])


def test_attention_of_jagged_tensors_in_the_graph_is_refused():
    """The graph that Dynamo makes where PyTorch has a fused kernel for them; on the CPU it makes none."""
    q = heads_of(nested()).detach()
    want = F.scaled_dot_product_attention(q, q, q)
    graph_module = torch.fx.symbolic_trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
    for node in graph_module.graph.nodes:
        if node.op != "output":
            node.meta["example_value"] = want if node.op == "call_function" else q
    got = compile_graph(graph_module, [q, q, q], lowering="eager")(q, q, q)
    torch.testing.assert_close(got.values(), want.values())
    (site,) = sites()
    assert codes() == {"tensor_subclass"} and "NestedTensor (torch.jagged)" in site.reasons[0].text


def test_padded_nested_tensors_are_plain():
    def padded(x):
        q = heads_of(torch.nested.to_padded_tensor(x, 0.0))
        return F.scaled_dot_product_attention(q, q, q)

    x, pipeline = nested(), Pipeline("eager")
    torch.testing.assert_close(torch.compile(padded, backend=pipeline)(x), padded(x))
    assert pipeline.calls == 1


def test_subclasses_of_tensors_are_refused_with_a_reason():
    def both(q, k, v):
        return F.scaled_dot_product_attention(q, k, v) + (q @ k.mT).softmax(-1) @ v

    pairs = [TwoTensor(t, t.clone()) for t in qkv()]
    pipeline = Pipeline("aot_eager")
    got, want = torch.compile(both, backend=pipeline)(*pairs), both(*pairs)
    torch.testing.assert_close((got.a, got.b), (want.a, want.b))
    assert pipeline.calls == 0
    assert codes() == {"tensor_subclass"} and "TwoTensor" in sites()[0].reasons[0].text
    (look_alike,) = reports()[0].look_alikes
    assert look_alike.reasons[0].code == "tensor_subclass"
