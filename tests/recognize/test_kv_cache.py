"""Attention over paged and float8 caches: right, and the op reads the cache itself exactly where that was proved."""

from __future__ import annotations

from typing import Any

import kv_cache_programs as programs
import pytest
import torch

from rocm_attn_compile.rewrite import builder
from rocm_attn_compile.testing import assert_as_accurate_as_eager, compile_and_capture


def in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else copied(value)


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def run(program: programs.Program, **how: Any) -> Any:
    """The compiled program, after its result and what it wrote were compared with eager."""
    eager_inputs, exact_inputs = [copied(x) for x in program.inputs], [in_float64(x) for x in program.inputs]
    inputs = [copied(x) for x in program.inputs]
    with torch.no_grad():
        eager, exact = program.function(*eager_inputs), program.function(*exact_inputs)
        found = compile_and_capture(program.function, *inputs, **how)
    assert_as_accurate_as_eager(found.result, eager, exact)
    for mine, theirs in zip(inputs, eager_inputs):
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))
    return found


def op_call(found: Any) -> torch.fx.Node:
    calls = [
        node
        for graph in found.graphs
        for node in graph.graph.nodes
        if node.target is torch.ops.rocm_attn.attention.default
    ]
    assert len(calls) == 1
    return calls[0]


def reads_cache(found: Any) -> bool:
    """Whether the op reads the cache; then nothing of the size of what would be gathered is left in the graph."""
    call = op_call(found)
    if not {"block_table", "k_scale"} & set(call.kwargs):
        return False
    gathered = {programs.B * programs.N * heads * programs.D for heads in (1, programs.K, programs.H)}
    if "block_table" in call.kwargs:
        sizes = [
            node.meta["example_value"].numel()
            for node in call.graph.nodes
            if node.op != "placeholder" and isinstance(node.meta.get("example_value"), torch.Tensor)
        ]
        assert not gathered & set(sizes)
    return True


def notes(found: Any) -> set[str]:
    return {note.code for site in found.sites for note in site.notes}


def parameters(which: Any) -> list[Any]:
    return [pytest.param(program, id=program.name.replace(" ", "-")) for program in which]


@pytest.mark.parametrize("program", parameters(programs.RECOGNISED))
def test_recognised(program: programs.Program) -> None:
    found = run(program)
    assert reads_cache(found), notes(found)
    assert not notes(found)
    call = op_call(found)
    assert ("block_table" in call.kwargs) == ("table" in program.function.__code__.co_varnames)
    assert ("k_scale" in call.kwargs) == (program.inputs[1].dtype.itemsize == 1)


@pytest.mark.parametrize("program", parameters(programs.NEAR))
def test_near_misses_stay_right(program: programs.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small tensors are copied before they are overwritten; a cache is not small.
    monkeypatch.setattr(builder, "_SNAPSHOT_LIMIT", 100)
    found = run(program)
    if program.note is not None:
        assert not reads_cache(found)
        assert notes(found) == ({program.note} if program.note else set())
