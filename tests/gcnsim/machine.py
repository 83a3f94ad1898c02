"""Runs a few instructions on one wave, with registers given and read back: the bench for the per-instruction tests."""

from __future__ import annotations

import re
from collections.abc import Sequence

import gcnsim
import numpy as np

HEADER = """\t.amdgcn_target "amdgcn-amd-amdhsa--{arch}"
test:
{body}
.Lfunc_end0:
\t.amdhsa_kernel test
\t\t.amdhsa_group_segment_fixed_size {lds}
\t\t.amdhsa_private_segment_fixed_size {scratch}
\t\t.amdhsa_user_sgpr_kernarg_segment_ptr 1
\t\t.amdhsa_user_sgpr_count 2
\t.end_amdhsa_kernel
"""


def lanes(arch: str) -> int:
    """Lanes of a wave."""
    return 64 if arch.startswith("gfx9") else 32


def kernel_text(arch: str, body: Sequence[str], lds: int = 0, scratch: int = 0) -> str:
    """A module with one kernel, `test`, whose arguments are at s[0:1]."""
    return HEADER.format(arch=arch, body="\n".join(f"\t{line}" for line in body), lds=lds, scratch=scratch)


def execute(
    arch: str,
    body: Sequence[str],
    inputs: dict[str, np.ndarray | int] | None = None,
    outputs: Sequence[str] = (),
    lds: int = 0,
    scratch: int = 0,
) -> dict[str, np.ndarray]:
    """Run `body` on one wave.

    Args:
        arch: "gfx942" and so on.
        body: Instructions; s[0:7] and v[250:255] are the bench's.
        inputs: Registers ("v3", "a0", "s9", "vcc_lo") -> one dword per lane (any 4-byte dtype), or a number.
        outputs: Registers to read, "exec_lo" and "scc" among them; as uint32 per lane.
        lds, scratch: Bytes of each.

    Returns:
        The outputs by name.
    """
    count = lanes(arch)
    inputs = inputs or {}
    vectors = {name: np.asarray(value) for name, value in inputs.items() if re.match(r"[va]\d", name)}
    given = np.zeros((len(vectors) + 1, count), np.uint32)
    for k, value in enumerate(vectors.values()):
        given[k] = np.broadcast_to(value, count).copy().view(np.uint32) if value.dtype != int else value
    taken = np.zeros((len(outputs), count), np.uint32)
    arguments = np.array([given.ctypes.data, taken.ctypes.data], np.uint64)
    code = ["s_load_dwordx4 s[4:7], s[0:1], 0x0", "v_lshlrev_b32 v255, 2, v0"]
    for k, name in enumerate(vectors):
        code.append(f"global_load_dword v254, v255, s[4:5] offset:{k * 4 * count}")
        code.append(f"v_accvgpr_write_b32 {name}, v254" if name[0] == "a" else f"v_mov_b32 {name}, v254")
    code += [f"s_mov_b32 {name}, {value:#x}" for name, value in inputs.items() if name not in vectors]
    code += body
    # SCC first, then scalars, before EXEC is restored to store everything.
    scalars = [name for name in outputs if not re.match(r"[va]\d", name)]
    if "scc" in scalars:
        code.append("s_cselect_b32 s95, 1, 0")
    places = {name: f"s{96 + k}" for k, name in enumerate(scalars)}
    code += [f"s_mov_b32 {places[name]}, {'s95' if name == 'scc' else name}" for name in scalars]
    code.append("s_mov_b64 exec, -1" if count == 64 else "s_mov_b32 exec_lo, -1")
    for k, name in enumerate(outputs):
        if name in places:
            code.append(f"v_mov_b32 v254, {places[name]}")
        else:
            code.append(f"v_accvgpr_read_b32 v254, {name}" if name[0] == "a" else f"v_mov_b32 v254, {name}")
        code.append(f"global_store_dword v255, v254, s[6:7] offset:{k * 4 * count}")
    code.append("s_endpgm")
    kernel, program = gcnsim.load(kernel_text(arch, code, lds, scratch))
    memory = [
        gcnsim.Memory(given.ctypes.data, given.nbytes, False),
        gcnsim.Memory(taken.ctypes.data, max(taken.nbytes, 4)),
    ]
    report = gcnsim.run(kernel, program, (1, 1, 1), (count, 1, 1), arguments.tobytes(), memory)
    assert report.findings == [], [str(finding) for finding in report.findings]
    return dict(zip(outputs, taken))


def mask(values: dict[str, np.ndarray], low: str, arch: str) -> np.ndarray:
    """A lane mask read as `low` (and, for 64 lanes, its upper half) as one bool per lane."""
    words = [values[low][0]] + ([values[low.replace("_lo", "_hi")][0]] if lanes(arch) == 64 else [])
    return np.array([words[lane // 32] >> np.uint32(lane % 32) & 1 for lane in range(lanes(arch))], bool)
