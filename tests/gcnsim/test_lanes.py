"""Instructions of gcnsim that move data between lanes, against index arithmetic in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from machine import execute, lanes

U = np.uint32
RNG = np.random.default_rng(3)
X, OLD = (RNG.integers(0, 2**32, 64, dtype=np.uint64).astype(U) for _ in range(2))
LANE = np.arange(64)
ROW, IN_ROW = LANE // 16 * 16, LANE % 16

# DPP control -> source lane, -1 for none. AMD CDNA3 ISA, table of DPP_CTRL.
DPP = {
    "quad_perm:[2,0,3,1]": LANE // 4 * 4 + np.array([2, 0, 3, 1])[LANE % 4],
    "row_shl:3": np.where(IN_ROW + 3 < 16, LANE + 3, -1),
    "row_shr:5": np.where(IN_ROW >= 5, LANE - 5, -1),
    "row_ror:4": ROW + (IN_ROW - 4) % 16,
    "row_mirror": ROW + 15 - IN_ROW,
    "row_half_mirror": LANE // 8 * 8 + 7 - LANE % 8,
    "row_bcast:15": np.where(LANE // 16 % 2 == 1, ROW - 1, -1),
    "row_bcast:31": np.where(LANE >= 32, 31, -1),
    "row_newbcast:7": ROW + 7,
    "wave_shr:1": LANE - 1,
    "wave_rol:1": (LANE + 1) % 64,
}


@pytest.mark.parametrize("control", DPP)
def test_dpp(control: str) -> None:
    """Without a source lane the destination is kept; with bound_ctrl it is 0; the row mask keeps whole rows."""
    source = DPP[control]
    inputs = {"v10": X, "v1": OLD, "v2": OLD, "v3": OLD}
    masks = "row_mask:0xf bank_mask:0xf"
    body = [
        f"v_mov_b32_dpp v1, v10 {control} {masks}",
        f"v_mov_b32_dpp v2, v10 {control} {masks} bound_ctrl:1",
        f"v_mov_b32_dpp v3, v10 {control} row_mask:0xa bank_mask:0xf bound_ctrl:1",
    ]
    got = execute("gfx942", body, inputs, ["v1", "v2", "v3"])
    np.testing.assert_array_equal(got["v1"], np.where(source >= 0, X[source], OLD))
    np.testing.assert_array_equal(got["v2"], np.where(source >= 0, X[source], 0))
    np.testing.assert_array_equal(got["v3"], np.where(LANE // 16 % 2 == 1, np.where(source >= 0, X[source], 0), OLD))


@pytest.mark.parametrize(
    ("control", "source"),
    [
        ("row_share:5", ROW[:32] + 5),
        ("row_xmask:9", ROW[:32] + (IN_ROW[:32] ^ 9)),
        ("dpp8:[7,6,5,4,3,2,1,0]", LANE[:32] // 8 * 8 + 7 - LANE[:32] % 8),
    ],
)
def test_dpp_of_rdna(control: str, source: np.ndarray) -> None:
    masks = "" if control.startswith("dpp8") else " row_mask:0xf bank_mask:0xf"
    got = execute("gfx1100", [f"v_mov_b32_dpp v1, v10 {control}{masks}"], {"v10": X[:32], "v1": OLD[:32]}, ["v1"])
    np.testing.assert_array_equal(got["v1"], X[source])


def test_dpp_source_is_read_before_the_result_is_written() -> None:
    """Destination and source may be one register."""
    got = execute(
        "gfx942", ["v_add_u32_dpp v10, v10, v10 row_shr:1 row_mask:0xf bank_mask:0xf bound_ctrl:1"], {"v10": X}, ["v10"]
    )
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got["v10"], np.where(IN_ROW >= 1, X[LANE - 1], 0).astype(U) + X)


def test_inactive_lanes_are_no_source_of_dpp() -> None:
    body = ["s_mov_b32 exec_lo, 0xffff00ff", "v_mov_b32_dpp v1, v10 row_ror:8 row_mask:0xf bank_mask:0xf"]
    got = execute("gfx942", body, {"v10": X, "v1": OLD}, ["v1"])["v1"]
    source = ROW + (IN_ROW - 8) % 16
    on = ~((LANE >= 8) & (LANE < 16))
    np.testing.assert_array_equal(got, np.where(on & on[source], X[source], OLD))


def test_permutes_through_lds() -> None:
    order = RNG.permutation(64)
    got = execute(
        "gfx942",
        [
            "ds_bpermute_b32 v1, v11, v10",
            "ds_permute_b32 v2, v11, v10",
            "ds_swizzle_b32 v3, v10 offset:swizzle(SWAP,16)",
            "ds_swizzle_b32 v4, v10 offset:swizzle(QUAD_PERM,3,2,0,1)",
            "ds_swizzle_b32 v5, v10 offset:swizzle(BROADCAST,8,3)",
        ],
        {"v10": X, "v11": (order * 4).astype(U)},
        ["v1", "v2", "v3", "v4", "v5"],
    )
    np.testing.assert_array_equal(got["v1"], X[order])
    pushed = np.empty_like(X)
    pushed[order] = X
    np.testing.assert_array_equal(got["v2"], pushed)
    np.testing.assert_array_equal(got["v3"], X[LANE ^ 16])
    np.testing.assert_array_equal(got["v4"], X[LANE // 4 * 4 + np.array([3, 2, 0, 1])[LANE % 4]])
    np.testing.assert_array_equal(got["v5"], X[LANE // 8 * 8 + 3])


def test_swaps_of_gfx950() -> None:
    got = execute(
        "gfx950",
        ["v_permlane32_swap_b32 v10, v11", "v_permlane16_swap_b32 v12, v13"],
        {"v10": X, "v11": OLD, "v12": X, "v13": OLD},
        ["v10", "v11", "v12", "v13"],
    )
    np.testing.assert_array_equal(got["v10"], np.concatenate([X[:32], OLD[:32]]))
    np.testing.assert_array_equal(got["v11"], np.concatenate([X[32:], OLD[32:]]))
    x, old = X.reshape(4, 16), OLD.reshape(4, 16)
    np.testing.assert_array_equal(got["v12"], np.concatenate([x[0], old[0], x[2], old[2]]))
    np.testing.assert_array_equal(got["v13"], np.concatenate([x[1], old[1], x[3], old[3]]))


def test_permutations_within_rows_of_rdna() -> None:
    order = RNG.integers(0, 16, 16)
    low, high = (sum(int(lane) << 4 * k for k, lane in enumerate(half)) for half in (order[:8], order[8:]))
    got = execute(
        "gfx1100",
        ["v_permlane16_b32 v1, v10, s10, s11", "v_permlanex16_b32 v2, v10, s10, s11"],
        {"v10": X[:32], "s10": low, "s11": high},
        ["v1", "v2"],
    )
    rows = X[:32].reshape(2, 16)
    np.testing.assert_array_equal(got["v1"].reshape(2, 16), rows[:, order])
    np.testing.assert_array_equal(got["v2"].reshape(2, 16), rows[::-1][:, order])


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_lanes_and_scalars(arch: str) -> None:
    n = lanes(arch)
    body = [
        "v_readlane_b32 s10, v10, 7",
        "v_writelane_b32 v1, 42, 9",
        "s_mov_b32 exec_lo, 0xfffffff0",
        "v_readfirstlane_b32 s11, v10",
    ]
    got = execute(arch, body, {"v10": X[:n], "v1": OLD[:n]}, ["s10", "s11", "v1"])
    assert got["s10"][0] == X[7]
    assert got["s11"][0] == X[4]
    np.testing.assert_array_equal(got["v1"], np.where(np.arange(n) == 9, 42, OLD[:n]))


def test_counting_lanes_below() -> None:
    got = execute("gfx942", ["v_mbcnt_lo_u32_b32 v1, -1, 0", "v_mbcnt_hi_u32_b32 v1, -1, v1"], {}, ["v1"])["v1"]
    np.testing.assert_array_equal(got, LANE)


def test_accumulation_registers() -> None:
    got = execute("gfx942", ["v_accvgpr_write_b32 a3, v10", "v_accvgpr_read_b32 v1, a3"], {"v10": X}, ["v1", "a3"])
    np.testing.assert_array_equal(got["v1"], X)
    np.testing.assert_array_equal(got["a3"], X)
