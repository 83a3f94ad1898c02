"""Hopper's decode: which calls take which form, and that keys are asked for before queries are there.

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
from rocm_attn_compile.kernels.triton.launch import Descriptor, Launch, Tuning

DECODE = {
    "arch": "sm90", "dtype": torch.bfloat16, "head_dim": 128, "q_len": 1, "kv_len": 800, "causal": False,
    "backward": False, "batch": 1, "num_heads": 8, "num_kv_heads": 2, "num_splits": 2,
}  # fmt: skip


def launch(**features: Any) -> Launch:
    return aot_launches.launches(**{**DECODE, **features})["attention_forward_kernel"]


PAGES = {"page": 16, "kv_end": True, "tuning": Tuning(arch="sm90", traced=True, num_splits=2)}
"""Launched by Inductor, which cannot launch Hopper's own kernel."""
LONG = {"kv_len": 8192}  # so many scores that a CUDA graph reads through descriptors


@pytest.mark.parametrize(
    "features",
    [
        {}, {"num_splits": 1}, {"q_len": 4, "kv_end": True}, {"num_heads": 22, "q_len": 3, "num_splits": 1},
        {"soft_cap": 30.0}, {"head_dim": 64}, {"head_dim": 256}, {"num_splits": 3}, {"batch": 3},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("sizes", [{}, LONG], ids=["short", "long"])
def test_plain_heads(features: dict[str, Any], sizes: dict[str, Any]) -> None:
    found = launch(**features, **sizes).arguments
    assert found["MERGED"] and found["LATE_QUERIES"] and found["TMA"] == bool(sizes)
    assert found["ONE_TILE"] == (features.get("q_len") != 3)  # 11 heads of 3 queries are two tiles
    assert found["INTERLEAVED"] == (found["num_splits"] > 1)
    assert isinstance(found["k"], Descriptor) == isinstance(found["v"], Descriptor) == bool(sizes)
    assert isinstance(found["q"], torch.Tensor)


def test_descriptors_by_who_launches() -> None:
    """Inductor makes them in microseconds, a CUDA graph has them, and Triton's own launcher takes too long."""
    ways = {
        "graph": Tuning(arch="sm90"),
        "Inductor for a graph": Tuning(arch="sm90", traced=True, replayed=True),
        "Inductor": Tuning(arch="sm90", traced=True),
        "Triton": Tuning(arch="sm90", opaque=True),
    }
    found = {
        scores: [name for name, way in ways.items() if launch(tuning=way, kv_len=2**scores // 8).arguments["TMA"]]
        for scores in (15, 16, 19, 20, 27, 28)
    }
    graphs = list(ways)[:2]
    assert found == {15: [], 16: graphs, 19: graphs, 20: list(ways)[:3], 27: list(ways)[:3], 28: list(ways)}


@pytest.mark.parametrize(
    ("head_dim", "sizes", "tile"),
    [
        (128, {"num_splits": 2}, (64, 4)), (128, {"kv_len": 6000}, (128, 3)),
        (128, {**LONG, "num_splits": 2}, (128, 3)),
        (128, {**LONG, "num_splits": 8}, (128, 2)), (128, {**LONG, "num_splits": 7}, (128, 3)),
        (64, {"num_splits": 2}, (128, 4)), (64, {**LONG, "num_splits": 2}, (128, 4)), (64, {"kv_len": 6000}, (128, 2)),
        (64, {**LONG, "num_splits": 7}, (256, 3)), (64, {**LONG, "num_splits": 8}, (128, 2)),
        (256, {**LONG, "num_splits": 8}, (64, 3)),
    ],
    ids=str,
)  # fmt: skip
def test_tiles(head_dim: int, sizes: dict[str, Any], tile: tuple[int, int]) -> None:
    """Keys and stages by what a program reads. The meta device has room for four programs."""
    found = launch(head_dim=head_dim, **{"num_splits": 3, **sizes})
    assert (found.arguments["BLOCK_N"], found.options["num_stages"]) == tile


@pytest.mark.parametrize(
    ("head_dim", "sizes", "tile"),
    [
        (64, {}, (128, 5)), (64, {"batch": 2}, (128, 2)), (128, {}, (128, 5)), (128, {"batch": 2}, (128, 2)),
        (128, {"batch": 2, **LONG}, (128, 5)), (128, {"kv_len": 256, "batch": 2}, (128, 1)),
        (128, {"kv_len": 256}, (128, 1)),
    ],
    ids=str,
)  # fmt: skip
def test_tiles_of_pages(head_dim: int, sizes: dict[str, Any], tile: tuple[int, int]) -> None:
    """Much on its way in programs that all run at once, and short ones several on a multiprocessor."""
    found = launch(head_dim=head_dim, **PAGES, **sizes)
    assert (found.arguments["BLOCK_N"], found.options["num_stages"]) == tile


@pytest.mark.parametrize(
    "features",
    [
        {"head_dim": 96}, {"dtype": torch.float32}, PAGES, {"q_len": 512},
        {"arch": "gfx942"}, {"arch": "sm80"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("sizes", [{}, LONG], ids=["short", "long"])
def test_others_are_as_they_were(features: dict[str, Any], sizes: dict[str, Any]) -> None:
    """What was not measured, or not faster."""
    found = launch(**{**features, **sizes}).arguments
    assert not found["LATE_QUERIES"] and not found["ONE_TILE"]
    assert not found["INTERLEAVED"] or features.get("head_dim") == 96
    assert not found["TMA"] or features.get("q_len") == 512


@pytest.mark.parametrize("features", [{}, {"num_splits": 1}, {"kv_end": True, "key_mask": True}], ids=str)
@pytest.mark.parametrize("sizes", [{}, LONG, {"head_dim": 64, **LONG}], ids=["short", "long", "64"])
def test_keys_are_asked_for_before_queries(features: dict[str, Any], sizes: dict[str, Any], tmp_path: Path) -> None:
    """The first asynchronous copy of keys precedes whatever waits for the queries, and nothing spills."""
    told, code = machine_code(launch(**features, **sizes), tmp_path)
    assert "0 bytes spill stores" in told, told
    copies, stores = (
        [match.start() for match in re.finditer(pattern, code)] for pattern in (r"LDGSTS|UTMALDG", r"STS\.(?:64|128)")
    )
    assert copies[0] < min(stores)


def test_one_query_of_many_heads_lies_in_a_few_tiles() -> None:
    """71 heads of one key/value head, as Falcon 7B has them: three tiles, not 71 programs that read the same keys."""
    for arch in ("sm90", "gfx942"):
        sizes = {"batch": 1, "num_heads": 71, "num_kv_heads": 1, "q_len": 1, "kv_len": 4096, "num_splits": 2}
        launches = aot_launches.launches(arch, torch.bfloat16, 64, causal=False, backward=False, **sizes)
        main = launches["attention_forward_kernel"]
        assert (main.arguments["PACK"], main.arguments["BLOCK_M"], main.grid) == (71, 32, 3 * 2)
        assert not main.arguments["ONE_TILE"] and main.direction == "decode"
