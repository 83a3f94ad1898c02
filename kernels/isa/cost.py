"""What one AMD instruction costs: which unit of a compute unit executes it, and for how many cycles.

A model for comparing kernels, not for predicting time; it has not been validated on hardware. Cycles are of the unit,
for one wave. Sources: AMD "CDNA3 Instruction Set Architecture" and the data sheets' peak rates (vector and matrix
units; matrix cycles equal AMD's matrix instruction calculator), AMD's white papers "CDNA 3 Architecture", "RDNA
Architecture" (bytes a clock of LDS and L1) and "CDNA 4 Architecture" (gfx950: "transcendental rates have been increased
by 2x", and the LDS "doubles the read bandwidth to 256 bytes per clock").
"""

from __future__ import annotations

import re

MATRIX, VECTOR, LDS, MEMORY, SCALAR, BARRIER, WAIT, OTHER = (
    "matrix", "vector", "lds", "memory", "scalar", "barrier", "wait", "other",
)  # fmt: skip

# Multiplications and additions per SIMD and cycle.
_MATRIX_RATES: dict[str, dict[str, int]] = {
    "gfx90a": {"f16": 256, "bf16": 256, "f32": 64, "f64": 64, "i8": 256},
    "gfx942": {"f16": 512, "bf16": 512, "f32": 64, "xf32": 256, "8": 1024, "i8": 1024, "f64": 64},
    "gfx950": {"f16": 1024, "bf16": 1024, "f32": 64, "8": 2048, "i8": 2048, "f64": 32},
    "gfx11": {"f16": 256, "bf16": 256, "i8": 256},
    "gfx12": {"f16": 512, "bf16": 512, "8": 1024, "i8": 1024},
}
_MATRIX_NAME = re.compile(r"v_(?:mfma|wmma|smfmac|swmmac)_\w+?_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_?(\w*)")
_TRANSCENDENTAL = re.compile(r"v_(s_)?(exp|log|rcp|rsq|sqrt|sin|cos)_")
_WIDE_MULTIPLY = re.compile(r"v_(mul_lo_u32|mul_hi_[ui]32|mad_(co_)?[ui]64_[ui]32)$")
_SLOW_64 = re.compile(r"v_(lshl_add_u64|lshlrev_b64|lshrrev_b64|ashrrev_i64)$")
_CACHE = re.compile(r"(buffer_(inv|wbl2|gl)|global_(inv|wb|prefetch))")
_BYTES = (
    ("x16", 64), ("b512", 64), ("x8", 32), ("b256", 32), ("x4", 16), ("b128", 16), ("x3", 12), ("b96", 12),
    ("x2", 8), ("b64", 8), ("dword", 4), ("b32", 4), ("u32", 4), ("f32", 4), ("i32", 4), ("short", 2), ("16", 2),
    ("byte", 1), ("8", 1),
)  # fmt: skip
_LDS_BYTES_PER_CLOCK = 128
# Reads of 8 and 16 bytes use all 64 banks of gfx950's LDS, those of 12 and writes use 32: measured by HipKittens (Hu et
# al., 2025, its folder analysis/paper_experiments/phases). Narrower ones were not measured, and are left as they were.
_WIDE_READ = re.compile(r"ds_read2?(st64)?_b(64|128)")
_MEMORY_BYTES_PER_CLOCK = {"gfx9": 64, "gfx1": 128}


def simds(arch: str) -> int:
    """SIMDs that share one LDS and L1: 4 on CDNA, 2 on RDNA."""
    return 4 if arch.startswith("gfx9") else 2


def lanes(arch: str) -> int:
    """Lanes of a wave, as compute kernels are compiled."""
    return 64 if arch.startswith("gfx9") else 32


def known(arch: str) -> bool:
    """Whether this file has numbers for an architecture."""
    return arch in _MATRIX_RATES or arch[:5] in _MATRIX_RATES


def is_matrix(name: str) -> bool:
    """Whether it is a matrix instruction (MFMA, WMMA and their sparse forms)."""
    return name.startswith(("v_mfma", "v_wmma", "v_smfmac", "v_swmmac"))


def matrix_cycles(name: str, arch: str) -> int:
    """Cycles that a matrix instruction keeps its SIMD's matrix unit busy.

    Raises:
        ValueError: The name has no shape.
    """
    shape = _MATRIX_NAME.match(name)
    if not shape:
        raise ValueError(f"not a matrix instruction: {name!r}")
    m, n, k, blocks = (int(size or 1) for size in shape.groups()[:4])
    kind = next((kind for kind in ("xf32", "bf16", "f16", "f64", "i8") if kind in shape[5]), "f32")
    if re.search(r"fp8|bf8|f8f6f4", shape[5]):
        kind = "8"
    family = arch if arch in _MATRIX_RATES else arch[:5]
    # Twice the products: a multiplication and an addition each.
    return max(2 * m * n * k * blocks // _MATRIX_RATES[family].get(kind, 256), 4)


def access_bytes(name: str) -> int:
    """Bytes per lane of a memory or LDS instruction."""
    if "permute" in name or "swizzle" in name:
        return 4
    pairs = 2 if re.search(r"read2|write2|2addr", name) else 1
    return pairs * next((size for text, size in _BYTES if text in name.replace("2addr", "")), 4)


def cost(name: str, arch: str) -> tuple[str, int]:
    """`(unit, cycles)` of an instruction, by its mnemonic without encoding suffix."""
    if is_matrix(name):
        return MATRIX, matrix_cycles(name, arch)
    if name.startswith("v_nop"):
        return OTHER, 0
    if name.startswith("v_"):
        once = 4 if arch.startswith("gfx9") else 1  # 16 or 32 lanes a clock
        if _TRANSCENDENTAL.match(name):
            return VECTOR, (2 if arch == "gfx950" else 4) * once
        if _WIDE_MULTIPLY.match(name):
            return VECTOR, 4 * once
        return VECTOR, 2 * once if _SLOW_64.match(name) or "lane32_swap" in name or "lane16_swap" in name else once
    if name.startswith("ds_"):
        rate = 2 * _LDS_BYTES_PER_CLOCK if arch == "gfx950" and _WIDE_READ.match(name) else _LDS_BYTES_PER_CLOCK
        return LDS, max(2, lanes(arch) * access_bytes(name) // rate)
    if name.startswith(("global_", "buffer_", "flat_", "scratch_")):
        if _CACHE.match(name):
            return OTHER, 0
        return MEMORY, max(4, lanes(arch) * access_bytes(name) // _MEMORY_BYTES_PER_CLOCK[arch[:4]])
    if name.startswith(("s_waitcnt", "s_wait_")):
        return WAIT, 0
    if name.startswith("s_barrier"):
        return BARRIER, 0
    if name.startswith(("s_nop", "s_delay_alu", "s_clause", "s_sethalt", "s_setprio")):
        return OTHER, 0
    return SCALAR, 4 if arch.startswith("gfx9") else 1
