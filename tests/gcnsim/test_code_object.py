"""Code objects made by clang from HIP sources run in gcnsim: the way in for kernels that are not Triton's.

Slow, so not in CI, which has no clang for AMD: no kernel that ships needs it yet.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import gcnsim
import numpy as np
import pytest
from gcnsim.code_object import load_code_object

SOURCE = """
extern "C" __attribute__((global)) void column_sums(const float* x, float* out, int rows, int columns) {
  __attribute__((shared)) static float partial[256];
  int lane = __builtin_amdgcn_workitem_id_x(), column = __builtin_amdgcn_workgroup_id_x();
  float sum = 0;
  for (int row = lane; row < rows; row += 256) sum += x[row * columns + column];
  partial[lane] = sum;
  for (int step = 128; step > 0; step /= 2) {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
    if (lane < step) partial[lane] += partial[lane + step];
  }
  if (lane == 0) out[column] = partial[0];
}
"""


def clang() -> str:
    """The newest clang."""
    for name in ("clang-22", "clang-21", "clang-20", "clang"):
        if found := shutil.which(name):
            return found
    pytest.skip("needs clang with the AMD GPU target (Debian: apt install clang-22 lld-22 llvm-22)")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"])
def test_hip_kernel(tmp_path: Path, arch: str) -> None:
    source, target = tmp_path / "sums.hip", tmp_path / "sums.co"
    source.write_text(SOURCE)
    flags = ["--offload-device-only", "--no-gpu-bundle-output", "-nogpuinc", "-nogpulib", "-O3"]
    command = [clang(), "-x", "hip", f"--offload-arch={arch}", *flags, str(source), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    loaded = load_code_object(target.read_bytes(), arch, "column_sums")
    x = np.random.default_rng(0).integers(-9, 10, (300, 3)).astype(np.float32)
    out = np.full(3, np.nan, np.float32)
    values = [("Q", x.ctypes.data), ("Q", out.ctypes.data), ("i", 300), ("i", 3)]
    report = gcnsim.run(
        loaded.kernel,
        loaded.program,
        (3, 1, 1),
        (256, 1, 1),
        gcnsim.pack_arguments(loaded.kernel, values, (3, 1, 1), (256, 1, 1)),
        [loaded.memory, gcnsim.Memory(x.ctypes.data, x.nbytes, False), gcnsim.Memory(out.ctypes.data, out.nbytes)],
    )
    assert report.findings == []
    np.testing.assert_array_equal(out, x.sum(0))
    with pytest.raises(ValueError, match=r"no kernel 'other' in the code object; it has \['column_sums'\]"):
        load_code_object(target.read_bytes(), arch, "other")
