"""Programs compiled once for many sizes: Inductor launches our kernels in them, too, with numbers from symbols."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from latent_cases import Latent, attend, latent
from transformers import DynamicCache

import rocm_attn_compile
import rocm_attn_compile.ops as ops
from rocm_attn_compile import _torch_private
from rocm_attn_compile.testing import Float64Everywhere, assert_as_accurate_as_eager, cache_for, to_float64

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("default_gpu")]

FACTOR = 4.0
SIZES = [(2, 70, 70), (3, 257, 300), (2, 16, 901), (5, 129, 129), (2, 1024, 1024)]
"""batch, q_len, kv_len; the first is compiled for."""


def causal(q, k, v):
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(k.shape[2] - q.shape[2] + 1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


def padded(q, k, v):
    keys = torch.arange(k.shape[2], device=q.device)
    lengths = torch.arange(q.shape[0], device=q.device) * 7 + k.shape[2] // 2
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(keys < lengths[:, None])[:, None, None])


def biased(q, k, v):
    distance = (torch.arange(q.shape[2], device=q.device)[:, None] - torch.arange(k.shape[2], device=q.device)).abs()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance / 100.0).to(q.dtype).cos())


def soft_capped(q, k, v):
    return (30.0 * torch.tanh(q @ k.mT / math.sqrt(q.shape[-1]) / 30.0)).softmax(-1) @ v


def projected(q, k, v):
    """Heads side by side, as a linear layer gives them: their row stride is a number, the heads' a symbol."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) * 1.0 for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def leaves(sizes, dtype, requires_grad, head_dim=64):
    batch, q_len, kv_len = sizes
    made = [torch.randn(batch, 4, n, head_dim, device="cuda").to(dtype) for n in (q_len, kv_len, kv_len)]
    return [with_symbols(x, 0, 2).requires_grad_(requires_grad) for x in made]


def with_symbols(tensor, *dims):
    """Not `dynamic=True`, which makes symbols of heads and widths, too, as no model has them."""
    for dim in dims:
        torch._dynamo.mark_dynamic(tensor, dim)
    return tensor


def results(function, inputs, grad_out):
    out = function(*inputs)
    if grad_out is None:
        return (out,)
    return (out, *torch.autograd.grad(out, inputs, grad_out.to(out.dtype)))


def check(function, compiled, sizes, dtype, training):
    torch.manual_seed(sum(sizes))
    inputs = leaves(sizes, dtype, training)
    exact = [x.detach().double().requires_grad_(training) for x in inputs]
    grad_out = torch.randn_like(function(*exact)).to(dtype) if training else None
    want = results(function, exact, grad_out)
    eager = results(function, inputs, grad_out)
    assert_as_accurate_as_eager(results(compiled, inputs, grad_out), eager, want, factor=FACTOR)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("function", [causal, padded, biased, soft_capped, projected])
def test_one_program_for_all_sizes(function, dtype, training):
    compiled = torch.compile(function, backend="rocm_attn", fullgraph=True)
    _, codes = _torch_private.generated_code(lambda: check(function, compiled, SIZES[0], dtype, training))
    assert codes and not any("torch.ops.rocm_attn.attention" in code for code in codes)
    assert any("attention_forward_kernel" in code for code in codes)
    for sizes in SIZES[1:]:
        with torch._dynamo.config.patch(error_on_recompile=True):
            check(function, compiled, sizes, dtype, training)
    assert len(rocm_attn_compile.reports()) == 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_prompts_of_many_lengths_and_the_tokens_after_them(attention):
    """A model as users have it: lengths become symbols at the second prompt, the cache's with the second token."""
    family = next(f for f in FAMILIES if f.name == "llama")
    model = family.build(attention).cuda().to(torch.bfloat16)
    compiled = torch.compile(model, backend="rocm_attn")
    exact = to_float64(model)
    _, codes = _torch_private.generated_code(lambda: generated(compiled, model, exact, (2, 40), 3))
    assert sum("torch.ops.rocm_attn.attention" in code for code in codes) == 0
    assert sum("attention_forward_kernel" in code for code in codes) >= 2
    generated(compiled, model, exact, (2, 57), 3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (123, 300):
            generated(compiled, model, exact, (2, length), 3)


def generated(compiled, model, exact, sizes, steps):
    """Logits of a prompt and of each token behind it, compared with eager's; always the same tokens."""
    torch.manual_seed(sum(sizes))
    tokens = torch.randint(3, 90, (sizes[0], sizes[1] + steps), device="cuda")
    caches = [DynamicCache() for _ in range(3)]
    with torch.no_grad():
        for first, last in [(0, sizes[1]), *((n, n + 1) for n in range(sizes[1], sizes[1] + steps))]:
            results = []
            for run, cache in zip((compiled, model, exact), caches):
                with Float64Everywhere() if run is exact else nullcontext():
                    results.append((run(tokens[:, first:last], **cache_for(model, cache)).logits,))
            assert_as_accurate_as_eager(*results, factor=FACTOR)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_cache_that_grows(head_dim):
    """A step of decoding, compiled while the cache is short, takes one that is a hundred times as long."""

    def step(q, k, v, new_k, new_v):
        k, v = torch.cat((k, new_k), 2), torch.cat((v, new_v), 2)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True), k, v

    def inputs(kv_len):
        make = lambda heads, n: torch.randn(2, heads, n, head_dim, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        caches = (with_symbols(make(2, kv_len), 0, 2) for _ in "kv")
        return with_symbols(make(8, 1), 0), *caches, with_symbols(make(2, 1), 0), with_symbols(make(2, 1), 0)

    compiled = torch.compile(step, backend="rocm_attn", fullgraph=True)
    with torch.no_grad():
        _, codes = _torch_private.generated_code(lambda: compiled(*inputs(40)))
        assert codes and not any("torch.ops.rocm_attn.attention" in code for code in codes)
        for kv_len in (40, 41, 130, 1023, 4100):
            given = inputs(kv_len)
            with torch._dynamo.config.patch(error_on_recompile=True):
                got = compiled(*given)[0]
            exact = step(*(x.double() for x in given))[0]
            assert_as_accurate_as_eager((got,), (step(*given)[0],), (exact,), factor=FACTOR)


def test_a_latent_cache_that_grows():
    """A token against latents: the absorbed form, launched by Inductor, with as many splits as the cache asks for."""

    def step(*tensors, softmax_scale):
        return ops.mla(*tensors, softmax_scale=softmax_scale, impl="TRITON_MLA@1+inline")[0]

    def check_at(kv_len):
        with torch.device("cpu"):
            torch.manual_seed(kv_len)
            call = latent(M=1, N=kv_len, H=16, P=128, R=64, C=512, E=128, softmax_scale=0.07)
        call = Latent({name: x.cuda().bfloat16() for name, x in call.tensors.items()}, {}, call.settings)
        for cache in (call.kv_c, call.k_pe):
            with_symbols(cache, 1)
        got = compiled(*call.whole, **call.settings)
        assert_as_accurate_as_eager((got,), attend(call)[:1], attend(call.to(torch.float64))[:1], factor=FACTOR)

    compiled = torch.compile(step, fullgraph=True)
    with torch.no_grad():
        _, codes = _torch_private.generated_code(lambda: check_at(50))
        assert codes and not any("torch.ops.rocm_attn" in code for code in codes)
        assert any("mla_decode_kernel" in code for code in codes)
        for kv_len in (51, 300, 4100):
            with torch._dynamo.config.patch(error_on_recompile=True):
                check_at(kv_len)
