"""Autocast, grad mode, inference mode, functorch levels: followed, never really switched for the process."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version

from rocm_attn_compile.capture import capture


def attention(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


@pytest.fixture
def qkv():
    return [torch.randn(2, 4, 8) for _ in range(3)]


def modes(trace):
    return {value.name: value.grad_mode for value in trace.values if value.op != "input"}


def test_autocast_casts_appear(captured, qkv, check_replay):
    def function(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            inside = attention(q, k, v)
        return inside, q @ k.mT

    seen = captured(function, *qkv)
    assert seen.names.count("_to_copy") == 3
    inside, outside = [value for value in seen.trace.values if value.name == "bmm"][::2]
    assert (inside.dtype, outside.dtype) == (torch.bfloat16, torch.float32)
    assert seen.output(0).dtype == torch.bfloat16
    assert check_replay(seen.trace, seen.example_inputs)


def test_autocast_around_the_compiled_call_is_followed_too(captured, qkv):
    with torch.autocast("cpu", torch.bfloat16):
        seen = captured(attention, *qkv)
    assert seen.names.count("_to_copy") == 3 and not seen.codes


def test_disabled_autocast_inside_autocast(captured, qkv):
    def function(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            a = q @ k.mT
            with torch.autocast("cpu", enabled=False):
                b = q @ k.mT
            return a, b, q @ v.mT

    seen = captured(function, *qkv)
    assert [v.dtype for v in seen.trace.values if v.name == "bmm"] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert not torch.is_autocast_enabled("cpu")


def test_sdpa_under_autocast_has_explicit_casts(captured):
    def function(q, k, v, mask):
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v, mask)

    seen = captured(function, *(torch.randn(1, 2, 4, 8) for _ in range(3)), torch.zeros(4, 4))
    call = seen.value("sdpa")
    assert [call.kwargs[name].name for name in ("query", "key", "value", "attn_mask")] == ["_to_copy"] * 4
    assert {call.kwargs[name].dtype for name in ("query", "key", "value", "attn_mask")} == {torch.bfloat16}
    assert seen.result.dtype == call.dtype == torch.bfloat16


def test_autocast_left_open_by_a_graph_is_closed():
    def build():
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, None))
        graph.output((graph.call_function(torch.mm, (x, x)),))
        return torch.fx.GraphModule(torch.nn.Module(), graph)

    trace = capture(build(), [torch.randn(3, 3)])
    assert trace.values[-1].dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_grad_mode_of_each_value(captured, qkv):
    def function(q, k, v):
        scores = q @ k.mT
        with torch.no_grad():
            p = scores.softmax(-1)
        return p @ v

    seen = captured(function, *qkv)
    assert seen.value("_softmax").grad_mode is False
    assert {value.grad_mode for value in seen.trace.values if value.name == "bmm"} == {True}


def test_no_grad_around_the_compiled_call(captured, qkv):
    with torch.no_grad():
        seen = captured(attention, *qkv)
    assert {value.grad_mode for value in seen.trace.values} == {False}


def test_enable_grad_inside_no_grad(captured, qkv):
    def function(q, k, v):
        with torch.enable_grad():
            p = (q @ k.mT).softmax(-1)
        return p @ v

    with torch.no_grad():
        seen = captured(function, *qkv)
    assert modes(seen.trace)["_softmax"] is True
    assert seen.trace.values[-1].grad_mode is False


def test_inference_mode_regions_and_ambient(captured, qkv):
    def function(q, k, v):
        with torch.inference_mode():
            mask = (q @ k.mT) > 0
        return (q @ v.mT).masked_fill(mask, 0.0)

    seen = captured(function, *qkv)
    assert modes(seen.trace)["gt"] is False and modes(seen.trace)["masked_fill"] is True
    torch._dynamo.reset()
    with torch.inference_mode():
        seen = captured(attention, *qkv)
    assert {value.grad_mode for value in seen.trace.values} == {False}
    assert "bmm" in seen.names and "matmul" not in seen.names, "composites are decomposed as without inference mode"


def test_a_default_device_does_not_leak_in(captured):
    with torch.device("meta"):
        trace = capture(
            torch.fx.symbolic_trace(lambda x: x + torch.ones(3, device="cpu")), [torch.randn(3, device="cpu")]
        )
    assert {value.device.type for value in trace.values} == {"cpu"} and not trace.not_executed


@pytest.mark.parametrize(
    ("transform", "crossing"),
    [
        (lambda q, k, v: torch.vmap(attention)(q, k, v), "_add_batch_dim"),
        (lambda q, k, v: torch.func.grad(lambda q: attention(q, k, v).sum())(q), "_wrap_for_grad"),
        (lambda q, k, v: torch.func.jvp(lambda q: attention(q, k, v), (q,), (q,))[1], "_make_dual"),
        (lambda q, k, v: torch.func.vjp(lambda q: attention(q, k, v), q)[0], "_wrap_for_grad"),
    ],
    ids=["vmap", "grad", "jvp", "vjp"],
)
def test_functorch_levels_are_not_entered(captured, qkv, transform, crossing):
    depth = torch._C._functorch.maybe_current_level()
    seen = captured(transform, *qkv)
    assert torch._C._functorch.maybe_current_level() == depth
    codes = {"functorch"}
    if crossing == "_make_dual" and Version(torch.__version__) < Version("2.13"):
        codes |= {"failed", "meta_mismatch"}  # there the calls are not functorch's: they are tried, and fail
    assert "functorch" in seen.codes and set(seen.codes) <= codes
    assert any(crossing in text for _, _, text in seen.trace.not_executed)
    # What runs inside is captured, on the shapes the level shows, and marked.
    softmax = seen.value("_softmax")
    assert softmax.node in seen.trace.transformed
    assert softmax.shape == ((4, 4) if crossing == "_add_batch_dim" else (2, 4, 4))
    assert not any(node in seen.trace.transformed for node in seen.trace.order if node.op == "placeholder")


def test_a_write_inside_vmap_reaches_the_tensor_outside(captured):
    def function(x):
        y = x * 1
        torch.vmap(lambda row: row.add_(1))(y)
        return y * 1

    seen = captured(function, torch.randn(3, 4))
    assert seen.output().args[0].op == "opaque"


def test_kernel_choice_is_not_switched(captured):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def function(q):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, q, q)

    with torch.no_grad():
        seen = captured(function, torch.randn(1, 2, 4, 8))
    assert seen.names == ["sdpa"] and not seen.codes
    assert torch.backends.cuda.flash_sdp_enabled()


def test_tensor_subclasses_are_opaque_and_so_is_what_they_touch(captured):
    from torch.testing._internal.two_tensor import TwoTensor

    def function(x, plain):
        return (x @ x.mT).softmax(-1), plain.softmax(-1)

    seen = captured(function, TwoTensor(torch.randn(3, 3), torch.randn(3, 3)), torch.randn(3, 3))
    assert set(seen.codes) == {"tensor_subclass"} and seen.names.count("_softmax") == 1
    assert seen.output(0).op == "opaque" and seen.output(1).name == "_softmax"


def test_sparse_inputs_are_opaque():
    trace = capture(
        torch.fx.symbolic_trace(lambda x, y: (x.to_dense() + y, y * 2)), [torch.eye(3).to_sparse(), torch.eye(3)]
    )
    assert {code for _, code, _ in trace.not_executed} <= {"tensor_subclass", "failed"}
    assert [value.name for value in trace.values if value.op != "input"] == ["mul"]
