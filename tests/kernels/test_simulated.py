"""Every shipped Triton kernel, executed as AMD machine code by tools/gcnsim, against float64 within eager's own error.

The host code that ships plans the launches, for the architecture's shipped configurations; see simulated_grid.py.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from gcnsim.triton_launch import simulated_device

from rocm_attn_compile.kernels.triton.attention import attention_backward, attention_forward


def sibling(name: str) -> Any:
    """Import a helper file of this folder (tests are not a package)."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


oracle = sibling("kernel_oracle")
grid = sibling("simulated_grid")


def parameters() -> list[Any]:
    """One per row and architecture; `slow` outside of the CI cut."""
    return [
        pytest.param(row, arch, id=f"{row.name}-{arch}", marks=() if arch in row.ci else pytest.mark.slow)
        for row in grid.GRID
        for arch in row.archs
    ]


@pytest.mark.parametrize(("row", "arch"), parameters())
def test_row(row: Any, arch: str) -> None:
    case = row.case()
    tensors, scalars = oracle.make_inputs(case)
    given = [tensor for tensor in tensors.values() if tensor is not None]
    with simulated_device(arch, read_only=given) as device:
        out, lse = attention_forward(**tensors, **scalars, out_layout=case.get("out_layout", "bhsd"))
    got, grad_out = {"out": out, "lse": lse}, None
    if row.backward:
        grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        with simulated_device(arch, read_only=[*given, out, lse, grad_out]) as backward:
            gradients = attention_backward(
                grad_out, **tensors, out=out, lse=lse, **scalars, output_mask=[True] * len(oracle.GRADIENTS)
            )
        device.runs += backward.runs
        got.update((name, g) for name, g in zip(oracle.GRADIENTS, gradients) if tensors[name] is not None)
    assert device.findings() == []
    assert device.runs, "nothing was launched"
    errors = oracle.compare(tensors, scalars, got, grad_out, case.get("oracle_dtype", torch.float64))
    bad = {name: f"{error:.2e} > {limit:.2e}" for name, (error, limit) in errors.items() if not error <= limit}
    assert not bad, f"{row.name} on {arch}: {bad}"
