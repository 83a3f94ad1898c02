"""The rewritten programs on a real GPU: our Triton kernels run, inside graphs that Inductor compiled.

`make test-gpu`. Everything is compared with float64 and must be as accurate as eager on the same device.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, Family
from recorder import Recorder
from spellings import SPELLINGS, Spelling, inputs_of, results_of

import rocm_attn_compile
from rocm_attn_compile import _torch_private
from rocm_attn_compile.kernels.triton.launch import Launch
from rocm_attn_compile.ops.schemas import OPTIONAL_TENSORS
from rocm_attn_compile.testing import Float64Everywhere, assert_as_accurate_as_eager, to_float64

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("default_gpu")]

# float32 products of eager and of Triton's "ieee" dot; tf32 would be less accurate than the float64 comparison allows
FACTOR = 4.0
FLOAT64 = ("float64_softmax_with_mask",)
"""Attention in float64, for which no kernel on a GPU is offered."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=lambda s: s.name)
def test_spelling_trains(spelling: Spelling, dtype: torch.dtype):
    with Float64Everywhere():
        exact = results_of(spelling.function, inputs_of(spelling, torch.float64, dtype, True), True)
    eager = results_of(spelling.function, inputs_of(spelling, dtype, dtype, True), True)
    recorder = Recorder(lowering="aot_eager")
    compiled = torch.compile(spelling.function, backend=recorder, fullgraph=True)
    actual = results_of(compiled, inputs_of(spelling, dtype, dtype, True), True)
    (site,) = [site for report in rocm_attn_compile.reports() for site in report.sites]
    if spelling.name in FLOAT64:
        assert (recorder.calls, site.replaced) == (0, False)
        assert "dtype" in {reason.code for reason in site.reasons}
    else:
        assert recorder.calls == 1, site
    # In float32 as in tests/recognize: T5's scores, which nothing scales, are rounded where they are large.
    factor = 8.0 if dtype is torch.float32 else FACTOR
    assert_as_accurate_as_eager(actual, eager, tuple(t.double() for t in exact), factor=factor)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(
    "name", ["llama_repeat_kv", "causal_masked_fill", "gpt_oss_sinks", "key_padding", "t5_relative_bias"]
)
def test_inductor_runs_it(name: str, mode: str):
    """Under Inductor, also with CUDA graphs: repeated calls give the same result."""
    spelling = SPELLINGS[name]
    inputs = inputs_of(spelling, torch.bfloat16, torch.bfloat16, False)
    compiled = torch.compile(spelling.function, backend="rocm_attn", mode=mode, fullgraph=True)
    with torch.no_grad():
        want = spelling.function(*inputs)
        with Float64Everywhere():
            exact = spelling.function(*inputs_of(spelling, torch.float64, torch.bfloat16, False))
        for _ in range(4):
            got = compiled(*inputs).clone()
    (report,) = rocm_attn_compile.reports()
    assert all(site.replaced and site.backend == "TRITON_ATTN" for site in report.sites)
    assert_as_accurate_as_eager(got, want, exact.double(), factor=FACTOR)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_family(family: Family, attention: str):
    if attention not in family.attentions:
        pytest.skip(f"transformers has no {attention} attention for {family.name}")
    padded = family.inputs == "text"
    model = family.build(attention).cuda()
    arguments = {k: v.cuda() if torch.is_tensor(v) else v for k, v in family.arguments(padded).items()}
    recorder = Recorder(lowering="aot_eager")
    with torch.no_grad():
        eager = model(**arguments).logits
        wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in arguments.items()}
        exact_model = to_float64(model)
        exact_model.config._experts_implementation = "eager"
        with Float64Everywhere():
            exact = exact_model(**wide).logits
        actual = torch.compile(model, backend=recorder)(**arguments).logits
    sites = [site for report in rocm_attn_compile.reports() for site in report.sites]
    assert [site.replaced for site in sites] == [True] * family.sites
    assert_as_accurate_as_eager(actual, eager, exact, factor=FACTOR)


def test_training_step_of_a_padded_model():
    family = next(f for f in FAMILIES if f.name == "mistral")
    model = family.build("eager").cuda().train()
    arguments = {k: v.cuda() if torch.is_tensor(v) else v for k, v in family.arguments(True).items()}

    def gradients(module, run):
        return torch.autograd.grad(run(**arguments).logits.square().mean(), list(module.parameters()))

    eager = gradients(model, model)
    actual = gradients(model, torch.compile(model, backend="rocm_attn"))
    with Float64Everywhere():
        exact_model = to_float64(model).train()
        exact = gradients(exact_model, exact_model)
    assert_as_accurate_as_eager(actual, eager, exact, factor=FACTOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    ["llama_repeat_kv", "gpt_oss_sinks", "key_padding", "t5_relative_bias", "gemma2_soft_cap", "causal_masked_fill"],
)
def test_kernels_written_out_into_inductors_program(name: str, dtype: torch.dtype):
    """Inductor launches our Triton kernels itself, forward and backward: the op is in no graph that it compiles."""
    spelling = SPELLINGS[name]
    with Float64Everywhere():
        exact = results_of(spelling.function, inputs_of(spelling, torch.float64, dtype, True), True)
    eager = results_of(spelling.function, inputs_of(spelling, dtype, dtype, True), True)
    compiled = torch.compile(spelling.function, backend="rocm_attn", fullgraph=True)
    inputs = inputs_of(spelling, dtype, dtype, True)
    actual, codes = _torch_private.generated_code(lambda: results_of(compiled, inputs, True))
    assert codes and not any("torch.ops.rocm_attn.attention" in code for code in codes)
    assert any("attention_forward_kernel" in code for code in codes)
    assert_as_accurate_as_eager(actual, eager, tuple(t.double() for t in exact), factor=FACTOR)


@pytest.mark.hopper
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_hopper_runs_its_own_forward(mode: str, monkeypatch: pytest.MonkeyPatch):
    """A call long enough for it, with scores that grow after the first keys in one head."""
    launched = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (launched.append(self.kernel.__name__), run(self)))
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 4096, 128, device="cuda").bfloat16() for heads in (32, 8, 8))
    k[:, 3, 1000:] *= 40

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with torch.no_grad():
        eager = attend(q, k, v)
        exact = attend(q.double(), k.double(), v.double())
        compiled = torch.compile(attend, backend="rocm_attn", mode=mode, fullgraph=True)
        for _ in range(3):
            actual = compiled(q, k, v).clone()
    assert set(launched) == {"attention_forward_hopper_kernel"}
    assert_as_accurate_as_eager(actual, eager, exact, factor=FACTOR)


@pytest.mark.hopper
@pytest.mark.parametrize("kind", ["documents", "padding"])
def test_hopper_skips_what_ids_and_padding_leave_out(kind: str, monkeypatch: pytest.MonkeyPatch):
    """Packed documents by ids, and left padding, whose first rows keep no key and average as eager's."""
    launched = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (launched.append(self.kernel.__name__), run(self)))
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 16, 4096, 128, device="cuda").bfloat16() for _ in range(3))
    at = torch.arange(4096, device="cuda")
    which = (
        (at // 700)[None].repeat(2, 1) if kind == "documents" else (at >= torch.tensor([[1000], [0]], device="cuda"))
    )

    def attend(q, k, v, which):
        at = torch.arange(q.shape[2], device=q.device)  # of a tensor from outside nothing would be known
        causal = at[None, :] <= at[:, None]
        if kind == "documents":
            keep = causal & (which[:, None, :, None] == which[:, None, None, :])
        else:
            keep = causal & which[:, None, None, :]
        scores = (q @ k.transpose(-1, -2)) * 128**-0.5
        scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
        wide = scores.double() if scores.dtype == torch.float64 else scores.float()
        return torch.softmax(wide, -1).to(v.dtype) @ v

    with torch.no_grad():
        eager = attend(q, k, v, which)
        exact = attend(q.double(), k.double(), v.double(), which)
        actual = torch.compile(attend, backend="rocm_attn", fullgraph=True)(q, k, v, which)
    assert {"mask_ranges_kernel", "attention_forward_hopper_kernel"} <= set(launched)
    assert_as_accurate_as_eager(actual, eager, exact, factor=FACTOR)


@pytest.mark.parametrize("batch", [1, 2])
def test_long_calls_read_through_descriptors_that_inductor_makes(batch: int):
    """Packed queries, keys and values as in GPT-2: each an input of the backward that starts inside its storage."""
    heads, length, head_dim = 4, 1024, 64

    def packed(x, w):
        q, k, v = (x @ w).view(batch, length, 3, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    exact_inputs = tuple(
        torch.randn(shape, dtype=torch.float64, device="cuda").bfloat16().double().requires_grad_()
        for shape in ((batch, length, 128), (128, 3 * heads * head_dim))
    )
    exact = results_of(packed, exact_inputs, True)

    def inputs() -> tuple[torch.Tensor, ...]:
        return tuple(t.detach().bfloat16().requires_grad_() for t in exact_inputs)

    eager = results_of(packed, inputs(), True)
    compiled = torch.compile(packed, backend="rocm_attn", fullgraph=True)
    actual, codes = _torch_private.generated_code(lambda: results_of(compiled, inputs(), True))
    assert not any("torch.ops.rocm_attn.attention" in code for code in codes)
    if torch.cuda.get_device_capability() >= (9, 0) and torch.version.hip is None:
        assert all("TensorDescriptor.from_tensor" in code for code in codes)
    assert_as_accurate_as_eager(actual, eager, exact, factor=FACTOR)


def test_131072_tokens_in_linear_memory():
    """Forward and backward: right at both ends, and no more memory than a few tensors of the output's size."""
    from rocm_attn_compile.kernels.triton.attention import attention_backward, attention_forward

    length, size = 131072, 128
    q, k, v, grad = (
        torch.randn(1, heads, length, size, dtype=torch.bfloat16, requires_grad=False) for heads in (2, 1, 1, 2)
    )
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, lse = attention_forward(q, k, v, softmax_scale=size**-0.5, band_upper=0, empty_rows="impossible")
    masks = dict.fromkeys(OPTIONAL_TENSORS)
    dq, dk, _dv, _dbias, _dsinks = attention_backward(
        grad, q, k, v, **masks, out=out, lse=lse, softmax_scale=size**-0.5, logits_soft_cap=None, band_lower=None,
        band_upper=0, dropout_p=0.0, empty_rows="impossible", output_mask=[True, True, True, False, False],
    )  # fmt: skip
    assert torch.cuda.max_memory_allocated() - before < 6 * out.numel() * out.element_size()

    rows = slice(length - 64, length)
    keep = torch.arange(length)[None, :] <= torch.arange(length)[rows, None]
    weights = (q[0, :, rows].double() @ k[0].double().mT * size**-0.5).masked_fill(~keep, -torch.inf).softmax(-1)
    want = weights @ v[0].double()
    slope = weights * (grad[0, :, rows].double() @ v[0].double().mT - (grad[0, :, rows] * want).sum(-1, keepdim=True))
    for got, exact in ((out[0, :, rows], want), (dq[0, :, rows], slope @ k[0].double() * size**-0.5)):
        assert ((got - exact).norm() / exact.norm()).item() < 1e-2
    # The last key has one row, the last; what its gradient says is that row's alone.
    exact = (slope[:, -1:, -1:] * q[0, :, -1:].double()).sum(0) * size**-0.5
    assert ((dk[0, 0, -1:] - exact).norm() / exact.norm()).item() < 2e-2


def test_max_autotune_measures_on_the_device_and_the_second_time_finds_it_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("ROCM_ATTN_CACHE", str(tmp_path))

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        return tuple(torch.randn(1, 4, 512, 64).bfloat16().to(dtype).requires_grad_() for _ in range(3))

    exact = results_of(attend, inputs(torch.float64), True)
    eager = results_of(attend, inputs(torch.bfloat16), True)
    impls, texts = [], []
    for _ in range(2):
        torch._dynamo.reset()
        rocm_attn_compile.reset_reports()
        compiled = torch.compile(attend, backend="rocm_attn", mode="max-autotune-no-cudagraphs", fullgraph=True)
        actual = results_of(compiled, inputs(torch.bfloat16), True)
        assert_as_accurate_as_eager(actual, eager, exact, factor=FACTOR)
        (report,) = rocm_attn_compile.reports()
        impls.append(report.sites[0].impl)
        texts.append(str(report))
    assert impls[0] == impls[1] and "~forward=" in impls[0] and "backward_q=" in impls[0]
    for text, word in zip(texts, ("measured: ", "found stored: ")):
        assert text.count(f"max-autotune, {word}") == 3, text
    assert list((tmp_path / "tuned").glob("*.json"))
    assert "differs" not in texts[0] and "fails" not in texts[0], texts[0]
