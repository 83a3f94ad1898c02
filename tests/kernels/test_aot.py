"""TRITON_ATTN's kernels compiled ahead of time for AMD GPUs: they compile, fit, do not spill, use the matrix units."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from rocm_attn_compile.kernels.triton import aot, configs
from rocm_attn_compile.kernels.triton.aot_launches import launches
from rocm_attn_compile.kernels.triton.launch import Launch

ARCHS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
HALF = torch.bfloat16
NO_MATRIX_WORK = {"backward_rows_kernel", "mask_ranges_kernel", "attention_combine_kernel", "mla_combine_kernel"}


def spills_are_known(arch: str, kernel: str, dtype: torch.dtype, head_dim: int) -> bool:
    """Where the smallest tile does not fit in a wave32 lane's 256 registers; see configs.py."""
    if not arch.startswith("gfx1") or kernel in NO_MATRIX_WORK:
        return False
    if dtype == torch.float32:
        return True
    return head_dim > 64 and kernel != "attention_forward_kernel"


def check(launch: Launch, arch: str, dtype: torch.dtype, head_dim: int, heavy: bool = False) -> None:
    """Compile and assert. `heavy` feature mixes may spill; they must still compile and fit the LDS."""
    used = aot.resources(aot.compile_launch(launch, arch))
    name = launch.kernel.__name__
    assert used.lds_bytes <= configs.LDS_BYTES[configs.family(arch)], f"{name}: {used}"
    if name not in NO_MATRIX_WORK and (dtype != torch.float32 or arch.startswith("gfx9")):
        assert used.matrix_instructions > 0, f"{name}: {used}"
    if not heavy and not spills_are_known(arch, name, dtype, head_dim):
        assert used.vgpr_spills == 0, f"{name}: {used}"
        assert used.scratch_bytes == 0, f"{name}: {used}"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "kernel",
    ["attention_forward_kernel", "backward_dkdv_kernel", "backward_dq_kernel", "attention_weights_kernel"],
)
def test_main_kernels(arch: str, kernel: str) -> None:
    """Causal, bfloat16, head size 128 (64 for dk/dv): the shapes most models run."""
    head_dim = 64 if kernel == "backward_dkdv_kernel" else 128
    check(launches(arch, HALF, head_dim, weights=True)[kernel], arch, HALF, head_dim)


@pytest.mark.parametrize("arch", [pytest.param(a, marks=() if a == "gfx942" else pytest.mark.slow) for a in ARCHS])
def test_alibi_fits_in_the_registers(arch: str) -> None:
    for head_dim in (64, 128):
        for launch in launches(arch, HALF, head_dim, alibi_slopes=True).values():
            check(launch, arch, HALF, head_dim)


def test_decode_kernels() -> None:
    """One query token, keys split between programs."""
    for launch in launches("gfx942", HALF, 128, q_len=1, kv_len=4096, causal=False, backward=False).values():
        check(launch, "gfx942", HALF, 128)


CACHES: dict[str, dict[str, Any]] = {
    "pages": {"page": 16, "kv_end": True},
    "pages of 64": {"page": 64, "kv_end": True},
    "float8": {"kv_dtype": torch.float8_e5m2, "scale": True},
    "float8 pages": {"page": 16, "kv_end": True, "kv_dtype": torch.float8_e4m3fn, "scale": True},
}


@pytest.mark.parametrize("q_len", [1, 1024])
def test_cache_kernels(q_len: int) -> None:
    """Decode and prefill of a float8 cache in pages."""
    more = {"q_len": q_len, "kv_len": 4096, "causal": q_len > 1, "backward": False}
    for launch in launches("gfx942", HALF, 128, **CACHES["float8 pages"], **more).values():
        check(launch, "gfx942", HALF, 128)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_caches_of_every_size(arch: str, head_dim: int, cache: str) -> None:
    for q_len in (1, 1024):
        more = {"q_len": q_len, "kv_len": 4096, "causal": q_len > 1, "backward": False}
        for launch in launches(arch, HALF, head_dim, **CACHES[cache], **more).values():
            check(launch, arch, HALF, head_dim)


FEATURES: dict[str, dict[str, Any]] = {
    "bias": {"attn_bias": True},
    "masks": {"attn_mask": True, "key_mask": True, "band_lower": -256, "empty_rows": "zero"},
    "limits-ids": {"kv_start": True, "kv_end": True, "q_ids": True, "kv_ids": True, "empty_rows": "mean"},
    "cap-sinks": {"soft_cap": 30.0, "sinks": True},
    "dropout": {"dropout_p": 0.1},
    "alibi": {"alibi_slopes": True},
    "everything": {
        "attn_bias": True, "attn_mask": True, "key_mask": True, "kv_start": True, "kv_end": True, "q_ids": True,
        "kv_ids": True, "soft_cap": 30.0, "dropout_p": 0.1, "band_lower": -256, "empty_rows": "mean_added",
        "alibi_slopes": True,
    },
}  # fmt: skip


def test_everything_compiles() -> None:
    """All features at once, forward and backward: no combination of flags may fail to compile."""
    tiny = configs.KernelConfig(16, 16, 1, 1)
    for launch in launches("gfx942", HALF, 16, config=tiny, weights=True, **FEATURES["everything"]).values():
        check(launch, "gfx942", HALF, 16, heavy=True)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [HALF, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
def test_shipped_configurations(arch: str, dtype: torch.dtype, head_dim: int) -> None:
    """Every row of the tables, prefill, backward and decode."""
    for launch in launches(arch, dtype, head_dim, weights=True).values():
        check(launch, arch, dtype, head_dim)
    for launch in launches(arch, dtype, head_dim, q_len=1, kv_len=4096, causal=False, backward=False).values():
        check(launch, arch, dtype, head_dim)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_features(arch: str, features: str) -> None:
    """Each group of features, head size 128 with values of 64."""
    for launch in launches(arch, HALF, 128, 64, weights=True, **FEATURES[features]).values():
        check(launch, arch, HALF, 128, heavy=True)


def test_signature_is_what_triton_would_choose() -> None:
    """Constants, alignment and 32-bit pointer ranges: the binary measured is the binary that runs."""
    launch = launches("gfx942", HALF, 64, backward=False)["attention_forward_kernel"]
    types, constants, attributes = aot.signature(launch)
    index = {parameter.name: position for position, parameter in enumerate(launch.kernel.params)}
    assert types["q"] == "*bf16"
    assert types["stride_qd"] == "constexpr"
    assert constants[(index["stride_qd"],)] == 1
    assert types["attn_bias"] == "constexpr"
    assert types["kv_len"] == "i32"
    assert (index["kv_len"],) not in attributes  # lengths change from call to call: not specialised
    assert attributes[(index["stride_kn"],)] == [["tt.divisibility", 16]]
    assert ["tt.pointer_range", 32] in attributes[(index["k"],)]
