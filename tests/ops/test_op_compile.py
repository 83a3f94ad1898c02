"""opcheck, and the op inside torch.compile: training, dynamic shapes, transforms."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, make, randn, seeded
from oracle import Call, attend
from torch.library import opcheck

import rocm_attn_compile.ops as ops

NAMES = ("attn_bias", "attn_mask", "key_mask", "kv_start", "kv_end", "q_ids", "kv_ids", "sinks", "dropout_seed",
         "alibi_slopes")  # fmt: skip
CHECKED = {
    "causal-square": torch.float32,
    "gqa-causal": torch.bfloat16,
    "gqa-decode": torch.float16,
    "small-v-heads": torch.float32,
    "bias-heads": torch.float64,
    "key-mask-bias-causal": torch.float32,
    "kv-range-batch": torch.float32,
    "documents": torch.float32,
    "sinks-window-gqa": torch.float32,
    "soft-cap-bias-sinks": torch.bfloat16,
    "layout-packed": torch.float32,
    "everything": torch.float32,
}


def prepared(name: str, dtype: torch.dtype) -> Call:
    call = seeded(CASES[name]).to(dtype)
    call.settings["empty_rows"] = "nan"
    return call


def all_tests(checked: dict[str, str]) -> bool:
    return all(result == "SUCCESS" for result in checked.values())


@pytest.mark.parametrize("name", CHECKED)
def test_opcheck(name):
    call = prepared(name, CHECKED[name])
    args = (call.q, call.k, call.v, *(call.tensors.get(n) for n in NAMES))
    assert all_tests(opcheck(ops.attention, args, {**call.settings, "out_layout": "bshd"}))


@pytest.mark.parametrize("name", CHECKED)
def test_opcheck_backward(name):
    call = prepared(name, CHECKED[name])
    with torch.no_grad():
        out, lse = ops.attention(call.q, call.k, call.v, **call.kwargs)
    named = call.settings
    args = (
        torch.randn_like(out), call.q, call.k, call.v, *(call.tensors.get(n) for n in NAMES), out, lse,
        named["softmax_scale"], named.get("logits_soft_cap"), named.get("band_lower"), named.get("band_upper"), 0.0,
        "nan", "", [True, True, False, "attn_bias" in call.tensors, "sinks" in call.tensors],
    )  # fmt: skip
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    assert all_tests(opcheck(ops.attention_backward, args, test_utils=utilities))


def test_opcheck_dropout_mask():
    assert all_tests(opcheck(torch.ops.rocm_attn.dropout_keep_mask.default, (torch.tensor(3), 0.5, (1, 2, 3, 4))))


def step(call: Call, function):
    out = function(call.q, call.k, call.v, call.tensors)
    return (out, *torch.autograd.grad(out.sin().sum(), list(call.differentiable().values())))


@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", True)])
def test_compiled_training(backend, dynamic):
    """One graph, right numbers and gradients, new lengths without a new graph if dynamic."""
    compiled_graphs = []

    def model(q, k, v, tensors):
        q, k, v = q * 1.5, k + 1, v.sin()
        bias, sinks = tensors["attn_bias"] * 2, tensors["sinks"].exp()
        q_len, kv_len = q.shape[2], k.shape[2]
        out, _ = ops.attention(
            q, k, v, bias, sinks=sinks, softmax_scale=0.3, band_upper=kv_len - q_len, out_layout="bshd"
        )
        return out.transpose(1, 2).reshape(q.shape[0], q_len, -1).cos()

    def backend_fn(gm, inputs):
        compiled_graphs.append(gm)
        return torch._dynamo.lookup_backend(backend)(gm, inputs)

    compiled = torch.compile(model, backend=backend_fn, dynamic=dynamic, fullgraph=True)
    lengths = [(7, 9), (5, 11), (6, 13)] if dynamic else [(7, 9)]
    for M, N in lengths:
        torch.manual_seed(0)
        call = make({"attn_bias": randn(1, 4, M, N), "sinks": randn(4)}, H=4, K=2, M=M, N=N).to(torch.float32)
        torch.testing.assert_close(step(call, compiled), step(call, model))
        tensors = {"attn_bias": call.tensors["attn_bias"] * 2, "sinks": call.tensors["sinks"].exp()}
        settings = {"softmax_scale": 0.3, "band_upper": N - M}
        want = (
            attend(Call(call.q * 1.5, call.k + 1, call.v.sin(), tensors, settings))[0]
            .transpose(1, 2)
            .reshape(2, M, -1)
            .cos()
        )
        torch.testing.assert_close(compiled(call.q, call.k, call.v, call.tensors), want)
    assert len(compiled_graphs) == 1


@pytest.mark.parametrize("name", ["gqa-causal", "layout-packed", "small-v-heads"])
def test_inductor_agrees_on_strides(name):
    """Inductor asserts the strides that the fakes promised, of outputs and gradients."""
    call = seeded(CASES[name]).to(torch.float32)
    settings = {**call.settings, "out_layout": "bshd"}

    def model(q, k, v, tensors):
        return ops.attention(q, k, v, **tensors, **settings)[0] + 1

    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(step(call, compiled), step(call, model))


def loss(q, k):
    return ops.attention(q, k, k, softmax_scale=0.4, band_upper=0)[0].sin().sum()


def test_vmap_and_grad_inside_a_compiled_function():
    q, k = torch.randn(3, 1, 4, 5, 4), torch.randn(1, 2, 6, 4)

    def per_sample(q, k):
        return torch.func.vmap(torch.func.grad(loss), (0, None))(q, k)

    compiled = torch.compile(per_sample, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k), per_sample(q, k))


def test_jvp_inside_a_compiled_function():
    """The tangent must not be dropped. (Views of duals fail there in torch 2.13 itself: here are none.)"""
    q, tangent, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 6, 4)

    def directional(q, tangent, k):
        return torch.func.jvp(lambda x: loss(x, k), (q,), (tangent,))[1]

    compiled = torch.compile(directional, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, tangent, k), directional(q, tangent, k))


def test_compiled_checkpoint_with_dropout_sees_one_mask():
    def block(q, seed):
        return ops.attention(q, q, q, dropout_seed=seed, softmax_scale=0.3, dropout_p=0.5)[0]

    def model(q, seed):
        return torch.utils.checkpoint.checkpoint(block, q, seed, use_reentrant=False)

    q = torch.randn(2, 2, 9, 8, requires_grad=True)
    seed = torch.tensor(11)
    want = torch.autograd.grad(block(q, seed).sum(), q)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(q, seed).sum(), q), want)


def test_fake_tensors_are_not_specialised():
    """Symbolic lengths add no guard beyond what relates the inputs."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    q = mode.from_tensor(torch.randn(3, 4, 7, 8), static_shapes=False)
    with mode:
        out, lse = ops.attention(q, q, q, None, None, None, softmax_scale=0.3, band_upper=q.shape[2] - 1)
    assert [str(s) for s in out.shape] == [str(s) for s in q.shape]
    assert not env.guards
