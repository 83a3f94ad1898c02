"""gcnsim's packed and mixed-precision math against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from machine import execute

U = np.uint32
RNG = np.random.default_rng(2)
H = [RNG.standard_normal((64, 2)).astype(np.float16) for _ in range(3)]
HALVES = {f"v{10 + k}": h.view(U)[:, 0] for k, h in enumerate(H)}
F = [RNG.standard_normal((2, 64)).astype(np.float32) for _ in range(3)]
PAIRS = {f"v{10 + 2 * k + half}": F[k][half] for k in range(3) for half in range(2)}


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray, kind: type) -> np.ndarray:
    return (a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)).astype(kind)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("v_pk_add_f16", lambda a, b, c: a + b),
        ("v_pk_mul_f16", lambda a, b, c: a * b),
        ("v_pk_max_f16", lambda a, b, c: np.maximum(a, b)),
        ("v_pk_min_f16", lambda a, b, c: np.minimum(a, b)),
        ("v_pk_fma_f16", lambda a, b, c: fma(a, b, c, np.float16)),
    ],
)
def test_packed_halves(name: str, want) -> None:
    sources = "v10, v11, v12" if name == "v_pk_fma_f16" else "v10, v11"
    got = execute("gfx942", [f"{name} v9, {sources}"], HALVES, ["v9"])["v9"]
    np.testing.assert_array_equal(got[:, None].view(np.float16), want(*H))


def test_packed_halves_selected_and_negated() -> None:
    """op_sel and op_sel_hi choose the halves of each source; neg_lo and neg_hi negate per result."""
    got = execute(
        "gfx942", ["v_pk_mul_f16 v9, v10, v11 op_sel:[1,0] op_sel_hi:[0,0] neg_lo:[1,0] neg_hi:[0,1]"], HALVES, ["v9"]
    )["v9"]
    want = np.stack([-H[0][:, 1] * H[1][:, 0], H[0][:, 0] * -H[1][:, 0]], axis=1)
    np.testing.assert_array_equal(got[:, None].view(np.float16), want)


def test_packed_integers() -> None:
    words = {name: RNG.integers(0, 2**32, 64, dtype=np.uint64).astype(U) for name in ("v10", "v11")}
    a, b = (words[name][:, None].view(np.uint16) for name in words)
    body = [
        "v_pk_add_u16 v1, v10, v11",
        "v_pk_lshlrev_b16 v2, v10, v11",
        "v_pk_mul_lo_u16 v3, v10, v11",
        "v_pk_max_i16 v4, v10, v11",
    ]
    got = execute("gfx942", body, words, ["v1", "v2", "v3", "v4"])
    for name, want in (
        ("v1", a + b),
        ("v2", b << (a & 15)),
        ("v3", a * b),
        ("v4", np.maximum(a.view(np.int16), b.view(np.int16)).view(np.uint16)),
    ):
        np.testing.assert_array_equal(got[name][:, None].view(np.uint16), want.astype(np.uint16), err_msg=name)


def test_packed_floats() -> None:
    body = [
        "v_pk_add_f32 v[20:21], v[10:11], v[12:13]",
        "v_pk_mul_f32 v[22:23], v[10:11], v[12:13] op_sel_hi:[1,0]",
        "v_pk_fma_f32 v[24:25], v[10:11], v[12:13], v[14:15] op_sel:[1,0,0] op_sel_hi:[0,1,1] neg_lo:[0,0,1]",
        "v_pk_mov_b32 v[26:27], v[10:11], v[12:13] op_sel:[1,0]",
    ]
    got = execute("gfx942", body, PAIRS, [f"v{k}" for k in range(20, 28)])
    a, b, c = F
    for base, want in (
        (20, a + b),
        (22, np.stack([a[0] * b[0], a[1] * b[0]])),
        (24, np.stack([fma(a[1], b[0], -c[0], np.float32), fma(a[0], b[1], c[1], np.float32)])),
        (26, np.stack([a[1], b[0]])),
    ):
        for half in range(2):
            np.testing.assert_array_equal(
                got[f"v{base + half}"].view(np.float32), want[half], err_msg=f"v{base + half}"
            )


def test_mixed_precision() -> None:
    inputs = {"v10": HALVES["v10"], "v11": F[0][0], "v12": HALVES["v12"], "v9": HALVES["v11"]}
    body = [
        "v_fma_mix_f32 v1, v10, v11, v12 op_sel:[1,0,0] op_sel_hi:[1,0,1]",
        "v_fma_mixhi_f16 v9, v10, v11, v12 op_sel_hi:[1,0,1]",
    ]
    got = execute("gfx942", body, inputs, ["v1", "v9"])
    np.testing.assert_array_equal(got["v1"].view(np.float32), fma(H[0][:, 1], F[0][0], H[2][:, 0], np.float32))
    halves = got["v9"][:, None].view(np.float16)
    np.testing.assert_array_equal(halves[:, 0], H[1][:, 0])
    np.testing.assert_array_equal(halves[:, 1], fma(H[0][:, 0], F[0][0], H[2][:, 0], np.float32).astype(np.float16))


def test_dot_products() -> None:
    got = execute(
        "gfx942",
        ["v_dot2_f32_f16 v1, v10, v11, v13", "v_mov_b32 v2, v13", "v_dot2c_f32_f16 v2, v10, v11"],
        {**HALVES, "v13": F[0][0]},
        ["v1", "v2"],
    )
    want = (H[0].astype(np.float64) * H[1].astype(np.float64)).sum(1) + F[0][0]
    for name in ("v1", "v2"):
        np.testing.assert_allclose(got[name].view(np.float32), want, rtol=1e-5, atol=1e-6)
