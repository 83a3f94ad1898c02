"""The SSA of each kind of op: functional twins, views, leaves, whole calls, modes."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F

from rocm_attn_compile.capture import capture, dump

aten = torch.ops.aten


def test_operators_become_overloads(captured):
    seen = captured(lambda x: (x * 2 + 1).softmax(-1), torch.randn(3, 5))
    assert [value.op for value in seen.trace.values] == [
        "input",
        aten.mul.Tensor,
        aten.add.Tensor,
        aten._softmax.default,
    ]
    x, mul, add, softmax = seen.trace.values
    assert mul.args == (x, 2) and add.args == (mul, 1) and softmax.args == (add, -1, False)
    assert x.users == [mul] and mul.users == [add] and softmax.users == []
    assert (mul.shape, mul.stride, mul.dtype, mul.device.type) == ((3, 5), (5, 1), torch.float32, "cpu")
    assert [value.time for value in seen.trace.values] == sorted(value.time for value in seen.trace.values)
    assert mul.node.name == "mul" and repr(mul) == "%1:mul[3, 5]"


@pytest.mark.parametrize(
    "spelling", [torch.matmul, operator.matmul, lambda a, b: torch.einsum("bhqd,bhdk->bhqk", a, b)]
)
def test_contractions_all_become_bmm(captured, spelling):
    seen = captured(lambda a, b: spelling(a, b), torch.randn(2, 3, 4, 5), torch.randn(2, 3, 5, 6))
    assert seen.names.count("bmm") == 1
    assert set(seen.names) <= {"expand", "view", "bmm", "permute", "unsqueeze", "squeeze", "reshape", "_unsafe_view"}


def test_several_outputs_are_told_apart(captured):
    seen = captured(lambda x: operator.add(*x.chunk(2, -1)), torch.randn(3, 4))
    first, second = [value for value in seen.trace.values if value.name == "split"]
    assert (first.output_index, second.output_index) == (0, 1)
    assert seen.value("add").args == (first, second)


@pytest.mark.parametrize(
    ("write", "functional"),
    [
        (lambda x, o: x.add_(o), aten.add.Tensor),
        (lambda x, o: x.mul_(2), aten.mul.Tensor),
        (lambda x, o: x.copy_(o), aten.copy.default),
        (lambda x, o: x.fill_(1.5), aten.fill.Scalar),
        (lambda x, o: x.zero_(), aten.zero.default),
        (lambda x, o: x.masked_fill_(o > 0, -1.0), aten.masked_fill.Scalar),
        (lambda x, o: x.index_copy_(0, torch.tensor([1, 0, 2]), o), aten.index_copy.default),
        (lambda x, o: x.index_put_((torch.tensor([1]),), o[0]), aten.index_put.default),
        (lambda x, o: x.scatter_(0, torch.zeros(1, 4, dtype=torch.long), o), aten.scatter.src),
        (lambda x, o: x.triu_(1), aten.triu.default),
        (lambda x, o: operator.iadd(x, o), aten.add.Tensor),
        (lambda x, o: x.clamp_(min=0), aten.clamp.default),
        (lambda x, o: x.exp_(), aten.exp.default),
    ],
    ids=lambda v: str(v) if isinstance(v, torch._ops.OpOverload) else "",
)
def test_in_place_ops_are_recorded_as_their_functional_twin(captured, check_replay, write, functional):
    def function(x, other):
        x = x + 0
        write(x, other)
        return x * 1

    x, other = torch.randn(3, 4), torch.randn(3, 4)
    seen = captured(function, x, other)
    assert functional in [value.op for value in seen.trace.values]
    assert not any(getattr(value.op, "_schema", None) and value.op._schema.is_mutable for value in seen.trace.values)
    assert not seen.codes
    assert check_replay(seen.trace, seen.example_inputs)
    before, after = seen.trace.tensors, seen.output().args[0]
    assert after.op is functional and any(tensor.storage.value is after for tensor in before.values())


def test_random_and_out_writes_are_opaque(captured):
    def function(x):
        noise = torch.empty(3, 4).normal_()
        torch.add(x, 1, out=noise)
        return x + noise

    seen = captured(function, torch.randn(3, 4))
    x, noise = seen.output().args
    assert x.op == "input" and noise.op == "opaque"
    (storage,) = {tensor.storage for tensor in seen.trace.tensors.values() if tensor.storage.history}
    assert storage.value is noise and len(storage.history) == 2


def test_constants_have_their_number(captured):
    def function(x):
        return x * torch.tensor(0.5) + torch.tensor([3]) + torch.tensor([1.0, 2.0])

    seen = captured(function, torch.randn(3, 2))
    constants = [value for value in seen.trace.values if value.op == "constant"]
    assert [value.kwargs["value"] for value in constants] == [0.5, 3, None]


def test_a_lifted_constant_has_its_number_but_a_buffer_has_not():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor(0.5))
            self._tensor_constant0 = torch.tensor(0.25)

        def forward(self, x):
            return x * self.scale * self._tensor_constant0

    trace = capture(torch.fx.symbolic_trace(Model()), [torch.randn(2)])
    x, scale, _, constant, _ = trace.values
    assert (scale.op, scale.kwargs) == ("input", {}) and constant.kwargs == {"value": 0.25}


def test_factories_are_not_detached(captured):
    seen = captured(lambda x: x + torch.ones(3) + torch.zeros_like(x), torch.randn(3))
    assert seen.names == ["ones", "add", "zeros_like", "add"]
    assert all(tensor.is_base for tensor in seen.trace.tensors.values())


@pytest.mark.parametrize("detach", [lambda x: x.detach(), lambda x: x.data])
def test_detach_is_visible(captured, detach):
    seen = captured(lambda x: detach(x) * 2, torch.randn(3, requires_grad=True))
    assert seen.names == ["detach", "mul"]


def test_library_calls_are_cut(captured):
    linear, norm = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)
    seen = captured(lambda x: F.gelu(linear(norm(x))).tanh(), torch.randn(3, 4))
    assert seen.names == ["opaque", "opaque", "opaque", "tanh"]
    assert not seen.codes, "a cut is not a failure"
    assert {value.node.name for value in seen.trace.values if value.op == "opaque"} == {"layer_norm", "linear", "gelu"}


def test_a_cut_function_in_place_is_not_cut(captured, check_replay):
    seen = captured(lambda x: F.relu(x + 0, inplace=True) * 1, torch.randn(3, 4))
    assert seen.names == ["add", "relu", "mul"]
    assert check_replay(seen.trace, seen.example_inputs)


def test_sdpa_is_whole_with_all_arguments(captured, check_replay):
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    seen = captured(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3), q, k, v)
    call = seen.value("sdpa")
    assert set(call.kwargs) == {
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    }  # fmt: skip
    assert call.kwargs["is_causal"] is True and call.kwargs["scale"] == 0.3 and call.kwargs["dropout_p"] == 0.0
    assert call.args == () and call.kwargs["query"].users == [call]
    assert check_replay(seen.trace, seen.example_inputs)


def test_sdpa_positional_and_overload():
    def function(q, k, v, mask):
        one = F.scaled_dot_product_attention(q, k, v, mask, 0.0, False)
        return torch.ops.aten.scaled_dot_product_attention.default(one, k, v)

    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    trace = capture(torch.fx.symbolic_trace(function), [q, k, v, torch.ones(4, 4, dtype=torch.bool)])
    one, two = [value for value in trace.values if value.op == "sdpa"]
    assert one.kwargs["attn_mask"].dtype == torch.bool and two.kwargs["query"] is one
    assert one.shape == (1, 2, 4, 8)


@pytest.mark.parametrize(
    "dropout",
    [
        lambda x: F.dropout(x, 0.25),
        lambda x: F.dropout(x, p=0.25, training=True, inplace=True),
        lambda x: torch.dropout(x, 0.25, train=True),
        lambda x: torch.native_dropout(x, 0.25, True)[0],
        lambda x: torch.ops.aten.dropout(x, 0.25, True),
        lambda x: torch.dropout_(x, 0.25, True),
        torch.nn.Dropout(0.25),
    ],
)
def test_dropout_is_whole(captured, dropout):
    seen = captured(lambda x: dropout(x * 1) * 2, torch.randn(3, 4))
    call = seen.value("dropout")
    assert call.args[1:] == (0.25, True) and call.args[0].name == "mul" and call.kwargs == {}
    assert seen.output().args[0] is call


@pytest.mark.parametrize(
    "dropout", [lambda x: F.dropout(x, 0.25, training=False), lambda x: torch.dropout(x, 0.0, True)]
)
def test_dropout_that_is_off_is_its_input(captured, dropout):
    seen = captured(lambda x: dropout(x * 1).add_(1), torch.randn(3, 4))
    assert seen.names == ["mul", "add"]
    mul = next(tensor for node, tensor in seen.trace.tensors.items() if node.name.startswith("mul"))
    assert mul.storage.value.name == "add", "eager returns the very tensor, so the write goes to both"


def test_dump_is_readable(captured):
    def function(x):
        with torch.no_grad():
            y = x + 1
        y[:, :2] = 0.0
        return torch.cat([x, y], 0)

    seen = captured(function, torch.randn(2, 4))
    assert dump(seen.trace).splitlines() == [
        "%0 = input() : f32[2, 4]  # l_x_",
        "%1 = aten.add.Tensor(%0, 1) : f32[2, 4]  # y, no_grad",
        "%2 = constant(value=0.0) : f32[]  # setitem",
        "%3 = aten.slice.Tensor(%1, 1, 0, 2) : f32[2, 2]  # setitem",
        "%4 = aten.fill.Tensor(%3, %2) : f32[2, 2]  # setitem",
        "%5 = view_scatter(%1, %4, [[aten.slice.Tensor, [1, 0, 2], {}, None]]) : f32[2, 4]  # setitem",
        "%6 = aten.cat.default([%0, %5]) : f32[4, 4]  # cat",
    ]
