"""gcnsim's vector compares and selects against numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from machine import execute, lanes, mask

U = np.uint32
RNG = np.random.default_rng(6)
WORDS = [RNG.integers(0, 2**32, 64, dtype=np.uint64).astype(U) for _ in range(3)]
FLOATS = [(RNG.standard_normal(64) * 2.0 ** RNG.integers(-20, 20, 64)).astype(np.float32) for _ in range(3)]
FLOATS[0][:8] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-41, 3.0, np.nan]
FLOATS[1][:8] = [1.0, 0.0, np.inf, np.inf, 1.0, 1e-41, np.nan, np.nan]

RELATIONS: dict[str, Callable[..., Any]] = {
    "lt": np.less, "le": np.less_equal, "eq": np.equal, "ge": np.greater_equal, "gt": np.greater,
}  # fmt: skip


@pytest.mark.parametrize("arch", ["gfx942", "gfx1201"])
def test_compares(arch: str) -> None:
    """Per type and relation, ordered or not, on the lanes that are on."""
    n = lanes(arch)
    on = np.arange(n) % 3 != 0
    low = int(sum(int(bit) << k for k, bit in enumerate(on[:32])))
    high = int(sum(int(bit) << k for k, bit in enumerate(on[32:])))
    set_exec = [f"s_mov_b32 exec_lo, {low:#x}", *([f"s_mov_b32 exec_hi, {high:#x}"] if n == 64 else [])]
    where = "vcc" if n == 64 else "vcc_lo"
    outputs = ["vcc_lo", "vcc_hi"] if n == 64 else ["vcc_lo"]
    a, b = FLOATS[0][:n].copy(), FLOATS[1][:n].copy()
    b[10:20] = a[10:20]
    for name, relation in RELATIONS.items():
        for kind, x, y in (("f32", a, b), ("u32", a.view(U), b.view(U)), ("i32", a.view(np.int32), b.view(np.int32))):
            got = execute(arch, [*set_exec, f"v_cmp_{name}_{kind} {where}, v10, v11"], {"v10": a, "v11": b}, outputs)
            np.testing.assert_array_equal(mask(got, "vcc_lo", arch), relation(x, y) & on, err_msg=f"{name}_{kind}")
    got = execute(arch, [*set_exec, f"v_cmp_nge_f32 {where}, v10, v11"], {"v10": a, "v11": b}, outputs)
    np.testing.assert_array_equal(mask(got, "vcc_lo", arch), ~(a >= b) & on)
    got = execute(arch, [*set_exec, f"v_cmp_u_f32 {where}, v10, v11"], {"v10": a, "v11": b}, outputs)
    np.testing.assert_array_equal(mask(got, "vcc_lo", arch), (np.isnan(a) | np.isnan(b)) & on)
    got = execute(
        arch, [*set_exec, f"v_cmp_class_f32 {where}, v10, v11"], {"v10": a, "v11": np.full(n, 0x204, U)}, outputs
    )
    np.testing.assert_array_equal(mask(got, "vcc_lo", arch), np.isinf(a) & on)
    got = execute(
        arch,
        [*set_exec, "v_cmpx_gt_f32 v10, v11"],
        {"v10": a, "v11": b},
        ["exec_lo", "exec_hi"] if n == 64 else ["exec_lo"],
    )
    np.testing.assert_array_equal(mask(got, "exec_lo", arch), (a > b) & on)


@pytest.mark.parametrize("kind", ["i64", "u64", "i16", "u16"])
def test_compares_of_other_integers(kind: str) -> None:
    """64 bits from register pairs, 16 bits from lower halves; near values and equal ones among them."""
    a, b = WORDS[0].copy(), WORDS[1].copy()
    b[::4] = a[::4]
    inputs = {"v10": a, "v11": WORDS[2], "v12": b, "v13": np.where(np.arange(64) % 2, WORDS[2], WORDS[2] ^ U(1))}
    dtype = {"i64": np.int64, "u64": np.uint64, "i16": np.int16, "u16": np.uint16}[kind]
    if kind.endswith("64"):
        x, y = (
            np.stack([inputs[low], inputs[high]], 1).view(dtype)[:, 0] for low, high in (("v10", "v11"), ("v12", "v13"))
        )
        operands = "v[10:11], v[12:13]"
    else:
        x, y = (word.astype(np.uint16).view(dtype) for word in (a, b))
        operands = "v10, v12"
    for name, relation in {**RELATIONS, "ne": np.not_equal}.items():
        got = execute("gfx942", [f"v_cmp_{name}_{kind} vcc, {operands}"], inputs, ["vcc_lo", "vcc_hi"])
        np.testing.assert_array_equal(mask(got, "vcc_lo", "gfx942"), relation(x, y), err_msg=name)


@np.errstate(all="ignore")
def test_unordered_compares() -> None:
    a, b = FLOATS[0].copy(), FLOATS[1].copy()
    b[20:30] = a[20:30]
    wants = {
        "neq": ~(a == b), "nlt": ~(a < b), "ngt": ~(a > b), "nle": ~(a <= b), "nlg": ~((a < b) | (a > b)),
        "lg": (a < b) | (a > b), "o": ~(np.isnan(a) | np.isnan(b)),
    }  # fmt: skip
    for name, want in wants.items():
        got = execute("gfx942", [f"v_cmp_{name}_f32 vcc, v10, v11"], {"v10": a, "v11": b}, ["vcc_lo", "vcc_hi"])
        np.testing.assert_array_equal(mask(got, "vcc_lo", "gfx942"), want, err_msg=name)


def test_select() -> None:
    a, b = FLOATS[1], FLOATS[2]
    body = ["v_cndmask_b32 v1, v10, v11, vcc", "v_cndmask_b32_e64 v2, -v10, v11, s[10:11]"]
    masks = {"vcc_lo": 0x0F0F00FF, "vcc_hi": 0x3, "s10": 0xAAAAAAAA, "s11": 0x1}
    got = execute("gfx942", body, {"v10": a, "v11": b, **masks}, ["v1", "v2"])
    chosen = np.array([(0x30F0F00FF >> lane) & 1 for lane in range(64)], bool)
    np.testing.assert_array_equal(got["v1"].view(np.float32), np.where(chosen, b, a))
    chosen = np.array([(0x1AAAAAAAA >> lane) & 1 for lane in range(64)], bool)
    np.testing.assert_array_equal(got["v2"].view(np.float32), np.where(chosen, b, -a))
