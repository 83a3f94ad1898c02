"""Hopper's decode where all programs run at once: which calls are such, and that keys are asked for before queries.

Results need the GPU: tests/gpu/test_decode.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from test_forward_hopper import machine_code

from rocm_attn_compile.kernels.triton import aot_launches
from rocm_attn_compile.kernels.triton.launch import Launch, device_arch

DECODE = {
    "arch": "sm90", "dtype": torch.bfloat16, "head_dim": 128, "q_len": 1, "kv_len": 8192, "causal": False,
    "backward": False, "batch": 1, "num_heads": 8, "num_kv_heads": 2, "num_splits": 2,
}  # fmt: skip


def launch(**features: Any) -> Launch:
    return aot_launches.launches(**{**DECODE, **features})["attention_forward_kernel"]


@pytest.mark.parametrize(
    "features",
    [
        {}, {"num_splits": 1}, {"q_len": 4, "kv_end": True}, {"num_heads": 32, "q_len": 3, "num_splits": 1},
        {"soft_cap": 30.0},
    ],
    ids=str,
)  # fmt: skip
def test_one_wave(features: dict[str, Any]) -> None:
    found = launch(**features)
    assert found.grid <= device_arch(torch.device("meta"))[1]
    assert found.arguments["MERGED"] and found.arguments["LATE_QUERIES"]
    assert found.arguments["ONE_TILE"] == (features.get("q_len") != 3)  # 16 heads of 3 queries are two tiles


@pytest.mark.parametrize(
    "features",
    [
        {"num_splits": 4}, {"batch": 4}, {"head_dim": 64}, {"head_dim": 96}, {"head_dim": 256},
        {"dtype": torch.float32}, {"page": 16, "kv_end": True}, {"q_len": 512}, {"arch": "gfx942"}, {"arch": "sm80"},
    ],
    ids=str,
)  # fmt: skip
def test_others_are_as_they_were(features: dict[str, Any]) -> None:
    """What was not measured, or not faster."""
    found = launch(**features)
    assert not found.arguments["LATE_QUERIES"] and not found.arguments["ONE_TILE"]


@pytest.mark.parametrize("features", [{}, {"num_splits": 1}, {"kv_end": True, "key_mask": True}], ids=str)
def test_keys_are_asked_for_before_queries(features: dict[str, Any], tmp_path: Path) -> None:
    """The first asynchronous copy of keys precedes whatever waits for the queries, and nothing spills."""
    told, code = machine_code(launch(**features), tmp_path)
    assert "0 bytes spill stores" in told, told
    copies, stores, loads = (
        [match.start() for match in re.finditer(pattern, code)] for pattern in (r"LDGSTS", r"STS\.128", r"LDG\.E\.128")
    )
    assert len(loads) == 2, "the queries"
    assert copies[0] < min(stores) and sum(at < loads[0] for at in copies) >= 8, "keys of the first block"
