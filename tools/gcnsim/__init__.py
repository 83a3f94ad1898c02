"""gcnsim: executes AMD GPU machine code on the CPU, and checks what it does.

A test tool: nobody here has an AMD GPU, so every kernel we ship is compiled for AMD and run in this. It takes the
assembly text that LLVM (so also Triton) prints for gfx90a, gfx942, gfx950, gfx1100 and gfx1201, executes it wave by
wave on tensors in this process's memory, and reports

* accesses outside the tensors that were named, or writes to those named read-only; LDS and scratch out of bounds;
* LDS races: two waves, one dword, no barrier between, at least one write (of another value);
* registers that are read before they are written, as NaN: all start as a poison value, and LDS as 0xEE;
* barriers that some waves never reach; programs that do not end; instructions that are not implemented, before it runs.

What it does not model, so cannot find: time; wait counters (a missing s_waitcnt) and other hazards (a missing s_nop);
caches and their coherence; the MODE register (denormals are kept, rounding is to nearest); traps; several workgroups at
once (they run one after another, so a kernel that waits for another workgroup hangs, and races in global memory are
not seen); preloaded arguments (kernels load them themselves then). exp, log, rcp and sqrt are correctly rounded, where
hardware is within 1 ulp. Matrix instructions sum in order in float32, as hardware's order is not published. Function
calls, image instructions, sparse, scaled, fp4, fp6 and f64 matrix instructions are not implemented.

Documents: AMD "CDNA3" and "CDNA4 Instruction Set Architecture", "RDNA3" and "RDNA4 Instruction Set Architecture"; the
AMD matrix instruction calculator; LLVM "User Guide for AMDGPU Backend".

    from gcnsim import triton_launch
    report = triton_launch.run(launch, "gfx942")      # a rocm_attn_compile.kernels.triton.launch.Launch on CPU tensors
"""

from __future__ import annotations

from .build import mnemonics
from .launch import Finding, Memory, Report, SimulationError, load, pack_arguments, run

__all__ = ["Finding", "Memory", "Report", "SimulationError", "load", "mnemonics", "pack_arguments", "run"]
