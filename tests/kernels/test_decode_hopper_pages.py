"""Hopper's decode kernel of paged caches: which calls take it and with which tile, and what it is compiled to.

Its results need the GPU: tests/gpu/test_decode_hopper_pages.py.
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

from rocm_attn_compile.kernels.triton import aot_launches, decode_hopper_pages_launch, traced
from rocm_attn_compile.kernels.triton.launch import Launch, Tuning

KERNEL = "decode_hopper_pages_kernel"
DECODE = {
    "arch": "sm90", "dtype": torch.bfloat16, "head_dim": 128, "q_len": 1, "kv_len": 8192, "causal": False,
    "backward": False, "page": 16, "kv_end": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an H200 has."""
    monkeypatch.setattr("rocm_attn_compile.kernels.triton.forward_launch.device_arch", lambda device: ("sm90", 132))


def launches(**features: Any) -> dict[str, Launch]:
    return aot_launches.launches(**{**DECODE, **features})


@pytest.mark.parametrize(
    "features",
    [
        {}, {"head_dim": 64}, {"head_dim": 256, "q_len": 8}, {"dtype": torch.float16}, {"q_len": 16},
        {"page": 48, "kv_len": 8208}, {"kv_start": True, "sinks": True, "empty_rows": "mean"},
        {"causal": True, "empty_rows": "nan"},
        {"band_lower": -100, "q_len": 2}, {"num_splits": 1},
    ],
    ids=str,
)  # fmt: skip
def test_decode_takes_it(features: dict[str, Any]) -> None:
    """With the sum of the splits behind it, which starts early; Inductor does not launch it."""
    found = launches(**features)
    assert list(found) == [KERNEL] + ["attention_combine_kernel"] * ("num_splits" not in features)
    if "num_splits" not in features:
        combine = found["attention_combine_kernel"]
        assert combine.options["launch_pdl"] and combine.arguments["WAITS"]
        assert combine.arguments["num_splits"] == found[KERNEL].arguments["num_splits"]
    with pytest.raises(traced.StaysOpaque, match="Gluon"):
        traced.trace(list(found.values()), {}, SimpleNamespace())


@pytest.mark.parametrize(
    "features",
    [
        {"page": None}, {"kv_dtype": torch.float8_e4m3fn, "soft_cap": 1.0}, {"head_dim": 80}, {"v_head_dim": 64},
        {"q_len": 17}, {"head_dim": 256, "q_len": 16}, {"soft_cap": 30.0}, {"key_mask": True}, {"attn_bias": True},
        {"alibi_slopes": True}, {"empty_rows": "mean"}, {"arch": "sm89"}, {"arch": "gfx942"},
        {"dtype": torch.float32}, {"kv_len": 1024},
        {"tuning": Tuning(arch="sm90", traced=True)}, {"tuning": Tuning(arch="sm90", tma=False)},
        {"head_dim": 64, "num_kv_heads": 1, "num_heads": 4},
    ],
    ids=str,
)  # fmt: skip
def test_others_keep_the_kernel_of_all(features: dict[str, Any]) -> None:
    assert "attention_forward_kernel" in launches(**features)


def test_a_cuda_graph_replays_it() -> None:
    assert KERNEL in launches(tuning=Tuning(arch="sm90", traced=True, replayed=True))


# Heads that a program takes at once, and shares of their keys: rows that were measured, see docs/kernels.md.
TILES = {
    (1, 32, 8, 2048, 128): (1, 16),
    (1, 32, 8, 32768, 128): (1, 16),
    (16, 32, 8, 4096, 128): (1, 1),
    (64, 32, 8, 8192, 128): (4, 1),
    (8, 64, 8, 16384, 128): (2, 4),
    (32, 32, 32, 4096, 64): (8, 1),
    (16, 8, 1, 8192, 256): (1, 8),
    (32, 64, 8, 8192, 128): (2, 1),
    (16, 28, 4, 8192, 128): (2, 4),
    (16, 32, 8, 8192, 64): (2, 2),
    (128, 32, 8, 1024, 128): (4, 1),
    (1, 32, 8, 2048, 64): (2, 16),
}


@pytest.mark.parametrize("sizes", TILES, ids=str)
def test_heads_and_shares(sizes: tuple[int, ...]) -> None:
    """Several heads where that needs no sum, or has long shares, or makes copies large enough."""
    batch, num_heads, num_kv_heads, kv_len, head_dim = sizes
    found = launches(batch=batch, num_heads=num_heads, num_kv_heads=num_kv_heads, kv_len=kv_len, head_dim=head_dim)
    arguments = found[KERNEL].arguments
    heads, shares = TILES[sizes]
    assert (arguments["HEADS"], arguments["num_splits"]) == (heads, shares)
    assert arguments["num_items"] == batch * num_kv_heads // heads * shares
    assert found[KERNEL].grid == arguments["num_programs"] == min(arguments["num_items"], 132)
    for cache in (arguments["k"], arguments["v"]):
        assert cache.block_shape == (1, heads, arguments["BOX"], head_dim)


def test_no_more_shares_than_blocks() -> None:
    found = launches(batch=1, num_heads=32, num_kv_heads=8, kv_len=2048, head_dim=64, page=64)
    arguments = found[KERNEL].arguments
    assert arguments["HEADS"] == 1 and arguments["num_splits"] == 2048 // arguments["BLOCK_N"] == 8


def test_shared_memory_fits() -> None:
    """Two of each in 227 KiB, or more: keys, values, weights and queries."""
    for (width, rows), (block_n, stages) in decode_hopper_pages_launch.STAGED.items():
        assert stages >= 2 and block_n % 64 == 0
        assert 2 * (2 * stages * block_n * width + rows * width + block_n * rows) <= 227 * 1024 - 256


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize(("head_dim", "q_len"), [(64, 1), (64, 8), (64, 16), (128, 1), (128, 16), (256, 1), (256, 8)])
@pytest.mark.parametrize("kv_heads", [1, 8])
def test_machine_code(kv_heads: int, head_dim: int, q_len: int, page: int, tmp_path: Path) -> None:
    """No spills in the loop, and next to none elsewhere; products of a warp group, and copies by descriptors alone."""
    tuning = Tuning(arch="sm90", in_flight=True, num_splits=1)
    sizes = {"head_dim": head_dim, "q_len": q_len, "num_heads": 4 * kv_heads, "num_kv_heads": kv_heads}
    launch = launches(**sizes, page=page, tuning=tuning)[KERNEL]
    arguments = launch.arguments
    assert (arguments["HEADS"] > 1) == (kv_heads > 1 and q_len == 1)
    told, code = machine_code(launch, tmp_path)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told)
    assert spilled, told
    assert max(map(int, spilled.groups())) <= 80
    lines = code.splitlines()
    products = [at for at, line in enumerate(lines) if f"HGMMA.64x{arguments['ROWS']}x16" in line]
    assert len(products) == 2 * arguments["BLOCK_N"] * head_dim // (64 * 16)
    assert not re.search(r"\b(LDL|STL)\b", "\n".join(lines[products[0] : products[-1]]))
    assert "UTMALDG.4D" in code and "LDGSTS" not in code
