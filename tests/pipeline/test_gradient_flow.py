"""Where gradients stop in eager they stop in the compiled program, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from pipeline_harness import SCALE, B, D, H, M, N, attend, check, qkv, rand


def weights(q, k):
    return (q @ k.mT * SCALE).softmax(-1)


def query_detached(q, k, v):
    return attend(q.detach(), k, v)


def query_made_under_no_grad(q, k, v):
    with torch.no_grad():
        q = q * 2.0
    return attend(q, k, v)


def key_viewed_under_no_grad(q, k, v):
    with torch.no_grad():
        kt = k.mT
    return (q @ kt * SCALE).softmax(-1) @ v


def all_under_no_grad(q, k, v):
    with torch.no_grad():
        out = attend(q, k, v)
    return out + v[:, :, :M]


def enabled_inside_no_grad(q, k, v):
    with torch.no_grad():
        scale = q.amax() * 0.0 + 1.0
        with torch.enable_grad():
            return attend(q, k, v) * scale


def maximum_under_no_grad(q, k, v):
    """What is subtracted from a whole row has no influence on the gradient."""
    s = q @ k.mT * SCALE
    with torch.no_grad():
        maximum = s.amax(-1, keepdim=True)
    e = (s - maximum).exp()
    return e / e.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize(
    "function",
    [
        query_detached,
        query_made_under_no_grad,
        key_viewed_under_no_grad,
        all_under_no_grad,
        enabled_inside_no_grad,
        maximum_under_no_grad,
    ],
)
def test_operands_without_gradient(function):
    check(function, calls=1, trains=True)


def bias_detached(q, k, v, a, b):
    return (q @ k.mT * SCALE + a.detach()).softmax(-1) @ v + b.sum()


def bias_viewed_under_no_grad(q, k, v, a, b):
    with torch.no_grad():
        a = a.unsqueeze(0)
    return (q @ k.mT * SCALE + a).softmax(-1) @ v + b.sum()


def biases_added_under_no_grad(q, k, v, a, b):
    """The sum is one bias without gradient, not two with."""
    with torch.no_grad():
        bias = a + b
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


def second_product_under_no_grad(q, k, v, a, b):
    with torch.no_grad():
        other = q @ k.mT
    return (q.flip(-1) @ k.mT + other).softmax(-1) @ v + b.sum()


@pytest.mark.parametrize(
    "function", [bias_detached, bias_viewed_under_no_grad, biases_added_under_no_grad, second_product_under_no_grad]
)
def test_biases_without_gradient(function):
    check(function, lambda: (*qkv(), rand(H, M, N), rand(M, N)), calls=1, trains=True)


def weights_under_no_grad(q, k, v):
    with torch.no_grad():
        p = weights(q, k)
    return p @ v


def product_under_no_grad(q, k, v):
    with torch.no_grad():
        s = q @ k.mT
    return (s * SCALE).softmax(-1) @ v


def normaliser_under_no_grad(q, k, v):
    e = (q @ k.mT * SCALE).exp()
    with torch.no_grad():
        total = e.sum(-1, keepdim=True)
    return e / total @ v


def logsumexp_under_no_grad(q, k, v):
    s = q @ k.mT * SCALE
    with torch.no_grad():
        total = s.logsumexp(-1, keepdim=True)
    return (s - total).exp() @ v


def weights_detached(q, k, v):
    return weights(q, k).detach() @ v


def weights_data(q, k, v):
    return weights(q, k).data @ v


def scores_detached(q, k, v):
    return ((q @ k.mT).detach() * SCALE).softmax(-1) @ v


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (weights_under_no_grad, "mixed_grad_mode"),
        (product_under_no_grad, "mixed_grad_mode"),
        (normaliser_under_no_grad, "mixed_grad_mode"),
        (logsumexp_under_no_grad, "mixed_grad_mode"),
        (weights_detached, "weights_detached"),
        (weights_data, "weights_detached"),
        (scores_detached, "score_op"),
    ],
)
def test_gradient_cut_inside_the_attention(function, code):
    check(function, calls=0, refused=code, trains=True)


# --- gradients that the program changes on their way ---


class Exp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].exp()


class HalvedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 0.5


class OwnAttention(torch.autograd.Function):
    """A gradient of its own, on purpose not that of attention."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return attend(q, k, v)

    @staticmethod
    def backward(ctx, grad):
        return tuple(grad.sum() * t for t in ctx.saved_tensors)


def functions_around(q, k, v):
    return Exp.apply(attend(Exp.apply(q), k, v))


def function_on_the_weights(q, k, v):
    return HalvedGradient.apply(weights(q, k)) @ v


def hook_on_the_weights(q, k, v):
    p = weights(q, k)
    p.register_hook(lambda grad: grad * 2.0)
    return p @ v


def test_autograd_functions_around_an_attention():
    check(functions_around, calls=1, trains=True)


@pytest.mark.parametrize("function", [function_on_the_weights, hook_on_the_weights])
def test_gradient_changed_inside_the_attention(function):
    check(function, calls=0, refused="weights_used_elsewhere", trains=True)


def test_attention_with_a_gradient_of_its_own():
    check(OwnAttention.apply, calls=0, trains=True)


def test_operands_that_need_no_gradient():
    """Only v is trained: q and k get none, and none is computed."""

    def frozen(q, k, v, projection):
        return attend(q, k, v @ projection)

    q, k, v = qkv()
    check(lambda projection: frozen(q.to(projection.dtype), k.to(projection.dtype), v.to(projection.dtype), projection),
          lambda: (rand(D, D),), calls=1, trains=True)  # fmt: skip


def test_float_bias_shared_by_the_batch_gets_its_gradient():
    check(
        lambda q, k, v, b: (q @ k.mT * SCALE + b).softmax(-1) @ v,
        lambda: (*qkv(), rand(1, H, M, N)),
        calls=1,
        trains=True,
    )
    check(
        lambda q, k, v, b: (q @ k.mT * SCALE + b).softmax(-1) @ v,
        lambda: (*qkv(), rand(B, 1, 1, N)),
        calls=1,
        trains=True,
    )
