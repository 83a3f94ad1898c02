"""Static quality of a compiled AMD kernel: registers, occupancy, spills, and what bounds its main loop.

Read from assembly text alone (see assembly.py); nothing is run. For what the cycle numbers mean see cost.py.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from . import cost
from .assembly import Kernel
from .loops import loops

_LDS_OF_UNIT = {"gfx950": (163840, 1280), "gfx9": (65536, 512), "gfx1": (65536, 1024)}
"""LDS of a compute unit, and the step in which it is given out, in bytes."""


@dataclass(frozen=True)
class LoopMetrics:
    """One iteration of the main loop, for one wave.

    Attributes:
        instructions: All of them.
        matrix_instructions: MFMA or WMMA.
        cycles: Per unit, the cycles of its SIMD's share: LDS and memory are shared by the SIMDs of a compute unit, so
            their cycles count that often. "vector" includes the issue of matrix instructions.
        bound_by: The unit with the most cycles.
        matrix_share: Matrix cycles over those of `bound_by`: the best utilisation of the matrix unit, whatever the
            number of waves; 0 to 1.
        barriers: Workgroup barriers.
        waits: Wait instructions.
    """

    instructions: int
    matrix_instructions: int
    cycles: dict[str, int]
    bound_by: str
    matrix_share: float
    barriers: int
    waits: int


@dataclass(frozen=True)
class KernelMetrics:
    """What one kernel uses.

    Attributes:
        kernel, arch: Its name and target.
        threads: Of a workgroup.
        vgprs: Vector registers of a lane, accumulation registers included.
        agprs: Accumulation registers among them.
        allocated_vgprs: Reserved when it is launched. More than `vgprs` where the compiler was told not to let more
            waves in (Triton's waves_per_eu: LLVM then reserves what keeps others out).
        sgprs: Scalar registers of a wave.
        vgpr_spills, sgpr_spills: Registers spilled; scalar ones go to lanes of vector registers.
        scratch_bytes: Private memory of a lane.
        lds_bytes: Of a workgroup.
        occupancy: Waves that fit a SIMD, by registers and LDS.
        limited_by: "vgprs", "sgprs", "lds", "waves" (the hardware's limit) or "reserved" (see allocated_vgprs).
        instructions, matrix_instructions: In the text.
        main_loop: The innermost loop with the most matrix cycles, and of several (a kernel has further copies of its
            loop for blocks that a mask cuts) that with the fewest instructions; that with the most if none has matrix
            instructions; None without a loop.
    """

    kernel: str
    arch: str
    threads: int
    vgprs: int
    agprs: int
    allocated_vgprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch_bytes: int
    lds_bytes: int
    occupancy: int
    limited_by: str
    instructions: int
    matrix_instructions: int
    main_loop: LoopMetrics | None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def metrics(kernel: Kernel, lds_bytes: int | None = None, threads: int | None = None) -> KernelMetrics:
    """Measure a kernel.

    Args:
        kernel: From assembly.parse.
        lds_bytes: LDS of a workgroup where it is known only at launch, as with Triton; None takes the kernel's own.
        threads: Threads of a workgroup; None takes the kernel's declared largest.

    Raises:
        ValueError: An architecture whose units are not described in cost.py.
    """
    if not cost.known(kernel.arch):
        raise ValueError(f"{kernel.name} is for {kernel.arch}; known are gfx90a, gfx942, gfx950, gfx11.. and gfx12..")
    meta = kernel.metadata
    own_lds = meta.get("group_segment_fixed_size", 0)
    lds_bytes = own_lds if lds_bytes is None else max(lds_bytes, own_lds)
    threads = threads or meta.get("max_flat_workgroup_size", kernel.wave_size)
    vgprs, sgprs = meta.get("vgpr_count", 0), meta.get("sgpr_count", 0)
    allocated = max(vgprs, kernel.directives.get("next_free_vgpr", 0))
    waves, limit = occupancy(kernel.arch, allocated, sgprs, lds_bytes, threads)
    if limit == "vgprs" and occupancy(kernel.arch, vgprs, sgprs, lds_bytes, threads)[0] > waves:
        limit = "reserved"
    names = _names(kernel, range(len(kernel.instructions)))
    return KernelMetrics(
        kernel=kernel.name,
        arch=kernel.arch,
        threads=threads,
        vgprs=vgprs,
        agprs=meta.get("agpr_count", 0),
        allocated_vgprs=allocated,
        sgprs=sgprs,
        vgpr_spills=meta.get("vgpr_spill_count", 0),
        sgpr_spills=meta.get("sgpr_spill_count", 0),
        scratch_bytes=meta.get("private_segment_fixed_size", 0),
        lds_bytes=lds_bytes,
        occupancy=waves,
        limited_by=limit,
        instructions=names.total(),
        matrix_instructions=sum(count for name, count in names.items() if cost.is_matrix(name)),
        main_loop=_main_loop(kernel),
    )


def occupancy(arch: str, vgprs: int, sgprs: int, lds_bytes: int, threads: int) -> tuple[int, str]:
    """Waves that fit a SIMD, and what limits them. LLVM's "Occupancy" is the same without the LDS known at launch.

    Args:
        arch: "gfx942" and so on.
        vgprs: Reserved for a lane, accumulation registers included.
        sgprs: Of a wave.
        lds_bytes, threads: Of a workgroup.
    """
    if arch.startswith("gfx9"):
        largest, file, step = 8, 512, 8
        by_sgprs = 8 if sgprs <= 102 else 7
    else:
        largest, step, by_sgprs = 16, 24, 16
        file = 1536
    limits = {"waves": largest, "sgprs": by_sgprs, "vgprs": min(largest, file // _round_up(max(vgprs, 1), step))}
    if lds_bytes:
        size, grain = next(value for prefix, value in _LDS_OF_UNIT.items() if arch.startswith(prefix))
        waves = -(-threads // cost.lanes(arch))
        # A compute unit's workgroups spread their waves over its SIMDs.
        limits["lds"] = -(-(size // _round_up(lds_bytes, grain)) * waves // cost.simds(arch))
    least = min(limits.values())
    return least, next(name for name in ("waves", "vgprs", "lds", "sgprs") if limits.get(name) == least)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _names(kernel: Kernel, indices: Any) -> Counter[str]:
    """Mnemonics of some instructions, halves of VOPD pairs one by one."""
    found: Counter[str] = Counter()
    for index in indices:
        instruction = kernel.instructions[index]
        found[instruction.name] += 1
        if instruction.second is not None:
            found[instruction.second.name] += 1
    return found


def _main_loop(kernel: Kernel) -> LoopMetrics | None:
    measured = [
        (_loop(names, kernel.arch), names.total())
        for names in (_names(kernel, loop.body) for loop in loops(kernel) if loop.innermost)
    ]
    if not measured:
        return None

    def rank(pair: tuple[LoopMetrics, int]) -> tuple[int, int]:
        matrix = pair[0].cycles[cost.MATRIX]
        return matrix, -pair[1] if matrix else pair[1]

    return max(measured, key=rank)[0]


def _loop(names: Counter[str], arch: str) -> LoopMetrics:
    cycles: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for name, count in names.items():
        unit, each = cost.cost(name, arch)
        counts[unit] += count
        cycles[unit] += each * count
    issue = 4 if arch.startswith("gfx9") else 1
    shared = cost.simds(arch)
    total = {
        cost.MATRIX: cycles[cost.MATRIX],
        cost.VECTOR: cycles[cost.VECTOR] + issue * counts[cost.MATRIX],
        cost.LDS: shared * cycles[cost.LDS],
        cost.MEMORY: shared * cycles[cost.MEMORY],
        cost.SCALAR: cycles[cost.SCALAR],
    }
    if not arch.startswith("gfx9"):
        # RDNA's matrix instructions run on the vector unit.
        total[cost.VECTOR] = cycles[cost.VECTOR] + cycles[cost.MATRIX]
    worst = max(total, key=lambda unit: total[unit])
    return LoopMetrics(
        instructions=names.total(),
        matrix_instructions=counts[cost.MATRIX],
        cycles=total,
        bound_by=worst,
        matrix_share=round(total[cost.MATRIX] / total[worst], 3) if total[worst] else 0.0,
        barriers=counts[cost.BARRIER],
        waits=counts[cost.WAIT],
    )


def llvm_occupancy(text: str) -> int | None:
    """What LLVM says in its comments, without the LDS known at launch; for tests."""
    match = re.search(r"^; Occupancy: (\d+)", text, re.MULTILINE)
    return int(match[1]) if match else None
