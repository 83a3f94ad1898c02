"""Every spelling of latent attention becomes an MLA op, as accurate as eager: forward, gradients, symbolic sizes."""

from __future__ import annotations

import pytest
import torch
from latent_programs import EXPANDED, PROGRAMS, RUNTIME, Program
from pipeline_harness import check, sites

from rocm_attn_compile.testing import count_calls


def ops_in(pipeline) -> set[str]:
    names = {name for graph in pipeline.graphs for name in count_calls(graph)}
    return {name.removeprefix("rocm_attn.") for name in names if name.startswith("rocm_attn.")}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=lambda p: p.name)
def test_it_becomes_the_op_that_is_cheaper(program: Program, dtype, monkeypatch):
    torch.set_default_dtype(dtype)
    try:
        pipeline = check(program.function, program.make, calls=1)
    finally:
        torch.set_default_dtype(torch.float32)
    (site,) = sites()
    assert (site.kind, site.backend, site.notes) == ("mla", "TRITON_MLA", [])
    assert ops_in(pipeline) == {program.op}


@pytest.mark.parametrize("program", [p for p in PROGRAMS.values() if p.trains], ids=lambda p: p.name)
def test_it_trains_in_the_prefill_form(program: Program):
    pipeline = check(program.function, program.make, calls=1, trains=True)
    assert ops_in(pipeline) == {EXPANDED}


def with_parameters(program: Program):
    """Weights as a model has them: Dynamo takes their sizes for numbers."""
    return tuple(torch.nn.Parameter(t, requires_grad=False) if t.ndim == 2 else t for t in program.make())


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=lambda p: p.name)
def test_symbolic_sizes_leave_the_form_to_the_op(program: Program):
    pipeline = check(program.function, lambda: with_parameters(program), calls=1, dynamic=True)
    assert ops_in(pipeline) == {RUNTIME if program.dynamic else program.op}
