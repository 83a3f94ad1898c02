"""gcnsim's vector ALU, instruction by instruction, against numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from machine import execute, lanes

U = np.uint32
RNG = np.random.default_rng(0)
WORDS = [RNG.integers(0, 2**32, 64, dtype=np.uint64).astype(U) for _ in range(3)]
for special, word in enumerate((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF, 0x80)):
    WORDS[0][special] = word
    WORDS[1][2 * special] = word
FLOATS = [(RNG.standard_normal(64) * 2.0 ** RNG.integers(-20, 20, 64)).astype(np.float32) for _ in range(3)]
FLOATS[0][:8] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-41, 3.0, np.nan]
FLOATS[1][:8] = [1.0, 0.0, np.inf, np.inf, 1.0, 1e-41, np.nan, np.nan]


def signed(x: np.ndarray) -> np.ndarray:
    return x.astype(U).view(np.int32).astype(np.int64)


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.uint64)


def low24(x: np.ndarray) -> np.ndarray:
    return signed(x << U(8)) >> 8


def extract(x: np.ndarray, offset: np.ndarray, width: np.ndarray, is_signed: bool) -> np.ndarray:
    """Bit field of each word, by way of its binary digits."""
    out = []
    for value, o, w in zip(x, offset & U(31), width & U(31)):
        digits = f"{int(value):032b}"[::-1][int(o) : int(o) + int(w)][::-1]
        number = int(digits, 2) if digits else 0
        out.append(number - (1 << len(digits)) if is_signed and digits[:1] == "1" else number)
    return np.array(out)


def permute_bytes(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """V_PERM_B32 as the ISA's table of selectors says it."""
    out = []
    for x, y, selectors in zip(a, b, c):
        source = list(int(y).to_bytes(4, "little") + int(x).to_bytes(4, "little"))
        table = {**dict(enumerate(source)), 12: 0}
        for k, byte in ((8, 1), (9, 3), (10, 5), (11, 7)):
            table[k] = 255 if source[byte] & 0x80 else 0
        out.append(int.from_bytes(bytes(table.get(s, 255) for s in int(selectors).to_bytes(4, "little")), "little"))
    return np.array(out)


Function = Callable[..., Any]
INTEGER: dict[str, Function] = {
    "v_add_u32": lambda a, b: a + b,
    "v_sub_u32": lambda a, b: a - b,
    "v_subrev_u32": lambda a, b: b - a,
    "v_mul_lo_u32": lambda a, b: wide(a) * wide(b),
    "v_mul_hi_u32": lambda a, b: (wide(a) * wide(b)) >> np.uint64(32),
    "v_mul_hi_i32": lambda a, b: (signed(a) * signed(b)) >> 32,
    "v_mul_u32_u24": lambda a, b: wide(a & U(0xFFFFFF)) * wide(b & U(0xFFFFFF)),
    "v_mul_i32_i24": lambda a, b: low24(a) * low24(b),
    "v_max_i32": lambda a, b: np.maximum(signed(a), signed(b)),
    "v_min_i32": lambda a, b: np.minimum(signed(a), signed(b)),
    "v_max_u32": np.maximum,
    "v_min_u32": np.minimum,
    "v_and_b32": np.bitwise_and,
    "v_or_b32": np.bitwise_or,
    "v_xor_b32": np.bitwise_xor,
    "v_xnor_b32": lambda a, b: ~(a ^ b),
    "v_lshlrev_b32": lambda a, b: wide(b) << wide(a & U(31)),
    "v_lshrrev_b32": lambda a, b: b >> (a & U(31)),
    "v_ashrrev_i32": lambda a, b: signed(b) >> (a & U(31)).astype(np.int64),
    "v_bcnt_u32_b32": lambda a, b: wide(np.array([int(x).bit_count() for x in a], U)) + wide(b),
    "v_bfm_b32": lambda a, b: ((1 << wide(a & U(31))) - 1) << wide(b & U(31)),
    "v_not_b32": lambda a: ~a,
    "v_bfrev_b32": lambda a: np.array([int(f"{int(x):032b}"[::-1], 2) for x in a]),
    "v_ffbh_u32": lambda a: np.array([32 - int(x).bit_length() if x else 0xFFFFFFFF for x in a]),
    "v_ffbl_b32": lambda a: np.array([(int(x) & -int(x)).bit_length() - 1 if x else 0xFFFFFFFF for x in a]),
    "v_add3_u32": lambda a, b, c: a + b + c,
    "v_lshl_add_u32": lambda a, b, c: (wide(a) << wide(b & U(31))) + wide(c),
    "v_add_lshl_u32": lambda a, b, c: wide(a + b) << wide(c & U(31)),
    "v_lshl_or_b32": lambda a, b, c: (wide(a) << wide(b & U(31))) | wide(c),
    "v_and_or_b32": lambda a, b, c: (a & b) | c,
    "v_or3_b32": lambda a, b, c: a | b | c,
    "v_xor3_b32": lambda a, b, c: a ^ b ^ c,
    "v_xad_u32": lambda a, b, c: (a ^ b) + c,
    "v_bfi_b32": lambda a, b, c: (a & b) | (~a & c),
    "v_bfe_u32": lambda a, b, c: extract(a, b, c, False),
    "v_bfe_i32": lambda a, b, c: extract(a, b, c, True),
    "v_alignbit_b32": lambda a, b, c: (wide(a) << np.uint64(32) | wide(b)) >> wide(c & U(31)),
    "v_alignbyte_b32": lambda a, b, c: (wide(a) << np.uint64(32) | wide(b)) >> wide((c & U(3)) * U(8)),
    "v_mad_u32_u24": lambda a, b, c: wide(a & U(0xFFFFFF)) * wide(b & U(0xFFFFFF)) + wide(c),
    "v_mad_i32_i24": lambda a, b, c: low24(a) * low24(b) + signed(c),
    "v_med3_i32": lambda a, b, c: np.median([signed(a), signed(b), signed(c)], axis=0).astype(np.int64),
    "v_max3_i32": lambda a, b, c: np.maximum(np.maximum(signed(a), signed(b)), signed(c)),
    "v_min3_u32": lambda a, b, c: np.minimum(np.minimum(a, b), c),
    "v_maxmin_u32": lambda a, b, c: np.minimum(np.maximum(a, b), c),
    "v_minmax_i32": lambda a, b, c: np.maximum(np.minimum(signed(a), signed(b)), signed(c)),
}


def sources(function: Function) -> int:
    return getattr(function, "nin", 0) or function.__code__.co_argcount


def operate(name: str, values: list[np.ndarray], arch: str = "gfx942", extra: str = "") -> np.ndarray:
    """The result of `name v9, v10, v11, ...`."""
    count = lanes(arch)
    inputs = {f"v{10 + k}": value[:count] for k, value in enumerate(values)}
    return execute(arch, [f"{name} v9, {', '.join(inputs)} {extra}".strip()], inputs, ["v9"])["v9"]


@pytest.mark.parametrize("name", INTEGER)
def test_integer(name: str) -> None:
    with np.errstate(over="ignore"):
        want = INTEGER[name](*WORDS[: sources(INTEGER[name])])
    np.testing.assert_array_equal(operate(name, WORDS[: sources(INTEGER[name])]), want.astype(np.int64).astype(U))


def test_byte_permutation() -> None:
    selectors = RNG.integers(0, 16, (64, 4)).astype(np.uint8).view(U)[:, 0]
    want = permute_bytes(WORDS[0], WORDS[1], selectors).astype(U)
    np.testing.assert_array_equal(operate("v_perm_b32", [WORDS[0], WORDS[1], selectors]), want)


def test_any_function_of_three_bits() -> None:
    for table in (0x96, 0x40, 0xEA):
        bits = [np.unpackbits(word.view(np.uint8)).astype(int) for word in WORDS]
        want = np.packbits([table >> (4 * a + 2 * b + c) & 1 for a, b, c in zip(*bits)]).view(U)
        np.testing.assert_array_equal(operate("v_bitop3_b32", WORDS, "gfx950", f"bitop3:{table:#x}"), want)


def maximum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.fmax(a, b)


FLOAT: dict[str, Function] = {
    "v_add_f32": np.add,
    "v_sub_f32": np.subtract,
    "v_mul_f32": np.multiply,
    "v_max_f32": np.fmax,
    "v_min_f32": np.fmin,
    "v_fma_f32": lambda a, b, c: (np.longdouble(a) * np.longdouble(b) + np.longdouble(c)).astype(np.float32),
    "v_max3_f32": lambda a, b, c: np.fmax(np.fmax(a, b), c),
    "v_rcp_f32": lambda a: (1 / a.astype(np.float64)).astype(np.float32),
    "v_rsq_f32": lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(np.float32),
    "v_sqrt_f32": np.sqrt,
    "v_floor_f32": np.floor,
    "v_ceil_f32": np.ceil,
    "v_trunc_f32": np.trunc,
    "v_rndne_f32": np.rint,
}


@pytest.mark.parametrize("name", FLOAT)
@np.errstate(all="ignore")
def test_float(name: str) -> None:
    values = FLOATS[: sources(FLOAT[name])]
    want = FLOAT[name](*values).astype(np.float32)
    got = operate(name, values).view(np.float32)
    np.testing.assert_array_equal(got, want)  # NaN equals NaN
    zero = (got == 0) & (want == 0)
    if name not in ("v_max_f32", "v_min_f32"):
        np.testing.assert_array_equal(np.signbit(got[zero]), np.signbit(want[zero]))


@np.errstate(all="ignore")
def test_exponential_and_logarithm() -> None:
    x = np.linspace(-140, 20, 64, dtype=np.float32)
    want = np.exp2(x.astype(np.float64)).astype(np.float32)
    want[want < 2**-126] = 0  # results that are not normal are flushed
    np.testing.assert_allclose(operate("v_exp_f32", [x]).view(np.float32), want, rtol=2e-7)
    x = np.abs(FLOATS[1])
    np.testing.assert_allclose(
        operate("v_log_f32", [x]).view(np.float32), np.log2(np.where(x < 2**-126, 0, x)), rtol=2e-7
    )


def test_modifiers() -> None:
    """Negate, absolute value, output multiplier, clamp."""
    a, b = FLOATS[1][8:], FLOATS[2][8:]
    a, b = np.resize(a, 64), np.resize(b, 64)
    inputs = {"v10": a, "v11": b}
    got = execute(
        "gfx942",
        [
            "v_add_f32_e64 v1, -v10, |v11|",
            "v_mul_f32_e64 v2, -|v10|, v11 mul:2",
            "v_add_f32_e64 v3, v10, v11 clamp",
            "v_fma_f32 v4, v10, -v11, 0.5 div:2",
        ],
        inputs,
        ["v1", "v2", "v3", "v4"],
    )
    np.testing.assert_array_equal(got["v1"].view(np.float32), -a + np.abs(b))
    np.testing.assert_array_equal(got["v2"].view(np.float32), (-np.abs(a) * b) * np.float32(2))
    np.testing.assert_array_equal(got["v3"].view(np.float32), np.clip(a + b, 0, 1))
    want = (0.5 - a.astype(np.float64) * b.astype(np.float64)).astype(np.float32) * np.float32(0.5)
    np.testing.assert_allclose(got["v4"].view(np.float32), want, rtol=1e-7)


def test_constants() -> None:
    """Inline constants are bits of the operand's type: 1.0 is a float, 1 an integer, also for float instructions."""
    body = ["v_mov_b32 v1, 1.0", "v_mov_b32 v2, -16", "v_mov_b32 v3, 0x42c80000", "v_add_f32 v4, 1, v1"]
    got = execute("gfx942", body, {}, ["v1", "v2", "v3", "v4"])
    assert [int(got[f"v{k}"][5]) for k in (1, 2, 3, 4)] == [0x3F800000, 0xFFFFFFF0, 0x42C80000, 0x3F800000]
    half = execute("gfx942", ["v_add_f16 v1, 1.0, v10"], {"v10": np.full(64, 0x3C00, U)}, ["v1"])["v1"]
    assert (half == np.float16(2).view(np.uint16)).all()


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_sixteen_bit_results(arch: str) -> None:
    """gfx9 clears the upper half of the register, RDNA keeps it; with op_sel the result goes there."""
    n = lanes(arch)
    a, b, old = (word[:n] for word in WORDS)
    name = "v_add_u16" if arch == "gfx942" else "v_add_nc_u16"
    body = ["v_mov_b32 v1, v12", f"{name} v1, v10, v11", "v_mov_b32 v2, v12", f"{name} v2, v10, v11 op_sel:[1,0,1]"]
    got = execute(arch, body, {"v10": a, "v11": b, "v12": old}, ["v1", "v2"])
    low, upper = (a + b) & U(0xFFFF), ((a >> U(16)) + b) & U(0xFFFF)
    np.testing.assert_array_equal(got["v1"], low | (old & U(0xFFFF0000) if arch == "gfx1100" else U(0)))
    np.testing.assert_array_equal(got["v2"], upper << U(16) | old & U(0xFFFF))


def test_wide_integers() -> None:
    """64-bit addition and subtraction by carries, wide products, 64-bit shifts."""
    names = ["v10", "v11", "v12", "v13"]
    values = [*WORDS, WORDS[0][::-1].copy()]
    a, b = (wide(values[k]) | wide(values[k + 1]) << np.uint64(32) for k in (0, 2))
    got = execute(
        "gfx942",
        [
            "v_add_co_u32 v1, vcc, v10, v12",
            "v_addc_co_u32 v2, vcc, v11, v13, vcc",
            "v_sub_co_u32 v3, s[10:11], v10, v12",
            "v_subb_co_u32 v4, s[10:11], v11, v13, s[10:11]",
            "v_mad_u64_u32 v[5:6], s[10:11], v10, v11, v[12:13]",
            "v_lshlrev_b64 v[7:8], v10, v[12:13]",
            "v_ashrrev_i64 v[14:15], v10, v[12:13]",
            "v_lshl_add_u64 v[16:17], v[10:11], 3, v[12:13]",
            "v_mad_i64_i32 v[18:19], vcc, v10, v11, v[12:13]",
        ],
        dict(zip(names, values)),
        [f"v{k}" for k in (1, 2, 3, 4, 5, 6, 7, 8, 14, 15, 16, 17, 18, 19)],
    )

    def pair(k: int) -> np.ndarray:
        return wide(got[f"v{k}"]) | wide(got[f"v{k + 1}"]) << np.uint64(32)

    with np.errstate(over="ignore"):
        shift = wide(values[0]) & np.uint64(63)
        np.testing.assert_array_equal(pair(1), a + b)
        np.testing.assert_array_equal(pair(3), a - b)
        np.testing.assert_array_equal(pair(5), wide(values[0]) * wide(values[1]) + b)
        np.testing.assert_array_equal(pair(7), b << shift)
        np.testing.assert_array_equal(pair(14), (b.view(np.int64) >> shift.view(np.int64)).view(np.uint64))
        np.testing.assert_array_equal(pair(16), (a << np.uint64(3)) + b)
        np.testing.assert_array_equal(pair(18).view(np.int64), signed(values[0]) * signed(values[1]) + b.view(np.int64))


@np.errstate(all="ignore")
def test_division_is_correctly_rounded() -> None:
    """The sequence that LLVM emits for a / b."""
    a = np.concatenate(
        [FLOATS[1][:8], (RNG.standard_normal(56) * 2.0 ** RNG.integers(-120, 120, 56)).astype(np.float32)]
    )
    b = np.concatenate(
        [FLOATS[0][:8], (RNG.standard_normal(56) * 2.0 ** RNG.integers(-120, 120, 56)).astype(np.float32)]
    )
    body = [
        "v_div_scale_f32 v1, s[10:11], v11, v11, v10",
        "v_div_scale_f32 v2, vcc, v10, v11, v10",
        "v_rcp_f32 v3, v1",
        "v_fma_f32 v4, -v1, v3, 1.0",
        "v_fmac_f32 v3, v4, v3",
        "v_mul_f32 v4, v2, v3",
        "v_fma_f32 v5, -v1, v4, v2",
        "v_fmac_f32 v4, v5, v3",
        "v_fma_f32 v1, -v1, v4, v2",
        "v_div_fmas_f32 v1, v1, v3, v4",
        "v_div_fixup_f32 v9, v1, v11, v10",
    ]
    got = execute("gfx942", body, {"v10": a, "v11": b}, ["v9"])["v9"].view(np.float32)
    want = a / b
    np.testing.assert_array_equal(np.where(np.abs(got) < 2**-126, 0, got), np.where(np.abs(want) < 2**-126, 0, want))


def test_scaling_and_packing() -> None:
    exponent = RNG.integers(-40, 40, 64)
    got = execute(
        "gfx942",
        ["v_ldexp_f32 v1, v10, v12", "v_pack_b32_f16 v2, v10, v11 op_sel:[1,0,0]",
         "v_fmamk_f32 v3, v10, 0x40490fdb, v11", "v_mov_b64 v[4:5], v[10:11]", "v_cvt_pk_u16_u32 v6, v10, v11"],
        {"v10": FLOATS[2], "v11": FLOATS[1], "v12": exponent.astype(np.int32)},
        [f"v{k}" for k in range(1, 7)],
    )  # fmt: skip
    a, b = FLOATS[2], FLOATS[1]
    np.testing.assert_array_equal(got["v1"].view(np.float32), np.ldexp(a, exponent))
    np.testing.assert_array_equal(got["v2"], a.view(U) >> U(16) | b.view(U) << U(16))
    pi = np.float32(np.pi)
    want = (a.astype(np.longdouble) * np.longdouble(pi) + b.astype(np.longdouble)).astype(np.float32)
    np.testing.assert_array_equal(got["v3"].view(np.float32), want)
    np.testing.assert_array_equal(np.stack([got["v4"], got["v5"]]), np.stack([a, b]).view(U))
    np.testing.assert_array_equal(got["v6"], np.minimum(a.view(U), 65535) | np.minimum(b.view(U), 65535) << U(16))


def test_sub_dword_addressing() -> None:
    """SDWA: bytes and halves of sources, where the result goes, what happens to the rest of the register."""
    a, b, old = WORDS
    got = execute(
        "gfx90a",
        [
            "v_add_u32_sdwa v1, v10, v11 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_2 src1_sel:WORD_1",
            "v_mov_b32 v2, v12",
            "v_mov_b32_sdwa v2, v10 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:WORD_0",
            "v_add_u32_sdwa v3, sext(v10), v11 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_0 src1_sel:DWORD",
        ],
        {"v10": a, "v11": b, "v12": old},
        ["v1", "v2", "v3"],
    )
    np.testing.assert_array_equal(got["v1"], (a >> U(16) & U(255)) + (b >> U(16)))
    np.testing.assert_array_equal(got["v2"], a << U(16) | old & U(0xFFFF))
    np.testing.assert_array_equal(
        got["v3"], (a.astype(np.uint8).view(np.int8).astype(np.int64) + wide(b).astype(np.int64)).astype(U)
    )


def test_dual_issue_reads_before_it_writes() -> None:
    """Both halves of a VOPD pair see the old registers."""
    a, b = FLOATS[1][:32], FLOATS[2][:32]
    got = execute(
        "gfx1100", ["v_dual_mov_b32 v10, v11 :: v_dual_mov_b32 v11, v10"], {"v10": a, "v11": b}, ["v10", "v11"]
    )
    np.testing.assert_array_equal(got["v10"].view(np.float32), b)
    np.testing.assert_array_equal(got["v11"].view(np.float32), a)
