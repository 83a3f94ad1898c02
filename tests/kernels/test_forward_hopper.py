"""Hopper's own forward kernel, compiled for it: which calls it takes, and what the assembler makes of its schedule."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton

from rocm_attn_compile.kernels.triton import aot, aot_launches, aot_mla, configs
from rocm_attn_compile.kernels.triton.common import CAP_SERIES, FIRST_MAX, NO_MAX
from rocm_attn_compile.kernels.triton.forward_hopper_launch import FASTER, MIN_KEYS, TILES
from rocm_attn_compile.kernels.triton.launch import Launch, Tuning

HALF = torch.bfloat16
KERNEL = "attention_forward_hopper_kernel"
LONG = {"q_len": 8192, "kv_len": 8192, "batch": 1, "num_heads": 128, "num_kv_heads": 128, "backward": False}
FORCED = Tuning(arch="sm90", config=configs.KernelConfig(128, 128, 4, 2), tma=True, in_flight=True, num_splits=1)


def launch(head_dim: int, v_head_dim: int, dtype: torch.dtype = HALF, **features: Any) -> Launch:
    """The main launch of a long call."""
    launches = aot_launches.launches("sm90", dtype, head_dim, v_head_dim, **{**LONG, **features})
    (found,) = (launch for name, launch in launches.items() if name.startswith("attention_forward"))
    return found


def machine_code(found: Launch, folder: Path) -> tuple[str, str]:
    """What ptxas says, and the disassembly, of Triton's own tools."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptx, cubin = folder / "kernel.ptx", folder / "kernel.cubin"
    ptx.write_text(aot.compile_launch(found, "sm90").asm["ptx"])
    command = [tools / "ptxas", "-v", "-arch=sm_90a", ptx, "-o", cubin]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return told, subprocess.run([tools / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True).stdout


CASES: dict[str, Callable[[], Launch]] = {
    "192/128, causal": lambda: launch(192, 128),
    "latent": lambda: aot_mla.launches("sm90", HALF, 128, absorbed=False, q_len=8192, kv_len=8192, batch=1)[KERNEL],
    "128, soft cap": lambda: launch(128, 128, soft_cap=20.0, tuning=FORCED),
    "128, soft cap by a polynomial": lambda: launch(128, 128, soft_cap=30.0),
    "256": lambda: launch(256, 256, tuning=FORCED, causal=False),
    "first maximum": lambda: launch(128, 128, tuning=replace(FORCED, shift=FIRST_MAX.value)),
    "padding and ids": lambda: launch(128, 128, key_mask=True, q_ids=True, kv_ids=True),
}
SLOW = ("latent", "256", "first maximum", "padding and ids")


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES]
)
def test_exponentials_overlap_with_the_second_product(case: str, tmp_path: Path) -> None:
    """No spills in the loop, and all exponentials in it lie between the wait for the scores and that for the values.

    Under a cap by the polynomial half of them do, and the other half behind it.
    """
    found = CASES[case]()
    assert found.kernel.__name__ == KERNEL
    told, code = machine_code(found, tmp_path)
    assert "setmaxnreg" not in told, told  # else it says that it ignores it
    # The polynomial's loop starts the values' product in two pieces.
    pieces = re.split(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([12])", code)
    parts, waits = pieces[::2], pieces[1::2]
    is_series = found.arguments["SHIFT"] == CAP_SERIES.value
    assert sorted(waits) == (["1", "1", "2", "2"] if is_series else ["1"] * len(waits))
    loops = 2 if found.arguments["SHIFT"] in (FIRST_MAX.value, CAP_SERIES.value) else 1
    assert len(parts) == 1 + 2 * loops, "so many in each of two groups"
    scores = found.arguments["BLOCK_N"] * 64 // 128
    tanhs = []
    for part, wait in zip(parts[1:], waits):
        softmax = part[: part.index("WARPGROUP.DEPBAR")]
        # What cuts a block by padding and ids takes registers, in a branch that few blocks take.
        assert "LDL" not in softmax or case == "padding and ids"
        assert softmax.count("MUFU.EX2") >= (scores // 2 if wait == "2" else scores)
        tanhs.append(softmax.count("MUFU.TANH"))
        # A row's sum over threads waits until the tile's end; its maximum cannot.
        assert "SHFL" not in softmax or "FMNMX" in softmax
    # In the polynomial's kernel one of two loops has them, that of tiles computed again.
    want = {0: "cap" not in case or loops == 2, scores: "cap" in case}
    assert sorted(set(tanhs)) == [count for count, wanted in want.items() if wanted]


def test_chosen_where_it_is_faster() -> None:
    """Long calls of the measured sizes, in half precision, with a mask in closed form."""
    for blocks in FASTER:
        size = blocks[0] + blocks[1], blocks[2]
        window = {"band_lower": 1 - 2 * MIN_KEYS}
        masks: list[dict[str, Any]] = [
            {}, {"kv_start": True, "kv_end": True}, {"causal": False}, window, {"key_mask": True},
            {"q_ids": True, "kv_ids": True, "empty_rows": "mean"},
        ]  # fmt: skip
        for features in ({**mask, "sinks": True} for mask in masks):
            assert launch(*size, **features).kernel.__name__ == KERNEL
        assert launch(*size, torch.float16).kernel.__name__ == KERNEL
        others: list[dict[str, Any]] = [
            {"q_len": 256, "kv_len": 256}, {"kv_len": MIN_KEYS // 2}, {"band_lower": -63}, {"attn_bias": True},
            {"attn_mask": True}, {"dropout_p": 0.1}, {"alibi_slopes": True}, {"tuning": Tuning(arch="sm90", tma=False)},
            {"tuning": Tuning(arch="sm90", num_splits=1)},
        ]  # fmt: skip
        for features in others:
            assert launch(*size, **features).kernel.__name__ == "attention_forward_kernel", features
        assert launch(size[0] - 8, size[1]).kernel.__name__ == "attention_forward_kernel"
        assert launch(*size, torch.float32).kernel.__name__ == "attention_forward_kernel"
        # Only a bfloat16 result may take the cap's fast tanh.
        assert launch(*size, torch.float16, soft_cap=30.0).kernel.__name__ == "attention_forward_kernel"


def test_padding_and_ids_come_with_a_table_of_ranges() -> None:
    """And a mean for empty rows with launches of its own."""
    masks = {"key_mask": True, "q_ids": True, "kv_ids": True, "empty_rows": "mean_added"}
    launches = aot_launches.launches("sm90", HALF, 128, 128, **LONG, **masks)
    assert list(launches) == ["mask_ranges_kernel", KERNEL, "values_sum_kernel", "empty_rows_kernel"]
    table, main, *_ = launches.values()
    assert main.arguments["ranges"] is table.arguments["ranges"]
    blocks = main.arguments["BLOCK_N"], 128
    assert (table.arguments["BLOCK_N"], table.arguments["BLOCK_M"]) == blocks
    assert table.arguments["ranges"].shape == (8192 // 128, 4)
    off = Tuning(arch="sm90", ranged=False)
    assert list(aot_launches.launches("sm90", HALF, 128, 128, **LONG, **masks, tuning=off)) == [
        "attention_forward_kernel"
    ]


@pytest.mark.parametrize("tuning", [None, Tuning(arch="sm90", opaque=True), Tuning(arch="sm90", traced=True)])
def test_chosen_from_so_many_products_on(tuning: Tuning | None) -> None:
    """Whoever launches it. An opaque call of forward.py's kernel makes no descriptors for so few, this one does."""
    assert TILES.keys() == FASTER.keys()
    for blocks, least in FASTER.items():
        size = blocks[0] + blocks[1], blocks[2]
        heads = math.ceil(least / (2048 * 2048 * sum(size)))
        for count, name in ((heads, KERNEL), (heads - 1, "attention_forward_kernel")):
            sizes = {"num_heads": count, "num_kv_heads": count, "q_len": 2048, "kv_len": 2048}
            assert launch(*size, **sizes, tuning=tuning).kernel.__name__ == name, (blocks, sizes)


def test_polynomial_only_where_it_is_faster() -> None:
    shifts = {
        (size, cap): launch(size, size, soft_cap=cap).arguments["SHIFT"] for size in (128, 256) for cap in (10.0, 50.0)
    }
    assert [key for key, shift in shifts.items() if shift == CAP_SERIES.value] == [(128, 50.0)]
    assert {shift for key, shift in shifts.items() if key != (128, 50.0)} == {NO_MAX.value}
    # The polynomial's loop has one piece of the head dimension, whoever asks for it.
    series = replace(FORCED, shift=CAP_SERIES.value)
    for size in ((64, 64), (192, 128), (256, 256)):
        assert launch(*size, soft_cap=50.0, tuning=series).arguments["SHIFT"] == NO_MAX.value
    for tuning in ({}, {"tuning": replace(series, ranged=True)}):
        found = aot_launches.launches("sm90", HALF, 128, 128, **LONG, soft_cap=50.0, key_mask=True, **tuning)
        assert found[KERNEL].arguments["SHIFT"] == NO_MAX.value


def test_other_gpus_have_no_such_kernel() -> None:
    for arch in ("gfx942", "sm80", "sm120"):
        (found,) = aot_launches.launches(arch, HALF, 192, 128, **LONG).values()
        assert found.kernel.__name__ == "attention_forward_kernel"
