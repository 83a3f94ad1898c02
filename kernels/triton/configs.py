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
from typing import Any

import triton

from .sizes import Hint


@dataclass(frozen=True)
class KernelConfig:
    """One launch configuration.

    Attributes:
        block_m: Query rows in a tile.
        block_n: Keys in a tile.
        num_warps: Warps (waves) of a program.
        num_stages: Depth of Triton's software pipeline.
        waves_per_eu: AMD only: occupancy that the compiler makes, no less and no more; 0 lets it choose.
        matrix_instr_nonkdim: AMD CDNA only: 16 or 32 picks the MFMA shape, 0 lets the compiler choose.
        merged: One loop over cut and uncut blocks with a branch, instead of one loop for each kind. Decode: besides,
            keys are asked for before the queries are there.
        first_max: Forward with bfloat16, on AMD float16: no running maximum, and a soft cap by a polynomial; see
            forward.py. Fewer instructions, but a third copy of the loop, which can need more registers.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    waves_per_eu: int = 0
    matrix_instr_nonkdim: int = 0
    merged: bool = False
    first_max: bool = False

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
Table = dict[tuple[int, int], KernelConfig | None]

# Float8 takes registers until it is widened: smaller tiles where the usual ones would spill.
_CDNA_FLOAT8: Table = {
    (64, 2): C(128, 64, 4, 2, 2),
    (128, 2): C(64, 32, 4, 2),
    (192, 2): None,
    (256, 2): C(64, 16, 8, 1),
}

# CDNA: two waves a SIMD (256 VGPRs each), 32 x 32 MFMA where a wave owns 32 rows; see docs/kernels.md for the counts.
# A pipeline of two stages loads the next K and V into registers while the matrix units work. Triton's waves_per_eu is
# an upper bound, too: LLVM then reserves registers that keep more waves out. It is given only where two waves need it.
_CDNA: dict[str, Table] = {
    "forward": {
        (64, 2): C(128, 64, 4, 2, 2, first_max=True),
        (128, 2): C(128, 32, 4, 2, 2, first_max=True),
        (192, 2): C(128, 32, 4, 1, 2),
        (256, 2): C(64, 32, 8, 1),
        (64, 4): C(64, 32, 4, 1, 2),
        (128, 4): C(64, 16, 4, 1),
        (256, 4): C(32, 16, 4, 1),
    },
    "forward_float8": _CDNA_FLOAT8,
    "forward_float8_pages": _CDNA_FLOAT8,
    "forward_alibi": {(64, 2): C(128, 32, 4, 2, 2)},
    "forward_cap": {(64, 2): C(128, 64, 4, 2, 2, first_max=True), (128, 2): C(128, 32, 4, 2, 2, first_max=True)},
    "decode": {
        (128, 2): C(16, 64, 4, 2),
        (256, 2): C(16, 32, 4, 1),
        (128, 4): C(16, 32, 4, 1),
        (256, 4): C(16, 16, 4, 1),
    },
    "backward_kv": {
        (64, 2): C(32, 128, 4, 1, 2),
        (128, 2): C(32, 64, 4, 1, 2, 16),
        (256, 2): C(16, 64, 8, 1),
        (128, 4): C(16, 32, 4, 1),
        (256, 4): C(16, 16, 4, 1),
    },
    "backward_q": {
        (64, 2): C(128, 32, 4, 1),
        (128, 2): C(128, 32, 4, 1, 2),
        (256, 2): C(64, 16, 4, 1),
        (128, 4): C(32, 16, 4, 1),
        (256, 4): C(16, 16, 4, 1),
    },
    "backward_q_alibi": {(64, 2): C(128, 32, 4, 1), (128, 2): C(128, 16, 4, 1)},
    "backward_q_cap": {(64, 2): C(128, 32, 4, 1), (128, 2): C(128, 16, 4, 1)},
    "backward_bias": {
        (128, 2): C(64, 32, 4, 1),
        (256, 2): C(32, 32, 4, 1),
        (128, 4): C(32, 16, 4, 1),
        (256, 4): C(16, 16, 4, 1),
    },
    "weights": {
        (64, 2): C(64, 128, 4, 1),
        (128, 2): C(64, 64, 4, 1),
        (256, 2): C(64, 32, 4, 1),
        (128, 4): C(32, 32, 4, 1),
        (256, 4): C(16, 32, 4, 1),
    },
}

_CAP_OF_32_KEYS: Table = {(128, 2): C(128, 32, 4, 2, 2, first_max=True)}

# gfx90a needs more registers for the narrower MFMA's operands.
_GFX90A: dict[str, Table] = {
    **_CDNA,
    "forward_cap": _CAP_OF_32_KEYS,
    "forward": {**_CDNA["forward"], (64, 2): C(128, 64, 4, 2, 2), (128, 2): C(128, 32, 4, 2, 2)},
    "backward_kv": {**_CDNA["backward_kv"], (128, 2): C(32, 64, 4, 1, 0, 16)},
}

# gfx950: matrix units twice as fast, so what else a block of keys costs weighs more: larger blocks. (Under a cap they
# take registers, and no instruction less; with ALiBi 64 keys took 38 spills.)
_GFX950: dict[str, Table] = {
    **_CDNA,
    "forward_cap": _CAP_OF_32_KEYS,
    "forward_alibi": {**_CDNA["forward_alibi"], (128, 2): C(128, 32, 4, 1, 2)},
    "forward": {
        **_CDNA["forward"],
        (64, 2): C(128, 128, 4, 1, 2),
        (128, 2): C(128, 64, 4, 1, 2),
    },
    "forward_first": {
        (64, 2): C(128, 64, 4, 2, 2, first_max=True),
        (128, 2): C(128, 32, 4, 2, 2, first_max=True),
    },
    # A wave owns 32 rows of keys or queries: LDS, which bounds these, is read half as often. For that, one wave a SIMD.
    "backward_kv": {
        (64, 2): C(32, 128, 4, 1, 2),
        (128, 2): C(32, 128, 4, 2, 0, 16),
        (192, 2): C(32, 128, 4, 1, 0, 16),
        (256, 2): C(16, 64, 8, 1),
        (128, 4): C(16, 32, 4, 1),
        (256, 4): C(16, 16, 4, 1),
    },
    "backward_q": {**_CDNA["backward_q"], (256, 2): C(128, 32, 4, 1, 0, 32)},
}

# A wave has 32 lanes of at most 256 VGPRs, and gfx11 keeps matrix operands twice: with head sizes from 128 on the
# backward operands of even the smallest tile do not fit, and float32 has no matrix instruction at all.
_RDNA_FLOAT8: Table = {(64, 2): None, (128, 2): C(32, 16, 4, 1)}

_RDNA: dict[str, Table] = {
    "forward_float8": _RDNA_FLOAT8,
    "forward_float8_pages": _RDNA_FLOAT8,
    "forward_cap": {(128, 2): C(64, 16, 4, 1, first_max=True)},
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
    "weights": {
        (128, 2): C(32, 32, 4, 1),
        (256, 2): C(16, 32, 4, 1),
        (128, 4): C(16, 16, 8, 1),
        (256, 4): C(16, 16, 16, 1),
    },
}

_HOPPER_SHORT: Table = {(128, 2): C(16, 128, 4, 2, merged=True)}

# Measured on an H200, see docs/kernels.md.
_HOPPER: dict[str, Table] = {
    "forward_tma": {
        (64, 2): C(64, 128, 4, 2, merged=True),
        (96, 2): C(64, 64, 4, 2, merged=True),
        (128, 2): C(128, 64, 4, 2, merged=True, first_max=True),
        (192, 2): C(128, 128, 8, 2, merged=True, first_max=True),
        (256, 2): C(128, 64, 8, 2, merged=True, first_max=True),
    },
    "forward": {
        (64, 2): C(128, 64, 4, 3),
        (128, 2): C(64, 64, 4, 3),
        (256, 2): C(128, 64, 8, 2),
        (64, 4): C(64, 32, 4, 2),
        (128, 4): C(64, 32, 4, 2),
        (256, 4): C(32, 32, 4, 2),
    },
    "decode": {
        (64, 2): C(16, 128, 4, 2, merged=True),
        (128, 2): C(16, 128, 4, 3, merged=True),
        (256, 2): C(16, 64, 4, 3, merged=True),
        (128, 4): C(16, 32, 4, 2),
        (256, 4): C(16, 16, 4, 2),
    },
    "decode_tma": {
        (64, 2): C(16, 256, 4, 3, merged=True),
        (128, 2): C(16, 128, 4, 3, merged=True),
        (256, 2): C(16, 64, 4, 3, merged=True),
    },
    "decode_tma_wave": {(64, 2): C(16, 128, 4, 4, merged=True)},
    # Short programs end and start all the time: several on a multiprocessor, so that some are reading.
    "decode_tma_few": _HOPPER_SHORT,
    "decode_tma_two": _HOPPER_SHORT,
    "decode_tma_one": _HOPPER_SHORT,
    # Where the address of a load waits for the block table, Triton gives it half of the stages.
    "decode_pages": {(64, 2): C(16, 128, 2, 2), (128, 2): C(16, 128, 4, 5), (256, 2): C(16, 64, 4, 5)},
    "decode_pages_wave": {(64, 2): C(16, 128, 4, 5)},
    "decode_pages_few": {(64, 2): None, (128, 2): C(16, 128, 4, 2)},
    "decode_pages_two": {(64, 2): None, (128, 2): C(16, 128, 4, 2)},
    "decode_float8_pages": {(64, 2): C(16, 128, 4, 5), (128, 2): C(16, 128, 4, 3), (256, 2): C(16, 64, 4, 3)},
    "decode_float8": {(64, 2): C(16, 128, 4, 3), (128, 2): C(16, 128, 4, 3), (256, 2): C(16, 64, 4, 3)},
    # All programs run at once: what counts is how soon they ask for keys, and how soon they end behind the last.
    "decode_wave": {(64, 2): C(16, 128, 4, 4, merged=True), (128, 2): C(16, 64, 4, 4, merged=True)},
    "decode_one": {(64, 2): None, (128, 2): C(16, 128, 4, 1)},
    "decode_pages_one": {(64, 2): None, (128, 2): C(16, 128, 4, 1)},
    "decode_float8_one": {(64, 2): None, (128, 2): C(16, 128, 4, 2)},
    "decode_float8_pages_one": {(64, 2): None, (128, 2): C(16, 128, 4, 2)},
    "decode_two": {(64, 2): None, (128, 2): C(16, 64, 4, 3)},
    "forward_tma_first": {(96, 2): C(128, 64, 4, 3, merged=True, first_max=True)},
    "forward_tma_alibi_first": {
        (64, 2): C(64, 64, 4, 3, merged=True, first_max=True),
        (96, 2): C(128, 64, 4, 3, merged=True, first_max=True),
    },
    # Here the polynomial of a soft cap is not faster than the instruction.
    "forward_tma_cap": {
        (96, 2): None,
        (128, 2): C(128, 64, 4, 2, merged=True),
        (192, 2): C(128, 128, 8, 2, merged=True),
        (256, 2): C(128, 64, 8, 2, merged=True),
    },
    "forward_tma_bias": {(128, 2): C(64, 64, 4, 2, merged=True)},
    "backward_kv_tma_bias": {(64, 2): C(32, 128, 4, 3)},
    "backward_q_tma_bias": {(128, 2): C(64, 64, 4, 2)},
    "backward_kv_tma_cap": {(64, 2): None, (128, 2): C(32, 64, 4, 3)},
    "backward_kv_tma_alibi": {(64, 2): None, (128, 2): C(32, 64, 4, 3)},
    "backward_q_tma_alibi": {(64, 2): None, (96, 2): C(64, 64, 4, 3, merged=True), (128, 2): C(128, 64, 8, 3)},
    "backward_kv_tma": {
        (64, 2): C(64, 64, 4, 3),
        (128, 2): C(64, 64, 4, 2),
        (192, 2): C(32, 64, 4, 2),
        (256, 2): C(64, 64, 8, 2),
    },
    "backward_k_tma": {(192, 2): None, (256, 2): C(64, 128, 8, 1)},
    "backward_v_tma": {(192, 2): None, (256, 2): C(64, 128, 8, 2)},
    "backward_q_tma": {
        (64, 2): C(64, 128, 4, 3),
        (96, 2): C(64, 64, 4, 3, merged=True),
        (128, 2): C(128, 64, 8, 3, merged=True),
        (192, 2): C(128, 64, 8, 2),
        (256, 2): C(128, 64, 8, 1),
    },
    "backward_kv": {
        (64, 2): C(64, 128, 8, 3),
        (128, 2): C(64, 128, 8, 2),
        (256, 2): C(64, 64, 8, 1),
        (128, 4): C(32, 32, 4, 1),
        (256, 4): C(16, 32, 4, 1),
    },
    "backward_q": {
        (64, 2): C(128, 64, 4, 2),
        (128, 2): C(128, 64, 8, 2),
        (256, 2): C(64, 64, 8, 2),
        (128, 4): C(32, 32, 4, 1),
        (256, 4): C(32, 16, 4, 1),
    },
    "backward_bias": {(64, 2): C(64, 64, 4, 2), (256, 2): C(64, 32, 4, 1), (256, 4): C(16, 16, 4, 1)},
    "weights": {
        (64, 2): C(128, 128, 8, 2),
        (128, 2): C(128, 128, 8, 2),
        (256, 2): C(64, 64, 4, 2),
        (128, 4): C(64, 32, 4, 2),
        (256, 4): C(32, 32, 4, 2),
    },
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
    "weights": {(128, 2): C(64, 64, 4, 2), (256, 2): C(32, 64, 4, 1), (256, 4): C(16, 32, 4, 1)},
}

# Triton's interpreter, on CPU tensors: small tiles, so that small tests still cross block boundaries.
_INTERPRETER: dict[str, Table] = {
    direction: {(256, 4): C(16, 16, 1, 1)}
    for direction in ("forward", "decode", "backward_kv", "backward_q", "backward_bias", "weights")
}

TABLES: dict[str, dict[str, Table]] = {
    "gfx90a": _GFX90A,
    "gfx942": _CDNA,
    "gfx950": _GFX950,
    "rdna": _RDNA,
    "sm90": _HOPPER,
    "cuda": _CUDA,
    "interpreter": _INTERPRETER,
}
"""Family -> direction -> table.

Directions: forward, decode, backward_kv, backward_q, backward_bias, weights. Where tensor descriptors exist and the
tensors' strides and size allow them, also forward_tma, decode_tma, backward_q_tma and backward_kv_tma, or instead of
the last backward_k_tma and backward_v_tma: two launches. A suffix "_bias" or "_cap" is for calls with a bias or mask
tensor or a soft cap, which need more registers, as "_alibi" for ALiBi (on Hopper not "forward"), "_first" and
"_alibi_first" for forward calls that may take first_max, "_pages", "_float8" and "_float8_pages" for those that read a
KV cache as it lies. Where such a table has no row, the one without the last suffix counts. "_wave" is for decode from
plain tensors or pages by no more programs than there are multiprocessors, else "_one", "_two" and "_few" for splits of
up to 128, 256 and 1024 keys; in pages "_one" comes first.
"""


def family(arch: str) -> str:
    """The table's name for an architecture such as "gfx942", "gfx1100", "sm90" or "interpreter"."""
    if arch in TABLES:
        return arch
    if arch.startswith("gfx9"):
        return "gfx90a"
    if arch.startswith("gfx"):
        return "rdna"
    return "cuda"


def select(arch: str, direction: str, head_block: int, itemsize: int, feature: str = "") -> KernelConfig:
    """The launch configuration of one kernel.

    Args:
        arch: "gfx942", "sm90", ... or "interpreter".
        direction: "forward", "decode", "backward_kv", "backward_q", "backward_bias" or "weights".
        head_block: From head_size, at most 256.
        itemsize: Bytes of one element of q: 2 or 4.
        feature: "" or a suffix that a table's name may have: "first", "bias", "cap", "alibi", "pages", "one", ...
    """
    config = select_tma(arch, direction, head_block, itemsize, feature)
    assert config, f"no {direction} configuration for {arch}, head size {head_block}, {itemsize} bytes"
    return config


def select_tma(arch: str, direction: str, head_block: int, itemsize: int, feature: str = "") -> KernelConfig | None:
    """Like select, None where there is no row: the tables "forward_tma", "backward_kv_tma", "backward_q_tma".

    Args:
        arch, direction, head_block, itemsize, feature: As for select.
    """
    while feature:
        special = select_tma(arch, f"{direction}_{feature}", head_block, itemsize)
        if special:
            return special
        feature = feature.rpartition("_")[0]
    for (max_head, max_bytes), config in TABLES[family(arch)].get(direction, {}).items():
        if head_block <= max_head and itemsize <= max_bytes:
            return config
    return None


GLUON_KNOWN = ("3.6.", "3.7.")
"""Releases of Triton with which the Hopper kernels were compiled; Gluon is experimental, and changes."""


def gluon_is_known() -> bool:
    """Whether this Triton is one of them."""
    return triton.__version__.startswith(GLUON_KNOWN)


def has_hopper_kernels(arch: str) -> bool:
    """Whether the kernels in Gluon can run."""
    return arch == "sm90" and gluon_is_known()


def kv_heads_first(arch: str) -> bool:
    """Whether consecutive programs take different key/value heads instead of the blocks of one.

    MI300 and MI350 deal programs out to 8 dies in turn, each with an L2 cache of its own. With as many heads as dies, a
    head's programs then meet in one cache.
    """
    return arch in ("gfx942", "gfx950")


HEADS_BYTES, LONG_HEADS_BYTES = 32 * 2**20, 8 * 2**20
"""How much of Hopper's 50 MB L2 cache all heads, or those that run at once, may take; see heads_at_once."""


def heads_at_once(arch: str, uneven: bool, heads: Any, head_bytes: int, is_long: bool = False, hint: Hint = int) -> Any:
    """How many key/value heads the programs are dealt out to in turn, before the next ones start.

    1 lets the programs of one head follow each other and share its tensors in the cache. That is best on one L2 cache,
    unless the programs do uneven work (a causal mask): they start with the longest, but the last head's all start
    together, and the device waits for the longest of them. Among several heads the short programs fill that time, as
    long as the cache holds what those heads read. For several L2 caches see kv_heads_first.

    Args:
        arch: "gfx942", "sm90", ...
        uneven: Whether programs of the same head do unequal work.
        heads: Key/value heads of all batch entries, which may be a symbol (sizes.py).
        head_bytes: What the programs of one of them all read.
        is_long: Whether programs are few and long: with grouped queries, those of dk and dv are.
        hint: As launch.Tuning.hint.
    """
    if kv_heads_first(arch):
        return heads
    if arch != "sm90" or not uneven:
        return 1
    if hint(heads) * head_bytes <= HEADS_BYTES:
        return heads
    return max(1, LONG_HEADS_BYTES // head_bytes) if is_long else 1


def backward_heads_at_once(heads: int, kv_blocks: int, num_units: int, share: float = 0.5) -> int:
    """The same for the one backward kernel of Hopper (backward_hopper.py), whose programs of a head follow each other.

    Half of a head's programs at once, so that the next ones start where these have been, was best on an H200 from 16 to
    128 blocks of keys. With fewer, what follows in the walk is no longer in the cache; where all start together, each
    waits a step longer for its turn than the one before.

    Args:
        heads: Key/value heads of all batch entries.
        kv_blocks: Programs of a head.
        num_units: Multiprocessors.
        share: Of a head's programs that run at once.
    """
    return max(1, min(heads, round(num_units / (share * kv_blocks))))


def has_tanh(arch: str) -> bool:
    """Whether the GPU has an instruction for tanh: NVIDIA from sm75 on."""
    return arch.startswith("sm") and int(arch[2:]) >= 75


def rounds_bits(arch: str) -> bool:
    """Whether kernels round to bfloat16 with integer arithmetic: AMD before gfx950 has no instruction for it."""
    return arch.startswith("gfx") and not arch.startswith("gfx95")


def transposes_keys(arch: str) -> bool:
    """Whether the forward kernel transposes a tile of keys by its pointers instead of with tl.trans.

    Triton's pipeliner for AMD (3.7) keeps a tile that is not itself an operand of tl.dot in local memory without a
    swizzle. Reading it back there has 16-way bank conflicts in the simulator (docs/amd.md).
    """
    return arch.startswith("gfx")


def converts_in_place(arch: str) -> bool:
    """Whether float8 is converted by float8.py's assembly: NVIDIA GPUs that have float8 in Triton, from sm89 on."""
    return arch.startswith("sm") and int(arch[2:]) >= 89


def programs_per_unit(arch: str, in_place: bool = False) -> int:
    """Split-KV decode fills each compute unit with this many programs.

    Hopper keeps enough bytes in flight with one program a multiprocessor, whose loads are asynchronous, and gains
    nothing from more, unless it converts float8 (`in_place`): then one program converts while another waits. AMD loads
    through registers and needs more waves.
    """
    return 1 if arch.startswith("sm") and not in_place else 2


def decode_feature(kv_len: int, num_splits: int) -> str:
    """The suffix of the tables for short splits."""
    keys = -(-kv_len // num_splits)
    return "one" if keys <= 128 else "two" if keys <= 256 else "few" if keys <= 1024 else ""


def combine_warps(arch: str) -> int:
    """Warps of a program that adds up the splits of one row: fewer need fewer barriers."""
    return 2 if arch.startswith("sm") else 4


def head_blocks(arch: str, itemsize: int, head_dim: int, v_head_dim: int) -> tuple[int, int, int]:
    """Tile extents of head_dim, in one or two pieces (the second 0), and of v_head_dim.

    192 columns become 128 + 64, 96 become 64 + 32, 80 become 64 + 16: the product q k^T costs what it holds. The value
    tile stays in one piece, since it is an accumulator.
    """
    smallest = smallest_head_block(arch, itemsize)
    whole = max(smallest, power_of_two(head_dim))
    first = whole // 2
    rest = max(32 if smallest > 32 else 16, power_of_two(head_dim - first))
    pieces = (first, rest) if smallest <= first and 32 <= first and rest < first and head_dim < whole else (whole, 0)
    return (*pieces, max(smallest, power_of_two(v_head_dim)))


def rope_blocks(arch: str, itemsize: int, nope: int, rope: int, v_head_dim: int) -> tuple[int, int, int]:
    """The same where the second piece is the rotary part of latent attention, `rope` wide."""
    smallest = smallest_head_block(arch, itemsize)
    second = max(32 if smallest > 32 else 16, power_of_two(rope))
    return max(smallest, power_of_two(nope)), second, max(smallest, power_of_two(v_head_dim))


def head_size(blocks: tuple[int, int, int], v_head_dim: int) -> int:
    """The size by which the tables are searched, from the tile extents of head_blocks: 96 is a class of its own."""
    return max(blocks[0] + blocks[1], 96 if 64 < v_head_dim <= 96 else blocks[2])


def power_of_two(size: int) -> int:
    """The least power of two from `size` on."""
    return 1 << max(size - 1, 0).bit_length()


def smallest_head_block(arch: str, itemsize: int) -> int:
    """The least extent a head dimension is padded to: 16 for the matrix units, 64 for Hopper's in half precision.

    Triton 3.6 compiles warp-group products over a value tile narrower than 64 (64 to 128 queries, 64 keys, 16 or 32
    columns) to reads past the end of shared memory: compute-sanitizer on an H200 reports "Invalid __shared__ read of
    size 512 bytes" at the second product, and results are wrong or the kernel dies. With 64 columns, or tiles of 32
    queries, which do not use these instructions, all cases are right.
    """
    return 64 if arch == "sm90" and itemsize == 2 else 16
