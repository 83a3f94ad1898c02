"""Static metrics of AMD kernels: occupancy against LLVM's own, costs against AMD's tables, loops on drawn graphs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from rocm_attn_compile.kernels.isa import assembly, cost
from rocm_attn_compile.kernels.isa.loops import loops
from rocm_attn_compile.kernels.isa.metrics import llvm_occupancy, metrics, occupancy
from rocm_attn_compile.kernels.triton import aot
from rocm_attn_compile.kernels.triton.aot_launches import launches


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"])
def test_occupancy_is_what_llvm_says(arch: str) -> None:
    """For Triton kernels, whose LDS LLVM does not know."""
    for launch in launches(arch, torch.bfloat16, 128).values():
        compiled = aot.compile_launch(launch, arch)
        text = compiled.asm["amdgcn"]
        measured = metrics(assembly.parse_only(text))
        assert measured.occupancy == llvm_occupancy(text), launch.kernel.__name__
        used = aot.resources(compiled)
        assert (measured.vgprs, measured.vgpr_spills, measured.scratch_bytes, measured.matrix_instructions) == (
            used.vgprs, used.vgpr_spills, used.scratch_bytes, used.matrix_instructions
        )  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "vgprs", "lds", "threads", "want"),
    [
        ("gfx942", 128, 0, 256, (4, "vgprs")),
        ("gfx942", 129, 0, 256, (3, "vgprs")),
        ("gfx942", 64, 0, 256, (8, "waves")),
        ("gfx942", 64, 32768, 256, (2, "lds")),
        ("gfx950", 64, 32768, 256, (4, "lds")),  # given out in steps of 1280 bytes
        ("gfx942", 300, 65536, 512, (1, "vgprs")),
        ("gfx1100", 96, 0, 128, (16, "waves")),
        ("gfx1100", 97, 0, 128, (12, "vgprs")),
        ("gfx1201", 96, 32768, 128, (4, "lds")),
    ],
)
def test_occupancy(arch: str, vgprs: int, lds: int, threads: int, want: tuple[int, str]) -> None:
    assert occupancy(arch, vgprs, 32, lds, threads) == want


@pytest.mark.parametrize(
    ("arch", "name", "cycles"),
    [
        # From AMD's matrix instruction calculator, "Execution cycles".
        ("gfx942", "v_mfma_f32_32x32x8_f16", 32),
        ("gfx942", "v_mfma_f32_16x16x16_bf16", 16),
        ("gfx942", "v_mfma_f32_32x32x2_f32", 64),
        ("gfx942", "v_mfma_f32_32x32x4_xf32", 32),
        ("gfx942", "v_mfma_f32_32x32x16_fp8_fp8", 32),
        ("gfx90a", "v_mfma_f32_32x32x8bf16_1k", 64),
        ("gfx950", "v_mfma_f32_32x32x16_bf16", 32),
        ("gfx1100", "v_wmma_f32_16x16x16_f16", 32),
    ],
)
def test_matrix_cycles(arch: str, name: str, cycles: int) -> None:
    assert cost.cost(name, arch) == (cost.MATRIX, cycles)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("v_add_f32", (cost.VECTOR, 4)),
        ("v_exp_f32", (cost.VECTOR, 16)),
        ("v_mul_lo_u32", (cost.VECTOR, 16)),
        ("ds_read_b128", (cost.LDS, 8)),
        ("ds_read2_b64", (cost.LDS, 8)),
        ("ds_bpermute_b32", (cost.LDS, 2)),
        ("buffer_load_dwordx4", (cost.MEMORY, 16)),
        ("global_load_ushort", (cost.MEMORY, 4)),
        ("s_barrier", (cost.BARRIER, 0)),
        ("s_waitcnt", (cost.WAIT, 0)),
        ("s_add_u32", (cost.SCALAR, 4)),
    ],
)
def test_costs(name: str, want: tuple[str, int]) -> None:
    assert cost.cost(name, "gfx942") == want


@pytest.mark.parametrize(
    ("name", "cycles"),
    [
        ("v_exp_f32", 8),
        ("v_add_f32", 4),
        ("v_mul_lo_u32", 16),
        ("ds_read_b128", 4),
        ("ds_read_b64", 2),
        ("ds_read_b64_tr_b16", 2),
        ("ds_read2st64_b64", 4),
        ("ds_read_b96", 6),
        ("ds_write_b128", 8),
    ],
)
def test_gfx950_has_twice_the_transcendental_rate_and_lds_read_bandwidth(name: str, cycles: int) -> None:
    """AMD, "CDNA 4 Architecture": transcendental rates doubled, LDS reads of 256 bytes per clock."""
    assert cost.cost(name, "gfx950")[1] == cycles


def graph(*lines: str) -> assembly.Kernel:
    text = "\n".join(f"\t{line}" if not line.endswith(":") else line for line in lines)
    return assembly.parse_only(
        f'\t.amdgcn_target "amdgcn-amd-amdhsa--gfx942"\nk:\n{text}\n\t.amdhsa_kernel k\n\t.end_amdhsa_kernel\n'
    )


def test_loops() -> None:
    """Two nested loops with a block that the compiler moved behind the end, and code that nothing reaches."""
    kernel = graph(
        "s_nop 0",
        ".LBB0_1:",
        "v_add_f32 v0, v0, v1",
        ".LBB0_2:",
        "v_mfma_f32_32x32x8_f16 v[0:15], v[16:17], v[18:19], v[0:15]",
        "s_cbranch_scc0 .LBB0_5",
        ".LBB0_3:",
        "s_cbranch_scc1 .LBB0_2",
        "s_cbranch_vccz .LBB0_1",
        "s_endpgm",
        "s_branch .LBB0_1",
        ".LBB0_5:",
        "v_exp_f32 v3, v3",
        "s_branch .LBB0_3",
    )
    outer, inner = loops(kernel)
    assert (outer.header, outer.innermost) == (1, False)
    assert (inner.header, inner.innermost) == (2, True)
    assert inner.body == {2, 3, 4, 8, 9}
    assert outer.body == {1, 2, 3, 4, 5, 8, 9}
    found = metrics(kernel).main_loop
    assert found is not None
    assert found.matrix_instructions == 1
    assert found.cycles[cost.MATRIX] == 32
    assert found.cycles[cost.VECTOR] == 16 + 4  # v_exp_f32 and the matrix instruction's issue
    assert (found.bound_by, found.matrix_share) == (cost.MATRIX, 1.0)


def test_no_loop_and_unknown_architectures() -> None:
    kernel = graph("v_mov_b32 v0, 0", "s_endpgm")
    assert metrics(kernel).main_loop is None
    kernel.arch = "gfx908"
    with pytest.raises(ValueError, match="is for gfx908; known are"):
        metrics(kernel)


def test_reserved_registers_limit_the_waves() -> None:
    """What `waves_per_eu` does: LLVM reserves registers nobody uses."""
    kernel = graph("s_endpgm")
    kernel.metadata["vgpr_count"] = 40
    assert metrics(kernel).occupancy == 8
    kernel.directives["next_free_vgpr"] = 257
    assert (metrics(kernel).occupancy, metrics(kernel).limited_by) == (1, "reserved")
