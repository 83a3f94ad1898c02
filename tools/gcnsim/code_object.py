"""Loads AMD code objects, such as clang makes of HIP sources, by way of LLVM's disassembler.

For kernels that do not come from Triton, whose assembly text is at hand. Needs pyelftools and LLVM's llvm-objdump and
llvm-readelf (version 22 knows all five architectures; Debian: apt install llvm-22). Layouts are those of LLVM's "User
Guide for AMDGPU Backend", "Code Object" and "Kernel Descriptor".
"""

from __future__ import annotations

import ctypes
import io
import re
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

from elftools.elf.elffile import ELFFile

from rocm_attn_compile.kernels.isa import assembly

from .encode import Program
from .launch import Memory

_LINE = re.compile(r"^\t(.*?)\s*// ([0-9A-F]{12}): ((?:[0-9A-F]{8} ?)+)")
_PAGE = 4096
_SLACK = 8192  # kernels prefetch instructions, and scalar loads round up, beyond the last segment
_ABSOLUTE, _RELATIVE = 3, 13  # R_AMDGPU_ABS64, R_AMDGPU_RELATIVE64


@dataclass
class CodeObject:
    """One kernel of a code object, loaded.

    Attributes:
        kernel, program: As from gcnsim.load; give both to gcnsim.run.
        memory: The loaded image, which belongs to what the kernel may access.
        image: Keeps that memory alive.
    """

    kernel: assembly.Kernel
    program: Program
    memory: Memory
    image: Any


def find_tool(name: str) -> str:
    """An LLVM tool, the newest first.

    Raises:
        RuntimeError: There is none.
    """
    for version in ("-22", "-21", "-20", "-19", ""):
        if found := shutil.which(name + version):
            return found
    raise RuntimeError(f"{name} was not found: install LLVM (Debian: apt install llvm-22)")


def load_code_object(blob: bytes, arch: str, name: str) -> CodeObject:
    """Load one kernel.

    Args:
        blob: The ELF file.
        arch: "gfx942" and so on.
        name: The kernel's symbol.

    Raises:
        ValueError: There is no such kernel, or a relocation that is not known.
        NotImplementedError: As gcnsim.encode.Program.
    """
    elf = ELFFile(io.BytesIO(blob))
    table = elf.get_section_by_name(".symtab") or elf.get_section_by_name(".dynsym")
    symbols = {symbol.name: symbol for symbol in table.iter_symbols()}
    if name + ".kd" not in symbols:
        raise ValueError(
            f"no kernel {name!r} in the code object; it has {sorted(s[:-3] for s in symbols if s[-3:] == '.kd')}"
        )
    image, base, size = _load_segments(elf)
    descriptor_at = symbols[name + ".kd"]["st_value"]
    descriptor = ctypes.string_at(base + descriptor_at, 64)
    entry = descriptor_at + struct.unpack_from("<q", descriptor, 16)[0]
    # Hand-written kernels may have no symbol, or one without a size.
    length = (symbols[name]["st_size"] if name in symbols else 0) or size - entry
    with tempfile.NamedTemporaryFile(suffix=".o") as file:
        file.write(blob)
        file.flush()
        listing = _output(find_tool("llvm-objdump"), "-d", f"--mcpu={arch}", file.name)
        notes = _output(find_tool("llvm-readelf"), "--notes", file.name)
    kernel = assembly.Kernel(name, arch, directives=_directives(descriptor))
    assembly.parse_metadata(notes, {name: kernel})
    addresses = _disassembly(kernel, listing, entry, entry + length)
    program = Program(kernel, [base + address for address in addresses])
    return CodeObject(kernel, program, Memory(base, size), image)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _load_segments(elf: ELFFile) -> tuple[Any, int, int]:
    """Copy the loadable segments to a page-aligned place and apply relocations: buffer, address, size."""
    segments = [segment for segment in elf.iter_segments() if segment["p_type"] == "PT_LOAD"]
    size = max(segment["p_vaddr"] + segment["p_memsz"] for segment in segments) + _SLACK
    image = ctypes.create_string_buffer(size + _PAGE)
    base = -(-ctypes.addressof(image) // _PAGE) * _PAGE
    for segment in segments:
        ctypes.memmove(base + segment["p_vaddr"], segment.data(), len(segment.data()))
    dynamic = elf.get_section_by_name(".dynsym")
    for section in elf.iter_sections():
        if section["sh_type"] != "SHT_RELA":
            continue
        for relocation in section.iter_relocations():
            if relocation["r_info_type"] not in (_ABSOLUTE, _RELATIVE):
                raise ValueError(f"relocation of type {relocation['r_info_type']} is not known")
            symbol = relocation["r_info_sym"]
            value = base + relocation["r_addend"] + (dynamic.get_symbol(symbol)["st_value"] if symbol else 0)
            ctypes.memmove(base + relocation["r_offset"], struct.pack("<Q", value), 8)
    return image, base, size


def _directives(descriptor: bytes) -> dict[str, int]:
    """The fields of a kernel descriptor that a launch needs, under the names of the assembler's directives."""
    lds, scratch = struct.unpack_from("<II", descriptor, 0)
    rsrc2, properties = struct.unpack_from("<IH", descriptor, 52)
    names = (
        "private_segment_buffer", "dispatch_ptr", "queue_ptr", "kernarg_segment_ptr", "dispatch_id",
        "flat_scratch_init", "private_segment_size",
    )  # fmt: skip
    return {
        "group_segment_fixed_size": lds,
        "private_segment_fixed_size": scratch,
        "user_sgpr_count": rsrc2 >> 1 & 31,
        "system_sgpr_private_segment_wavefront_offset": rsrc2 & 1,
        **{f"system_sgpr_workgroup_id_{axis}": rsrc2 >> 7 + k & 1 for k, axis in enumerate("xyz")},
        **{f"user_sgpr_{name}": properties >> k & 1 for k, name in enumerate(names)},
    }


def _disassembly(kernel: assembly.Kernel, listing: str, start: int, end: int) -> list[int]:
    """Fill in instructions and labels from llvm-objdump's output; returns the instructions' addresses."""
    addresses: list[int] = []
    for line in listing.splitlines():
        match = _LINE.match(line)
        if (
            not match
            or not start <= int(match[2], 16) < end
            or match[1].startswith((".long", "s_code_end", "<unknown>"))
        ):
            continue
        address = int(match[2], 16)
        text = match[1]
        if text.startswith(("s_branch", "s_cbranch")):
            words = int(match[3].split()[0], 16) & 0xFFFF
            text = f"{text.split()[0]} .L{address + 4 + 4 * (words - (words >> 15 << 16)):x}"
        kernel.labels[f".L{address:x}"] = len(kernel.instructions)
        kernel.instructions.append(assembly.instruction(text))
        addresses.append(address)
    return addresses
