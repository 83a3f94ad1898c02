"""Parsed assembly into the structures that the simulator runs."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Sequence

from rocm_attn_compile.kernels.isa import assembly

from .build import library
from .structures import INTEGER, LITERAL, NONE, REAL, SCALAR, VECTOR, Instruction, Operand

# What has no effect that is modelled: waits, scheduling hints, caches, the MODE register, traps.
NO_EFFECT = re.compile(
    r"s_waitcnt|s_wait_|s_nop$|s_delay_alu|s_clause|s_sleep|s_setprio|s_sendmsg|s_inst_prefetch|s_set_inst|buffer_gl|"
    r"buffer_inv|buffer_wb|global_inv|global_wb|s_dcache|s_icache|s_gl1|s_code_end|s_barrier_signal|s_setreg|"
    r"s_round_mode|s_denorm_mode|s_ttrace|v_nop|s_trap|s_barrier_leave|global_prefetch|s_prefetch|s_version|sched_|"
    r"s_set_vgpr_msb"
)

_SPECIAL = {
    "vcc": (106, 2), "vcc_lo": (106, 1), "vcc_hi": (107, 1), "exec": (126, 2), "exec_lo": (126, 1),
    "exec_hi": (127, 1), "m0": (128, 1), "flat_scratch": (102, 2), "flat_scratch_lo": (102, 1),
    "flat_scratch_hi": (103, 1), "xnack_mask": (104, 2), "src_shared_base": (130, 2), "src_private_base": (132, 2),
    "src_shared_limit": (134, 2), "src_private_limit": (136, 2), "scc": (138, 1), "src_scc": (138, 1),
}  # fmt: skip
_REGISTER = re.compile(r"(v|s|a|ttmp|acc)(?:(\d+)|\[(\d+)(?::(\d+))?\])")
_BASES = {"v": 0, "a": 256, "acc": 256, "s": 0, "ttmp": 108}
_SDWA = {"BYTE_0": 0, "BYTE_1": 1, "BYTE_2": 2, "BYTE_3": 3, "WORD_0": 4, "WORD_1": 5, "DWORD": 6}
_SDWA_UNUSED = {"UNUSED_PAD": 0, "UNUSED_SEXT": 1, "UNUSED_PRESERVE": 2}
_DPP = {
    "quad_perm": 1, "row_shl": 2, "row_shr": 3, "row_ror": 4, "row_mirror": 5, "row_half_mirror": 6, "row_bcast": 7,
    "row_share": 8, "row_newbcast": 8, "row_xmask": 9, "wave_shl": 10, "wave_rol": 11, "wave_shr": 12, "wave_ror": 13,
    "dpp8": 14,
}  # fmt: skip
_TWO_RESULTS = re.compile(
    r"v_div_scale_f32|v_mad_(co_)?u64_u32|v_mad_(co_)?i64_i32|v_(add|sub|subrev|addc|subb|subbrev)_co"
)
_PACKED = ("v_pk_", "v_fma_mix", "v_mad_mix", "v_dot", "v_mfma", "v_wmma")


@functools.lru_cache(maxsize=65536)
def _operand(text: str) -> tuple[Operand, bool]:
    """The operand, and whether it is a register's upper half (".h").

    Raises:
        ValueError: Not an operand that is known.
    """
    o, whole = Operand(select=6), text
    if text.startswith("sext("):
        o.sign_extend, text = 1, text[5:-1]
    if text.startswith("neg("):
        o.negate, text = 1, text[4:-1]
    if text.startswith("-") and not re.match(r"-[\d.]", text):
        o.negate, text = 1, text[1:]
    if text.startswith("abs("):
        o.absolute, text = 1, text[4:-1]
    if text.startswith("|"):
        o.absolute, text = 1, text.strip("|")
    upper = text.endswith(".h")
    text = text[:-2] if text.endswith((".l", ".h")) else text
    register = _REGISTER.fullmatch(text)
    if register:
        first = int(register[2] or register[3])
        o.kind = SCALAR if register[1] in ("s", "ttmp") else VECTOR
        o.index = first + _BASES[register[1]]
        o.count = int(register[4]) - first + 1 if register[4] else 1
    elif text in _SPECIAL:
        o.kind = SCALAR
        o.index, o.count = _SPECIAL[text]
    elif text in ("off", ""):
        o.kind = NONE
    elif text == "null" or text.startswith("hwreg"):
        o.kind = INTEGER
    elif re.fullmatch(r"-?0x[0-9a-f]+", text):
        value = int(text, 16)
        o.kind, o.integer = LITERAL, value if value < 1 << 63 else value - (1 << 64)
    elif re.fullmatch(r"-?\d+", text):
        o.kind, o.integer = INTEGER, int(text)
    elif re.fullmatch(r"-?[\d.]+(e[-+]?\d+)?", text):
        o.kind, o.real = REAL, float(text)
    elif text.startswith("lit64("):
        o.kind, o.integer = LITERAL, int(text[6:-1], 0)
    else:
        raise ValueError(f"operand {whole!r}")
    return o, upper


def _numbers(text: str) -> list[int]:
    return [int(part, 0) for part in text.strip("[]").split(",")]


def _mask(text: str) -> int:
    return sum(flag << k for k, flag in enumerate(_numbers(text)))


def _swizzle(text: str) -> int:
    """The offset of ds_swizzle_b32: a number, or one of LLVM's macros."""
    if not text.startswith("swizzle"):
        return int(text, 0)
    macro, *rest = (part.strip().strip('"') for part in text[8:-1].split(","))
    if macro == "SWAP":
        return int(rest[0]) << 10 | 31
    if macro == "REVERSE":
        return (int(rest[0]) - 1) << 10 | 31
    if macro == "BROADCAST":
        return int(rest[1]) << 5 | (32 - int(rest[0])) & 31
    if macro == "QUAD_PERM":
        return 0x8000 | sum(int(lane) << 2 * k for k, lane in enumerate(rest))
    if macro == "BITMASK_PERM":
        masks = [sum((letter in kinds) << 4 - k for k, letter in enumerate(rest[0])) for kinds in ("pi", "1", "i")]
        return masks[2] << 10 | masks[1] << 5 | masks[0]
    raise ValueError(f"swizzle {text!r}")


def _roles(name: str, operands: tuple[str, ...], to_lds: bool) -> tuple[list[str], list[str]]:
    """Which operands are written and which are read, in the order that the C++ side expects."""
    stores = "store" in name or "ds_write" in name
    if name.startswith(("s_cmp", "s_bitcmp")):
        written = 0
    elif name.startswith("ds_"):
        atomic = re.match(r"ds_(add|sub|max|min|or|and|xor|inc|dec|pk_add)_", name)
        written = 0 if stores or (atomic and "_rtn" not in name) else 1
    elif name.startswith(("global_", "flat_", "scratch_")):
        if "atomic" in name:
            written = int(len(operands) == (4 if name.startswith("global") else 3))
        else:
            written = 0 if stores or to_lds else 1
    elif name.startswith("buffer_"):
        written = 0 if to_lds else 1  # the data of a store is in the destination's place
    elif name.startswith("v_cmpx") and len(operands) == 2:
        written = 0
    else:
        written = min(len(operands), 2 if _TWO_RESULTS.match(name) else 1)
    return list(operands[:written]), list(operands[written:])


def _modifiers(i: Instruction, name: str, mods: dict[str, str], sources: int, upper: int) -> None:
    i.op_sel, i.op_sel_hi = upper, 0 if "mix" in name else 7
    if "op_sel" in mods:
        flags = _numbers(mods["op_sel"])
        # The last flag is the destination's, unless the instruction is packed.
        has_dst = not name.startswith(_PACKED) and "permlane" not in name and len(flags) > sources
        for k, flag in enumerate(flags):
            i.op_sel |= flag << (3 if has_dst and k == len(flags) - 1 else k)
    if "op_sel_hi" in mods:
        i.op_sel_hi = _mask(mods["op_sel_hi"])
    i.neg_lo, i.neg_hi = (_mask(mods[key]) if key in mods else 0 for key in ("neg_lo", "neg_hi"))
    i.clamp = "clamp" in mods
    i.omod = {"2": 1, "4": 2}[mods["mul"]] if "mul" in mods else 3 if "div" in mods else 0
    i.bitop = int(mods.get("bitop3", "0"), 0)
    i.cbsz = int(mods.get("cbsz", "0"), 0)
    i.blgp = 0 if mods.get("blgp", "0").startswith("[") else int(mods.get("blgp", "0"), 0)
    for key, value in mods.items():
        if key in _DPP:
            i.dpp = _DPP[key]
            if key in ("quad_perm", "dpp8"):
                width = 2 if key == "quad_perm" else 3
                i.dpp_argument = sum(lane << width * k for k, lane in enumerate(_numbers(value)))
                i.fetch_inactive = key == "dpp8"
            elif key not in ("row_mirror", "row_half_mirror"):
                i.dpp_argument = int(value, 0)
    i.row_mask, i.bank_mask = (int(mods.get(key, "15"), 0) for key in ("row_mask", "bank_mask"))
    i.bound_ctrl = "bound_ctrl" in mods
    if "fi" in mods:
        i.fetch_inactive = int(mods["fi"])


def _encode(instruction: assembly.Instruction, name: str) -> Instruction:
    mods = instruction.modifiers
    i = Instruction(sdwa_dst=6)
    if name.startswith("ds_swizzle"):
        i.offset0 = _swizzle(mods.get("offset", "0"))
    else:
        i.offset0 = int(mods.get("offset0", mods.get("offset", "0")), 0)
    i.offset1 = int(mods.get("offset1", "0"), 0)
    i.lds = "lds" in mods or "_load_lds_" in instruction.mnemonic
    i.offen, i.idxen, i.returns = "offen" in mods, "idxen" in mods, "glc" in mods or "sc0" in mods
    written, sources = _roles(name, instruction.operands, i.lds)
    upper = 0
    for k, text in enumerate(written):
        o, high = _operand(text)
        if k == 0:
            i.dst, upper = o, 8 if high else 0
        else:
            i.dst2 = o
    for k, text in enumerate(sources[:5]):
        i.src[k], high = _operand(text)
        upper |= high << k
    _modifiers(i, name, mods, len(sources), upper)
    if instruction.mnemonic.endswith("_sdwa"):
        i.sdwa = 1
        i.sdwa_dst = _SDWA[mods.get("dst_sel", "DWORD")]
        i.sdwa_unused = _SDWA_UNUSED[mods.get("dst_unused", "UNUSED_PAD")]
        for k in range(2):
            i.src[k].select = _SDWA[mods.get(f"src{k}_sel", "DWORD")]
    return i


class Program:
    """A kernel's instructions in the simulator's form.

    Attributes:
        instructions: ctypes array; halves of VOPD pairs are instructions of their own.
        texts: The text of each, with its source line.
        opcodes: Base mnemonics that occur; `Instruction.opcode` is an index into it.
    """

    def __init__(self, kernel: assembly.Kernel, addresses: Sequence[int] = ()) -> None:
        """Encode.

        Args:
            kernel: Parsed.
            addresses: Of the instructions in memory, where they have any.

        Raises:
            NotImplementedError: Instructions that are not implemented; the message names them all.
        """
        self.texts: list[str] = []
        self.opcodes: list[str] = []
        ids: dict[str, int] = {}
        missing: dict[str, str] = {}
        encoded: list[Instruction] = []
        starts: list[int] = []
        branches: list[tuple[int, str]] = []
        for index, instruction in enumerate(kernel.instructions):
            starts.append(len(encoded))
            for half in filter(None, (instruction, instruction.second)):
                name = half.name
                handler_name = "s_nop" if NO_EFFECT.match(name) else name.replace("_load_lds_", "_load_")
                text = f"{half}  ({half.source})" if half.source else str(half)
                handler = library().gcnsim_handler(handler_name.encode())
                i = Instruction()
                if handler is None:
                    missing.setdefault(name, text)
                elif handler_name != "s_nop":
                    try:
                        i = _encode(half, handler_name)
                    except (ValueError, KeyError, IndexError) as error:
                        missing.setdefault(name, f"{text}: {error}")
                i.handler, i.number = handler, len(encoded)
                i.address = addresses[index] if addresses else 0
                i.opcode = ids.setdefault(name, len(ids))
                i.dual = half.second is not None
                if half.target is not None:
                    branches.append((len(encoded), half.target))
                self.texts.append(text)
                encoded.append(i)
        if missing:
            raise NotImplementedError(
                f"{kernel.name} ({kernel.arch}): the simulator does not implement "
                + "; ".join(f"{name} [{text}]" for name, text in sorted(missing.items()))
            )
        starts.append(len(encoded))
        for index, label in branches:
            encoded[index].target = starts[kernel.labels[label]]
        self.opcodes = list(ids)
        self.instructions = (Instruction * len(encoded))(*encoded)

    def histogram(self, counts: ctypes.Array) -> dict[str, int]:
        """Executions per mnemonic, from executions per instruction."""
        found: dict[str, int] = {}
        for i, count in zip(self.instructions, counts):
            if count:
                name = self.opcodes[i.opcode]
                found[name] = found.get(name, 0) + count
        return found
