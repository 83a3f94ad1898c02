"""The one backward kernel for Hopper: which calls take it, and that it compiles to what its speed rests on.

Its results need the GPU: tests/gpu/test_backward_hopper.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from rocm_attn_compile.kernels.triton import aot, aot_launches, backward_hopper_launch, backward_launch, configs, traced

KERNEL, FINISH = "backward_hopper_kernel", "backward_finish_kernel"
LONG = {"arch": "sm90", "dtype": torch.bfloat16, "head_dim": 128, "q_len": 8192, "kv_len": 8192}


@pytest.mark.parametrize(
    "features",
    [
        {},
        {"causal": False},
        {"band_lower": -1023},
        {"sinks": True},
        {"soft_cap": 30.0},
        {"dtype": torch.float16, "v_head_dim": 112},
        {"head_dim": 64},
        {"head_dim": 40, "v_head_dim": 56, "band_lower": -1023},
    ],
    ids=str,
)
def test_long_calls_take_it(features):
    found = aot_launches.launches(**{**LONG, **features})
    assert [name for name in found if "backward" in name] == ["backward_rows_kernel", KERNEL, FINISH]
    with pytest.raises(traced.StaysOpaque, match="Gluon"):
        traced.trace(list(found.values()), {}, SimpleNamespace())


HEADS = "it takes 16-bit heads of at most 64, or of 97 to 128 numbers"
MASKS = "it knows no mask with a number a pair, no bias and no dropout"
CAPS = "of soft caps it knows the one by NVIDIA's tanh instruction, for bfloat16"
ROWS = "rows of row statistics do not start at multiples of 16 bytes, as the copy engine needs them"
HOPPER = "written for Hopper, in Gluon, which is experimental, as two releases of Triton have it"


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        ({"q_len": 1024, "kv_len": 1024}, "short, so that the host's time counts"),
        ({"head_dim": 80}, HEADS), ({"head_dim": 96}, HEADS), ({"head_dim": 192}, HEADS), ({"arch": "sm100"}, HOPPER),
        ({"dtype": torch.float16, "soft_cap": 30.0}, CAPS), ({"dropout_p": 0.1}, MASKS), ({"q_len": 8190}, ROWS),
        *(({name: True}, MASKS) for name in ("attn_bias", "attn_mask", "alibi_slopes")),
        ({"dtype": torch.float32}, HEADS), ({"arch": "gfx942"}, HOPPER),
    ],
    ids=str,
)  # fmt: skip
def test_others_keep_the_kernels_for_each_gradient(features, reason, monkeypatch):
    reasons = []

    def refusal(*arguments):
        reasons.append(backward_hopper_launch.refusal(*arguments))
        return reasons[-1]

    monkeypatch.setattr(backward_launch, "refusal", refusal)
    found = aot_launches.launches(**{**LONG, **features})
    assert reasons == [reason]
    assert KERNEL not in found
    assert {"backward_dkdv_kernel", "backward_dq_kernel"} <= set(found)


@pytest.mark.parametrize(
    "features",
    [{"key_mask": True}, {"kv_start": True}, {"kv_end": True, "causal": False}, {"q_ids": True, "kv_ids": True}],
    ids=str,
)
@pytest.mark.parametrize(("head_dim", "rows"), [(128, 64), (64, 128)])
def test_masks_in_tensors_are_read_beforehand(features, head_dim, rows):
    found = aot_launches.launches(**{**LONG, **features, "head_dim": head_dim})
    assert "mask_ranges_kernel" in found and list(found)[-3:] == ["key_ranges_kernel", KERNEL, FINISH]
    main, by_key = found[KERNEL].arguments, found["key_ranges_kernel"].arguments
    assert main["ranges"] is by_key["ranges"] and main["ranges"].shape == (2 * 8192 // rows, 4)
    assert main["key_ranges"] is by_key["key_ranges"] and main["key_ranges"].shape == (2 * 8192 // 128, 4)


@pytest.mark.parametrize("mode", ["mean", "mean_added", "nan", "nan_added"])
def test_rows_without_keys_are_added_afterwards(mode):
    found = aot_launches.launches(**{**LONG, "key_mask": True, "empty_rows": mode})
    has_ds = mode.endswith("added")
    assert list(found)[-2 - has_ds :] == [FINISH, "backward_dkdv_kernel"] + ["backward_dq_kernel"] * has_ds
    dkdv = found["backward_dkdv_kernel"]
    assert dkdv.arguments["ONLY_EMPTY"] and dkdv.arguments["WANT_DV"] and dkdv.arguments["WANT_DK"] == has_ds
    assert not dkdv.arguments["RANGED"] and not dkdv.direction
    if mode in ("mean", "nan_added"):
        for name in list(found)[-1 - has_ds :]:
            assert aot.compile_launch(found[name], "sm90").asm["cubin"]


def test_programs_of_a_head_have_ascending_numbers():
    """A program waits for lower numbers only, so each head's blocks of keys must be dealt out in ascending order."""
    launch = aot_launches.launches(**LONG)[KERNEL]
    heads, blocks = 2 * 2, 8192 // 128
    assert launch.grid == heads * blocks
    at_once = launch.arguments["heads_at_once"]
    seen: dict[int, list[int]] = {head: [] for head in range(heads)}
    for number in range(launch.grid):
        first = number // (at_once * blocks) * at_once
        count = min(at_once, heads - first)
        rest = number - first * blocks
        seen[first + rest % count].append(rest // count)
    assert all(order == list(range(blocks)) for order in seen.values())


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({}, 4),
        ({"head_dim": 64}, 4),
        ({"head_dim": 64, "num_kv_heads": 32}, 8),
        ({"head_dim": 64, "num_kv_heads": 32, "causal": False}, 4),
    ],
    ids=str,
)
def test_half_of_a_heads_programs_run_at_once_or_a_quarter(features, expected, monkeypatch):
    heads_at_once = configs.backward_heads_at_once
    monkeypatch.setattr(
        configs, "backward_heads_at_once", lambda heads, blocks, _, share: heads_at_once(heads, blocks, 132, share)
    )
    found = aot_launches.launches(**{**LONG, "num_heads": 32, "num_kv_heads": 8, **features})[KERNEL]
    assert found.arguments["heads_at_once"] == expected


@pytest.mark.parametrize(
    ("features", "spills", "loads"),
    [
        ({"band_lower": -1023}, 0, 0),
        ({"causal": False}, 1, 0),
        ({"soft_cap": 30.0}, 1, 0),
        ({"key_mask": True}, 1, 0),
        pytest.param({"kv_start": True}, 0, 0, marks=pytest.mark.slow),
        pytest.param({"q_ids": True, "kv_ids": True}, 1, 0, marks=pytest.mark.slow),
        ({"kv_start": True, "kv_end": True}, 20, 3),
        ({"head_dim": 64}, 20, 2),
        ({"head_dim": 64, "band_lower": -1023}, 22, 2),
        pytest.param({"head_dim": 64, "key_mask": True}, 24, 5, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_machine_code(features, spills, loads):
    """The products of warp groups, dq added by the copy engine, and registers moved between the roles.

    Where a role does not get by with its registers, ptxas ignores what the roles ask for, and everything spills. No
    product waits for its descriptor to be moved into uniform registers. What is spilled is stored once, before the
    loop, and a step of both groups loads so many registers.
    """
    compiled = aot.compile_launch(aot_launches.launches(**{**LONG, **features})[KERNEL], "sm90")
    ptx, sass = compiled.asm["ptx"], compiled.asm["sass"]
    assert ptx.count("wgmma.mma_async") > 80
    assert ptx.count("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add") == 2
    assert "USETMAXREG" in sass
    assert sass.count("STL") <= spills
    loops = main_loops(sass)
    assert not any("STL" in loop for loop in loops) and sum(loop.count("LDL") for loop in loops) <= loads
    assert len(loops) == 2 and all(loop.count("R2UR") <= 2 for loop in loops)
    assert compiled.metadata.shared <= 227 * 1024


def main_loops(sass):
    """The code of the two groups' loops: from a label to a branch back to it, with all 32 products of a step."""
    lines = sass.splitlines()
    labels = {line[:-1]: at for at, line in enumerate(lines) if line.endswith(":")}
    targets = [
        (labels.get(line.split("BRA ")[1].strip(" ;"), at), at) for at, line in enumerate(lines) if "BRA " in line
    ]
    loops = ["\n".join(lines[first:last]) for first, last in targets if first < last]
    return [loop for loop in loops if loop.count("HGMMA") == 32]


@pytest.mark.parametrize("width", [64, 128])
def test_finish_reads_what_the_roles_pack(width):
    """backward_finish_kernel's order is the inverse of backward_hopper_parts.pack, for each of a block's two tiles."""
    tile = torch.arange(64 * 128).view(-1, width)
    halves = tile.split(64, dim=width // 128)
    packed = [half.reshape(4, 2, 8, 8, 4, 2).permute(3, 0, 2, 4, 1, 5).reshape(-1) for half in halves]
    found = torch.cat(packed).view(2, 8, 4, 8, 4, 2, 2)
    order = (2, 5, 3, 0, 1, 4, 6) if width == 128 else (0, 2, 5, 3, 1, 4, 6)
    assert torch.equal(found.permute(order).reshape(tile.shape), tile)
