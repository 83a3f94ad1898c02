"""`attention_with_weights`: output and weights against eager code, in every mode of rows without a key."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, EMPTY_CASES, make, seeded
from oracle import INF, Call, keep_of

import rocm_attn_compile.ops as ops
from rocm_attn_compile.ops import floored, returned_weights
from rocm_attn_compile.testing import assert_as_accurate_as_eager

MODES = ("nan", "nan_added", "zero", "mean", "mean_added")


def eager(call: Call, out_mode: str, weights_mode: str, weights_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """As models write it, with the weights."""
    q, k, v, given, settings = call.q, call.k, call.v, call.tensors, call.settings
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    s = q @ k.mT * settings["softmax_scale"]
    if (cap := settings.get("logits_soft_cap")) is not None:
        s = torch.tanh(s / cap) * cap
    if (floor := settings.get("score_floor")) is not None:
        s = (s - s.max()).clamp(min=floor)
    s = s.to(wide)
    if "attn_bias" in given:
        s = s + given["attn_bias"].to(wide)
    if "alibi_slopes" in given:
        M, N = s.shape[2:]
        distance = (torch.arange(M)[:, None] + (N - M) - torch.arange(N)).abs()
        s = s - given["alibi_slopes"].to(wide).view(-1, q.shape[1], 1, 1) * distance
    results = []
    for mode in (out_mode, weights_mode):
        s_masked = s.masked_fill(~keep_of(call), torch.finfo(wide).min if "mean" in mode else -INF)
        if "sinks" in given:
            sinks = given["sinks"].to(wide).view(1, -1, 1, 1).expand(*s.shape[:3], 1)
            p = torch.softmax(torch.cat([s_masked, sinks], -1), -1)[..., :-1]
            p = p.nan_to_num(0.0)
        else:
            p = torch.softmax(s_masked, -1)
        results.append(p.nan_to_num(0.0) if mode == "zero" else p)
    return results[0].to(v.dtype) @ v, results[1].to(weights_dtype)


def run(call: Call, **more) -> tuple[torch.Tensor, torch.Tensor]:
    settings = {name: value for name, value in call.settings.items() if name != "dropout_p"}
    return ops.attention_with_weights(call.q, call.k, call.v, **call.tensors, **settings, **more)


def check(build, dtype: torch.dtype, out_mode: str, weights_mode: str, weights_dtype: torch.dtype) -> None:
    exact_call = seeded(build).to(dtype).to(torch.float64)
    call = exact_call.to(dtype)
    modes = {"empty_rows": out_mode, "weights_empty_rows": weights_mode, "weights_dtype": weights_dtype}
    with torch.no_grad():
        got = run(call, **modes)
        want = eager(call, out_mode, weights_mode, weights_dtype)
        exact = eager(exact_call, out_mode, weights_mode, torch.float64)
    assert got[1].dtype == weights_dtype
    assert got[1].is_contiguous()
    assert_as_accurate_as_eager(got, want, exact)


@pytest.mark.parametrize("name", CASES)
def test_output_and_weights(name):
    check(CASES[name], torch.float32, "nan", "nan", torch.float32)


@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["plain", "gqa-causal", "sinks-window-gqa", "bias-finfo-min", "everything"])
def test_in_half_precision(name, weights_dtype):
    check(CASES[name], torch.bfloat16, "zero", "zero", weights_dtype)


@pytest.mark.parametrize("name", EMPTY_CASES)
def test_rows_without_a_key(name):
    for mode, weights_mode in [*zip(MODES, MODES), ("zero", "nan"), ("zero", "mean"), ("nan", "zero")]:
        check(EMPTY_CASES[name], torch.float32, mode, weights_mode, torch.float32)


@pytest.mark.parametrize("score_floor", [-5e4, -0.5])
def test_scores_that_are_raised(score_floor):
    def build():
        return make({"key_mask": torch.arange(9)[None] != 4}, H=4, score_floor=score_floor)

    call = seeded(build)
    assert floored.is_floored(call.q, call.k, 0.37, score_floor) == (score_floor > -1), "both ways are to be tested"
    check(build, torch.float32, "nan", "nan", torch.float32)


def test_layout_of_the_output():
    call = seeded(CASES["gqa-causal"])
    out, _ = run(call, out_layout="bshd")
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, run(call)[0])


@pytest.mark.parametrize("name", ["gqa-causal", "sinks", "soft-cap", "bias"])
def test_gradients_of_both_results(name):
    call = seeded(CASES[name]).to(torch.float64)
    leaves = list(call.differentiable().values())
    grads = []
    for function in (run, lambda call: eager(call, "nan", "nan", torch.float64)):
        out, weights = function(call)
        total = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()
        total = total + (weights * torch.linspace(1, -1, weights.numel()).view(weights.shape)).sum()
        grads.append(torch.autograd.grad(total, leaves))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["plain", "everything", "kv-range-batch"])
def test_schema_and_fake_agree(name):
    call = seeded(CASES[name])
    torch.library.opcheck(ops.attention_with_weights, (call.q, call.k, call.v), call.kwargs)


def test_transforms():
    call = seeded(CASES["gqa-causal"])

    def function(q):
        return ops.attention_with_weights(q, call.k, call.v, softmax_scale=0.5, band_upper=0)

    queries = torch.stack([call.q, 3 * call.q])
    torch.testing.assert_close(torch.vmap(function)(queries), tuple(map(torch.stack, zip(*map(function, queries)))))
    (_, weights), (_, tangent) = torch.func.jvp(function, (call.q,), (call.q,))
    step = 1e-6
    torch.testing.assert_close(tangent, (function(call.q * (1 + step))[1] - weights) / step, atol=1e-5, rtol=1e-4)
    grad = torch.func.grad(lambda q: function(q)[1].square().sum())(call.q)
    assert grad.abs().max() > 1e-3


def test_under_autocast():
    call = seeded(CASES["plain"]).to(torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, weights = run(call)
        named = ops.attention_with_weights(call.q, call.k, call.v, softmax_scale=1.0, impl="TRITON_ATTN")
    assert out.dtype == weights.dtype == torch.bfloat16
    assert named[0].dtype == torch.float32, "the rewriter's casts are in the graph"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"weights_dtype": torch.float16}, "weights_dtype is torch.float16"),
        ({"weights_empty_rows": "none"}, "empty_rows is 'none'"),
        ({"score_floor": 0.0}, "score_floor is 0.0"),
        ({"score_floor": -1.0, "logits_soft_cap": 2.0}, "do not go together"),
        ({"impl": "NO_SUCH"}, "allowed are TRITON_ATTN"),
    ],
)
def test_what_it_does_not_take(settings, text):
    call = seeded(CASES["plain"])
    with pytest.raises(ValueError, match=text):
        run(call, **settings)


@pytest.mark.parametrize("name", ["gqa-causal", "sinks-window-gqa"])
def test_compiled_on_the_cpu_it_is_written_out(name):
    from torch._inductor.utils import run_and_get_code

    call = seeded(CASES[name]).to(torch.float32)
    exact_call = call.to(torch.float64)
    function = torch.compile(lambda call: run(call, impl="TRITON_ATTN+inline"))
    with torch.no_grad():
        got, (code,) = run_and_get_code(function, call)
        assert_as_accurate_as_eager(got, run(call), eager(exact_call, "nan", "nan", torch.float64))
    assert "rocm_attn" not in code


@pytest.mark.parametrize(("length", "is_short"), [(512, True), (4096, False)])
def test_on_a_gpu_short_calls_are_separate_operations(length, is_short):
    from torch._subclasses.fake_tensor import FakeTensorMode

    settings = {"softmax_scale": 1.0, "score_floor": None, "empty_rows": "zero", "weights_empty_rows": "zero"}
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(1, 32, length, 64, dtype=torch.bfloat16, device="cuda")
        arguments = {**dict.fromkeys(returned_weights.TENSORS), "q": q, "k": q, "v": q, **settings}
        found = returned_weights.traced("TRITON_ATTN", "", arguments)
    assert (found.func is returned_weights.unfused) == is_short
    assert returned_weights.MIN_SCORES == 2**26, "as docs/kernels.md says"
