"""Every shipped Triton kernel, executed as AMD machine code by tools/gcnsim, against float64 within eager's own error.

The host code that ships plans the launches, for the architecture's shipped configurations; see simulated_grid.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import kernel_oracle as oracle
import simulated_grid as grid
from gcnsim.triton_launch import simulated_device

from rocm_attn_compile.kernels.triton import mask_ranges_launch
from rocm_attn_compile.kernels.triton.attention import (
    attention_backward,
    attention_forward,
    attention_with_weights,
)


def weights_of(tensors: dict[str, Any], scalars: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and weights, both in the dtype of q."""
    given = {name: tensor for name, tensor in tensors.items() if name != "dropout_seed"}
    settings = {name: value for name, value in scalars.items() if name != "dropout_p"}
    settings["out_layout"] = "bhsd"
    return attention_with_weights(given, settings, scalars["empty_rows"], tensors["q"].dtype)


def parameters() -> list[Any]:
    """One per row and architecture; `slow` outside of the CI cut."""
    return [
        pytest.param(row, arch, id=f"{row.name}-{arch}", marks=() if arch in row.ci else pytest.mark.slow)
        for row in grid.GRID
        for arch in row.archs
    ]


@pytest.mark.parametrize(("row", "arch"), parameters())
def test_row(row: Any, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = row.case()
    if row.ranged:
        monkeypatch.setattr(mask_ranges_launch, "MIN_SCORES", 0)
    tensors, scalars = oracle.make_inputs(case)
    given = [tensor for tensor in tensors.values() if tensor is not None]
    with simulated_device(arch, read_only=given) as device:
        if row.weights:
            got = dict(zip(("out", "weights"), weights_of(tensors, scalars)))
        else:
            out, lse = attention_forward(**tensors, **scalars, out_layout=case.get("out_layout", "bhsd"))
            got = {"out": out, "lse": lse}
    grad_out = None
    if row.backward and not row.weights:
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
