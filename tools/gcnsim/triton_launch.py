"""Runs this project's Triton kernels in the simulator, through the host code that ships.

with simulated_device("gfx942", read_only=tensors) as device:
    out, lse = attention_forward(**tensors, ...)        # CPU tensors; launches run in the simulator
device.runs                                             # one Run per launch
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from rocm_attn_compile.kernels.triton import aot
from rocm_attn_compile.kernels.triton import launch as launch_module
from rocm_attn_compile.kernels.triton.launch import Launch

from .launch import Memory, Report, load, pack_arguments
from .launch import run as run_kernel

COMPUTE_UNITS = {"gfx90a": 104, "gfx942": 304, "gfx950": 256, "gfx1100": 48, "gfx1201": 32}
"""What `multi_processor_count` is on the largest GPU of each architecture (MI250X, one die; MI300X; MI355X; Radeon RX
7900 XTX and 9070 XT, where it counts work-group processors). The number of key splits depends on it."""
_FORMATS = {"i32": "i", "i64": "q", "fp32": "f"}


@dataclass
class Run:
    """One launch that was run."""

    launch: Launch
    compiled: Any
    report: Report


@dataclass
class SimulatedDevice:
    """The launches of a `with simulated_device(...)` block."""

    arch: str
    runs: list[Run] = field(default_factory=list)

    def findings(self) -> list[str]:
        """All that the checker reports, as text."""
        return [f"{run.launch.kernel.__name__}: {finding}" for run in self.runs for finding in run.report.findings]


def run(
    launch: Launch, arch: str, read_only: Iterable[torch.Tensor] = (), text: str | None = None, **options: Any
) -> Run:
    """Compile for `arch` and run all programs of a launch.

    Args:
        launch: Its tensors are on the CPU; those written are written in place.
        arch: "gfx942" and so on.
        read_only: Tensors that the kernel must not write.
        text: Assembly to run instead of Triton's, for negative tests.
        options: For `gcnsim.run`.
    """
    compiled = aot.compile_launch(launch, arch)
    kernel, program = load(text or compiled.asm["amdgcn"])
    protected = {tensor.data_ptr() for tensor in read_only}
    values: list[tuple[str, Any]] = []
    memory = []
    for name, kind in aot.signature(launch)[0].items():
        value = launch.arguments[name]
        if kind == "constexpr":
            continue
        if isinstance(value, torch.Tensor):
            values.append(("Q", value.data_ptr()))
            memory.append(extent(value, value.data_ptr() not in protected))
        else:
            values.append((_FORMATS[kind], value))
    grid, block = (launch.grid, 1, 1), (compiled.metadata.num_warps * kernel.wave_size, 1, 1)
    report = run_kernel(
        kernel,
        program,
        grid,
        block,
        pack_arguments(kernel, values, grid, block),
        memory,
        dynamic_lds=max(0, compiled.metadata.shared - kernel.directives.get("group_segment_fixed_size", 0)),
        **options,
    )
    return Run(launch, compiled, report)


def extent(tensor: torch.Tensor, writable: bool) -> Memory:
    """The bytes from a tensor's first to its last element; gaps of a strided view count as part of it."""
    if tensor.numel() == 0:
        return Memory(tensor.data_ptr(), 0, writable)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return Memory(tensor.data_ptr(), (last + 1) * tensor.element_size(), writable)


@contextlib.contextmanager
def simulated_device(arch: str, read_only: Iterable[torch.Tensor] = (), **options: Any) -> Iterator[SimulatedDevice]:
    """Make CPU tensors count as being on a GPU of this architecture: `Launch.run` runs in the simulator.

    What the host code allocates and does not fill is NaN (or the largest integer), so that a kernel that leaves
    something out is seen.

    Args:
        arch: A key of COMPUTE_UNITS.
        read_only: Tensors that no kernel may write.
        options: For `gcnsim.run`.
    """
    device = SimulatedDevice(arch)
    protected = list(read_only)

    def run_launch(launch: Launch) -> None:
        if launch.grid:
            device.runs.append(run(launch, arch, protected, **options))

    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Launch, "run", run_launch))
        prefix = launch_module.__name__.rpartition(".")[0] + "."
        for name, module in list(sys.modules.items()):
            if name.startswith(prefix) and hasattr(module, "device_arch"):
                answer = mock.Mock(return_value=(arch, COMPUTE_UNITS[arch]))
                stack.enter_context(mock.patch.object(module, "device_arch", answer))
        torch.use_deterministic_algorithms(True, warn_only=True)
        stack.callback(torch.use_deterministic_algorithms, deterministic, warn_only=warn_only)
        yield device
