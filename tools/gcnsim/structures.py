"""The structures shared with the C++ side, field for field as src/state.h declares them."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from typing import Any

NONE, SCALAR, VECTOR, INTEGER, REAL, LITERAL = range(6)


class Operand(ctypes.Structure):
    """Where a value comes from or goes to."""

    _fields_ = [
        ("kind", c_uint8), ("count", c_uint8), ("negate", c_uint8), ("absolute", c_uint8), ("sign_extend", c_uint8),
        ("select", c_uint8), ("index", c_uint16), ("integer", c_int64), ("real", c_double),
    ]  # fmt: skip


class Instruction(ctypes.Structure):
    """One instruction, ready to run."""

    _fields_ = [
        ("handler", c_void_p), ("address", c_uint64), ("number", c_uint32), ("target", c_uint32),
        ("opcode", c_uint32), ("dual", c_uint32), ("dst", Operand), ("dst2", Operand), ("src", Operand * 5),
        ("offset0", c_int32), ("offset1", c_int32), ("dpp_argument", c_int32),
        *((name, c_uint16) for name in ("op_sel", "op_sel_hi", "neg_lo", "neg_hi")),
        *((name, c_uint8) for name in (
            "clamp", "omod", "dpp", "bound_ctrl", "fetch_inactive", "row_mask", "bank_mask", "sdwa", "sdwa_dst",
            "sdwa_unused", "offen", "idxen", "lds", "returns", "bitop", "cbsz", "blgp",
        )),
    ]  # fmt: skip


class Region(ctypes.Structure):
    """A piece of memory that the kernel may touch."""

    _fields_ = [("low", c_uint64), ("high", c_uint64), ("writable", c_uint32), ("padding", c_uint32)]


class Error(ctypes.Structure):
    """Something the checker found."""

    _fields_ = [
        ("kind", c_uint32), ("instruction", c_uint32), ("address", c_uint64), ("detail", c_uint64),
        ("lane", c_uint32), ("wave", c_uint32),
    ]  # fmt: skip


class Launch(ctypes.Structure):
    """Everything about one launch, and its results."""

    _fields_ = [
        ("program", ctypes.POINTER(Instruction)), ("instructions", c_uint32), ("entry", c_uint32),
        ("lanes", c_uint32), ("gfx", c_uint32), ("grid", c_uint32 * 3), ("block", c_uint32 * 3),
        ("lds_bytes", c_uint32), ("scratch_bytes", c_uint32), ("user_sgprs", c_uint32),
        ("user_values", c_uint32 * 32), ("workgroup_ids", c_uint32), ("poison", c_uint32),
        ("check_races", c_uint32), ("count_banks", c_uint32), ("quantum", c_uint32),
        ("regions", ctypes.POINTER(Region)), ("num_regions", c_uint32), ("max_errors", c_uint32),
        ("errors", ctypes.POINTER(Error)), ("max_instructions", c_uint64), ("histogram", c_void_p),
        ("bank_cycles", c_void_p), ("bank_ideal", c_void_p), ("num_errors", c_uint32), ("status", c_uint32),
        ("stopped_at", c_uint32), ("dropped", c_uint32), ("executed", c_uint64),
    ]  # fmt: skip


def declare(library: Any) -> None:
    """Set argument types, and check that both sides lay the structures out alike."""
    library.gcnsim_handler.restype = c_void_p
    library.gcnsim_handler.argtypes = [ctypes.c_char_p]
    library.gcnsim_mnemonics.restype = ctypes.c_char_p
    library.gcnsim_run.restype = None
    library.gcnsim_run.argtypes = [ctypes.POINTER(Launch)]
    library.gcnsim_size.restype = c_uint32
    for which, structure in enumerate((Operand, Instruction, Region, Error, Launch)):
        here, there = ctypes.sizeof(structure), library.gcnsim_size(which)
        assert here == there, f"{structure.__name__}: {here} bytes in structures.py, {there} in state.h"
