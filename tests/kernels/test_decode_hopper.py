"""Hopper's decode kernel of float8 caches: which calls take it, and that its loop needs no shared memory.

Its results need the GPU: tests/gpu/test_decode_hopper.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from test_forward_hopper import machine_code

from rocm_attn_compile.kernels.triton import aot_launches, decode_hopper, decode_hopper_launch, traced
from rocm_attn_compile.kernels.triton.launch import Launch

KERNEL = "decode_hopper_kernel"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DECODE = {
    "arch": "sm90", "dtype": torch.bfloat16, "head_dim": 128, "q_len": 1, "kv_len": 8192, "causal": False,
    "backward": False, "kv_dtype": E4M3, "scale": True,
}  # fmt: skip


def launches(**features: Any) -> dict[str, Launch]:
    return aot_launches.launches(**{**DECODE, **features})


@pytest.mark.parametrize(
    "features",
    [
        {}, {"head_dim": 64}, {"kv_dtype": E5M2, "dtype": torch.float16}, {"q_len": 4},
        {"page": 16, "kv_end": True},
        {"kv_start": True, "kv_end": True, "sinks": True}, {"causal": True, "empty_rows": "nan"}, {"num_splits": 1},
    ],
    ids=str,
)  # fmt: skip
def test_decode_takes_it(features: dict[str, Any]) -> None:
    """With the sum of the splits behind it; Inductor does not launch it."""
    found = launches(**features)
    assert list(found) == [KERNEL] + ["attention_combine_kernel"] * ("num_splits" not in features)
    with pytest.raises(traced.StaysOpaque, match="Gluon"):
        traced.trace(list(found.values()), {}, SimpleNamespace())


@pytest.mark.parametrize(
    "features",
    [
        {"kv_dtype": torch.bfloat16, "scale": False}, {"head_dim": 256}, {"head_dim": 80}, {"v_head_dim": 64},
        {"q_len": 5}, {"soft_cap": 30.0}, {"key_mask": True}, {"attn_bias": True}, {"alibi_slopes": True},
        {"empty_rows": "mean"}, {"num_splits": 32}, {"arch": "sm89"}, {"arch": "gfx942"}, {"num_heads": 64},
    ],
    ids=str,
)  # fmt: skip
def test_others_keep_the_kernel_of_all(features: dict[str, Any]) -> None:
    assert "attention_forward_kernel" in launches(**features)


def test_columns_are_in_the_order_of_registers() -> None:
    """What the kernel computes for queries and for the result is what it does to keys and values."""
    for size in decode_hopper_launch.TILES:
        for width in size:
            at = torch.arange(width)
            side = 4 * decode_hopper.vector(width // 4, 4)
            keys = at.reshape(-1, 4, side // 2, 2).permute(0, 2, 1, 3).reshape(width)
            half = side // 2
            assert torch.equal(((at // (8 * half) * 4 + at // 2 % 4) * half + at // 8 % half) * 2 + at % 2, keys)
            side = 4 * decode_hopper.vector(width // 4, 8)
            values = at.reshape(-1, 8, side).permute(0, 2, 1).reshape(width)
            assert torch.equal((at // (8 * side) * 8 + at % 8) * side + at // 8 % side, values)
    assert decode_hopper.ROWS.value == decode_hopper_launch.ROWS


@pytest.mark.parametrize(
    "features",
    [
        {},
        {"head_dim": 64, "kv_dtype": E5M2},
        {"page": 16, "kv_end": True, "q_len": 4},
    ],
    ids=str,
)
def test_machine_code(features: dict[str, Any], tmp_path: Path) -> None:
    """No spills; in the loop products, loads of 16 bytes (values of 64 columns: 8), and neither shared memory nor
    barriers."""
    told, code = machine_code(launches(**features)[KERNEL], tmp_path)
    assert "0 bytes spill stores" in told, told
    loop = max(_loops(code), key=lambda text: text.count("HMMA"))
    size = features.get("head_dim", 128)
    tile = decode_hopper_launch.TILES[size, size]
    assert loop.count("HMMA") == 2 * (tile.keys // 8) * (size // 16)
    wide = len(re.findall(r"LDG\.E(\.EF)?\.128", loop)) + len(re.findall(r"LDG\.E(\.EF)?\.64", loop)) // 2
    assert wide == 2 * tile.keys * size // (32 * 16)
    assert not re.search(r"\b(LDS|STS|LDSM|BAR|LDL|STL)\b", loop)


def _loops(code: str) -> list[str]:
    """What lies between a label and each jump back to it."""
    lines = code.splitlines()
    labels = {line.strip()[1:-1]: at for at, line in enumerate(lines) if re.match(r"\.L_x_\d+:$", line.strip())}
    jumps = ((at, re.search(r"BRA.*`\(\.(L_x_\d+)\)", line)) for at, line in enumerate(lines))
    return ["\n".join(lines[labels[jump[1]] : at]) for at, jump in jumps if jump and labels.get(jump[1], at) < at]
