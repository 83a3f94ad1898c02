"""AITER's assembly flash attention, its code objects unmodified, in gcnsim against float64: optional, not in CI.

These are the kernels that ROCM_AITER_FA stands for on MI300 and MI350. Their arguments and grid are facts from AITER's
csrc/include/mha_fwd.h and csrc/cpp_itfs/mha_fwd.cu, commit e4048607.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gcnsim
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import aiter_objects
import isa_baseline
import kernel_oracle as oracle
from gcnsim.triton_launch import extent

from rocm_attn_compile.kernels.isa.metrics import metrics

needs_aiter = pytest.mark.skipif(
    not os.environ.get(aiter_objects.VARIABLE),
    reason=f"optional: set {aiter_objects.VARIABLE} to a checkout of github.com/ROCm/aiter; see docs/contributing.md",
)

SIZES = {"B": 2, "H": 4, "K": 2, "D": 128, "E": 128, "dtype": torch.bfloat16, "empty_rows": "zero"}
# Ragged, and more than one tile of 256 queries. The last query and the last key are aligned: band_upper is N - M.
CASES = {
    "plain": {"M": 300, "N": 333},
    "plain, one query": {"M": 1, "N": 77},
    "causal, one tile": {"M": 141, "N": 150, "band_upper": 9},
    "causal, packed projections": {"M": 600, "N": 600, "layout": "packed", "band_upper": 0},
    "causal, more keys": {"M": 300, "N": 433, "H": 8, "band_upper": 133},
    "causal, rows without a key": {"M": 433, "N": 300, "K": 1, "band_upper": -133},
}

TURN = 200
"""Instructions after which waves take turns: gfx950's causal kernel relies on them to go on together, see below."""
RACE = "LDS race (write after another wave's read)"


def run(kernel: aiter_objects.ForwardKernel, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Any:
    """Run a forward kernel on `(B, H, M, 128)` queries and `(B, K, N, 128)` keys and values: out, lse, report.

    Each argument has a slot of 16 bytes; strides are in bytes.
    """
    B, H, M, D = q.shape
    K, N = k.shape[1:3]
    out = torch.full((B, M, H, D), torch.nan, dtype=q.dtype).transpose(1, 2)
    lse = torch.full((B, H, M), torch.nan)

    def strides(tensor: Tensor) -> list[tuple[str, int]]:
        return [("I", tensor.stride(dim) * tensor.element_size()) for dim in (2, 1, 0)]

    q_strides = strides(q)
    q_strides.insert(1, ("I", kernel.q_tile * q_strides[0][1]))
    tuning = 3 if causal and H % 8 else 5
    values = [
        *(("Q", tensor.data_ptr()) for tensor in (out, q, k, v, lse)),
        ("f", scale), ("I", M), *q_strides, ("I", H // K), *strides(k), ("I", tuning), ("I", 1), ("I", N), ("I", D),
        ("I", D), ("I", H), *strides(v), *strides(out), ("Q", 0), ("Q", 0), ("I", lse.stride(1) * 4),
    ]  # fmt: skip
    arguments = b"".join(struct.pack("<" + kind, value).ljust(16, b"\0") for kind, value in values)
    arguments = arguments.ljust(kernel.loaded.kernel.metadata["kernarg_segment_size"], b"\0")
    tiles = -(-M // kernel.q_tile)
    # A workgroup of a causal kernel takes a tile from the front and one from the back.
    grid = (-(-tiles // 2) if causal else tiles, H, B)
    loaded = kernel.loaded
    memory = [loaded.memory, *(extent(t, False) for t in (q, k, v)), *(extent(t, True) for t in (out, lse))]
    report = gcnsim.run(loaded.kernel, loaded.program, grid, (kernel.threads, 1, 1), arguments, memory, quantum=TURN)
    return out, lse, report


@needs_aiter
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("arch", "rounding"), [(arch, rounding) for arch, names in aiter_objects.ROUNDINGS.items() for rounding in names]
)
def test_forward(arch: str, rounding: str, name: str) -> None:
    case = {**SIZES, **CASES[name]}
    causal = "band_upper" in case
    root = aiter_objects.checkout()
    assert root is not None
    kernel = aiter_objects.forward_kernel(root, arch, causal, rounding)
    tensors, scalars = oracle.make_inputs(case)
    out, lse, report = run(kernel, tensors["q"], tensors["k"], tensors["v"], causal, scalars["softmax_scale"])
    kinds = {finding.kind for finding in report.findings}
    if arch == "gfx950" and causal and case["M"] > kernel.q_tile:
        # Between the last reads of V and the load of the workgroup's second tile of Q into the same LDS there is no
        # barrier. On hardware the reads are presumably long done; the simulator has no time to say so.
        assert kinds == {RACE}
    else:
        assert kinds == set(), [str(finding) for finding in report.findings]
    errors = oracle.compare(tensors, scalars, {"out": out, "lse": lse})
    bad = {key: f"{error:.2e} > {limit:.2e}" for key, (error, limit) in errors.items() if not error <= limit}
    assert not bad, f"{kernel.name} on {arch}, {name}: {bad}"


@needs_aiter
def test_stored_figures_are_those_of_the_checkout() -> None:
    """What docs/amd.md says of the assembly kernels; another commit of AITER than the stored one may differ."""
    root = aiter_objects.checkout()
    assert root is not None
    stored = {(row["arch"], row["kernel"]): row for row in json.loads(isa_baseline.AITER.read_text())["rows"]}
    for arch, roundings in aiter_objects.ROUNDINGS.items():
        for causal in (False, True):
            for rounding in roundings:
                kernel = aiter_objects.forward_kernel(root, arch, causal, rounding)
                measured = metrics(kernel.loaded.kernel)
                expected = isa_baseline.stored_metrics(stored[arch, kernel.name])
                assert replace(measured, kernel=kernel.name) == expected


def test_a_folder_that_is_not_a_checkout_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(aiter_objects.VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match="it has no folder hsa"):
        aiter_objects.checkout()
    monkeypatch.delenv(aiter_objects.VARIABLE)
    assert aiter_objects.checkout() is None
