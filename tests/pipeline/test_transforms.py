"""Attention inside everything PyTorch can wrap around it: regions, torch.func, modes, graph breaks, modules, caches."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from pipeline_harness import (
    SCALE,
    B,
    D,
    H,
    M,
    N,
    Pipeline,
    attend,
    causal,
    check,
    codes,
    qkv,
    rand,
    reports,
    sites,
    square,
)
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from rocm_attn_compile import ops
from rocm_attn_compile.testing import assert_as_accurate_as_eager


def causal_attend(q, k, v):
    return attend(q, k, v, causal(q.shape[-2]))


# --- regions ---


def checkpointed(q, k, v):
    return checkpoint(causal_attend, q, k, v, use_reentrant=False)


def conditional(q, k, v):
    return torch.cond(q.sum() > 0, causal_attend, lambda q, k, v: attend(q, k, v), (q, k, v))


@torch.compiler.nested_compile_region
def region(q, k, v):
    return causal_attend(q, k, v)


def region_twice(q, k, v):
    return region(q, k, v) + region(k, q, v)


@pytest.mark.parametrize(
    ("function", "calls", "num_sites"), [(checkpointed, 1, 1), (conditional, 2, 2), (region_twice, 1, 1)]
)
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_regions_are_rewritten_inside(function, calls, num_sites, trains):
    check(function, square, calls=calls, trains=trains)
    assert len(sites()) == num_sites


def test_selective_checkpoint_sees_the_op():
    """A policy that names aten's attention must name ours: the op is what it is asked about."""
    seen = []

    def policy(context, op, *args, **kwargs):
        seen.append(op)
        return CheckpointPolicy.MUST_SAVE if op is ops.attention else CheckpointPolicy.PREFER_RECOMPUTE

    def function(q, k, v):
        context = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(causal_attend, q, k, v, use_reentrant=False, context_fn=context)

    inputs = [t.requires_grad_() for t in square()]
    pipeline = Pipeline("aot_eager")
    out = torch.compile(function, backend=pipeline, fullgraph=True)(*inputs)
    torch.testing.assert_close(out, causal_attend(*inputs))
    grads = torch.autograd.grad(out.sum(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad(causal_attend(*inputs).sum(), inputs))
    assert pipeline.calls == 1
    assert ops.attention in seen


def mixed_with_flex(q, k, v):
    flexed = flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf")))
    return flexed + attend(q, k, v)


def test_flex_attention_is_left_alone():
    check(mixed_with_flex, square, calls=1)
    assert any("flex_attention is not looked into" in note for note in reports()[0].notes)


# --- torch.func, inside the compiled function ---


FUNCTIONAL = {
    "vmap": lambda q, k, v: torch.vmap(attend)(q, k, v),
    "vmap_shared_key": lambda q, k, v: torch.vmap(attend, in_dims=(0, None, 0))(q, k[0], v),
    "vmap_twice": lambda q, k, v: torch.vmap(torch.vmap(attend))(q, k, v),
    "vmap_inner_dim": lambda q, k, v: torch.vmap(attend, in_dims=1, out_dims=1)(q, k, v),
    "grad": lambda q, k, v: torch.func.grad(lambda q: attend(q, k, v).square().sum())(q),
    "grad_of_grad": lambda q, k, v: torch.func.grad(
        lambda q: torch.func.grad(lambda q: attend(q, k, v).square().sum())(q).square().sum()
    )(q),
    "vmap_of_grad": lambda q, k, v: torch.vmap(torch.func.grad(lambda *a: attend(*a).square().sum()))(q, k, v),
    "vjp": lambda q, k, v: torch.func.vjp(attend, q, k, v)[1](torch.ones_like(q)),
    "jvp": lambda q, k, v: torch.func.jvp(lambda q: attend(q, k, v), (q,), (q.flip(0),)),
    "jacrev": lambda q, k, v: torch.func.jacrev(lambda q: attend(q, k, v)[0, 0, 0])(q),
    "jacfwd": lambda q, k, v: torch.func.jacfwd(lambda q: attend(q, k, v)[0, 0, 0])(q),
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_func_transforms_inside(name):
    check(FUNCTIONAL[name], calls=1)


@pytest.mark.parametrize("name", ["vmap", "vmap_shared_key"])
def test_vmap_in_training(name):
    check(FUNCTIONAL[name], calls=1, trains=True)


@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="Dynamo of torch before 2.13 cannot trace it")
def test_vmap_of_causal_and_dynamic():
    check(lambda q, k, v: torch.vmap(causal_attend)(q, k, v), square, calls=1, trains=True, dynamic=True)


# --- modes ---


def under_autocast(q, k, v):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return causal_attend(q, k, v)


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_autocast(where, trains):
    """Compared with eager under autocast: bfloat16 products, float32 softmax; exact is float64 without autocast."""

    def around(function):
        def run(*inputs):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "outside"):
                return function(*inputs)

        return run

    def run(function, inputs):
        out = function(*inputs)
        if not trains:
            return (out,)
        return (out, *torch.autograd.grad((out * out.detach().sign()).sum(), inputs))

    program = under_autocast if where == "inside" else causal_attend
    inputs = [t.requires_grad_(trains) for t in square()]
    pipeline = Pipeline("aot_eager")
    actual = run(around(torch.compile(program, backend=pipeline, fullgraph=True)), inputs)
    eager = run(around(program), inputs)
    exact = run(causal_attend, [t.detach().double().requires_grad_(trains) for t in inputs])
    assert (pipeline.calls, codes()) == (1, set())
    assert sites()[0].data["dtype"] == "bf16"
    assert_as_accurate_as_eager(actual, eager, exact)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_outside(mode):
    check(causal_attend, square, calls=1, around=mode)
    assert not sites()[0].data["requires_grad"]


def test_compiled_in_one_grad_mode_called_in_the_other():
    pipeline = Pipeline("aot_eager")
    compiled = torch.compile(causal_attend, backend=pipeline, fullgraph=True)
    inputs = [t.requires_grad_() for t in square()]
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), causal_attend(*inputs))
    out = compiled(*inputs)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(causal_attend(*inputs).sum(), inputs)
    )
    assert [site.data["requires_grad"] for site in sites()] == [False, True]


# --- several graphs and lengths ---


def broken(q, k, v):
    first = causal_attend(q, k, v)
    torch._dynamo.graph_break()
    return causal_attend(first, k, v)


@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_graph_breaks(trains):
    check(broken, square, calls=2, trains=trains, fullgraph=False)
    assert [(len(report.sites), report.sites[0].replaced) for report in reports()] == [(1, True), (1, True)]


def heads_of(x):
    return x.unflatten(-1, (H, 3, D)).transpose(1, 2).unbind(-2)


def packed(x):
    return causal_attend(*heads_of(x)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_lengths_do_not_recompile(trains):
    """dynamic=True: one compilation for all lengths."""
    pipeline = Pipeline("aot_eager")
    compiled = torch.compile(packed, backend=pipeline, fullgraph=True, dynamic=True)
    for length in range(7, 41, 3 if trains else 1):
        x = rand(B, length, H * 3 * D).requires_grad_(trains)
        out, want = compiled(x), packed(x)
        torch.testing.assert_close(out, want)
        if trains:
            weight = torch.randn_like(out)
            (got,), (grad,) = (torch.autograd.grad((y * weight).sum(), x) for y in (out, want))
            torch.testing.assert_close(got, grad)
    assert pipeline.calls == len(reports()) == 1


def test_automatic_dynamic_lengths():
    """Without `dynamic`, the second length makes it symbolic."""
    pipeline = Pipeline("aot_eager")
    compiled = torch.compile(packed, backend=pipeline, fullgraph=True)
    for length in range(7, 20):
        x = rand(B, length, H * 3 * D)
        torch.testing.assert_close(compiled(x), packed(x))
    assert pipeline.calls == len(pipeline.graphs) == 2


def test_mark_dynamic():
    """The attention forces no guard on what the user marks as dynamic: mark_dynamic would raise."""
    pipeline = Pipeline("aot_eager")
    compiled = torch.compile(packed, backend=pipeline, fullgraph=True)
    for batch, length in ((3, 9), (4, 17), (5, 9)):
        x = rand(batch, length, H * 3 * D)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(compiled(x), packed(x))
    assert pipeline.calls == len(pipeline.graphs) == 1


def length_from_data(q, k, v, n):
    length = n.item()
    torch._check(length >= 1)
    torch._check(length <= N)
    return attend(q, k[:, :, :length], v[:, :, :length])


def keys_from_data(q, k, v, n):
    i = (k.sum((0, 1, 3)) > 0).nonzero()[:, 0]
    return attend(q, k[:, :, i], v[:, :, i]) + n


@pytest.mark.parametrize("function", [length_from_data, keys_from_data])
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_lengths_that_depend_on_data(function, trains):
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        check(function, lambda: (*qkv(), torch.tensor(7)), calls=1, trains=trains)


def one_after_the_other(q, k, v):
    x = q
    for i in range(3):
        x = x + attend(x * (i + 1), k, v)
    return x


def of_one_tensor(q, k, v):
    return attend(q, q, q, causal(M)) + attend(k, k, k)[:, :, :M]


@pytest.mark.parametrize(("function", "calls"), [(one_after_the_other, 3), (of_one_tensor, 2)])
def test_several_in_one_graph(function, calls):
    check(function, calls=calls, trains=True)


# --- PyTorch's own modules ---


class InBothDtypes:
    """A module that computes in the dtype of its input, for `check`."""

    def __init__(self, module: nn.Module) -> None:
        self.modules = {torch.float32: module, torch.float64: copy.deepcopy(module).double()}

    def __call__(self, x, *args, **kwargs):
        return self.modules[x.dtype](x, *args, **kwargs)


WIDTH = 32
PADDING = torch.tensor([[False] * M, [False] * 3 + [True] * (M - 3)])


def multihead(**kwargs):
    module = InBothDtypes(nn.MultiheadAttention(WIDTH, 4, batch_first=True))

    def function(x, *masks):
        names = dict(zip(("key_padding_mask", "attn_mask"), masks))
        mha = module.modules[x.dtype]
        return mha(x, x, x, **names, **kwargs)

    return function


def embedded(*masks):
    return lambda: (rand(B, M, WIDTH), *(mask() if callable(mask) else mask for mask in masks))


def square_mask():
    return nn.Transformer.generate_square_subsequent_mask(M, dtype=torch.get_default_dtype())


@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("masks", [(), (PADDING,), (None, square_mask)], ids=["plain", "padding", "causal"])
def test_multihead_attention(masks, trains):
    check(multihead(need_weights=False), embedded(*masks), calls=1, trains=trains)


def test_multihead_attention_with_weights():
    function = multihead()
    check(lambda x: function(x)[0], embedded(), calls=1, trains=True)  # asked for, but nobody reads them
    check(function, embedded(), calls=0, refused="weights_used_elsewhere", trains=True)
    with torch.no_grad():
        check(function, embedded(), calls=1)
        check(function, embedded(PADDING), calls=1)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mask", [None, PADDING], ids=["plain", "padding"])
@pytest.mark.parametrize("mode", ["training", "evaluation", "evaluation_no_grad"])
def test_transformer_encoder_layer(mode, mask, norm_first):
    """In evaluation without gradients PyTorch calls one fused op, which is taken apart."""
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
    module = InBothDtypes(layer.train(mode == "training"))
    around = torch.no_grad if mode == "evaluation_no_grad" else torch.enable_grad
    check(lambda x: module(x, src_key_padding_mask=mask), embedded(), calls=1, trains=mode == "training", around=around)


def test_transformer_decoder_layer():
    module = InBothDtypes(nn.TransformerDecoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True))
    check(module, lambda: (rand(B, M, WIDTH), rand(B, N, WIDTH)), calls=2, trains=True)


# --- decoding with a cache ---


def attend_in_cache(q, k, v, keys, values, position):
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v)
    keep = torch.arange(keys.shape[2]) <= position[:, None]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=keep, scale=SCALE)


def test_static_cache():
    """Prompt, then token by token: every step is the last row of causal attention over everything so far."""
    length, prompt = 12, 5
    q, k, v = qkv(q_len=length, kv_len=length)
    want = attend(q, k, v, causal(length))
    pipeline = Pipeline("aot_eager")
    compiled = torch.compile(attend_in_cache, backend=pipeline, fullgraph=True)
    keys, values = torch.zeros(B, H, length + 4, D), torch.zeros(B, H, length + 4, D)
    for start, end in ((0, prompt), *((i, i + 1) for i in range(prompt, length))):
        here = slice(start, end)
        out = compiled(q[:, :, here], k[:, :, here], v[:, :, here], keys, values, torch.arange(start, end))
        torch.testing.assert_close(out, want[:, :, here])
    torch.testing.assert_close(keys[:, :, :length], k)
    torch.testing.assert_close(values[:, :, :length], v)
    assert pipeline.calls == len(pipeline.graphs) <= 3
    assert all(site.data["mask"]["has_kv_end"] for site in sites())


def attend_and_append(q, k, v, keys, values):
    keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    i = torch.arange(q.shape[2])[:, None] + keys.shape[2] - q.shape[2]
    return attend(q, keys, values, torch.arange(keys.shape[2]) <= i), keys, values


def test_growing_cache():
    length = 12
    q, k, v = qkv(q_len=length, kv_len=length)
    want = attend(q, k, v, causal(length))
    pipeline = Pipeline("aot_eager")
    compiled = torch.compile(attend_and_append, backend=pipeline, fullgraph=True)
    keys, values = k[:, :, :5], v[:, :, :5]
    for i in range(5, length):
        here = slice(i, i + 1)
        out, keys, values = compiled(q[:, :, here], k[:, :, here], v[:, :, here], keys, values)
        torch.testing.assert_close(out, want[:, :, here])
    torch.testing.assert_close(values, v)
    assert pipeline.calls == len(pipeline.graphs) == 2


def test_cache_as_module_buffers():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("keys", torch.zeros(B, H, 8, D))
            self.register_buffer("values", torch.zeros(B, H, 8, D))

        def forward(self, q, k, v, position):
            return attend_in_cache(q, k, v, self.keys, self.values, position)

    eager, module = Decoder(), Decoder()
    pipeline = Pipeline("aot_eager")
    module.compile(backend=pipeline, fullgraph=True)
    for i in range(4):
        token = [rand(B, H, 1, D) for _ in range(3)]
        torch.testing.assert_close(module(*token, torch.tensor([i])), eager(*token, torch.tensor([i])))
    torch.testing.assert_close(module.state_dict(), eager.state_dict())
    assert pipeline.calls == len(pipeline.graphs) == 1


# --- torch.func around the compiled function ---


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, q, k, v: torch.func.grad(lambda q: f(q, k, v).sum())(q),
        lambda f, q, k, v: torch.vmap(f)(q, k, v),
        lambda f, q, k, v: torch.func.jvp(f, (q, k, v), (q, k, v)),
    ],
    ids=["grad", "vmap", "jvp"],
)
def test_func_transforms_outside(transform):
    """PyTorch compiles nothing there and runs the function itself."""
    pipeline = Pipeline("aot_eager")
    compiled = torch.compile(attend, backend=pipeline)
    inputs = qkv()
    torch.testing.assert_close(transform(compiled, *inputs), transform(attend, *inputs))
    assert pipeline.calls == len(reports()) == 0
