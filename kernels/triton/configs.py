"""Launch configurations as data: which tile, how many warps and pipeline stages, per architecture and size class.

A row of a table is chosen by the larger of the two padded head sizes and by the element size. What bounds the choice:

* LDS (shared memory): 64 KiB on gfx90a, gfx942 and Radeon, 160 KiB on gfx950, 227 KiB on sm90, 99 KiB on sm86
  and sm120.
* Registers: the float32 accumulators of a program need `rows * head size / (warps * lanes)` registers a lane; beyond
  256 VGPRs only one wave fits a SIMD (gfx9), beyond 512 it spills. tests/kernels/test_aot.py holds every row to no
  spills.

Speed is tuned per architecture in a later step; these are safe, sensible values.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelConfig:
    """One launch configuration.

    Attributes:
        block_m: Query rows in a tile.
        block_n: Keys in a tile.
        num_warps: Warps (waves) of a program.
        num_stages: Depth of Triton's software pipeline.
        waves_per_eu: AMD only: occupancy the compiler should aim at, 0 to let it choose.
        matrix_instr_nonkdim: AMD CDNA only: 16 or 32 picks the MFMA shape, 0 lets the compiler choose.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    waves_per_eu: int = 0
    matrix_instr_nonkdim: int = 0

    def options(self, is_amd: bool) -> dict[str, int]:
        """Triton's compile options; the AMD-only ones are left out elsewhere, where Triton rejects them."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if is_amd:
            options["waves_per_eu"] = self.waves_per_eu
            if self.matrix_instr_nonkdim:
                options["matrix_instr_nonkdim"] = self.matrix_instr_nonkdim
        return options


LDS_BYTES = {"gfx90a": 65536, "gfx942": 65536, "gfx950": 163840, "rdna": 65536}
"""Shared memory of one workgroup, per family."""

C = KernelConfig

# (padded head size up to, bytes per element) -> configuration, first match wins.
Table = dict[tuple[int, int], KernelConfig]

_CDNA: dict[str, Table] = {
    "forward": {
        (64, 2): C(128, 64, 4, 1, 2),
        (128, 2): C(128, 32, 4, 1, 2),
        (256, 2): C(64, 32, 8, 1, 1),
        (64, 4): C(64, 32, 4, 1, 2),
        (128, 4): C(64, 16, 4, 1, 1),
        (256, 4): C(32, 16, 4, 1, 1),
    },
    "decode": {
        (128, 2): C(16, 64, 4, 1, 1),
        (256, 2): C(16, 32, 4, 1, 1),
        (128, 4): C(16, 32, 4, 1, 1),
        (256, 4): C(16, 16, 4, 1, 1),
    },
    "backward_kv": {
        (64, 2): C(32, 64, 4, 1, 2),
        (128, 2): C(32, 64, 4, 1, 1),
        (256, 2): C(16, 64, 8, 1, 1),
        (128, 4): C(16, 32, 4, 1, 1),
        (256, 4): C(16, 16, 4, 1, 1),
    },
    "backward_q": {
        (64, 2): C(128, 32, 4, 1, 1),
        (128, 2): C(128, 32, 8, 1, 1),
        (256, 2): C(64, 16, 4, 1, 1),
        (128, 4): C(32, 16, 4, 1, 1),
        (256, 4): C(16, 16, 4, 1, 1),
    },
    "backward_bias": {
        (128, 2): C(64, 32, 4, 1, 1),
        (256, 2): C(32, 32, 4, 1, 1),
        (128, 4): C(32, 16, 4, 1, 1),
        (256, 4): C(16, 16, 4, 1, 1),
    },
}

# A wave has 32 lanes of at most 256 VGPRs, and gfx11 keeps matrix operands twice: with head sizes from 128 on the
# backward operands of even the smallest tile do not fit, and float32 has no matrix instruction at all.
_RDNA: dict[str, Table] = {
    "forward": {
        (64, 2): C(64, 32, 4, 1),
        (128, 2): C(64, 16, 4, 1),
        (256, 2): C(16, 16, 4, 1),
        (64, 4): C(32, 16, 4, 1),
        (128, 4): C(16, 16, 8, 1),
        (256, 4): C(16, 16, 16, 1),
    },
    "decode": {
        (128, 2): C(16, 32, 4, 1),
        (256, 2): C(16, 16, 4, 1),
        (128, 4): C(16, 16, 8, 1),
        (256, 4): C(16, 16, 16, 1),
    },
    "backward_kv": {
        (64, 2): C(16, 32, 4, 1),
        (256, 2): C(16, 16, 8, 1),
        (128, 4): C(16, 16, 8, 1),
        (256, 4): C(16, 16, 16, 1),
    },
    "backward_q": {
        (128, 2): C(32, 16, 4, 1),
        (256, 2): C(16, 16, 8, 1),
        (128, 4): C(16, 16, 8, 1),
        (256, 4): C(16, 16, 16, 1),
    },
    "backward_bias": {
        (128, 2): C(32, 16, 4, 1),
        (256, 2): C(16, 16, 4, 1),
        (128, 4): C(16, 16, 8, 1),
        (256, 4): C(16, 16, 16, 1),
    },
}

_HOPPER: dict[str, Table] = {
    "forward": {
        (64, 2): C(128, 64, 4, 3),
        (128, 2): C(128, 64, 8, 3),
        (256, 2): C(128, 64, 8, 2),
        (64, 4): C(64, 32, 4, 2),
        (128, 4): C(64, 32, 4, 2),
        (256, 4): C(32, 32, 4, 2),
    },
    "decode": {
        (128, 2): C(16, 64, 4, 4),
        (256, 2): C(16, 64, 4, 3),
        (128, 4): C(16, 32, 4, 2),
        (256, 4): C(16, 16, 4, 2),
    },
    "backward_kv": {
        (64, 2): C(64, 128, 4, 3),
        (128, 2): C(64, 128, 8, 2),
        (256, 2): C(64, 64, 8, 1),
        (128, 4): C(32, 32, 4, 1),
        (256, 4): C(16, 32, 4, 1),
    },
    "backward_q": {
        (64, 2): C(128, 64, 4, 3),
        (128, 2): C(128, 64, 8, 2),
        (256, 2): C(64, 64, 8, 1),
        (128, 4): C(32, 32, 4, 1),
        (256, 4): C(32, 16, 4, 1),
    },
    "backward_bias": {(64, 2): C(64, 64, 4, 2), (256, 2): C(64, 32, 4, 1), (256, 4): C(16, 16, 4, 1)},
}

# Any other NVIDIA GPU: fits 99 KiB of shared memory.
_CUDA: dict[str, Table] = {
    "forward": {
        (64, 2): C(128, 64, 4, 2),
        (128, 2): C(64, 64, 4, 2),
        (256, 2): C(64, 32, 8, 1),
        (128, 4): C(32, 32, 4, 1),
        (256, 4): C(16, 16, 4, 1),
    },
    "decode": {(128, 2): C(16, 64, 4, 2), (256, 2): C(16, 32, 4, 2), (256, 4): C(16, 16, 4, 1)},
    "backward_kv": {
        (64, 2): C(32, 64, 4, 2),
        (128, 2): C(32, 64, 8, 1),
        (256, 2): C(32, 32, 8, 1),
        (256, 4): C(16, 16, 4, 1),
    },
    "backward_q": {
        (64, 2): C(64, 32, 4, 2),
        (128, 2): C(64, 32, 8, 1),
        (256, 2): C(32, 32, 8, 1),
        (256, 4): C(16, 16, 4, 1),
    },
    "backward_bias": {(128, 2): C(32, 32, 4, 1), (256, 4): C(16, 16, 4, 1)},
}

# Triton's interpreter, on CPU tensors: small tiles, so that small tests still cross block boundaries.
_INTERPRETER: dict[str, Table] = {
    direction: {(256, 4): C(16, 16, 1, 1)}
    for direction in ("forward", "decode", "backward_kv", "backward_q", "backward_bias")
}

TABLES: dict[str, dict[str, Table]] = {
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
    "gfx950": _CDNA,
    "rdna": _RDNA,
    "sm90": _HOPPER,
    "cuda": _CUDA,
    "interpreter": _INTERPRETER,
}
"""Family -> direction -> table. Directions: forward, decode, backward_kv, backward_q, backward_bias."""


def family(arch: str) -> str:
    """The table's name for an architecture such as "gfx942", "gfx1100", "sm90" or "interpreter"."""
    if arch in TABLES:
        return arch
    if arch.startswith("gfx9"):
        return "gfx90a"
    if arch.startswith("gfx"):
        return "rdna"
    return "cuda"


def select(arch: str, direction: str, head_block: int, itemsize: int) -> KernelConfig:
    """The launch configuration of one kernel.

    Args:
        arch: "gfx942", "sm90", ... or "interpreter".
        direction: "forward", "decode", "backward_kv", "backward_q" or "backward_bias".
        head_block: The larger of head_dim and v_head_dim, padded to a power of two; at most 256.
        itemsize: Bytes of one element of q: 2 or 4.
    """
    for (max_head, max_bytes), config in TABLES[family(arch)][direction].items():
        if head_block <= max_head and itemsize <= max_bytes:
            return config
    raise AssertionError(f"no {direction} configuration for {arch}, head size {head_block}, {itemsize} bytes")


def smallest_head_block(arch: str, itemsize: int) -> int:
    """The least extent a head dimension is padded to: 16 for the matrix units, 64 for Hopper's in half precision.

    Triton 3.6 compiles warp-group products over a value tile narrower than 64 (64 to 128 queries, 64 keys, 16 or 32
    columns) to reads past the end of shared memory: compute-sanitizer on an H200 reports "Invalid __shared__ read of
    size 512 bytes" at the second product, and results are wrong or the kernel dies. With 64 columns, or tiles of 32
    queries, which do not use these instructions, all cases are right.
    """
    return 64 if arch == "sm90" and itemsize == 2 else 16
