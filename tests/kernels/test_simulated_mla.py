"""TRITON_MLA's kernels, executed as AMD machine code by tools/gcnsim, against float64; see test_simulated.py."""

from __future__ import annotations

from typing import Any

import mla_grid as grid
import mla_oracle as oracle
import pytest
import torch

pytest.importorskip("triton")

from gcnsim.triton_launch import simulated_device

from rocm_attn_compile.kernels.triton.mla import mla_decode, mla_prefill, mla_prefill_backward


def parameters(rows: tuple[Any, ...]) -> list[Any]:
    """One per row and architecture; `slow` outside of the CI cut."""
    return [
        pytest.param(row, arch, id=f"{row.name}-{arch}", marks=() if arch in row.ci else pytest.mark.slow)
        for row in rows
        for arch in row.archs
    ]


def check(name: str, device: Any, errors: dict[str, tuple[float, float]]) -> None:
    assert device.findings() == []
    assert device.runs, "nothing was launched"
    bad = {key: f"{error:.2e} > {limit:.2e}" for key, (error, limit) in errors.items() if not error <= limit}
    assert not bad, f"{name} on {device.arch}: {bad}"


@pytest.mark.parametrize(("row", "arch"), parameters(grid.DECODE))
def test_decode(row: Any, arch: str) -> None:
    tensors, scalars = oracle.decode_inputs(row.fields)
    given = [tensor for tensor in tensors.values() if tensor is not None]
    with simulated_device(arch, read_only=given) as device:
        out, lse = mla_decode(**tensors, **scalars, out_layout=row.fields.get("out_layout", "bhsd"))
    check(row.name, device, oracle.compare(tensors, scalars, {"out": out, "lse": lse}))


@pytest.mark.parametrize(("row", "arch"), parameters(grid.PREFILL))
def test_prefill_and_its_gradients(row: Any, arch: str) -> None:
    tensors, scalars = oracle.prefill_inputs(row.fields)
    given = [tensor for tensor in tensors.values() if tensor is not None]
    with simulated_device(arch, read_only=given) as device:
        out, lse = mla_prefill(**tensors, **scalars)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    with simulated_device(arch, read_only=[*given, out, lse, grad_out]) as backward:
        grads = mla_prefill_backward(grad_out, **tensors, out=out, lse=lse, **scalars)
    device.runs += backward.runs
    got = {"out": out, "lse": lse, **dict(zip(oracle.PREFILL_GRADIENTS, grads))}
    check(row.name, device, oracle.compare_prefill(tensors, scalars, got, grad_out))
