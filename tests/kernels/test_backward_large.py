"""The backward of large heads for Hopper: which calls take it, what it compiles to, and that its two kernels agree.

Its results need the GPU: tests/gpu/test_backward_large.py.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from rocm_attn_compile.kernels.triton import aot, aot_launches, aot_mla, backward_large_launch, traced
from rocm_attn_compile.kernels.triton.launch import Launch

KERNELS = ["backward_large_kernel", "backward_large_dq_kernel"]
LONG = {"arch": "sm90", "dtype": torch.bfloat16, "head_dim": 256, "q_len": 8192, "kv_len": 8192}
LATENT = {"head_dim": 192, "v_head_dim": 128}


@pytest.mark.parametrize(
    "features",
    [
        {}, {"causal": False}, {"band_lower": -1023}, {"sinks": True}, {"soft_cap": 30.0}, LATENT,
        {"dtype": torch.float16, "head_dim": 240, "v_head_dim": 232}, {**LATENT, "head_dim": 176},
    ],
    ids=str,
)  # fmt: skip
def test_long_calls_take_it(features):
    found = aot_launches.launches(**{**LONG, **features})
    assert [name for name in found if "backward" in name] == ["backward_rows_kernel", *KERNELS]
    with pytest.raises(traced.StaysOpaque, match="Gluon"):
        traced.trace(list(found.values()), {}, SimpleNamespace())


@pytest.mark.parametrize(
    "features",
    [
        {"q_len": 1024, "kv_len": 1024}, {"head_dim": 192}, {"head_dim": 256, "v_head_dim": 128},
        {"dtype": torch.float32}, {"arch": "sm100"}, {"arch": "gfx942"}, {"dtype": torch.float16, "soft_cap": 30.0},
        {"dropout_p": 0.1}, {"q_len": 8190},
        {"q_len": 65536, "kv_len": 65536, "batch": 1, "num_heads": 4},
        *({name: True} for name in ("attn_bias", "attn_mask", "alibi_slopes")),
    ],
    ids=str,
)  # fmt: skip
def test_others_keep_the_kernels_for_each_gradient(features):
    found = aot_launches.launches(**{**LONG, **features})
    assert not set(KERNELS) & set(found)
    assert {"backward_dkdv_kernel", "backward_dq_kernel"} <= set(found)


@pytest.mark.parametrize(
    "features", [{"key_mask": True}, {"kv_start": True, **LATENT}, {"q_ids": True, "kv_ids": True}], ids=str
)
def test_masks_in_tensors_are_read_beforehand(features):
    found = aot_launches.launches(**{**LONG, **features})
    assert "mask_ranges_kernel" in found and list(found)[-3:] == ["key_ranges_kernel", *KERNELS]
    by_key = found["key_ranges_kernel"].arguments
    assert found[KERNELS[0]].arguments["key_ranges"] is by_key["key_ranges"]
    assert by_key["key_ranges"].shape == (2 * 8192 // 64, 4)
    assert found[KERNELS[1]].arguments["ranges"] is by_key["ranges"] and found[KERNELS[1]].arguments["RANGED"]
    assert by_key["ranges"].shape == (2 * 8192 // 128, 4)


def test_latent_attention_takes_it_in_pieces():
    found = aot_mla.launches("sm90", torch.bfloat16, 16, q_len=8192, kv_len=8192, absorbed=False, backward=True)
    assert set(KERNELS) <= set(found)
    assert found[KERNELS[0]].arguments["ROPE"] == found[KERNELS[1]].arguments["ROPE"] == 64


@pytest.mark.parametrize("features", [{}, {"band_lower": -1023}, {"q_len": 20000, "kv_len": 5000}], ids=str)
def test_memory_of_ds_is_bounded(features, monkeypatch):
    """Some heads at a time, or some queries of one: each once, and one kernel at once after the other."""
    seen: list[Launch] = []

    def planned(*fields):
        seen.append(Launch(*fields))
        return seen[-1]

    monkeypatch.setattr(backward_large_launch, "Launch", planned)
    sizes = {**LONG, **features}
    aot_launches.launches(**sizes, batch=3, num_heads=12, num_kv_heads=4)
    tiles = -(-sizes["q_len"] // 128)
    assert [one.kernel.__name__ for one in seen] == KERNELS * (len(seen) // 2)
    for main, final in zip(seen[::2], seen[1::2]):
        given = main.arguments
        heads, here = given["head_count"], given["last_tile"] - given["first_tile"]
        assert all(given[name] == final.arguments[name] for name in ("first_head", "head_count", "first_tile",
                                                                    "last_tile", "row_tiles"))  # fmt: skip
        ds = given["ds"].base
        assert ds is final.arguments["ds"].base
        assert heads * 3 * here * given["row_tiles"] * 64 <= ds.shape[0]
        assert ds.numel() * 2 <= max(backward_large_launch.MAX_BYTES, 3 * 12 * sizes["q_len"] * 256 * 4)
        assert (main.grid, final.grid) == (heads * -(-sizes["kv_len"] // 64), heads * 3 * here)
        assert (given["IS_FIRST"], given["IS_LAST"]) == (given["last_tile"] == tiles, given["first_tile"] == 0)
        assert main.arguments["part"].numel() >= (here < tiles) * heads * sizes["kv_len"] * 512
    done = [
        (one.arguments["first_head"] + head, tile)
        for one in seen[::2]
        for head in range(one.arguments["head_count"])
        for tile in range(one.arguments["first_tile"], one.arguments["last_tile"])
    ]
    assert sorted(done) == list(itertools.product(range(12), range(tiles)))
    assert len(seen) > 2


@pytest.mark.parametrize(("q_len", "kv_len"), [(700, 700), (129, 640), (1000, 65), (128, 128)])
def test_both_kernels_walk_over_the_same_tiles(q_len, kv_len, monkeypatch):
    """What one reads of ds the other has written, and no two tiles of a row of them lie in the same place."""
    from rocm_attn_compile.kernels.triton import backward_large, backward_large_dq

    python = SimpleNamespace(minimum=min, maximum=max, cdiv=lambda a, b: -(-a // b))
    for module, name in ((backward_large, "gl"), (backward_large_dq, "tl")):
        monkeypatch.setattr(module, name, python)
        for constant in ("KEYS", "TILE_M"):
            monkeypatch.setattr(module, constant, getattr(module, constant).value)
    bounds = [None, -500, -130, -64, -63, -1, 0, 1, 63, 64, 127, 128, 300]
    for lower, upper in itertools.product(bounds, bounds):
        has = lower is not None, upper is not None
        written = {
            (tile, block)
            for block in range(-(-kv_len // 64))
            for tile in range(*backward_large.query_range.fn(block * 64, q_len, lower, upper, *has))
        }
        read = {
            (tile, block)
            for tile in range(-(-q_len // 128))
            for block in range(*backward_large_dq.key_range.fn(tile * 128, kv_len, lower, upper, *has))
        }
        assert read == written
        visible = {
            (q // 128, k // 64)
            for q, k in itertools.product(range(q_len), range(kv_len))
            if (lower is None or k - q >= lower) and (upper is None or k - q <= upper)
        } if (q_len, kv_len) == (129, 640) else set()  # fmt: skip
        assert visible <= read
        arguments = {"k": torch.empty(1, 1, kv_len, 1), "HAS_LOWER": has[0], "HAS_UPPER": has[1],
                     "band_lower": lower, "band_upper": upper}  # fmt: skip
        for last_tile in range(1, -(-q_len // 128) + 1):
            row_tiles = backward_large_launch.tiles_of_row(arguments, last_tile)
            before = [(tile, block) for tile, block in read if tile < last_tile]
            assert len({(tile, block % row_tiles) for tile, block in before}) == len(before)


@pytest.mark.parametrize("features", [{"band_lower": -1023}, LATENT, {"soft_cap": 30.0}], ids=str)
def test_machine_code(features):
    """The products of warp groups with nothing between that makes them wait, and no spills."""
    found = aot_launches.launches(**{**LONG, **features})
    compiled = aot.compile_launch(found[KERNELS[0]], "sm90")
    assert compiled.asm["ptx"].count("wgmma.mma_async") >= 52
    assert "USETMAXREG" in compiled.asm["sass"]
    assert "STL" not in compiled.asm["sass"]
    assert compiled.metadata.shared <= 227 * 1024
    compiled = aot.compile_launch(found[KERNELS[1]], "sm90")
    assert compiled.asm["ptx"].count("wgmma.mma_async") >= 4
    assert "STL" not in compiled.asm["sass"]
    assert compiled.metadata.shared <= 227 * 1024


def test_a_group_unpacks_what_the_other_packs():
    """backward_large.unpack is the inverse of pack."""
    tile = torch.arange(64 * 64).view(64, 64)
    packed = tile.reshape(4, 2, 8, 4, 2, 4, 2).permute(3, 0, 2, 5, 1, 4, 6).reshape(512, 8)
    found = packed.reshape(4, 4, 8, 4, 2, 2, 2).permute(1, 4, 2, 0, 5, 3, 6).reshape(64, 64)
    assert torch.equal(found, tile)
