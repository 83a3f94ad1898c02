"""Half-precision weights under the maximum of the first keys: where they do not hold, the tile is computed again."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from gcnsim.triton_launch import simulated_device

from rocm_attn_compile.kernels.triton import common, configs, forward_launch
from rocm_attn_compile.kernels.triton.attention import attention_forward

FIRST_BLOCK = configs.select("gfx942", "forward", 64, 2).block_n
BITS_PER_KEY = 8.0 * 1.4426950408889634
"""What a key's first element is worth in the test below, in powers of 2 of its weight."""


@pytest.mark.parametrize("case", ["one weight overflows", "all weights are tiny"])
def test_tile_is_computed_again(case: str) -> None:
    """2**20 above the first keys, more than float16 holds; and 2**20 below them, where they are masked: few bits left.

    Both are far within float32, so that the sums alone, as they are tested for bfloat16, show nothing.
    """
    generator = torch.Generator().manual_seed(0)
    q = torch.zeros(1, 1, 130, 64)
    q[..., 0] = 8.0
    k = torch.zeros(1, 1, 150, 64)
    k[..., 0] = torch.rand((150,), generator=generator) / 4
    start = 0
    if case == "one weight overflows":
        k[..., 2 * FIRST_BLOCK, 0] += 20 / BITS_PER_KEY
    else:
        start = FIRST_BLOCK // 2
        k[..., :start, 0] += 20 / BITS_PER_KEY
    v = torch.randn((1, 1, 150, 64), generator=generator)
    q, k, v = (x.half() for x in (q, k, v))
    kv_start = torch.full((1, 1), start, dtype=torch.int32)
    with simulated_device("gfx942") as device:
        out, lse = attention_forward(q, k, v, kv_start=kv_start, softmax_scale=1.0, empty_rows="zero")
    assert device.findings() == []
    assert device.runs[0].launch.arguments["SHIFT"] == common.FIRST_MAX.value
    scores = (q.double() @ k.double().mT)[..., start:]
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=0)
    want = scores.softmax(-1) @ v[..., start:, :].double()
    torch.testing.assert_close(out.double(), want, atol=2e-3, rtol=2e-3)


def test_only_amd_takes_it_in_float16() -> None:
    plain = {"HAS_BIAS": False, "HAS_ATTN_MASK": False, "logits_soft_cap": None, "HAS_ALIBI": False, "RAW": True,
             "HAS_KEY_MASK": False, "HAS_IDS": False, "softmax_scale": 1.0}  # fmt: skip
    found = {arch: forward_launch.feature(plain, torch.float16, arch) for arch in ("gfx942", "gfx1100", "sm90")}
    assert found == {"gfx942": "first", "gfx1100": "first", "sm90": ""}
