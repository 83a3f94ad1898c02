"""Everything that ships is in the simulated grid: each kernel, each launch configuration of an AMD architecture.

docs/contributing.md has the rule. What fails here is named; add a row to simulated_grid.py.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import kernel_oracle as oracle
import mla_grid
import mla_oracle
import simulated_grid as grid
from gcnsim.triton_launch import simulated_device
from test_simulated import weights_of

from rocm_attn_compile.kernels.triton import (
    configs,
    forward_launch,
    mask_ranges_launch,
    mla_configs,
    mla_decode_launch,
)
from rocm_attn_compile.kernels.triton.attention import attention_backward, attention_forward
from rocm_attn_compile.kernels.triton.launch import Launch
from rocm_attn_compile.kernels.triton.mla import mla_decode, mla_prefill, mla_prefill_backward

KERNELS = Path(configs.__file__).parent
ONLY_HOPPER = {
    "backward_finish_kernel", "backward_large_dq_kernel", "key_ranges_kernel", "mla_combine_kernel",
}  # fmt: skip
"""Launched before or after a kernel in Gluon for Hopper only; tests/gpu runs both."""


def launched_kernels(folder: Path) -> set[str]:
    """Names of the @triton.jit functions that host code, not another kernel, refers to."""
    jitted: set[str] = set()
    used: set[str] = set()
    for path in sorted(folder.glob("*.py")):
        host = []
        for node in ast.parse(path.read_text()).body:
            decorators = [ast.unparse(d) for d in node.decorator_list] if isinstance(node, ast.FunctionDef) else []
            if any("triton.jit" in decorator for decorator in decorators):
                jitted.add(node.name)
            elif not any("gluon.jit" in decorator for decorator in decorators):  # they call such functions, too
                host.append(node)
        used |= {name.id for node in host for name in ast.walk(node) if isinstance(name, ast.Name)}
    return jitted & used - ONLY_HOPPER


def rows_of(table: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[str, configs.KernelConfig]]:
    """Every configuration in a table, however nested, with its place."""
    if isinstance(table, configs.KernelConfig):
        yield " ".join(map(str, path)), table
    elif isinstance(table, dict):
        for key, value in table.items():
            yield from rows_of(value, (*path, key))
    elif isinstance(table, (list, tuple)):
        for index, value in enumerate(table):
            yield from rows_of(value, (*path, index))


def reached(rows: Any, arch: str) -> tuple[set[str], set[int]]:
    """Kernels launched and configurations chosen (by id) by the host code for these rows; nothing is compiled."""
    kernels: set[str] = set()
    chosen: set[int] = set()
    original = configs.select

    def select(*args: Any, **kwargs: Any) -> Any:
        chosen.add(id(found := original(*args, **kwargs)))
        return found

    forward_launch.forward_plan.cache_clear()
    with simulated_device(arch), mock.patch.object(configs, "select", select), \
         mock.patch.object(Launch, "run", lambda launch: kernels.add(launch.kernel.__name__)):  # fmt: skip
        for row in rows:
            case = row.case()
            tensors, scalars = oracle.make_inputs(case)
            if row.weights:
                weights_of(tensors, scalars)
                continue
            with mock.patch.object(
                mask_ranges_launch, "MIN_SCORES", 0 if row.ranged else mask_ranges_launch.MIN_SCORES
            ):
                out, lse = attention_forward(**tensors, **scalars)
                if row.backward:
                    attention_backward(
                        torch.zeros_like(out), **tensors, out=out, lse=lse, **scalars,
                        output_mask=[True] * len(oracle.GRADIENTS),
                    )  # fmt: skip
            forward_launch.forward_plan.cache_clear()
    forward_launch.forward_plan.cache_clear()
    return kernels, chosen


def reached_by_latent(arch: str, ci: bool) -> tuple[set[str], set[int]]:
    """The same for the rows of mla_grid.py on an architecture, or for those of its CI cut."""
    kernels: set[str] = set()
    chosen: set[int] = set()
    original = mla_configs.select

    def select(*args: Any) -> Any:
        chosen.add(id(found := original(*args)))
        return found

    mla_decode_launch.mla_decode_plan.cache_clear()
    with simulated_device(arch), mock.patch.object(mla_configs, "select", select), \
         mock.patch.object(Launch, "run", lambda launch: kernels.add(launch.kernel.__name__)):  # fmt: skip
        for row in mla_grid.GRID:
            if arch not in (row.ci if ci else row.archs):
                continue
            if row in mla_grid.DECODE:
                tensors, scalars = mla_oracle.decode_inputs(row.fields)
                mla_decode(**tensors, **scalars)
            else:
                tensors, scalars = mla_oracle.prefill_inputs(row.fields)
                out, lse = mla_prefill(**tensors, **scalars)
                mla_prefill_backward(torch.zeros_like(out), **tensors, out=out, lse=lse, **scalars)
    mla_decode_launch.mla_decode_plan.cache_clear()
    return kernels, chosen


@pytest.mark.parametrize("arch", grid.ARCHS)
def test_every_kernel_and_configuration_is_simulated(arch: str) -> None:
    kernels, chosen = reached([row for row in grid.GRID if arch in row.archs], arch)
    latent_kernels, latent_chosen = reached_by_latent(arch, ci=False)
    launched = kernels | latent_kernels
    assert launched_kernels(KERNELS) - launched == set(), f"kernels that no row of the grid launches on {arch}"
    table = mla_configs.DECODE[configs.family(arch)]
    missing = [place for place, row in rows_of(table) if id(row) not in latent_chosen]
    assert not missing, f"configurations of latent decode that no row of the grid uses on {arch}: {missing}"
    missing = [place for place, row in rows_of(configs.TABLES[configs.family(arch)]) if id(row) not in chosen]
    assert not missing, f"configurations that no row of the grid uses on {arch}: {missing}"


@pytest.mark.parametrize("arch", grid.ARCHS)
def test_the_cut_for_ci_runs_every_kernel(arch: str) -> None:
    kernels, _ = reached([row for row in grid.GRID if arch in row.ci], arch)
    assert launched_kernels(KERNELS) - kernels - reached_by_latent(arch, ci=True)[0] == set()


def test_all_shipped_architectures_are_in_the_grid() -> None:
    for arch in grid.ARCHS:
        assert configs.family(arch) in configs.TABLES
    amd = {name for name in configs.TABLES if name.startswith("gfx")}
    assert amd <= set(grid.ARCHS), "an architecture with a table of its own is not simulated"


def test_what_is_not_in_the_grid_is_found(tmp_path: Path) -> None:
    """The two searches above do find a kernel and a configuration that nobody asked for."""
    (tmp_path / "a.py").write_text(
        "@triton.jit\ndef helper(): ...\n@triton.jit\ndef new_kernel(): helper()\n"
        "@triton.jit(do_not_specialize=['n'])\ndef other_kernel(): ...\n"
    )
    (tmp_path / "b.py").write_text("def launch():\n    return Launch(new_kernel), [other_kernel]\n")
    assert launched_kernels(tmp_path) == {"new_kernel", "other_kernel"}
    _, chosen = reached(grid.CUT[:1], "gfx942")
    table = configs.TABLES["gfx942"]
    assert any(id(row) in chosen for _, row in rows_of(table))
    assert any(id(row) not in chosen for _, row in rows_of(table))
    extra = configs.KernelConfig(16, 16, 1, 1)
    assert [place for place, row in rows_of({"forward": {(64, 2): extra}}) if id(row) not in chosen] == [
        "forward (64, 2)"
    ]
