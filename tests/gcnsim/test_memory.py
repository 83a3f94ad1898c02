"""gcnsim's LDS, scratch, global and buffer instructions, and its scalar ALU, against numpy and Python integers."""

from __future__ import annotations

import gcnsim
import numpy as np
import pytest
from machine import execute, kernel_text

U = np.uint32
RNG = np.random.default_rng(5)
LANE = np.arange(64)
X = [RNG.integers(0, 2**32, 64, dtype=np.uint64).astype(U) for _ in range(4)]
WORDS = {f"v{10 + k}": x for k, x in enumerate(X)}
BYTES_4 = {"v20": (LANE * 4).astype(U)}
BYTES_8 = {"v21": (LANE * 8).astype(U)}
BYTES_16 = {"v22": (LANE * 16).astype(U)}


def test_lds_widths() -> None:
    """Each store is read back at other widths."""
    body = [
        "ds_write_b128 v22, v[10:13]",
        "ds_read_b32 v1, v20 offset:8",
        "ds_read_b64 v[2:3], v21",
        "ds_read_u16 v4, v20 offset:2",
        "ds_read_i8 v5, v20 offset:3",
        "v_mov_b32 v6, v11",
        "ds_read_u16_d16_hi v6, v20",
        "ds_read_b128 v[30:33], v22",
    ]
    outputs = [*(f"v{k}" for k in range(1, 7)), *(f"v{k}" for k in range(30, 34))]
    got = execute("gfx942", body, {**WORDS, **BYTES_4, **BYTES_8, **BYTES_16}, outputs, lds=1024)
    memory = np.stack(X, axis=1).reshape(-1)
    np.testing.assert_array_equal(got["v1"], memory[LANE + 2])
    np.testing.assert_array_equal(np.stack([got["v2"], got["v3"]], 1), memory[:128].reshape(64, 2))
    np.testing.assert_array_equal(got["v4"], memory[LANE] >> U(16))
    np.testing.assert_array_equal(got["v5"].view(np.int32), memory[LANE].view(np.int32) >> 24)
    np.testing.assert_array_equal(got["v6"], memory[LANE] << U(16) | X[1] & U(0xFFFF))
    for k in range(4):
        np.testing.assert_array_equal(got[f"v{30 + k}"], X[k])


def test_lds_pairs() -> None:
    """Two addresses in one instruction, also where the result overwrites the address."""
    body = [
        "ds_write2_b32 v20, v10, v11 offset0:0 offset1:64",
        "ds_write2st64_b32 v20, v12, v13 offset0:2 offset1:3",
        "ds_read2_b32 v[20:21], v20 offset0:0 offset1:192",
        "ds_read_b32 v2, v23 offset:512",
    ]
    got = execute("gfx942", body, {**WORDS, **BYTES_4, "v23": (LANE * 4).astype(U)}, ["v20", "v21", "v2"], lds=1024)
    np.testing.assert_array_equal(got["v20"], X[0])
    np.testing.assert_array_equal(got["v21"], X[3])
    np.testing.assert_array_equal(got["v2"], X[2])


@pytest.mark.parametrize(("kind", "name"), [(np.uint16, "b16"), (np.uint8, "b8")])
def test_transposed_lds_reads(kind: type, name: str) -> None:
    """ds_read_b64_tr: 16 lanes read 128 bytes; seen as (n, 16 / n, n) of elements, the axes rotate."""
    n = 8 // np.dtype(kind).itemsize
    body = ["ds_write_b64 v21, v[10:11]", f"ds_read_b64_tr_{name} v[1:2], v21"]
    got = execute("gfx950", body, {**WORDS, **BYTES_8}, ["v1", "v2"], lds=512)
    given = np.stack(X[:2], 1).view(kind).reshape(4, n, 16 // n, n)
    want = given.transpose(0, 2, 3, 1).reshape(64, n)
    np.testing.assert_array_equal(np.stack([got["v1"], got["v2"]], 1).view(kind), want)


def test_lds_atomics() -> None:
    """All lanes add to one word; each sees the sum of those before it."""
    body = ["ds_write_b32 v23, v23", "ds_add_rtn_u32 v1, v23, v24", "ds_read_b32 v2, v23"]
    got = execute("gfx942", body, {"v23": np.zeros(64, U), "v24": (LANE + 1).astype(U)}, ["v1", "v2"], lds=16)
    np.testing.assert_array_equal(got["v1"], np.cumsum(LANE + 1) - (LANE + 1))
    assert (got["v2"] == 64 * 65 // 2).all()


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_scratch(arch: str) -> None:
    """Scratch is private to a lane."""
    n = 64 if arch == "gfx942" else 32
    names = ("scratch_store_dwordx2", "scratch_load_dword") if n == 64 else ("scratch_store_b64", "scratch_load_b32")
    body = [f"{names[0]} off, v[10:11], off offset:8", f"{names[1]} v1, off, off offset:12"]
    got = execute(arch, body, {name: x[:n] for name, x in WORDS.items()}, ["v1"], scratch=16)
    np.testing.assert_array_equal(got["v1"], X[1][:n])


def test_inactive_lanes_touch_nothing() -> None:
    """Addresses of lanes that are off are not looked at."""
    bad = np.where(LANE < 32, LANE * 4, 0x7FFFFFF0).astype(U)
    body = ["s_mov_b32 exec_hi, 0", "ds_write_b32 v20, v10", "ds_read_b32 v1, v20"]
    got = execute("gfx942", body, {"v20": bad, "v10": X[0], "v1": X[1]}, ["v1"], lds=128)
    np.testing.assert_array_equal(got["v1"], np.where(LANE < 32, X[0], X[1]))


def run_global(arch: str, body: list[str], given: np.ndarray, taken: np.ndarray) -> gcnsim.Report:
    """Kernel arguments are the two arrays; s[4:5] points to the first, s[6:7] to the second, v1 is 4 * lane."""
    code = ["s_load_dwordx4 s[4:7], s[0:1], 0x0", "v_lshlrev_b32 v1, 2, v0", *body, "s_endpgm"]
    kernel, program = gcnsim.load(kernel_text(arch, code))
    arguments = np.array([given.ctypes.data, taken.ctypes.data], np.uint64)
    memory = [
        gcnsim.Memory(given.ctypes.data, given.nbytes, False),
        gcnsim.Memory(taken.ctypes.data, taken.nbytes),
    ]
    return gcnsim.run(kernel, program, (1, 1, 1), (64, 1, 1), arguments.tobytes(), memory)


def test_global_and_buffer_loads() -> None:
    """Signed and narrow loads; a buffer load beyond its descriptor gives 0 and is counted."""
    given = np.concatenate(X)
    taken = np.zeros((4, 64), U)
    body = [
        "global_load_sshort v10, v1, s[4:5] offset:2",
        "v_mov_b32 v2, s4",
        "v_mov_b32 v3, s5",
        "v_add_co_u32 v2, vcc, v2, v1",
        "v_addc_co_u32 v3, vcc, 0, v3, vcc",
        "global_load_dword v11, v[2:3], off offset:512",
        "s_mov_b64 s[8:9], s[4:5]",
        "s_mov_b32 s10, 0x100",
        "s_mov_b32 s11, 0x27000",
        "buffer_load_dword v12, v1, s[8:11], 0 offen offset:128",
        "v_mov_b32 v13, v1",
        "buffer_load_ubyte v13, v1, s[8:11], 0 offen offset:1",
        *(f"global_store_dword v1, v{10 + k}, s[6:7] offset:{256 * k}" for k in range(4)),
    ]
    report = run_global("gfx942", body, given, taken)
    assert report.findings == []
    assert report.dropped == 32
    np.testing.assert_array_equal(taken[0].view(np.int32), given[:64].view(np.int32) >> 16)
    np.testing.assert_array_equal(taken[1], given[128:192])
    np.testing.assert_array_equal(taken[2], np.where(LANE < 32, given[32:96], 0))
    np.testing.assert_array_equal(taken[3], given[:64] >> U(8) & U(255))


def test_global_atomics() -> None:
    taken = np.zeros(66, np.float32)
    body = [
        "v_mov_b32 v2, 0",
        "v_mov_b32 v3, 1.0",
        "v_mov_b32 v4, 1",
        "global_atomic_add_f32 v2, v3, s[6:7]",
        "global_atomic_add v5, v2, v4, s[6:7] offset:4 sc0",
        "global_store_dword v1, v5, s[6:7] offset:8",
    ]
    report = run_global("gfx942", body, np.zeros(4, U), taken)
    assert report.findings == []
    assert taken[0] == 64.0
    assert taken.view(U)[1] == 64
    np.testing.assert_array_equal(taken.view(U)[2:], LANE)


M64 = 2**64 - 1


@pytest.mark.parametrize(
    ("body", "want"),
    [
        (["s_add_u32 s10, s12, s14", "s_addc_u32 s11, s13, s15"], lambda a, b: a + b & M64),
        (["s_sub_u32 s10, s12, s14", "s_subb_u32 s11, s13, s15"], lambda a, b: a - b & M64),
        (["s_and_b64 s[10:11], s[12:13], s[14:15]"], lambda a, b: a & b),
        (["s_andn2_b64 s[10:11], s[12:13], s[14:15]"], lambda a, b: a & ~b),
        (["s_xnor_b64 s[10:11], s[12:13], s[14:15]"], lambda a, b: ~(a ^ b) & M64),
        (["s_lshl_b64 s[10:11], s[12:13], 13"], lambda a, b: a << 13 & M64),
        (["s_ashr_i64 s[10:11], s[12:13], 13"], lambda a, b: (a - (a >> 63 << 64) >> 13) & M64),
        (["s_mul_i32 s10, s12, s14", "s_mul_hi_u32 s11, s12, s14"], lambda a, b: (a & 2**32 - 1) * (b & 2**32 - 1)),
        (["s_bfe_u32 s10, s12, 0x80004", "s_bfe_i32 s11, s12, 0x80004"],
         lambda a, b: (a >> 4 & 255) | ((((a >> 4 & 255) ^ 128) - 128 & 2**32 - 1) << 32)),
        (["s_min_i32 s10, s12, s14", "s_max_u32 s11, s12, s14"],
         lambda a, b: min(a & 2**32 - 1, b & 2**32 - 1, key=lambda x: x - (x >> 31 << 32))
         | max(a & 2**32 - 1, b & 2**32 - 1) << 32),
        (["s_lshl2_add_u32 s10, s12, s14", "s_pack_lh_b32_b16 s11, s12, s14"],
         lambda a, b: (4 * (a & 2**32 - 1) + (b & 2**32 - 1) & 2**32 - 1) | ((a & 65535) | (b & 0xFFFF0000)) << 32),
        (["s_brev_b32 s10, s12", "s_bcnt1_i32_b64 s11, s[12:13]"],
         lambda a, b: int(f"{a & 2**32 - 1:032b}"[::-1], 2) | a.bit_count() << 32),
        (["s_ff1_i32_b64 s10, s[12:13]", "s_flbit_i32_b32 s11, s13"],
         lambda a, b: (a & -a).bit_length() - 1 | (32 - (a >> 32).bit_length()) << 32),
        (["s_cmp_gt_i32 s12, s14", "s_cselect_b32 s10, s13, s15", "s_cmp_lg_u64 s[12:13], s[14:15]",
          "s_cselect_b32 s11, 1, 2"],
         lambda a, b: ((a if (a & 2**32 - 1 ^ 2**31) > (b & 2**32 - 1 ^ 2**31) else b) >> 32)
         | (1 if a != b else 2) << 32),
    ],
)  # fmt: skip
def test_scalar(body: list[str], want) -> None:
    for a, b in (
        (0x123456789ABCDEF0, 0xFEDCBA9876543210),
        (0x00000001FFFFFFFF, 0x8000000000000001),
        (2**63, 2**64 - 1),
    ):
        inputs = {"s12": a & 2**32 - 1, "s13": a >> 32, "s14": b & 2**32 - 1, "s15": b >> 32}
        got = execute("gfx942", body, inputs, ["s10", "s11"])
        assert int(got["s10"][0]) | int(got["s11"][0]) << 32 == want(a, b), (hex(a), hex(b))


def test_loops_and_saved_masks() -> None:
    """A loop with a divergent exit: lane l counts to l."""
    body = [
        "v_mov_b32 v1, 0",
        "s_mov_b64 s[10:11], exec",
        ".LBB0_1:",
        "v_cmp_lt_u32 vcc, v1, v0",
        "s_and_saveexec_b64 s[12:13], vcc",
        "v_add_u32 v1, 1, v1",
        "s_cbranch_execnz .LBB0_1",
        "s_mov_b64 exec, s[10:11]",
    ]
    np.testing.assert_array_equal(execute("gfx942", body, {}, ["v1"])["v1"], LANE)
