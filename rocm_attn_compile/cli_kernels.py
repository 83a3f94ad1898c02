"""`rocm-attn aot` and `rocm-attn isa-report`: kernels compiled for a GPU that need not be here, and measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .kernels.isa.metrics import KernelMetrics
    from .spec import AttentionSpec

HEADER = (
    "kernel", "arch", "VGPRs", "SGPRs", "LDS", "waves", "limited by", "spills", "scratch", "matrix", "share",
    "bound by",
)  # fmt: skip


def aot(spec: AttentionSpec, arch: str, out: str | None) -> list[KernelMetrics]:
    """Compile our Triton kernels for one attention, as the device would; write them to the folder `out` if given.

    Raises:
        RuntimeError: There is no Triton.
        ValueError: `arch` is not an AMD GPU that Triton compiles for.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeError("compiling kernels needs Triton, which comes with PyTorch for GPUs") from error
    from .kernels.isa import assembly, cost
    from .kernels.isa.metrics import metrics
    from .kernels.triton import aot as compiler

    if not cost.known(arch):
        raise ValueError(f"--arch must be gfx90a, gfx942, gfx950 or one of gfx11.. and gfx12..; got {arch!r}")
    results = []
    for name, launch in (_latent_launches if spec.latent else _launches)(spec, arch).items():
        compiled = compiler.compile_launch(launch, arch)
        if out is not None:
            Path(out).mkdir(parents=True, exist_ok=True)
            (Path(out) / f"{name}.amdgcn").write_text(compiled.asm["amdgcn"])
            (Path(out) / f"{name}.hsaco").write_bytes(compiled.asm["hsaco"])
        kernel = assembly.parse_only(compiled.asm["amdgcn"])
        results.append(metrics(kernel, compiled.metadata.shared, compiled.metadata.num_warps * kernel.wave_size))
    return results


def _launches(spec: AttentionSpec, arch: str) -> dict[str, Any]:
    """TRITON_ATTN's launches by kernel name."""
    from .kernels.triton.aot_launches import launches

    return launches(
        arch,
        spec.dtype,
        spec.head_dim,
        spec.v_head_dim,
        spec.q_len,
        spec.kv_len,
        causal=spec.mask.band_upper is not None,
        backward=spec.requires_grad,
        batch=spec.batch,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        attn_bias=spec.has_bias,
        alibi_slopes=spec.has_alibi,
        sinks=spec.has_sinks,
        soft_cap=spec.logits_soft_cap,
        band_lower=spec.mask.band_lower,
        dropout_p=spec.dropout_p,
    )


def _latent_launches(spec: AttentionSpec, arch: str) -> dict[str, Any]:
    """TRITON_MLA's launches by kernel name, in the form that the cost rule takes."""
    from .kernels.triton.aot_mla import launches
    from .ops.mla_form import prefers_absorbed

    latent: Any = spec.latent
    names = ("qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank", "v_head_dim")
    sizes: Any = {name: getattr(latent, name) for name in names}
    call: Any = {
        **sizes,
        **{name: getattr(spec, name) for name in ("q_len", "kv_len", "num_heads")},
        **{name: getattr(spec.mask, name) for name in ("band_lower", "band_upper")},
        "itemsize": spec.dtype.itemsize,
    }
    absorbed = not spec.requires_grad and prefers_absorbed(**call)
    return launches(
        arch,
        spec.dtype,
        spec.num_heads,
        q_len=spec.q_len,
        kv_len=spec.kv_len,
        batch=spec.batch,
        causal=spec.mask.band_upper is not None,
        absorbed=absorbed,
        backward=spec.requires_grad,
        band_lower=spec.mask.band_lower,
        **sizes,
    )


def isa_report(paths: list[str]) -> list[KernelMetrics]:
    """Measure kernels in files of AMD assembly (`clang -S`, Triton's ".amdgcn"), or in folders such as Triton's cache.

    Raises:
        ValueError: A path does not exist or holds no AMD assembly.
    """
    from .kernels.isa import assembly
    from .kernels.isa.metrics import metrics

    results = []
    for given in paths:
        path = Path(given)
        if not path.exists():
            raise ValueError(f"{given}: no such file or folder")
        files = sorted(path.rglob("*.amdgcn")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{given}: no .amdgcn file in this folder; Triton's cache is in ~/.triton/cache")
        for file in files:
            try:
                kernels = assembly.parse(file.read_text())
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from error
            lds, threads = _launch_data(file)
            results += [metrics(kernel, lds, threads and threads * kernel.wave_size) for kernel in kernels.values()]
    return results


def _launch_data(file: Path) -> tuple[int | None, int | None]:
    """LDS bytes and warps, which Triton keeps in a JSON file beside the assembly."""
    beside = file.with_suffix(".json")
    if not beside.exists():
        return None, None
    data = json.loads(beside.read_text())
    return data.get("shared"), data.get("num_warps")


def show(results: list[KernelMetrics], as_json: bool, table: Callable[..., str]) -> str:
    """The results as JSON or as a table."""
    if as_json:
        return json.dumps([result.to_dict() for result in results], indent=2)
    return table(HEADER, [_row(result) for result in results])


def _row(result: KernelMetrics) -> tuple[str, ...]:
    loop = result.main_loop
    cells: tuple[Any, ...] = (
        result.kernel, result.arch, f"{result.vgprs} ({result.agprs} acc)" if result.agprs else result.vgprs,
        result.sgprs, result.lds_bytes, result.occupancy, result.limited_by, result.vgpr_spills, result.scratch_bytes,
        result.matrix_instructions, f"{loop.matrix_share:.0%}" if loop and loop.matrix_instructions else "",
        loop.bound_by if loop else "",
    )  # fmt: skip
    return tuple(map(str, cells))


def add_commands(commands: Any, add_spec_arguments: Callable[[argparse.ArgumentParser], None],
                 make_spec: Callable[[argparse.Namespace], tuple[AttentionSpec, str | None]],
                 table: Callable[..., str]) -> None:  # fmt: skip
    """Add both commands to the parser of cli.py, whose options for an attention `aot` shares."""

    def run_aot(arguments: argparse.Namespace) -> str:
        spec, arch = make_spec(arguments)
        if arch is None:
            raise ValueError('name the GPU to compile for: --arch gfx942, "gfx1100" and so on')
        return show(aot(spec, arch, arguments.out), arguments.json, table)

    compile_command = commands.add_parser("aot", help="compile the Triton kernels of an attention for an AMD GPU")
    add_spec_arguments(compile_command)
    compile_command.add_argument("--out", metavar="FOLDER", help="also write assembly and code objects")
    compile_command.add_argument("--json", action="store_true", help="as JSON")
    compile_command.set_defaults(command=run_aot)

    report = commands.add_parser("isa-report", help="registers, occupancy, spills and main loop of AMD kernels")
    report.add_argument(
        "paths", nargs="+", help="files of AMD assembly, or folders with .amdgcn files (Triton's cache)"
    )
    report.add_argument("--json", action="store_true", help="as JSON, with cycles")
    report.set_defaults(command=lambda arguments: show(isa_report(arguments.paths), arguments.json, table))
