"""gcnsim's scalar ALU, instruction by instruction: result and condition code against Python's integers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from machine import execute

WORD = 2**32
VALUES = (0, 1, 5, 31, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678, 0xFEDCBA98)
PAIRS = list(itertools.product(VALUES, repeat=2))


def signed(x: int) -> int:
    return x - WORD if x >> 31 else x


def overflow(x: int) -> bool:
    return not -(2**31) <= x < 2**31


NONE = object()  # the condition code is not written
Result = tuple[int, Any]
BINARY: dict[str, Callable[[int, int], Result]] = {
    "s_add_u32": lambda a, b: (a + b, a + b >= WORD),
    "s_sub_u32": lambda a, b: (a - b, b > a),
    "s_add_i32": lambda a, b: (a + b, overflow(signed(a) + signed(b))),
    "s_sub_i32": lambda a, b: (a - b, overflow(signed(a) - signed(b))),
    "s_and_b32": lambda a, b: (a & b, a & b != 0),
    "s_or_b32": lambda a, b: (a | b, a | b != 0),
    "s_xor_b32": lambda a, b: (a ^ b, a ^ b != 0),
    "s_andn2_b32": lambda a, b: (a & ~b, a & ~b != 0),
    "s_and_not1_b32": lambda a, b: (a & ~b, a & ~b != 0),
    "s_lshl_b32": lambda a, b: (a << b % 32, (a << b % 32) % WORD != 0),
    "s_lshr_b32": lambda a, b: (a >> b % 32, a >> b % 32 != 0),
    "s_ashr_i32": lambda a, b: (signed(a) >> b % 32, signed(a) >> b % 32 != 0),
    "s_mul_i32": lambda a, b: (a * b, NONE),
    "s_mul_hi_u32": lambda a, b: (a * b >> 32, NONE),
    "s_mul_hi_i32": lambda a, b: (signed(a) * signed(b) >> 32, NONE),
    "s_min_i32": lambda a, b: (min(signed(a), signed(b)), signed(a) < signed(b)),
    "s_max_i32": lambda a, b: (max(signed(a), signed(b)), signed(a) >= signed(b)),
    "s_min_u32": lambda a, b: (min(a, b), a < b),
    "s_max_u32": lambda a, b: (max(a, b), a >= b),
    "s_lshl1_add_u32": lambda a, b: (2 * a + b, 2 * a + b >= WORD),
    "s_lshl3_add_u32": lambda a, b: (8 * a + b, 8 * a + b >= WORD),
    "s_lshl4_add_u32": lambda a, b: (16 * a + b, 16 * a + b >= WORD),
    "s_absdiff_i32": lambda a, b: (abs(signed(a) - signed(b)), a != b),
    "s_bfm_b32": lambda a, b: (((1 << a % 32) - 1) << b % 32, NONE),
    "s_pack_ll_b32_b16": lambda a, b: (a % 65536 | b % 65536 << 16, NONE),
    "s_pack_hh_b32_b16": lambda a, b: (a >> 16 | b >> 16 << 16, NONE),
}
UNARY: dict[str, Callable[[int], Result]] = {
    "s_mov_b32": lambda a: (a, NONE),
    "s_not_b32": lambda a: (~a, ~a % WORD != 0),
    "s_abs_i32": lambda a: (abs(signed(a)), a != 0),
    "s_sext_i32_i16": lambda a: ((a % 65536 ^ 32768) - 32768, NONE),
    "s_sext_i32_i8": lambda a: ((a % 256 ^ 128) - 128, NONE),
    "s_bcnt1_i32_b32": lambda a: (a.bit_count(), a != 0),
    "s_flbit_i32_b32": lambda a: (32 - a.bit_length() if a else WORD - 1, NONE),
    "s_ff1_i32_b32": lambda a: ((a & -a).bit_length() - 1, NONE),
    "s_cvt_f32_u32": lambda a: (int(np.float32(a).view(np.uint32)), NONE),
    "s_cvt_f32_i32": lambda a: (int(np.float32(signed(a)).view(np.uint32)), NONE),
}
COMPARES: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b, "lg": lambda a, b: a != b, "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
}  # fmt: skip


def run_all(template: str, operands: list[tuple[int, ...]]) -> list[tuple[int, int, int]]:
    """Per operands: result, and the condition code when it was 0 before and when it was 1."""
    body, lanes = [], {}
    for k, values in enumerate(operands):
        moves = [f"s_mov_b32 s{12 + n}, {value:#x}" for n, value in enumerate(values)]
        for before in (0, 1):
            body += [*moves, f"s_cmp_eq_u32 {before}, 1", template, "s_cselect_b32 s20, 1, 0"]
            body += [f"v_writelane_b32 v{200 + before}, s20, {k}", f"v_writelane_b32 v{202 + before}, s10, {k}"]
    for register in range(200, 204):
        lanes[f"v{register}"] = np.zeros(64, np.uint32)
    got = execute("gfx942", body, lanes, list(lanes))
    return [(int(got["v202"][k]), int(got["v200"][k]), int(got["v201"][k])) for k in range(len(operands))]


def check(template: str, operands: list[tuple[int, ...]], want: Callable[..., Result]) -> None:
    for start in range(0, len(operands), 64):
        part = operands[start : start + 64]
        for values, (result, code_0, code_1) in zip(part, run_all(template, part)):
            value, code = want(*values)
            assert result == value % WORD, (template, values)
            assert (code_0, code_1) == ((0, 1) if code is NONE else (int(code), int(code))), (template, values)


@pytest.mark.parametrize("name", BINARY)
def test_two_operands(name: str) -> None:
    check(f"{name} s10, s12, s13", PAIRS, BINARY[name])


@pytest.mark.parametrize("name", UNARY)
def test_one_operand(name: str) -> None:
    check(f"{name} s10, s12", [(value,) for value in VALUES], UNARY[name])


@pytest.mark.parametrize("name", COMPARES)
def test_compares(name: str) -> None:
    """Signed, unsigned, and with the 16-bit constant of S_CMPK, which is extended as the type says."""
    relation = COMPARES[name]
    keep = "s_mov_b32 s10, 0\n\t"
    check(f"{keep}s_cmp_{name}_u32 s12, s13", PAIRS, lambda a, b: (0, relation(a, b)))
    check(f"{keep}s_cmp_{name}_i32 s12, s13", PAIRS, lambda a, b: (0, relation(signed(a), signed(b))))
    singles = [(value,) for value in VALUES]
    check(f"{keep}s_cmpk_{name}_u32 s12, 0xffff", singles, lambda a: (0, relation(a, 65535)))
    check(f"{keep}s_cmpk_{name}_i32 s12, 0xffff", singles, lambda a: (0, relation(signed(a), -1)))


def test_constants_of_sixteen_bits() -> None:
    singles = [(value,) for value in VALUES]
    check("s_mov_b32 s10, s12\n\ts_addk_i32 s10, 0xfff0", singles, lambda a: (a - 16, overflow(signed(a) - 16)))
    check("s_mov_b32 s10, s12\n\ts_mulk_i32 s10, 0xfffe", singles, lambda a: (-2 * a, NONE))
    check("s_movk_i32 s10, 0x8000", singles, lambda a: (-32768, NONE))


def test_literals_of_64_bit_operands_are_zero_extended() -> None:
    """S_MOV_B64 with 0x80000000 is how LLVM makes the pair (-0.0, 0.0); inline constants are sign extended."""
    body = ["s_mov_b64 s[10:11], 0x80000000", "s_mov_b64 s[12:13], -2", "s_or_b64 s[14:15], s[10:11], 0xffff0000"]
    got = execute("gfx942", body, {}, [f"s{k}" for k in range(10, 16)])
    words = [int(got[f"s{k}"][0]) for k in range(10, 16)]
    assert words == [0x80000000, 0, 0xFFFFFFFE, 0xFFFFFFFF, 0xFFFF0000, 0]


def test_bits() -> None:
    check("s_mov_b32 s10, s13\n\ts_bitset1_b32 s10, s12", PAIRS, lambda a, b: (b | 1 << a % 32, NONE))
    check("s_mov_b32 s10, s13\n\ts_bitset0_b32 s10, s12", PAIRS, lambda a, b: (b & ~(1 << a % 32), NONE))
    check("s_mov_b32 s10, 0\n\ts_bitcmp0_b32 s12, s13", PAIRS, lambda a, b: (0, not a >> b % 32 & 1))
    check("s_mov_b32 s10, 0\n\ts_bitcmp1_b32 s12, s13", PAIRS, lambda a, b: (0, a >> b % 32 & 1))


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("and", lambda a, x: a & x), ("or", lambda a, x: a | x), ("xor", lambda a, x: a ^ x),
        ("andn2", lambda a, x: a & ~x), ("andn1", lambda a, x: ~a & x), ("orn1", lambda a, x: ~a | x),
    ],
)  # fmt: skip
def test_saved_masks(name: str, want: Callable[[int, int], int]) -> None:
    """The old EXEC goes to the destination, the new one is combined from both."""
    source, before = 0x0123456789ABCDEF, 0xFFFF0000FFFF0000
    body = [f"s_mov_b32 exec_{half}, 0xffff0000" for half in ("lo", "hi")]
    body.append(f"s_{name}_saveexec_b64 s[10:11], s[12:13]")
    outputs = ["s10", "s11", "exec_lo", "exec_hi", "scc"]
    got = execute("gfx942", body, {"s12": source % WORD, "s13": source >> 32}, outputs)
    words = [int(got[name][0]) for name in outputs]
    assert words[0] | words[1] << 32 == before
    assert words[2] | words[3] << 32 == want(source, before) % 2**64
    assert words[4] == int(want(source, before) % 2**64 != 0)


def test_branches() -> None:
    """Each conditional branch, taken and not: a bit is set where it falls through."""
    conditions = {
        "scc0": ("s_cmp_eq_u32 {}, 0", (0, 1)), "scc1": ("s_cmp_eq_u32 {}, 0", (1, 0)),
        "vccz": ("s_mov_b64 vcc, {}", (1, 0)), "vccnz": ("s_mov_b64 vcc, {}", (0, 1)),
        "execz": ("s_mov_b64 exec, {}", (1, 0)), "execnz": ("s_mov_b64 exec, {}", (0, 1)),
    }  # fmt: skip
    body, count = ["s_mov_b32 s10, 0"], 0
    for name, (setup, (falls, jumps)) in conditions.items():
        for operand in (falls, jumps):
            body += [setup.format(operand), f"s_cbranch_{name} .LBB0_{count}", f"s_bitset1_b32 s10, {count}"]
            body += [f".LBB0_{count}:", "s_mov_b64 exec, -1"]
            count += 1
    assert int(execute("gfx942", body, {}, ["s10"])["s10"][0]) == 0b010101010101
