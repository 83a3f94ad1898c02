"""The static quality of every shipped Triton kernel, per AMD architecture: `make isa` writes both of its files.

* tests/kernels/isa_baseline.json, which tests/kernels/test_isa_baseline.py compares with what compiles today;
* docs/amd.md, the same as tables, beside AITER's kernels: tests/kernels/isa_aiter.json, which it only reads.

A row is a kernel, as the host code launches it for a type and head size. Compiling all of them takes some minutes.
"""

from __future__ import annotations

import argparse
import functools
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gcnsim.triton_launch import simulated_device

from rocm_attn_compile.kernels.isa import assembly
from rocm_attn_compile.kernels.isa.metrics import KernelMetrics, LoopMetrics, metrics
from rocm_attn_compile.kernels.triton import aot
from rocm_attn_compile.kernels.triton.aot_launches import launches
from rocm_attn_compile.kernels.triton.aot_mla import launches as latent_launches
from rocm_attn_compile.kernels.triton.attention import attention_backward, attention_forward
from rocm_attn_compile.kernels.triton.launch import Launch
from rocm_attn_compile.kernels.triton.mla import mla_decode

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "tests" / "kernels" / "isa_baseline.json"
AITER = ROOT / "tests" / "kernels" / "isa_aiter.json"
PAGE = ROOT / "docs" / "amd.md"
ARCHS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LATENT = "latent"
SIZES: tuple[tuple[str, int | str], ...] = (
    ("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp16", 128), ("fp32", 64), ("fp32", 128), ("bf16", LATENT),
)  # fmt: skip
"""Type and head size, or LATENT: DeepSeek's attention, 512 + 64 absorbed and 192/128. CUT is what CI compiles."""
CUT = ("bf16", 128)
KEPT = ("vgprs", "occupancy", "vgpr_spills", "scratch_bytes", "lds_bytes", "matrix_instructions")
"""What the baseline stores of KernelMetrics."""


def measure(arch: str, dtype: str, head_dim: int | str) -> dict[str, KernelMetrics]:
    """Compile and measure all kernels of a causal attention (its gradients and a bias among them) and of a decode step.

    Returns:
        Metrics by row name, such as "gfx942 bf16 128 backward_dq_kernel".
    """
    if head_dim == LATENT:
        return measure_latent(arch, dtype)
    assert isinstance(head_dim, int)
    decode: dict[str, Any] = {"q_len": 1, "kv_len": 4096, "causal": False, "backward": False, "num_splits": 4}
    calls: list[tuple[str, dict[str, Any]]] = [
        ("", {"attn_bias": False}),
        ("bias ", {"attn_bias": True}),
        ("decode ", decode),
    ]
    if dtype != "fp32":
        float8 = {"kv_dtype": torch.float8_e4m3fn, "scale": True}
        calls += [
            ("decode, pages of 16 ", {**decode, "page": 16, "kv_end": True}),
            ("decode, float8 ", {**decode, **float8}),
        ]
    found: dict[str, KernelMetrics] = {}
    for prefix, options in calls:
        for kernel, launch in launches(arch, DTYPES[dtype], head_dim, **options).items():
            if prefix == "bias " and kernel != "backward_bias_kernel":
                continue
            if "decode, " in prefix and kernel == "attention_combine_kernel":  # as of any decode step
                continue
            name = kernel if prefix == "bias " else prefix + kernel
            found[f"{arch} {dtype} {head_dim} {name}"] = _compiled(launch, arch)
    return found


def measure_latent(arch: str, dtype: str) -> dict[str, KernelMetrics]:
    """The same of latent attention: decode of 16 heads over pages and of 128 heads; prefill with gradients."""
    calls = (
        ("16 heads ", {"num_heads": 16, "block_size": 16, "num_splits": 4}),
        ("128 heads ", {"num_heads": 128}),
        ("", {"num_heads": 8, "q_len": 1024, "kv_len": 1024, "absorbed": False, "backward": True}),
    )
    return {
        f"{arch} {dtype} {LATENT} {prefix}{kernel}": _compiled(launch, arch)
        for prefix, options in calls
        for kernel, launch in latent_launches(arch, DTYPES[dtype], **options).items()
    }


def _compiled(launch: Launch, arch: str) -> KernelMetrics:
    compiled = aot.compile_launch(launch, arch)
    parsed = assembly.parse_only(compiled.asm["amdgcn"])
    return metrics(parsed, compiled.metadata.shared, compiled.metadata.num_warps * parsed.wave_size)


def worse(name: str, now: KernelMetrics, before: dict[str, int]) -> list[str]:
    """What a change has made worse, in words; each names the row."""
    found = []
    for key in ("vgpr_spills", "scratch_bytes"):
        if getattr(now, key) > before[key]:
            found.append(f"{name}: {key} was {before[key]}, is {getattr(now, key)}")
    if now.occupancy < before["occupancy"]:
        found.append(f"{name}: occupancy was {before['occupancy']}, is {now.occupancy} (by {now.limited_by})")
    if before["matrix_instructions"] and not now.matrix_instructions:
        found.append(f"{name}: had {before['matrix_instructions']} matrix instructions, has none")
    return found


def page(rows: dict[str, KernelMetrics]) -> str:
    """docs/amd.md."""
    lines = [
        "# Machine code for AMD GPUs",
        "",
        "Made by `make isa`; do not edit. What Triton's compiler makes of the shipped kernels and configurations, read",
        "from its assembly. **Nothing here was measured on hardware.** That each kernel computes the right thing is a",
        "different test: all of them are executed as machine code in a simulator (`tools/gcnsim`).",
        "",
        "- *VGPRs*: vector registers of a lane (accumulation registers among them in brackets).",
        "- *waves*: that fit a SIMD, and what limits them. *reserved*: Triton's `waves_per_eu`, which makes LLVM",
        "  reserve registers that keep more waves out.",
        "- *spills*: vector registers spilled, and bytes of scratch memory per lane.",
        "- *share*: of the matrix unit in the main loop, at best: its cycles over those of the unit that bounds it.",
        "- *cycles*: of one iteration of the main loop for a wave: matrix, vector, LDS and memory unit (the latter",
        "  two times the SIMDs that share them). A model, `kernels/isa/cost.py`, to compare kernels with.",
    ]
    for dtype, head_dim in SIZES:
        title = "latent attention (512 + 64; 192/128)" if head_dim == LATENT else f"head size {head_dim}"
        lines += ["", f"## {dtype}, {title}"]
        for arch in ARCHS:
            lines += ["", f"### {arch}, {dtype}, {head_dim}", "", "| " + " | ".join(HEADER) + " |"]
            lines.append("| --- | " + "--: | " * (len(HEADER) - 1))
            lines[-1] = lines[-1].rstrip()
            prefix = f"{arch} {dtype} {head_dim} "
            lines += [_line(name.removeprefix(prefix), row) for name, row in rows.items() if name.startswith(prefix)]
    return "\n".join([*lines, *beside_aiter(rows), *bank_conflicts()]) + "\n"


def beside_aiter(rows: dict[str, KernelMetrics]) -> list[str]:
    """The forward kernel of CUT beside AITER's, whose figures are stored: none of it is needed here.

    tests/kernels/test_aiter_objects.py compares the stored figures of the assembly kernels with a checkout's.
    """
    stored = json.loads(AITER.read_text())
    dtype, head_dim = CUT
    lines = [
        "", f"## Beside AITER's: {dtype}, head size {head_dim}, forward", "",
        "AITER's assembly kernels (`hsa/`, code objects as they are), and its Triton `_attn_fwd` with the default of",
        f"its configurations, compiled by Triton {stored['triton']}; commit {stored['commit'][:10]}. Ours is causal.",
        "rtne, rtna and rtz round the probabilities to nearest, ties to even or away from zero, and towards zero.",
        "*conflicts*: as in the last table. Loops differ in the work of an iteration: compare shares, and cycles with",
        "those of the matrix unit.",
    ]  # fmt: skip
    header = (*HEADER, "conflicts")
    for arch in dict.fromkeys(row["arch"] for row in stored["rows"]):
        lines += ["", f"### {arch}, beside AITER's", "", "| " + " | ".join(header) + " |"]
        lines.append("| --- |" + " --: |" * (len(header) - 1))
        kernel = "attention_forward_kernel"
        conflicts = _conflicts(arch, head_dim)[kernel] if arch in BANKED else ""
        lines.append(_line("ours: " + kernel, rows[f"{arch} {dtype} {head_dim} {kernel}"], conflicts))
        for row in stored["rows"]:
            if row["arch"] == arch:
                name = row["kernel"] + (", causal" if row["causal"] and "causal" not in row["kernel"] else "")
                ratio = row["lds_conflicts"]
                lines.append(_line(name, stored_metrics(row), f"{ratio:.2f}" if ratio else ""))
    return lines


def stored_metrics(row: dict[str, Any]) -> KernelMetrics:
    """The figures in a row of AITER."""
    fields = {**row["metrics"], "main_loop": LoopMetrics(**row["metrics"]["main_loop"])}
    return KernelMetrics(kernel=row["kernel"], arch=row["arch"], **fields)


def bank_conflicts() -> list[str]:
    """LDS clocks with conflicts over those without, from simulated runs; where the simulator's bank model holds."""
    lines = [
        "", "## LDS bank conflicts", "",
        "Clocks of LDS accesses over those without conflicts, from simulated runs (bf16, causal, 141 x 150; latent",
        "decode: one query, 150 keys). 1.00 is free of conflicts. CDNA2 and CDNA3 only: the simulator has no model of",
        "other chips' banks.", "",
        "| kernel | head size | " + " | ".join(BANKED) + " |", "| --- | --: | " + "--: | " * len(BANKED),
    ]  # fmt: skip
    lines[-1] = lines[-1].rstrip()
    for head_dim in (64, 128):
        columns = [_conflicts(arch, head_dim) for arch in BANKED]
        for kernel in columns[0]:
            cells = " | ".join(column[kernel] for column in columns)
            lines.append(f"| {kernel.removesuffix('_kernel')} | {head_dim} | {cells} |")
    for heads in (16, 128):
        cells = " | ".join(f"{latent_conflicts(arch, heads):.2f}" for arch in BANKED)
        lines.append(f"| mla_decode, {heads} heads | 512 + 64 | {cells} |")
    return lines


def latent_conflicts(arch: str, heads: int) -> float:
    """The same of the decode kernel of latent attention."""
    q, kv = torch.randn((1, heads, 1, 576)).bfloat16(), torch.randn((1, 150, 576)).bfloat16()
    (q_latent, q_pe), (kv_c, k_pe) = (tensor.split([512, 64], dim=-1) for tensor in (q, kv))
    with simulated_device(arch, banks=True, races=False) as device:
        mla_decode(q_latent, q_pe, kv_c, k_pe, softmax_scale=0.1, band_upper=149)
    report = device.runs[0].report
    return report.lds_cycles / report.lds_ideal


@functools.cache
def _conflicts(arch: str, head_dim: int) -> dict[str, str]:
    q, k, v = (torch.randn((1, 2, length, head_dim)).bfloat16() for length in (141, 150, 150))
    none = [None] * 10
    scalars = (head_dim**-0.5, None, None, 9, 0.0, "zero")
    with simulated_device(arch, banks=True, races=False) as device:
        out, lse = attention_forward(q, k, v, *none, *scalars)
        attention_backward(out, q, k, v, *none, out, lse, *scalars, [True] * 5)
    reports = {run.launch.kernel.__name__: run.report for run in device.runs}
    return {name: f"{r.lds_cycles / r.lds_ideal:.2f}" if r.lds_ideal else "" for name, r in reports.items()}


BANKED = ("gfx90a", "gfx942")
HEADER = ("kernel", "VGPRs", "SGPRs", "LDS", "waves", "spills", "matrix", "share", "bound by", "cycles")


def _line(name: str, row: KernelMetrics, *more: str) -> str:
    loop = row.main_loop
    cells = [
        name.replace("_kernel", ""),
        f"{row.vgprs} ({row.agprs})" if row.agprs else str(row.vgprs),
        str(row.sgprs),
        str(row.lds_bytes),
        f"{row.occupancy} {row.limited_by}",
        f"{row.vgpr_spills}, {row.scratch_bytes} B" if row.scratch_bytes or row.vgpr_spills else "0",
        str(row.matrix_instructions),
        f"{loop.matrix_share:.0%}" if loop and loop.matrix_instructions else "",
        loop.bound_by if loop else "no loop",
        ", ".join(str(loop.cycles[unit]) for unit in ("matrix", "vector", "lds", "memory")) if loop else "",
        *more,
    ]
    return "| " + " | ".join(cells) + " |"


def _measure(job: tuple[str, str, int | str]) -> dict[str, KernelMetrics]:
    return measure(*job)


def main() -> None:
    """Write the baseline and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    arguments = parser.parse_args()
    jobs = [(arch, dtype, head_dim) for dtype, head_dim in SIZES for arch in ARCHS]
    rows: dict[str, KernelMetrics] = {}
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for found in pool.map(_measure, jobs):
            rows.update(found)
    stored: dict[str, Any] = {name: {key: getattr(row, key) for key in KEPT} for name, row in rows.items()}
    entries = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in stored.items())
    BASELINE.write_text("{\n" + entries + "\n}\n")
    PAGE.write_text(page(rows))
    print(f"{len(rows)} rows in {BASELINE.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
