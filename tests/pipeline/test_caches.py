"""What is compiled is reused while nothing changed, and never after: by Dynamo, AOTAutograd and Inductor.

The caches on disk key on the graph, in which our op is only a name; its `impl` argument carries everything else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch._dynamo
from cache_worker import attend
from pipeline_harness import rand, reports
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from rocm_attn_compile.backends import fingerprint

HIT = {"autograd_cache_hit": 1, "fxgraph_cache_hit": 2}
MISS = {"autograd_cache_miss": 1, "fxgraph_cache_miss": 2}
"""One training graph: one entry of AOTAutograd, and of Inductor one for the forward and one for the backward."""
SAME_PROGRAM = {"autograd_cache_miss": 1, "fxgraph_cache_hit": 2}
"""The graph with our op is another, but written out it is the same program, which has no code of ours in it."""


def new_inputs():
    return [rand(2, 3, 5, 8).requires_grad_() for _ in range(3)]


def step(compiled):
    """A training step, checked; returns what the caches on disk did in it."""
    counters.clear()
    inputs = new_inputs()
    out, want = compiled(*inputs), attend(*inputs)
    torch.testing.assert_close(out, want)
    grads = torch.autograd.grad(out.sum(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad(want.sum(), inputs))
    return cache_counts()


def cache_counts() -> dict[str, int]:
    found = {**counters["aot_autograd"], **counters["inductor"]}
    names = [f"{cache}_{what}" for cache in ("autograd_cache", "fxgraph_cache") for what in ("hit", "miss", "bypass")]
    return {name: found[name] for name in names if found.get(name)}


def compiled_anew(**options):
    """As in a new process: Dynamo has forgotten everything, the disk has not. The op is one call, as on a GPU."""
    torch._dynamo.reset()
    return torch.compile(attend, backend="rocm_attn", fullgraph=True, options={"inline": False, **options})


@pytest.fixture
def empty_caches():
    with fresh_cache():
        yield


CHANGES = {
    "VLLM_ROCM_USE_AITER": "1",
    "VLLM_ROCM_USE_AITER_MHA": "0",
    "VLLM_V1_USE_PREFILL_DECODE_ATTENTION": "1",
    "VLLM_ATTENTION_BACKEND": "TRITON_ATTN",
    "ROCM_ATTN_ARCH": "gfx942",
}


@pytest.mark.filterwarnings("ignore:attention runs on")
@pytest.mark.usefixtures("empty_caches")
def test_environment_is_in_the_key_on_disk(monkeypatch):
    assert step(compiled_anew()) == MISS
    assert step(compiled_anew()) == HIT
    for variable, value in CHANGES.items():
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            assert step(compiled_anew()) == MISS, variable
            assert step(compiled_anew()) == HIT, variable
    assert step(compiled_anew()) == HIT
    impls = [report.sites[0].impl for report in reports()]
    assert Counter(impls) == {impl: 2 if i else 3 for i, impl in enumerate(dict.fromkeys(impls))}
    assert len(set(impls)) == 1 + len(CHANGES)


@pytest.mark.filterwarnings("ignore:attention runs on")
@pytest.mark.usefixtures("empty_caches")
def test_options_are_in_the_key_on_disk():
    assert step(compiled_anew()) == MISS
    assert step(compiled_anew(arch="gfx942")) == MISS
    assert step(compiled_anew(arch="gfx950")) == MISS
    assert step(compiled_anew(disable=True)) == MISS
    assert step(compiled_anew(attention_backend="ROCM_ATTN")) == HIT, "not built yet: it falls back to the same kernel"
    assert step(compiled_anew(strict=True)) == HIT, "it changes nothing in the graph"
    assert step(compiled_anew(arch="gfx942")) == HIT


@pytest.mark.usefixtures("empty_caches")
def test_our_code_is_in_the_key_on_disk(monkeypatch):
    """PyTorch hashes the graph, not what the op does: a new version of ours must not run with what an old one left."""
    assert step(compiled_anew()) == MISS
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "sources_digest", lambda: "of another version")
        assert step(compiled_anew()) == MISS
    assert step(compiled_anew()) == HIT


@pytest.mark.usefixtures("empty_caches")
def test_written_out_it_is_traced_again_whenever_our_code_changes(monkeypatch):
    assert step(compiled_anew(inline=True)) == MISS
    assert step(compiled_anew(inline=True)) == HIT
    assert step(compiled_anew()) == MISS, "one opaque call is another program"
    monkeypatch.setattr(fingerprint, "sources_digest", lambda: "of another version")
    assert step(compiled_anew(inline=True)) == SAME_PROGRAM


@pytest.mark.filterwarnings("ignore:attention runs on")
@pytest.mark.usefixtures("empty_caches")
def test_compiled_function_follows_the_environment(monkeypatch):
    """The same compiled function: Dynamo compiles again when a variable changes, and finds old code again."""
    compiled = compiled_anew()
    assert step(compiled) == MISS
    assert step(compiled) == {}
    monkeypatch.setenv("VLLM_ROCM_USE_AITER", "1")
    assert step(compiled) == MISS
    assert step(compiled) == {}
    monkeypatch.delenv("VLLM_ROCM_USE_AITER")
    assert step(compiled) == {}
    monkeypatch.setenv("ROCM_ATTN_DISABLE", "1")
    assert step(compiled) == MISS
    monkeypatch.delenv("ROCM_ATTN_DISABLE")
    assert step(compiled) == {}
    assert [len(report.sites) for report in reports()] == [1, 1, 0]
    first, second = (report.sites[0].impl for report in reports()[:2])
    assert first != second


@pytest.mark.usefixtures("empty_caches")
def test_backward_compiled_late_is_that_of_its_forward(monkeypatch):
    """The environment changes between forward and backward: each step keeps the choice of its forward."""
    compiled = compiled_anew()
    inputs = new_inputs()
    out = compiled(*inputs)
    monkeypatch.setenv("ROCM_ATTN_DISABLE", "1")
    grads = torch.autograd.grad(out.sum(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad(attend(*inputs).sum(), inputs))
    assert len(reports()) == 1


def run_worker(folder: Path, **variables: str) -> dict:
    environ = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), **variables}
    worker = Path(__file__).with_name("cache_worker.py")
    command = [sys.executable, "-P", "-W", "ignore", str(worker)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environ)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    found["caches"] = {name: count for name, count in found["caches"].items() if count}
    return found


def test_across_processes(tmp_path):
    first = run_worker(tmp_path)
    second = run_worker(tmp_path)
    changed = run_worker(tmp_path, VLLM_ROCM_USE_AITER="1")
    assert [run["caches"] for run in (first, second, changed)] == [MISS, HIT, MISS]
    assert first["impl"] == second["impl"] != changed["impl"]
    assert {run["backend"] for run in (first, second, changed)} == {"TRITON_ATTN"}
