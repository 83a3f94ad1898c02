"""Latent attention on a real GPU: the ops through their dispatch, and Hugging Face models that read latents.

`make test-gpu`. The ops are compared with float64 and must be as accurate as eager on the same device.
"""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from latent_cases import MASKS, SIZES, Latent, attend, latent, paged, rows, seeded
from latent_models import LAYERS, build, prompt
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

import rocm_attn_compile.ops as ops
from rocm_attn_compile.integrations.transformers import use_latent_cache
from rocm_attn_compile.kernels.triton.launch import device_arch
from rocm_attn_compile.testing import assert_as_accurate_as_eager, cache_for

pytestmark = pytest.mark.gpu

FACTOR = 8.0  # as on the CPU: of few numbers eager's own error is a matter of luck
DEEPSEEK = {"H": 16, "P": 128, "R": 64, "C": 512, "E": 128, "softmax_scale": 0.07}
CASES = {
    **MASKS,
    **SIZES,
    "deepseek-decode": lambda: latent({"kv_end": rows(211, 300)}, M=1, N=301, **DEEPSEEK),
    "deepseek-chunk": lambda: latent({"kv_start": rows(3, 0)}, M=33, N=301, band_upper=268, **DEEPSEEK),
    "deepseek-prompt": lambda: latent(M=257, N=257, band_upper=0, **DEEPSEEK),
}


@pytest.fixture(autouse=True)
def _exact_products():
    torch.backends.cuda.matmul.allow_tf32 = False


def on_gpu(call: Latent, dtype: torch.dtype, requires_grad: bool = False) -> Latent:
    tensors = {name: t.cuda().to(dtype).requires_grad_(requires_grad) for name, t in call.tensors.items()}
    return Latent(tensors, {name: mask.cuda() for name, mask in call.masks.items()}, call.settings)


def results(call: Latent, function, grad_out):
    out, lse = function(call)
    return (out, lse, *torch.autograd.grad(out, tuple(call.tensors.values()), grad_out.to(out.dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name, dtype, monkeypatch):
    call = on_gpu(seeded(CASES[name]), dtype)
    exact = Latent({n: t.double().cpu() for n, t in call.tensors.items()}, seeded(CASES[name]).masks, call.settings)
    with torch.no_grad():
        got = ops.mla(*call.whole, **call.kwargs)
        assert_as_accurate_as_eager(got, attend_on(call), attend(exact), factor=FACTOR)
    grad_out = torch.randn(got[0].shape, dtype=torch.float64)
    leaves = on_gpu(Latent(exact.tensors, exact.masks, exact.settings), dtype, requires_grad=True)
    got = results(leaves, lambda c: ops.mla(*c.whole, **c.kwargs), grad_out.cuda())
    eager = results(leaves, attend_on, grad_out.cuda())
    exact = exact.to(torch.float64, requires_grad=True)
    want = results(exact, attend, grad_out.to(dtype).double())
    if call.kv_c.shape[1] == 1:
        # A lone key has weight 1 and no gradient of its score: eager is exact there, by luck and not by merit.
        torch.testing.assert_close(got, eager, atol=100 * torch.finfo(dtype).eps, rtol=0.02)
    else:
        assert_as_accurate_as_eager(got, eager, want, factor=FACTOR)


def attend_on(call: Latent):
    with torch.device("cuda"):
        return attend(call)


@pytest.mark.parametrize("name", ["kv-end", "decode", "deepseek-decode"])
def test_pages(name):
    call = seeded(CASES[name])
    kv_c, k_pe, table = paged(call, 16)
    exact = attend(call)
    moved = on_gpu(call, torch.float32)
    pages = (kv_c.float().cuda(), k_pe.float().cuda())
    got = ops.mla(moved.q_nope, moved.q_pe, *pages, moved.w_uk, moved.w_uv, table.cuda(), **moved.kwargs)
    torch.testing.assert_close([t.double().cpu() for t in got], list(exact), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["deepseek-decode", "deepseek-chunk", "deepseek-prompt"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_written_out(name, training, backend):
    """Inductor launches the kernels; where CUDA graphs will, Hopper's decode stays an opaque call of its own kernel."""
    kernels = {}

    def recorder(graph_module, inputs):
        graph = graph_module.graph
        opaque = [n.target for n in graph.nodes if getattr(n.target, "namespace", "") == "rocm_attn"]
        kernels["opaque"] = kernels.get("opaque", []) + [target._schema.name for target in opaque]
        kernels["written"] = kernels.get("written", 0) + sum("triton_kernel" in str(n.target) for n in graph.nodes)
        return graph_module.forward

    def step(*tensors, call):
        return ops.mla(*tensors, **call.kwargs, impl="TRITON_MLA@1+inline")

    call = on_gpu(seeded(CASES[name]), torch.bfloat16, requires_grad=training)
    exact = Latent(
        {n: t.detach().double().cpu() for n, t in call.tensors.items()}, seeded(CASES[name]).masks, call.settings
    )
    made_by = aot_autograd(fw_compiler=recorder, bw_compiler=recorder) if backend == "aot_eager" else "inductor"
    compiled = torch.compile(step, backend=made_by, dynamic=False, fullgraph=True)
    if training:
        exact = exact.to(torch.float64, requires_grad=True)
        grad_out = torch.randn_like(attend(exact)[0]).bfloat16().double()
        got = results(call, lambda c: compiled(*c.whole, call=c), grad_out.cuda())
        eager, want = results(call, attend_on, grad_out.cuda()), results(exact, attend, grad_out)
    else:
        with torch.no_grad():
            got, eager, want = compiled(*call.whole, call=call), attend_on(call), attend(exact)
    assert_as_accurate_as_eager(got, eager, want, factor=FACTOR)
    if backend == "aot_eager":
        assert kernels["opaque"] == [] and kernels["written"] >= 1 + 3 * training
    if (
        name == "deepseek-decode"
        and not training
        and backend == "aot_eager"
        and device_arch(call.kv_c.device)[0] == "sm90"
    ):
        torch._dynamo.reset()
        kernels.clear()
        with torch.no_grad(), torch._inductor.config.patch({"triton.cudagraphs": True}):
            got = torch.compile(step, backend=made_by, dynamic=False, fullgraph=True)(*call.whole, call=call)
        assert kernels == {"opaque": ["rocm_attn::mla_decode"], "written": 0}
        assert_as_accurate_as_eager(got, eager, want, factor=FACTOR)


GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize(("name", "backend"), [("deepseek-v2", "inductor"), ("deepseek-v3", "rocm_attn")])
def test_generates_the_same_tokens(name, backend):
    """transformers compiles the decode step by itself here, and replays CUDA graphs."""
    model = build(name, first_k_dense_replace=LAYERS).cuda()  # graphs cannot replay the experts in float32
    tokens, mask = (t.cuda() for t in prompt())
    want = model.generate(tokens, attention_mask=mask, **GREEDY)
    use_latent_cache(model)
    config = hf.CompileConfig(backend=backend)
    counters.clear()
    for _ in range(2):
        got = model.generate(tokens, attention_mask=mask, compile_config=config, **GREEDY)
        assert torch.equal(got, want)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("backend", ["inductor", "rocm_attn"])
def test_a_step_replayed(backend):
    model = use_latent_cache(build("deepseek-v3", first_k_dense_replace=LAYERS).cuda())
    tokens = prompt()[0].cuda()
    step = torch.compile(model.forward, backend=backend, mode="reduce-overhead", fullgraph=True)
    runs = []
    for function in (model.forward, step):
        cache = hf.StaticCache(config=model.config, max_cache_len=90)
        with torch.no_grad():
            token = model(tokens, **cache_for(model, cache), use_cache=True).logits[:, -1:].argmax(-1)
            made = [token]
            for _ in range(32):
                token = function(token, **cache_for(model, cache), use_cache=True).logits[:, -1:].argmax(-1).clone()
                made.append(token)
        runs.append(torch.cat(made, 1))
    assert torch.equal(*runs)
