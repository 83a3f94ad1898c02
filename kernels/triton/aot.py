"""Compile a `Launch` ahead of time for a GPU that is not here, and read the resources it needs.

`forward_launches` and `backward_launches` accept tensors on the "meta" device together with `Tuning(arch=...)`; what
they return compiles here with the types and specialisations that Triton would choose on the device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Descriptor, Launch, is_gluon

_POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e4m3fnuz: "*fp8e4b8", torch.float8_e5m2: "*fp8e5",
    torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What one compiled AMD kernel uses, from the metadata and text of its code object.

    Attributes:
        lds_bytes: Shared memory of a workgroup.
        vgprs: Vector registers of a lane, accumulation registers included.
        vgpr_spills: Vector registers spilled to scratch memory.
        sgpr_spills: Scalar registers spilled; they go to lanes of vector registers, which costs little.
        scratch_bytes: Private memory of a lane; more than 0 means spills or dynamic indexing.
        matrix_instructions: Number of MFMA or WMMA instructions in the code.
    """

    lds_bytes: int
    vgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch_bytes: int
    matrix_instructions: int


def target(arch: str) -> GPUTarget:
    """The Triton target of an architecture such as "gfx942", or "sm90"."""
    if arch.startswith("sm"):
        return GPUTarget("cuda", int(arch[2:]), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def signature(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list]]:
    """Types, constants and attributes of the arguments, as Triton derives them from real ones with aligned pointers."""
    types: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        specialize = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialize):
            types[name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            types[name] = _POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
            if value.numel() * value.element_size() < 2**31:
                attributes[(index,)].append(["tt.pointer_range", 32])
        elif isinstance(value, Descriptor):
            block = ", ".join(map(str, value.block_shape))
            layout = f",{value.layout()!r}" if value.swizzle else ""
            types[name] = f"tensordesc<{_POINTERS[value.base.dtype][1:]}[{block}]{layout}>"
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialize and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            assert isinstance(value, float), f"{name}: no Triton type for {value!r}"
            types[name] = "fp32"
    return types, constants, attributes


def compile_launch(launch: Launch, arch: str) -> Any:
    """Compile for an architecture; returns Triton's compiled kernel (`.asm` has "hsaco" and "amdgcn", or "cubin")."""
    types, constants, attributes = signature(launch)
    source_type = ASTSource
    if is_gluon(launch.kernel):
        from triton.experimental.gluon._runtime import GluonASTSource as source_type
    source = source_type(launch.kernel, signature=types, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target(arch), options=dict(launch.options))


def resources(compiled: Any) -> Resources:
    """Read the resources of a kernel compiled by `compile_launch`."""
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        match = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(match.group(1)) if match else 0

    return Resources(
        lds_bytes=compiled.metadata.shared,
        vgprs=field("vgpr_count"),
        vgpr_spills=field("vgpr_spill_count"),
        sgpr_spills=field("sgpr_spill_count"),
        scratch_bytes=field("private_segment_fixed_size"),
        matrix_instructions=len(re.findall(r"^\s+v_(?:mfma|wmma|swmmac)", text, re.MULTILINE)),
    )
