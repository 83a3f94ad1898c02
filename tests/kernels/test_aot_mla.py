"""TRITON_MLA's kernels compiled ahead of time: for AMD GPUs without spills and within the LDS, and for Hopper."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from test_aot import ARCHS, HALF, NO_MATRIX_WORK
from test_forward_hopper import machine_code

from rocm_attn_compile.kernels.triton import aot, configs
from rocm_attn_compile.kernels.triton.aot_mla import launches

CDNA = ARCHS[:3]
RADEON_SPILLS = {"gfx1100": 32, "gfx1201": 0}


def check(arch: str, dtype: torch.dtype, heavy: bool = False, **sizes: Any) -> None:
    """Compile all launches and assert.

    On gfx1100 a wave's 256 registers barely hold 576 columns, in pieces; with a key mask they spill.
    """
    for name, launch in launches(arch, dtype, **sizes).items():
        used = aot.resources(aot.compile_launch(launch, arch))
        assert used.lds_bytes <= configs.LDS_BYTES[configs.family(arch)], f"{name}: {used}"
        if name not in NO_MATRIX_WORK and (dtype != torch.float32 or arch in CDNA):
            assert used.matrix_instructions > 0, f"{name}: {used}"
        if arch in CDNA and not heavy:
            assert used.vgpr_spills == 0, f"{name}: {used}"
            assert used.scratch_bytes == 0, f"{name}: {used}"
        if name == "mla_decode_kernel" and arch in RADEON_SPILLS and not heavy:
            assert used.vgpr_spills <= RADEON_SPILLS[arch], f"{name}: {used}"


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_decode(arch: str) -> None:
    """16 heads over pages, 128 heads over a contiguous cache; bfloat16."""
    check(arch, HALF, num_heads=16, block_size=16)
    check(arch, HALF, num_heads=128)


def test_prefill() -> None:
    check("gfx942", HALF, num_heads=4, q_len=1024, kv_len=1024, absorbed=False, backward=True)


EVERYTHING = {"key_mask": True, "kv_start": True, "kv_end": True, "band_lower": -256, "q_len": 4}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [HALF, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("heads", [8, 16, 32, 128])
@pytest.mark.parametrize("block_size", [0, 16, 64])
def test_every_decode_configuration(arch: str, dtype: torch.dtype, heads: int, block_size: int) -> None:
    check(arch, dtype, num_heads=heads, block_size=block_size)
    check(arch, dtype, heavy=True, num_heads=heads, block_size=block_size, empty_rows="nan", **EVERYTHING)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [HALF, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("sizes", [(128, 64, 128), (64, 32, 64), (32, 16, 32)], ids=str)
def test_every_prefill_configuration(arch: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    nope, rope, value = sizes
    widths = {"qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": value}
    check(arch, dtype, num_heads=4, q_len=1024, kv_len=1024, absorbed=False, backward=True, **widths)
    check(arch, dtype, num_heads=4, q_len=1, kv_len=1024, absorbed=False, **widths)


@pytest.mark.parametrize("block_size", [0, 16])
def test_hopper_decode(block_size: int) -> None:
    """A latent that Hopper's own kernels do not take: matrix instructions of a warp."""
    for launch in launches("sm90", HALF, 16, kv_lora_rank=256, block_size=block_size).values():
        ptx = aot.compile_launch(launch, "sm90").asm["ptx"]
        assert launch.kernel.__name__ in NO_MATRIX_WORK or "mma.sync" in ptx


@pytest.mark.parametrize(("heads", "block_size", "kernel"), [
    (16, 0, "mla_decode_few_kernel"), (16, 16, "mla_decode_few_kernel"), (128, 64, "mla_decode_hopper_kernel"),
])  # fmt: skip
def test_hopper_decode_in_gluon(heads: int, block_size: int, kernel: str) -> None:
    """The kernels with roles, and their products by warp groups. Gluon is experimental: changes show here."""
    launch = launches("sm90", HALF, heads, block_size=block_size, key_mask=heads > 16)[kernel]
    ptx = aot.compile_launch(launch, "sm90").asm["ptx"]
    assert ptx.count("wgmma.mma_async") > 50
    assert "setmaxnreg" in ptx


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize(("block_size", "splits"), [(0, 4), (16, 4), (64, 1)])
def test_hopper_decode_keeps_its_loop_in_registers(heads: int, block_size: int, splits: int, tmp_path: Path) -> None:
    """No spills, and descriptors of products are computed in uniform registers.

    Those that LLVM makes before the loop cost the kernel for many heads 368 bytes of spills and a quarter of its time.
    Without operands known to be uniform the kernel for few heads had 282 moves into such registers, 4 for a product.
    """
    found = launches("sm90", HALF, heads, block_size=block_size, batch=16, num_splits=splits)
    (launch,) = (launch for name, launch in found.items() if name.startswith("mla_decode"))
    told, code = machine_code(launch, tmp_path)
    assert "0 bytes spill stores, 0 bytes spill loads" in told
    assert code.count("HGMMA") > 60
    assert "LDL" not in code
    # Those of the copies' coordinates; a page of 16 tokens is a copy of its own.
    assert code.count("R2UR") <= (160 if block_size == 16 else 50)


def test_few_rows_with_a_mask_go_to_the_kernel_that_was_checked() -> None:
    assert "mla_decode_few_kernel" not in launches("sm90", HALF, 16, key_mask=True)


def test_hopper_copies_pages() -> None:
    """Every page of a block goes to its own rows of the tile: 36 copies for a block of four pages, to 36 places."""
    launch = launches("sm90", HALF, 16, block_size=16)["mla_decode_few_kernel"]
    text = aot.compile_launch(launch, "sm90").asm["ptx"]
    copies = re.findall(r"cp\.async\.bulk\.tensor\.3d\S* \[(%r\d+)\]", text)
    assert len(copies) == len(set(copies)) == 36
