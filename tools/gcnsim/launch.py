"""Launches a kernel in the simulator and reports what its checker found."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from rocm_attn_compile.kernels.isa import assembly

from . import opcodes
from .build import library
from .encode import Program
from .structures import Error, Launch, Region

POISON = 0x7FC0DEAD
"""What registers hold before they are written: a NaN as float32, an odd number as an integer."""
_MAX_ERRORS = 64
_ERRORS = {
    1: "read outside of all tensors", 2: "write outside of all writable tensors", 3: "LDS access out of bounds",
    4: "LDS race", 5: "scratch access out of bounds", 6: "not supported by the simulator",
}  # fmt: skip
_RACES = ("read after another wave's write", "write after another wave's write", "write after another wave's read")
_STATUS = ("finished", "waves wait at a barrier that others have left behind by ending", "instruction limit reached",
           "branch out of the program", "instruction without implementation")  # fmt: skip
# User SGPRs in their order (LLVM AMDGPU usage, "Kernel Descriptor"), with the number of registers.
_USER_SGPRS = (
    ("private_segment_buffer", 4), ("dispatch_ptr", 2), ("queue_ptr", 2), ("kernarg_segment_ptr", 2),
    ("dispatch_id", 2), ("flat_scratch_init", 2), ("private_segment_size", 1),
)  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes the kernel may access: `[address, address + size)`."""

    address: int
    size: int
    writable: bool = True


@dataclass(frozen=True)
class Finding:
    """One thing the checker reports."""

    kind: str
    instruction: str
    address: int
    lane: int
    wave: int

    def __str__(self) -> str:
        return f"{self.kind} at {self.address:#x} by lane {self.lane} of wave {self.wave}: {self.instruction}"


@dataclass
class Report:
    """What a launch did.

    Attributes:
        executed: Wave instructions.
        errors: Number of findings; `findings` has the first of them.
        dropped: Lane accesses beyond a buffer descriptor's size, which hardware drops too.
        histogram: Executions per mnemonic.
        lds_cycles, lds_ideal: Clocks of LDS accesses with and without bank conflicts, if counted.
    """

    executed: int = 0
    errors: int = 0
    findings: list[Finding] = field(default_factory=list)
    dropped: int = 0
    histogram: dict[str, int] = field(default_factory=dict)
    lds_cycles: int = 0
    lds_ideal: int = 0


class SimulationError(RuntimeError):
    """The kernel did not run to its end."""


@functools.lru_cache(maxsize=256)
def load(text: str) -> tuple[assembly.Kernel, Program]:
    """Parse and encode the one kernel of an assembly text; remembered."""
    kernel = assembly.parse_only(text)
    return kernel, Program(kernel)


def pack_arguments(
    kernel: assembly.Kernel,
    values: Sequence[tuple[str, int | float]],
    grid: tuple[int, int, int] = (1, 1, 1),
    block: tuple[int, int, int] = (1, 1, 1),
) -> bytes:
    """The argument buffer.

    Args:
        kernel: Says where each argument goes.
        values: Per explicit argument, its struct format ("Q" a pointer, "i", "q", "f") and value. Arguments that the
            kernel has beyond these (Triton's scratch pointers) are 0.
        grid, block: For the hidden arguments that HIP kernels have of them.

    Raises:
        ValueError: There are more values than arguments, or a size differs.
    """
    if len(values) > len(kernel.arguments):
        raise ValueError(f"{kernel.name} takes {len(kernel.arguments)} arguments, got {len(values)}")
    size = max([argument.offset + argument.size for argument in kernel.arguments], default=0)
    buffer = bytearray(max(size, kernel.metadata.get("kernarg_segment_size", 0)))
    for argument, (kind, value) in zip(kernel.arguments, values):
        if struct.calcsize(kind) != argument.size:
            raise ValueError(f"{kernel.name}: argument at {argument.offset} has {argument.size} bytes, {kind!r} given")
        struct.pack_into("<" + kind, buffer, argument.offset, value)
    for argument in kernel.arguments:
        prefix, _, axis = argument.kind.rpartition("_")
        sizes = {"hidden_block_count": grid, "hidden_group_size": block}.get(prefix)
        if sizes is not None:
            hidden = sizes["xyz".index(axis)]
            buffer[argument.offset : argument.offset + argument.size] = hidden.to_bytes(argument.size, "little")
    return bytes(buffer)


def run(
    kernel: assembly.Kernel,
    program: Program,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    arguments: bytes,
    memory: Sequence[Memory],
    dynamic_lds: int = 0,
    races: bool = True,
    banks: bool = False,
    quantum: int = 0,
    max_instructions: int = 100_000_000,
) -> Report:
    """Run all workgroups of a launch.

    Args:
        kernel, program: From `load`.
        grid: Workgroups.
        block: Threads of a workgroup.
        arguments: From `pack_arguments`.
        memory: All that the kernel may access, besides its arguments.
        dynamic_lds: Bytes of LDS beyond what the kernel declares.
        races: Whether to look for LDS races.
        banks: Whether to count LDS bank conflicts (a model of CDNA3's LDS).
        quantum: If positive, waves take turns after this many instructions; else they run from barrier to barrier.
        max_instructions: Per workgroup.

    Raises:
        SimulationError: A wave did not reach the kernel's end.
    """
    buffer = ctypes.create_string_buffer(arguments, len(arguments) + 64)
    regions = [Memory(ctypes.addressof(buffer), len(arguments) + 64, False), *memory]
    region_array = (Region * len(regions))(*(Region(m.address, m.address + m.size, m.writable, 0) for m in regions))
    errors = (Error * _MAX_ERRORS)()
    count = len(program.instructions)
    histogram, cycles, ideal = ((ctypes.c_uint64 * count)() for _ in range(3))
    directives = kernel.directives
    launch = Launch(
        program=program.instructions,
        instructions=count,
        lanes=kernel.wave_size,
        gfx=int(kernel.arch[3:], 16),
        grid=grid,
        block=block,
        lds_bytes=directives.get("group_segment_fixed_size", 0) + dynamic_lds,
        scratch_bytes=directives.get("private_segment_fixed_size", 0),
        user_sgprs=directives.get("user_sgpr_count", 0),
        workgroup_ids=sum(directives.get(f"system_sgpr_workgroup_id_{axis}", 0) << k for k, axis in enumerate("xyz")),
        poison=POISON,
        check_races=races,
        count_banks=banks,
        quantum=quantum,
        regions=region_array,
        num_regions=len(regions),
        max_errors=_MAX_ERRORS,
        errors=errors,
        max_instructions=max_instructions,
        histogram=ctypes.addressof(histogram),
        bank_cycles=ctypes.addressof(cycles),
        bank_ideal=ctypes.addressof(ideal),
    )
    _set_user_sgprs(launch, directives, ctypes.addressof(buffer))
    library().gcnsim_run(ctypes.byref(launch))
    executed = program.histogram(histogram)
    opcodes.record(executed)
    if launch.status:
        raise SimulationError(
            f"{kernel.name} ({kernel.arch}): {_STATUS[launch.status]} at {program.texts[launch.stopped_at]}"
        )
    return Report(
        executed=launch.executed,
        errors=launch.num_errors,
        findings=[_finding(error, program) for error in errors[: min(launch.num_errors, _MAX_ERRORS)]],
        dropped=launch.dropped,
        histogram=executed,
        lds_cycles=sum(cycles),
        lds_ideal=sum(ideal),
    )


def _set_user_sgprs(launch: Launch, directives: dict[str, int], kernarg: int) -> None:
    """Arguments are never preloaded: kernels that ask for it begin with code that loads them where that is so."""
    launch.workgroup_ids |= directives.get("system_sgpr_private_segment_wavefront_offset", 0) << 3
    index = 0
    for name, size in _USER_SGPRS:
        if not directives.get(f"user_sgpr_{name}", 0):
            continue
        if name == "kernarg_segment_ptr":
            launch.user_values[index] = kernarg & 0xFFFFFFFF
            launch.user_values[index + 1] = kernarg >> 32
        elif name == "private_segment_buffer":
            launch.user_values[index + 3] = 0x5C5C5C5C  # memory.cpp: the scratch descriptor
        index += size


def _finding(error: Error, program: Program) -> Finding:
    kind = _ERRORS[error.kind] + (f" ({_RACES[error.detail]})" if error.kind == 4 else "")
    return Finding(kind, program.texts[error.instruction], error.address, error.lane, error.wave)
