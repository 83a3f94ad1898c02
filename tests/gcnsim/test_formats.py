"""gcnsim's number formats against numpy and PyTorch, with the processor's fp16 conversion and without."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from gcnsim import build
from machine import execute

U = np.uint32
RNG = np.random.default_rng(1)
SPECIAL = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, 1e-8, 5.97e-8, 6.1e-5, -1e30], np.float32
)


@np.errstate(over="ignore")
def floats(count: int) -> np.ndarray:
    """Values around the range of half precision, halfway cases among them."""
    spread = (RNG.standard_normal(count) * 2.0 ** RNG.integers(-30, 20, count)).astype(np.float32)
    ties = (spread.astype(np.float16).view(np.uint16).astype(U) << U(13)).view(np.float32)
    spread[: count // 4] = (spread[: count // 4].view(U) & U(0xFFFFF000) | U(0x1000)).view(np.float32)
    return np.concatenate([SPECIAL, spread, ties])[:count]


def same(got: np.ndarray, want: np.ndarray) -> None:
    """Equal bits, where any NaN equals any other."""
    np.testing.assert_array_equal(got, want)
    number = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[number]), np.signbit(want[number]))


@pytest.mark.parametrize("flags", [(), ("-mno-f16c", "-mno-avx")], ids=["native", "portable"])
@np.errstate(all="ignore")
def test_half_precision(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """All 65536 halves to float, and many floats and doubles to half."""
    source = tmp_path / "half.cpp"
    source.write_text(
        f'#include "{build.SOURCES}/number.h"\n'
        'extern "C" void widen(const u16* x, f32* y, int n) { halves_to_floats(x, y, n); }\n'
        'extern "C" void narrow(const f32* x, u16* y, int n) { while (n--) y[n] = float_to_half(x[n]); }\n'
        'extern "C" void narrow64(const f64* x, u16* y, int n) { while (n--) y[n] = double_to_half(x[n]); }\n'
    )
    command = [build.compiler(), *build.FLAGS, "-march=native", *flags, "-shared", source, "-o", tmp_path / "half.so"]
    subprocess.run(list(map(str, command)), check=True)
    library = ctypes.CDLL(str(tmp_path / "half.so"))

    def call(name: str, values: np.ndarray, kind: type) -> np.ndarray:
        out = np.empty(values.shape, kind)
        getattr(library, name)(ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(out.ctypes.data), values.size)
        return out

    halves = np.arange(65536, dtype=np.uint16)
    same(call("widen", halves, np.float32), halves.view(np.float16).astype(np.float32))
    x = floats(200_000)
    same(call("narrow", x, np.uint16).view(np.float16), x.astype(np.float16))
    wide = np.concatenate([x.astype(np.float64), x.astype(np.float64) * (1 + 2.0**-40), x * (1 - 2.0**-40)])
    same(call("narrow64", wide, np.uint16).view(np.float16), wide.astype(np.float16))


def in_waves(body: list[str], values: np.ndarray, arch: str, second: np.ndarray | None = None) -> np.ndarray:
    """v9 of `body` for as many waves as it takes; v10 is `values`, v11 `second`."""
    second = values if second is None else second
    parts = [
        execute(arch, body, {"v10": values[k : k + 64], "v11": second[k : k + 64]}, ["v9"])["v9"]
        for k in range(0, values.size, 64)
    ]
    return np.concatenate(parts)


@np.errstate(all="ignore")
def test_half_conversions() -> None:
    x, y = floats(512), floats(512)[::-1].copy()
    same(in_waves(["v_cvt_f16_f32 v9, v10"], x, "gfx942").astype(np.uint16).view(np.float16), x.astype(np.float16))
    halves = RNG.integers(0, 65536, 512).astype(U)
    want = halves.astype(np.uint16).view(np.float16).astype(np.float32)
    same(in_waves(["v_cvt_f32_f16 v9, v10"], halves, "gfx942").view(np.float32), want)
    packed = in_waves(["v_cvt_pkrtz_f16_f32 v9, v10, v11"], x, "gfx942", y)
    for got, given in ((packed, x), (packed >> U(16), y)):
        got = got.astype(np.uint16).view(np.float16)
        number = ~np.isnan(given)
        finite = np.abs(given) < 65504
        # Towards zero: never above the value, and the next half is beyond it.
        assert (np.abs(got[number & finite].astype(np.float64)) <= np.abs(given[number & finite])).all()
        after = np.nextafter(np.abs(got[number & finite]), np.float16(np.inf)).astype(np.float64)
        assert (after > np.abs(given[number & finite])).all()


def test_bfloat_conversions() -> None:
    x, y = floats(512), floats(512)[::-1].copy()
    packed = in_waves(["v_cvt_pk_bf16_f32 v9, v10, v11"], x, "gfx950", y)
    for got, given in ((packed & U(0xFFFF), x), (packed >> U(16), y)):
        same((got << U(16)).view(np.float32), torch.from_numpy(given.copy()).bfloat16().float().numpy())


@np.errstate(all="ignore")
def test_integer_conversions() -> None:
    """Out of range saturates, NaN is 0."""
    x = np.concatenate([SPECIAL, np.array([2.0**31, -(2.0**31), 2.0**32, 4e9, 0.5, -0.5, 1.5, -1.5], np.float32)])
    x = np.resize(x, 64)
    exact = np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0.0, posinf=1e30, neginf=-1e30)
    got = in_waves(["v_cvt_u32_f32 v9, v10"], x, "gfx942")
    np.testing.assert_array_equal(got, np.clip(exact, 0, 2**32 - 1).astype(np.uint64).astype(U))
    got = in_waves(["v_cvt_i32_f32 v9, v10"], x, "gfx942").view(np.int32)
    np.testing.assert_array_equal(got, np.clip(exact, -(2**31), 2**31 - 1).astype(np.int64).astype(np.int32))
    words = RNG.integers(0, 2**32, 64, dtype=np.uint64).astype(U)
    np.testing.assert_array_equal(
        in_waves(["v_cvt_f32_u32 v9, v10"], words, "gfx942").view(np.float32), words.astype(np.float32)
    )
    want = words.view(np.int32).astype(np.float32)
    np.testing.assert_array_equal(in_waves(["v_cvt_f32_i32 v9, v10"], words, "gfx942").view(np.float32), want)
    got = in_waves(["v_cvt_f32_ubyte2 v9, v10"], words, "gfx942").view(np.float32)
    np.testing.assert_array_equal(got, (words >> U(16) & U(255)).astype(np.float32))


FP8 = {
    ("gfx942", "fp8"): torch.float8_e4m3fnuz, ("gfx942", "bf8"): torch.float8_e5m2fnuz,
    ("gfx950", "fp8"): torch.float8_e4m3fn, ("gfx950", "bf8"): torch.float8_e5m2,
}  # fmt: skip


@pytest.mark.parametrize(("arch", "name"), FP8)
def test_fp8(arch: str, name: str) -> None:
    """All 256 values to float; floats in range to the nearest."""
    dtype = FP8[arch, name]
    every = np.arange(256, dtype=np.uint8)
    want = torch.from_numpy(every.copy()).view(dtype).float().numpy()
    same(in_waves([f"v_cvt_f32_{name} v9, v10"], every.astype(U), arch).view(np.float32), want)
    x = np.clip(floats(256)[16:], -200, 200).astype(np.float32)
    x = np.resize(x[~np.isnan(x)], 256)
    got = in_waves([f"v_cvt_pk_{name}_f32 v9, v10, v11"], x, arch, x[::-1].copy())
    for part, given in ((got & U(255), x), (got >> U(8) & U(255), x[::-1])):
        want = torch.from_numpy(given.copy()).to(dtype).float().numpy()
        np.testing.assert_array_equal(torch.from_numpy(part.astype(np.uint8)).view(dtype).float().numpy(), want)
