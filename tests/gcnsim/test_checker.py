"""What gcnsim reports: each kind of defect is made on purpose and must be found; and its own errors are clear."""

from __future__ import annotations

import gcnsim
import numpy as np
import pytest
import torch
from gcnsim import build, triton_launch
from machine import kernel_text

pytest.importorskip("triton")

from rocm_attn_compile.kernels.isa import assembly
from rocm_attn_compile.kernels.triton import aot, forward_launch
from rocm_attn_compile.kernels.triton.launch import Launch, Tuning

ARCH = "gfx942"


def run(body: list[str], arch: str = ARCH, threads: int = 64, lds: int = 0, **options) -> gcnsim.Report:
    kernel, program = gcnsim.load(kernel_text(arch, [*body, "s_endpgm"], lds))
    return gcnsim.run(kernel, program, (1, 1, 1), (threads, 1, 1), b"", [], **options)


@pytest.fixture(scope="module")
def attention() -> Launch:
    """A forward launch on CPU tensors, with LDS traffic between its waves."""
    q, k, v = (torch.randn((1, 1, length, 64), dtype=torch.float16) for length in (150, 141, 141))
    launches, out, lse = forward_launch.forward_launches(
        q, k, v, *[None] * 10, 0.125, None, None, 9, 0.0, "zero", "bhsd", tuning=Tuning(arch=ARCH, num_splits=1)
    )  # fmt: skip
    out.zero_(), lse.zero_()
    return launches[0]


def replace(launch: Launch, **arguments: torch.Tensor) -> Launch:
    return Launch(launch.kernel, launch.grid, {**launch.arguments, **arguments}, launch.options)


def test_a_sound_kernel_is_not_accused(attention: Launch) -> None:
    inputs = [attention.arguments[name] for name in "qkv"]
    for quantum in (0, 50):
        report = triton_launch.run(attention, ARCH, inputs, quantum=quantum).report
        assert report.findings == []
        assert report.executed > 1000


def test_a_removed_barrier_is_a_race(attention: Launch) -> None:
    text = aot.compile_launch(attention, ARCH).asm["amdgcn"]
    assert text.count("\ts_barrier") > 0, "the kernel has no barrier to remove"
    report = triton_launch.run(attention, ARCH, text=text.replace("\ts_barrier", "\ts_nop 0")).report
    assert report.errors > 0
    assert {finding.kind.split(" (")[0] for finding in report.findings} == {"LDS race"}
    assert "forward.py" in report.findings[0].instruction  # the report says from which line


def test_a_shortened_tensor_is_reported(attention: Launch) -> None:
    for name, kind in (("k", "read outside of all tensors"), ("out", "write outside of all writable tensors")):
        short = attention.arguments[name][:, :, :-1]
        report = triton_launch.run(replace(attention, **{name: short}), ARCH).report
        assert report.errors > 0
        assert {finding.kind for finding in report.findings} == {kind}


def test_a_write_to_a_read_only_tensor_is_reported(attention: Launch) -> None:
    report = triton_launch.run(attention, ARCH, [attention.arguments["out"]]).report
    assert {finding.kind for finding in report.findings} == {"write outside of all writable tensors"}


def test_an_unknown_mnemonic_is_an_error_that_names_it(attention: Launch) -> None:
    text = aot.compile_launch(attention, ARCH).asm["amdgcn"]
    with pytest.raises(NotImplementedError, match=r"attention_forward_kernel \(gfx942\).*v_exq_f32 \["):
        triton_launch.run(attention, ARCH, text=text.replace("v_exp_f32", "v_exq_f32"))


def test_unknown_operands_and_formats_are_errors() -> None:
    with pytest.raises(NotImplementedError, match=r"v_mov_b32 \[v_mov_b32 v1, src_foo: operand 'src_foo'"):
        run(["v_mov_b32 v1, src_foo"])
    report = run(["v_mfma_f32_16x16x128_f8f6f4 v[0:3], v[4:11], v[12:19], 0 cbsz:4 blgp:4"], "gfx950")
    assert [finding.kind for finding in report.findings] == ["not supported by the simulator"]


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        ("ds_write_b32 v2, v3", "ds_read_b32 v4, v2", "read after another wave's write"),
        ("ds_write_b32 v2, v3", "ds_write_b32 v2, v3", "write after another wave's write"),
        ("ds_read_b32 v4, v2", "ds_write_b32 v2, v3", "write after another wave's read"),
    ],
)
def test_each_kind_of_race(first: str, second: str, kind: str) -> None:
    """Two waves on one dword; with a barrier between them there is nothing to report."""
    start = ["v_lshrrev_b32 v3, 6, v0", "v_mov_b32 v2, 0", "v_cmp_eq_u32 s[10:11], 0, v3"]
    middle = ["s_and_b64 exec, exec, s[10:11]", first, "s_mov_b64 exec, -1"]
    end = ["s_andn2_b64 exec, exec, s[10:11]", second, "s_mov_b64 exec, -1"]
    report = run([*start, *middle, *end], threads=128, lds=16)
    assert {finding.kind for finding in report.findings} == {f"LDS race ({kind})"}
    assert {finding.wave for finding in report.findings} == {1}
    assert run([*start, *middle, "s_barrier", *end], threads=128, lds=16).findings == []


def test_accesses_out_of_bounds() -> None:
    assert run(["v_mov_b32 v2, 16", "ds_read_b32 v1, v2"], lds=16).findings[0].kind == "LDS access out of bounds"
    scratch = run(["scratch_load_dword v1, off, off offset:64"]).findings[0]
    assert scratch.kind == "scratch access out of bounds"
    load = run(["v_mov_b32 v2, 0", "v_mov_b32 v3, 0", "global_load_dword v1, v[2:3], off offset:8"]).findings[0]
    assert (load.kind, load.address) == ("read outside of all tensors", 8)
    assert str(load).endswith("global_load_dword v1, v[2:3], off offset:8")


def test_waves_that_never_meet() -> None:
    body = ["v_readfirstlane_b32 s10, v0", "s_cmp_eq_u32 s10, 0", "s_cbranch_scc0 .LBB0_1", "s_barrier", ".LBB0_1:"]
    with pytest.raises(gcnsim.SimulationError, match="waves wait at a barrier"):
        run(body, threads=128)


def test_programs_that_do_not_end() -> None:
    with pytest.raises(gcnsim.SimulationError, match=r"instruction limit reached at s_branch \.LBB0_1"):
        run([".LBB0_1:", "s_branch .LBB0_1"], max_instructions=1000)


def test_registers_start_as_nan() -> None:
    out = np.zeros(64, np.float32)
    body = ["s_load_dwordx2 s[4:5], s[0:1], 0x0", "v_lshlrev_b32 v1, 2, v0", "v_add_f32 v2, 1.0, v77",
            "global_store_dword v1, v2, s[4:5]", "s_endpgm"]  # fmt: skip
    kernel, program = gcnsim.load(kernel_text(ARCH, body))
    arguments = np.array([out.ctypes.data], np.uint64).tobytes()
    gcnsim.run(kernel, program, (1, 1, 1), (64, 1, 1), arguments, [gcnsim.Memory(out.ctypes.data, out.nbytes)])
    assert np.isnan(out).all()


def test_bank_conflicts_are_counted() -> None:
    """32 lanes with a stride of 128 bytes are all in one bank; with 4 bytes, in 32."""
    for shift, cycles in ((2, 2), (7, 64)):
        report = run([f"v_lshlrev_b32 v1, {shift}, v0", "ds_read_b32 v2, v1"], lds=8192, banks=True)
        assert (report.lds_cycles, report.lds_ideal) == (cycles, 2)


def test_a_missing_compiler_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+20 compiler, and found none: install g\+\+"):
        build.compiler()


def test_argument_buffers_are_checked() -> None:
    kernel = assembly.Kernel(
        "k", ARCH, arguments=[assembly.Argument(0, 8, "global_buffer"), assembly.Argument(8, 4, "by_value")]
    )
    assert gcnsim.pack_arguments(kernel, [("Q", 1), ("i", -1)]) == b"\1" + b"\0" * 7 + b"\xff" * 4
    # What the runtime adds for kernels that ask for their grid (tl.num_programs, gridDim).
    for offset, size, kind in ((16, 4, "hidden_block_count_x"), (20, 2, "hidden_group_size_y")):
        kernel.arguments.append(assembly.Argument(offset, size, kind))
    assert gcnsim.pack_arguments(kernel, [("Q", 1)], (7, 1, 1), (64, 3, 1))[12:] == b"\0\0\0\0\7\0\0\0\3\0"
    del kernel.arguments[2:]
    with pytest.raises(ValueError, match="argument at 8 has 4 bytes"):
        gcnsim.pack_arguments(kernel, [("Q", 1), ("q", 1)])
    with pytest.raises(ValueError, match="takes 2 arguments, got 3"):
        gcnsim.pack_arguments(kernel, [("Q", 1), ("i", 1), ("i", 1)])


def test_texts_that_are_not_kernels() -> None:
    with pytest.raises(ValueError, match="not AMD GPU assembly"):
        assembly.parse("mov eax, 1")
    with pytest.raises(ValueError, match="describes no kernel"):
        assembly.parse('.amdgcn_target "amdgcn-amd-amdhsa--gfx942"')
