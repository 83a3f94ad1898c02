"""The op under torch.func, forward mode, higher derivatives, hooks, checkpoint, autocast, and torch.compile."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, EMPTY_CASES, make, randn, seeded
from oracle import Call, attend
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import rocm_attn_compile.ops as ops

TRANSFORMED = [
    "causal-square", "gqa-causal", "gqa-decode", "bias-heads", "bias-keys", "key-mask-bias-causal", "kv-range-batch",
    "documents-one-batch", "sinks-window-gqa", "soft-cap-bias-sinks", "small-v-heads", "layout-bshd", "everything",
]  # fmt: skip
DOUBLE = ["gqa-causal", "bias-heads", "sinks-window-gqa", "soft-cap-bias-sinks", "everything"]


def functions(call: Call):
    """The op and the oracle as functions of the differentiable tensors, and those tensors."""
    leaves = call.differentiable()
    names = list(leaves)

    def with_leaves(values) -> Call:
        named = dict(zip(names, values))
        tensors = {name: named.get(name, tensor) for name, tensor in call.tensors.items()}
        return Call(named["q"], named["k"], named["v"], tensors, call.settings)

    def op(*values):
        new = with_leaves(values)
        return ops.attention(new.q, new.k, new.v, **new.kwargs)[0]

    def oracle(*values):
        return attend(with_leaves(values))[0]

    return op, oracle, tuple(t.detach() for t in leaves.values())


def pair(name: str, cases=CASES, **settings):
    call = seeded(cases[name], **settings)
    call.settings.setdefault("empty_rows", "nan")
    return functions(call)


def close(a, b):
    torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("name", TRANSFORMED)
def test_forward_mode_and_reverse_mode(name):
    op, oracle, values = pair(name)
    tangents = tuple(torch.randn_like(v).where(v.isfinite(), 0.0) for v in values)
    close(jvp(op, values, tangents), jvp(oracle, values, tangents))
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(v, t) for v, t in zip(values, tangents)]
        got = torch.autograd.forward_ad.unpack_dual(op(*duals)).tangent
        want = torch.autograd.forward_ad.unpack_dual(oracle(*duals)).tangent
        close(got, want)
    every = tuple(range(len(values)))
    close(grad(lambda *v: op(*v).sin().sum(), every)(*values), grad(lambda *v: oracle(*v).sin().sum(), every)(*values))


def test_forward_mode_reaches_every_input():
    """A tangent on any one input, with no_grad too; a dropped tangent is the failure to guard against."""
    op, oracle, values = pair("soft-cap-bias-sinks")
    for i in range(len(values)):
        for context in (torch.enable_grad, torch.no_grad):
            with context(), torch.autograd.forward_ad.dual_level():
                args = list(values)
                args[i] = torch.autograd.forward_ad.make_dual(args[i], torch.randn_like(args[i]))
                got = torch.autograd.forward_ad.unpack_dual(op(*args)).tangent
                assert got is not None
                close(got, torch.autograd.forward_ad.unpack_dual(oracle(*args)).tangent)


@pytest.mark.parametrize("name", DOUBLE)
def test_gradgradcheck(name):
    op, _, values = pair(name)
    values = tuple(v.requires_grad_() for v in values)
    assert torch.autograd.gradgradcheck(op, values, fast_mode=True, check_fwd_over_rev=True)
    assert torch.autograd.gradcheck(op, values, fast_mode=True, check_forward_ad=True, check_batched_grad=True)


# Not "zero": its eager spelling, nan_to_num of NaN, has NaN second derivatives; gradgradcheck below has none.
@pytest.mark.parametrize("mode", ["mean", "mean_added"])
@pytest.mark.parametrize("name", ["kv-end", "left-padding-causal"])
def test_double_backward_with_empty_rows(name, mode):
    op, oracle, values = pair(name, EMPTY_CASES, empty_rows=mode)
    weight = torch.randn_like(op(*values))

    def second(f):
        def first(*v):
            return grad(lambda *w: (f(*w) * weight).sin().sum(), (0, 1, 2))(*v)

        return grad(lambda *v: sum((g * g).sum() for g in first(*v)), (0, 1, 2))(*values)

    close(second(op), second(oracle))


def test_double_backward_with_zeroed_rows():
    op, _, values = pair("left-padding-causal", EMPTY_CASES, empty_rows="zero")
    assert torch.autograd.gradgradcheck(op, tuple(v.requires_grad_() for v in values), fast_mode=True)


@pytest.mark.parametrize("name", ["gqa-causal", "sinks-window-gqa", "bias-heads"])
def test_composed_transforms(name):
    op, oracle, values = pair(name)
    q, rest = values[0], values[1:]

    def loss(f):
        return lambda x: f(x, *rest).sin().sum()

    close(grad(lambda x: grad(loss(op))(x).square().sum())(q), grad(lambda x: grad(loss(oracle))(x).square().sum())(q))
    many = torch.randn(3, *q.shape, dtype=q.dtype)
    close(vmap(grad(loss(op)))(many), vmap(grad(loss(oracle)))(many))
    close(grad(lambda x: vmap(loss(op))(x).sum())(many), grad(lambda x: vmap(loss(oracle))(x).sum())(many))
    close(vmap(vmap(loss(op)))(torch.stack([many, many + 1])), vmap(vmap(loss(oracle)))(torch.stack([many, many + 1])))


def test_jacobians_and_hessian():
    call = seeded(lambda: make({"sinks": randn(2)}, B=1, M=2, N=3, D=2, E=2, band_upper=1))
    op, oracle, values = functions(call)
    q, rest = values[0], values[1:]
    close(jacrev(op, argnums=(0, 1, 2, 3))(*values), jacrev(oracle, argnums=(0, 1, 2, 3))(*values))
    close(jacfwd(op)(*values), jacfwd(oracle)(*values))
    close(hessian(lambda x: op(x, *rest).sin().sum())(q), hessian(lambda x: oracle(x, *rest).sin().sum())(q))


def batched(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Different values along a new leading dim, of the same kind."""
    if tensor.dtype == torch.bool:
        return torch.stack([tensor, *[tensor.roll(i, -1) for i in range(1, size)]])
    if tensor.is_floating_point():
        return torch.stack([tensor + i for i in range(size)])
    return torch.stack([tensor + (i % 2) for i in range(size)])


@pytest.mark.parametrize("name", [*TRANSFORMED, "key-mask-one-batch", "mask-row", "sinks-decode"])
def test_vmap_over_each_input_alone_and_over_all(name):
    """Outputs and per-sample gradients against a loop, each input mapped alone, then all together."""
    call = seeded(CASES[name])
    call.settings["empty_rows"] = "zero"
    named = {"q": call.q, "k": call.k, "v": call.v, **call.tensors}
    floats = list(call.differentiable())
    weight = randn(*call.q.shape[:3], call.v.shape[3])

    def run(*values):
        given = dict(zip(named, values))
        return ops.attention(given.pop("q"), given.pop("k"), given.pop("v"), **given, **call.settings)

    def loss(*values):
        return (run(*values)[0] * weight).sum()

    places = tuple(list(named).index(n) for n in floats)
    for mapped in [*[{n} for n in named], set(named)]:
        values = [batched(t, 3) if n in mapped else t for n, t in named.items()]
        in_dims = tuple(0 if n in mapped else None for n in named)
        slices = [[v[i] if n in mapped else v for n, v in zip(named, values)] for i in range(3)]
        close(vmap(run, in_dims)(*values), tuple(map(torch.stack, zip(*[run(*s) for s in slices]))))
        got = vmap(grad(loss, places), in_dims)(*values)
        close(got, tuple(map(torch.stack, zip(*[grad(loss, places)(*s) for s in slices]))))


def test_vmap_of_the_backward_with_only_grad_out_mapped():
    call = seeded(CASES["everything"]).to(torch.float64)
    out, _ = ops.attention(call.q, call.k, call.v, **call.kwargs)
    leaves = list(call.differentiable().values())
    grads = torch.randn(3, *out.shape, dtype=out.dtype)
    got = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    close(got, tuple(map(torch.stack, zip(*[torch.autograd.grad(out, leaves, g, retain_graph=True) for g in grads]))))


def test_vmap_other_dims_and_dropout():
    q, k, v = (torch.randn(2, 4, 3, 5, 8).double() for _ in range(3))
    run = lambda q, k, v: ops.attention(q, k, v, softmax_scale=0.3, band_upper=0)[0]  # noqa: E731
    close(vmap(run, (2, 0, None), out_dims=1)(q.movedim(2, 2), q.movedim(2, 0), k[:, :, 0]).movedim(1, 0),
          torch.stack([run(q[:, :, i], q[:, :, i], k[:, :, 0]) for i in range(3)]))  # fmt: skip
    seeds = torch.tensor([3, 4, 5])

    def drop(q, seed):
        return ops.attention(q, q, q, dropout_seed=seed, dropout_p=0.5, softmax_scale=0.3)[0]

    x = v.movedim(2, 0)
    close(vmap(drop)(x, seeds), torch.stack([drop(a, s) for a, s in zip(x, seeds)]))
    close(vmap(drop, (0, None))(x, seeds[0]), torch.stack([drop(a, seeds[0]) for a in x]))
    loss = lambda q, seed: drop(q, seed).sin().sum()  # noqa: E731
    close(vmap(grad(loss))(x, seeds), torch.stack([grad(loss)(a, s) for a, s in zip(x, seeds)]))
    tangent = torch.randn_like(x[0])
    close(jvp(lambda a: drop(a, seeds[0]), (x[0],), (tangent,))[0], drop(x[0], seeds[0]))
    assert torch.autograd.gradgradcheck(lambda a: drop(a, seeds[0]), (x[0].requires_grad_(),), fast_mode=True)
    leaf = x[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: drop(a, seeds[0]), (leaf,), check_forward_ad=True, fast_mode=True)


def test_lse_is_not_differentiable():
    call = seeded(CASES["plain"]).to(torch.float64)
    _, lse = ops.attention(call.q, call.k, call.v, softmax_scale=0.3)
    assert not lse.requires_grad


def test_gradients_only_where_wanted():
    call = seeded(CASES["bias-heads"])
    for wanted in ("q", "k", "v", "attn_bias"):
        leaves = {n: t.clone().requires_grad_(n == wanted) for n, t in call.differentiable().items()}
        out = ops.attention(leaves["q"], leaves["k"], leaves["v"], leaves["attn_bias"], **call.settings)[0]
        out.sum().backward()
        assert [n for n, t in leaves.items() if t.grad is not None] == [wanted]


def test_saved_tensor_hooks_and_checkpoint():
    op, oracle, values = pair("sinks-window-gqa")
    values = tuple(v.requires_grad_() for v in values)
    want = torch.autograd.grad(oracle(*values).sum(), values)
    packed = []

    def pack(t):
        packed.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.clone()):
        out = op(*values)
    assert len(packed) == 6  # q, k, v, sinks, out, lse: nothing of size q_len x kv_len
    close(torch.autograd.grad(out.sum(), values), want)
    for use_reentrant in (False, True):
        out = torch.utils.checkpoint.checkpoint(op, *values, use_reentrant=use_reentrant)
        leaves = torch.autograd.grad(out.sum(), values) if not use_reentrant else None
        if use_reentrant:
            out.sum().backward()
            leaves = tuple(v.grad for v in values)
        close(leaves, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_q_k_v_and_keeps_the_bias_exact(dtype):
    q, k, v = (torch.randn(2, 2, 5, 8, requires_grad=True) for _ in range(3))
    bias = torch.zeros(1, 1, 5, 5)
    bias[..., 3, :] = torch.finfo(torch.float32).min  # -inf if it were cast
    with torch.autocast("cpu", dtype):
        out, lse = ops.attention(q, k, v, bias, softmax_scale=0.3)
        assert out.dtype == dtype == torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype
        assert lse.dtype == torch.float32
    assert bool(out.isfinite().all())
    want, _ = ops.attention(q.to(dtype), k.to(dtype), v.to(dtype), bias, softmax_scale=0.3)
    torch.testing.assert_close(out, want)
    out.float().sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32
    double = q.detach().double()
    with torch.autocast("cpu", dtype):
        assert ops.attention(double, double, double, softmax_scale=0.3)[0].dtype == torch.float64
    with torch.autocast("cpu", dtype, enabled=False):
        assert ops.attention(q, k, v, softmax_scale=0.3)[0].dtype == torch.float32


def test_inference_mode_and_meta():
    q = torch.randn(1, 2, 3, 4)
    with torch.inference_mode():
        close(ops.attention(q, q, q, softmax_scale=0.5)[0], ops.attention(q, q, q, softmax_scale=0.5)[0])
    meta = q.to("meta").requires_grad_()
    out, lse = ops.attention(meta, meta, meta, softmax_scale=0.5, out_layout="bshd")
    assert out.stride() == (24, 4, 8, 1) and lse.dtype == torch.float32
    out.sum().backward()
    assert meta.grad.shape == meta.shape
