"""gcnsim's matrix instructions against numpy, with the layouts of AMD's matrix instruction calculator.

Values are small integers, so that every product and sum is exact, whatever the order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from machine import execute

U = np.uint32
RNG = np.random.default_rng(4)


def bits16(kind: torch.dtype) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: torch.from_numpy(x.astype(np.float32)).to(kind).view(torch.int16).numpy().view(np.uint16)


def bits8(kind: torch.dtype) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: torch.from_numpy(x.astype(np.float32)).to(kind).view(torch.uint8).numpy()


ENCODE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "f16": bits16(torch.float16),
    "bf16": bits16(torch.bfloat16),
    "f32": lambda x: x.astype(np.float32).view(U),
    "fp8": bits8(torch.float8_e4m3fnuz),
    "bf8": bits8(torch.float8_e5m2fnuz),
    "ocp fp8": bits8(torch.float8_e4m3fn),
    "i8": lambda x: x.astype(np.int8).view(np.uint8),
}

MFMA = [
    ("gfx90a", "v_mfma_f32_32x32x8f16", 32, 8, "f16", "f16"),
    ("gfx90a", "v_mfma_f32_16x16x16f16", 16, 16, "f16", "f16"),
    ("gfx90a", "v_mfma_f32_32x32x8bf16_1k", 32, 8, "bf16", "bf16"),
    ("gfx90a", "v_mfma_f32_16x16x16bf16_1k", 16, 16, "bf16", "bf16"),
    ("gfx90a", "v_mfma_f32_32x32x2f32", 32, 2, "f32", "f32"),
    ("gfx90a", "v_mfma_f32_16x16x4f32", 16, 4, "f32", "f32"),
    ("gfx942", "v_mfma_f32_32x32x8_f16", 32, 8, "f16", "f16"),
    ("gfx942", "v_mfma_f32_16x16x16_bf16", 16, 16, "bf16", "bf16"),
    ("gfx942", "v_mfma_f32_32x32x4_xf32", 32, 4, "f32", "f32"),
    ("gfx942", "v_mfma_f32_16x16x8_xf32", 16, 8, "f32", "f32"),
    ("gfx942", "v_mfma_f32_32x32x16_fp8_fp8", 32, 16, "fp8", "fp8"),
    ("gfx942", "v_mfma_f32_16x16x32_fp8_bf8", 16, 32, "fp8", "bf8"),
    ("gfx942", "v_mfma_i32_32x32x16_i8", 32, 16, "i8", "i8"),
    ("gfx942", "v_mfma_i32_16x16x32_i8", 16, 32, "i8", "i8"),
    ("gfx950", "v_mfma_f32_32x32x16_f16", 32, 16, "f16", "f16"),
    ("gfx950", "v_mfma_f32_16x16x32_bf16", 16, 32, "bf16", "bf16"),
    ("gfx950", "v_mfma_f32_16x16x128_f8f6f4", 16, 128, "ocp fp8", "ocp fp8"),
]


def registers(elements: np.ndarray) -> dict[int, np.ndarray]:
    """(lanes, elements per lane) of 1, 2 or 4 bytes -> register -> dword per lane."""
    words = np.ascontiguousarray(elements).view(U)
    return {k: words[:, k].copy() for k in range(words.shape[1])}


@pytest.mark.parametrize(("arch", "name", "m", "k", "a_type", "b_type"), MFMA, ids=[row[1] for row in MFMA])
def test_mfma(arch: str, name: str, m: int, k: int, a_type: str, b_type: str) -> None:
    """Lane l holds row or column l % m and a run of k; lane l of the result's register r holds a row given below."""
    groups = 64 // m
    a, b = RNG.integers(-4, 5, (m, k)), RNG.integers(-4, 5, (k, m))
    c = RNG.integers(-9, 10, (m, m))
    lane = np.arange(64)
    run = (lane // m * (k // groups))[:, None] + np.arange(k // groups)
    a_lanes, b_lanes = a[(lane % m)[:, None], run], b[run, (lane % m)[:, None]]
    integer = "_i32_" in name
    row = {16: lambda r: 4 * (lane // 16) + r, 32: lambda r: 8 * (r // 4) + 4 * (lane // 32) + r % 4}[m]
    count = m * m // 64
    as_dword = (lambda x: x.astype(np.int32).view(U)) if integer else ENCODE["f32"]
    inputs = {f"v{20 + n}": word for n, word in registers(ENCODE[a_type](a_lanes)).items()}
    inputs |= {f"a{n}": word for n, word in registers(ENCODE[b_type](b_lanes)).items()}
    inputs |= {f"v{60 + r}": as_dword(c[row(r), lane % m]) for r in range(count)}
    sizes = len(registers(ENCODE[a_type](a_lanes))), len(registers(ENCODE[b_type](b_lanes)))
    sources = f"v[20:{19 + sizes[0]}], a[0:{sizes[1] - 1}]"
    body = [f"{name} v[100:{99 + count}], {sources}, v[60:{59 + count}]", f"{name} a[100:{99 + count}], {sources}, 0"]
    got = execute(arch, body, inputs, [f"{kind}{100 + r}" for kind in "va" for r in range(count)])
    for kind, want in (("v", a @ b + c), ("a", a @ b)):
        for r in range(count):
            word = got[f"{kind}{100 + r}"]
            value = word.view(np.int32) if integer else word.view(np.float32)
            np.testing.assert_array_equal(value, want[row(r), lane % m])


def test_mfma_of_sixteen_blocks() -> None:
    """16 products of 4 x 4 x 4: lane l is row or column l % 4 of block l // 4, register r the result's row r."""
    a, b = RNG.integers(-4, 5, (16, 4, 4)), RNG.integers(-4, 5, (16, 4, 4))
    inputs = {f"v{20 + n}": word for n, word in registers(ENCODE["f16"](a.reshape(64, 4))).items()}
    inputs |= {f"v{30 + n}": word for n, word in registers(ENCODE["f16"](b.transpose(0, 2, 1).reshape(64, 4))).items()}
    got = execute(
        "gfx942", ["v_mfma_f32_4x4x4_16b_f16 v[40:43], v[20:21], v[30:31], 0"], inputs, [f"v{k}" for k in range(40, 44)]
    )
    result = np.stack([got[f"v{40 + r}"].view(np.float32) for r in range(4)])  # row, 4 * block + column
    np.testing.assert_array_equal(result.reshape(4, 16, 4).transpose(1, 0, 2), a @ b)


def test_old_chips_flush_small_operands() -> None:
    """gfx90a's fp16 MFMA takes subnormal operands as zero, gfx942's does not."""
    tiny, one = np.float16(2.0**-20).view(np.uint16), np.float16(1).view(np.uint16)
    inputs = {f"v{k}": np.full(64, int(tiny) << 16 | int(tiny), U) for k in (20, 21)}
    inputs |= {f"v{k}": np.full(64, int(one) << 16 | int(one), U) for k in (22, 23)}
    for arch, name, want in (("gfx90a", "16x16x16f16", 0.0), ("gfx942", "16x16x16_f16", 16 * 2.0**-20)):
        got = execute(arch, [f"v_mfma_f32_{name} v[30:33], v[20:21], v[22:23], 0"], inputs, ["v30"])["v30"]
        assert (got.view(np.float32) == want).all(), arch


@pytest.mark.parametrize("arch", ["gfx1100", "gfx1201"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_wmma(arch: str, kind: str) -> None:
    """gfx11: all k in a lane, upper lanes repeat the lower; result rows alternate. gfx12: half of k, half the rows."""
    a, b, c = RNG.integers(-4, 5, (16, 16)), RNG.integers(-4, 5, (16, 16)), RNG.integers(-9, 10, (16, 16))
    lane = np.arange(32)
    if arch == "gfx1100":
        a_lanes, b_lanes = a[lane % 16], b.T[lane % 16]
    else:
        run = (lane // 16 * 8)[:, None] + np.arange(8)
        a_lanes, b_lanes = a[(lane % 16)[:, None], run], b[run, (lane % 16)[:, None]]
    rows = [2 * r + lane // 16 if arch == "gfx1100" else r + 8 * (lane // 16) for r in range(8)]
    count = a_lanes.shape[1] // 2
    inputs = {f"v{20 + n}": word for n, word in registers(ENCODE[kind](a_lanes)).items()}
    inputs |= {f"v{40 + n}": word for n, word in registers(ENCODE[kind](b_lanes)).items()}
    inputs |= {f"v{60 + r}": ENCODE["f32"](c[rows[r], lane % 16]) for r in range(8)}
    body = [f"v_wmma_f32_16x16x16_{kind} v[60:67], v[20:{19 + count}], v[40:{39 + count}], v[60:67]"]
    got = execute(arch, body, inputs, [f"v{60 + r}" for r in range(8)])
    for r in range(8):
        np.testing.assert_array_equal(got[f"v{60 + r}"].view(np.float32), (a @ b + c)[rows[r], lane % 16])
