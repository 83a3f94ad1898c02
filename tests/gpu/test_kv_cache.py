"""Paged and float8 caches on a real GPU, read by our Triton kernel inside graphs that Inductor compiled."""

from __future__ import annotations

from typing import Any

import kv_cache_programs as programs
import pytest
import torch

import rocm_attn_compile
from rocm_attn_compile.testing import assert_as_accurate_as_eager

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("default_gpu")]

SPELLINGS = [program for program in programs.RECOGNISED if "e4m3fnuz" not in program.name]


def on_gpu(value: Any, wide: bool = False) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return (value.double() if wide and value.is_floating_point() else value.clone()).cuda()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("program", SPELLINGS, ids=lambda program: program.name.replace(" ", "-"))
def test_program(program: programs.Program, mode: str) -> None:
    if mode != "default" and program not in (SPELLINGS[1], SPELLINGS[14]):
        pytest.skip("CUDA graphs with one program of each kind")
    writes = program.name.startswith("written")
    with torch.no_grad():
        eager_inputs = [on_gpu(x) for x in program.inputs]
        eager = program.function(*eager_inputs)
        exact = program.function(*(on_gpu(x, wide=True) for x in program.inputs))
        rocm_attn_compile.reset_reports()
        compiled = torch.compile(program.function, backend="rocm_attn", mode=mode, fullgraph=True)
        inputs = [on_gpu(x) for x in program.inputs]
        for _ in range(1 if writes else 4):
            got = compiled(*inputs).clone()
    (report,) = rocm_attn_compile.reports()
    (site,) = report.sites
    assert site.replaced, site
    assert site.backend == "TRITON_ATTN"
    assert not site.notes
    assert "read from a cache" in site.spec
    assert_as_accurate_as_eager(got, eager, exact, factor=4.0)
    if writes:
        for mine, theirs in zip(inputs, eager_inputs):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ["pages", "float8"])
def test_what_is_gathered_is_never_there(kind: str) -> None:
    """The peak of memory in a step is far below the size of the gathered, or dequantised, keys."""
    B, H, K, D, size, per_row = 4, 8, 2, 128, 16, 512
    q = torch.randn(B, H, 1, D, dtype=torch.bfloat16)
    lengths = torch.full((B, 1), 5000)
    if kind == "pages":
        caches = [torch.randn(B * per_row, size, K, D, dtype=torch.bfloat16) for _ in range(2)]
        table = torch.randperm(B * per_row, dtype=torch.int32).view(B, per_row)
        function, inputs = programs.by_index, (q, *caches, table, lengths)
    else:
        caches = [torch.randn(B, per_row * size, K, D, dtype=torch.bfloat16).to(torch.float8_e4m3fn) for _ in range(2)]
        scale = torch.tensor(0.5)
        function, inputs = programs.dequantised_contiguous, (q, *caches, lengths, scale, scale)
    compiled = torch.compile(function, backend="rocm_attn", fullgraph=True)
    with torch.no_grad():
        compiled(*inputs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compiled(*inputs)
        torch.cuda.synchronize()
    one = B * per_row * size * K * D * 2
    assert torch.cuda.max_memory_allocated() - before < one / 2


@pytest.mark.hopper
@pytest.mark.parametrize(("mode", "is_own"), [("default", False), ("reduce-overhead", True)])
def test_a_replayed_step_takes_hoppers_own_kernel(mode: str, is_own: bool) -> None:
    """Which Inductor cannot launch; elsewhere the kernel of all is part of its program."""
    B, H, K, D, size, per_row = 4, 8, 2, 128, 16, 512
    lengths = torch.tensor([[5000], [1], [8192], [77]])
    table = torch.randperm(B * per_row, dtype=torch.int32).view(B, per_row)

    def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
        generator = torch.Generator("cuda").manual_seed(0)
        sizes = (B, H, 1, D), *((B * per_row, size, K, D),) * 2
        q, k, v = (torch.randn(s, dtype=torch.bfloat16, generator=generator).to(dtype) for s in sizes)
        return [q, k, v, table, lengths]

    compiled = torch.compile(programs.by_index, backend="rocm_attn", mode=mode, fullgraph=True)
    with torch.no_grad():
        exact, eager = (programs.by_index(*inputs(dtype)) for dtype in (torch.float64, torch.bfloat16))
        given = inputs(torch.bfloat16)
        for _ in range(3):
            compiled(*given)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            got = compiled(*given).clone()
            torch.cuda.synchronize()
    assert_as_accurate_as_eager(got, eager, exact, factor=4.0)
    assert any("decode_hopper_pages_kernel" in event.name for event in profile.events()) == is_own
