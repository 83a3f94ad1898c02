"""`mode="max-autotune"` in the pipeline: what is asked of the tuner, and what becomes of its choice.

The tuner itself is a fake here, which takes CPU tensors; tests/kernels/test_autotune.py has the real one.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from pipeline_harness import attend, causal, rand
from test_caches import HIT, MISS, cache_counts, counters
from torch._inductor.utils import fresh_cache

import rocm_attn_compile
from rocm_attn_compile import pipeline
from rocm_attn_compile.ops.impl import parse, with_tuning
from rocm_attn_compile.options import Options, follow_mode
from rocm_attn_compile.rewrite import tune
from rocm_attn_compile.testing import assert_as_accurate_as_eager, compile_and_capture


class FakeTuner:
    """Stands for kernels/triton/autotune.py; chooses `text`."""

    def __init__(self) -> None:
        self.text = "forward=64"
        self.calls: list[tuple] = []
        self.error: Exception | None = None

    def store_of(self, device, digest):
        assert len(digest) == 64
        return SimpleNamespace(path="/cache/tuned.json")

    def tune(self, problems, output_mask, store, device):
        self.calls.append((problems, output_mask, device))
        if self.error is not None:
            raise self.error
        return [SimpleNamespace(stored=False, __str__=lambda: "")]

    def text_of(self, outcomes):
        return self.text


@pytest.fixture
def tuner(monkeypatch):
    fake = FakeTuner()
    monkeypatch.setitem(sys.modules, "fake_tuner", fake)
    monkeypatch.setattr(tune, "TUNERS", {"TRITON_ATTN": "fake_tuner"})
    monkeypatch.setattr(pipeline, "Tuner", lambda: tune.Tuner(device="a device"))
    return fake


def model(q, k, v):
    out = attend(q, k, v, causal(6))
    return attend(out, k, v, causal(6))


def inputs(requires_grad=False):
    return [rand(2, 3, 6, 8).requires_grad_(requires_grad) for _ in range(3)]


def test_the_choice_is_in_the_graph_and_in_the_report(tuner):
    given = inputs()
    compiled = compile_and_capture(model, *given, options={"autotune": True})
    assert_as_accurate_as_eager(compiled.result, model(*given), model(*(t.double() for t in given)))
    (graph,) = compiled.graphs
    calls = [node for node in graph.graph.nodes if node.target is torch.ops.rocm_attn.attention.default]
    assert [parse(call.kwargs["impl"]).tuned for call in calls] == ["forward=64"] * 2
    (report,) = compiled.reports
    assert [parse(site.impl).tuned for site in report.sites] == ["forward=64"] * 2
    assert "max-autotune, measured" in str(report) and "/cache/tuned.json" in str(report)


def test_equal_calls_are_measured_once_on_tensors_like_theirs(tuner):
    compile_and_capture(model, *inputs(requires_grad=True), options={"autotune": True})
    ((problems, output_mask, device),) = tuner.calls
    assert output_mask == [True, True, True, False, False] and device == "a device"
    (arguments,) = problems
    assert {name: tuple(arguments[name].shape) for name in "qkv"} == dict.fromkeys("qkv", (2, 3, 6, 8))
    assert arguments["q"].std() > 0.5 and not arguments["q"].requires_grad
    assert (arguments["band_upper"], arguments["out_layout"], arguments["kv_end"]) == (0, "bhsd", None)
    assert "impl" not in arguments


def test_strides_masks_and_symbols(tuner):
    def packed(x, lengths):
        q, k, v = x.unflatten(-1, (3, 3, 8)).unbind(2)
        keep = torch.arange(x.shape[1]) < lengths[:, None]
        return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), keep[:, None, None])

    given = rand(2, 7, 72), torch.tensor([3, 7])
    compile_and_capture(packed, *given, dynamic=True, options={"autotune": True})
    problems, output_mask, _ = tuner.calls[-1]
    q, kv_end = problems[0]["q"], problems[0]["kv_end"]
    assert q.shape == (2, 3, 7, 8) and q.stride() == (504, 8, 72, 1)
    assert not any(output_mask)
    assert kv_end.unique().tolist() == [7] if kv_end is not None else problems[0]["key_mask"].all()


def test_a_tuner_that_fails_leaves_the_shipped_choice_and_says_so(tuner):
    tuner.error = torch.OutOfMemoryError("no memory left")
    given = inputs()
    compiled = compile_and_capture(model, *given, options={"autotune": True})
    torch.testing.assert_close(compiled.result, model(*given))
    (report,) = compiled.reports
    assert [parse(site.impl).tuned for site in report.sites] == ["", ""]
    assert "nothing tuned, OutOfMemoryError: no memory left" in str(report)


def test_the_choice_is_in_the_key_of_the_caches_on_disk(tuner):
    def step():
        torch._dynamo.reset()
        counters.clear()
        given = inputs(requires_grad=True)
        out = torch.compile(attend, backend="rocm_attn", options={"inline": False, "autotune": True})(*given)
        torch.autograd.grad(out.sum(), given)
        return cache_counts()

    with fresh_cache():
        assert [step(), step()] == [MISS, HIT]
        tuner.text = "forward=128"
        assert [step(), step()] == [MISS, HIT]


def test_without_a_gpu_nothing_is_tuned_and_that_is_said():
    given = inputs()
    explanation = rocm_attn_compile.explain(model, mode="max-autotune")(*given)
    assert all("max-autotune: no GPU, nothing tuned" in site.choice for site in explanation.sites)
    assert [parse(site.impl).tuned for site in explanation.sites] == ["", ""]


def test_a_site_that_returns_its_weights_is_not_tuned_and_that_is_said(tuner):
    def with_weights(q, k, v):
        weights = torch.softmax(q @ k.mT, -1)
        return weights @ v, weights

    with torch.no_grad():
        given = inputs()[:3]
        explanation = rocm_attn_compile.explain(with_weights, options={"autotune": True})(*given)
    (site,) = explanation.sites
    assert site.replaced and "max-autotune: the weights are a result, too" in str(site.choice)
    assert tuner.calls == []


def test_the_mode_decides_unless_the_option_does(tuner):
    given = inputs()
    rocm_attn_compile.explain(model)(*given)
    rocm_attn_compile.explain(model, mode="max-autotune", options={"autotune": False})(*given)
    assert tuner.calls == []
    rocm_attn_compile.explain(model, mode="max-autotune-no-cudagraphs")(*given)
    assert len(tuner.calls) == 1
    assert follow_mode(Options(), "default") == follow_mode(Options(), None) == Options()


def test_impl_is_taken_apart_and_put_together():
    for impl in ("TRITON_ATTN@0123+inline", "TRITON_ATTN@0123", "TRITON_ATTN"):
        tuned = with_tuning(impl, "forward=1.2")
        assert parse(tuned) == ("TRITON_ATTN", "forward=1.2", impl.endswith("+inline"))
        assert parse(impl) == ("TRITON_ATTN", "", impl.endswith("+inline"))
    assert parse("") == ("", "", False)
