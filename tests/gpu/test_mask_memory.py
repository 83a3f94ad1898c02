"""On a GPU a whole call, kernel included, needs no tensor over all pairs, whatever the mask is."""

from __future__ import annotations

import math

import pytest
import torch
from mask_cases import BIASES, MASKS, top_left
from pipeline_harness import Pipeline

from rocm_attn_compile.testing import assert_as_accurate_as_eager, peak_memory

pytestmark = pytest.mark.gpu

B, H, LENGTH, D = 2, 3, 8192, 64
"""As many rows and heads as the masks have; queries enough that no keys are split, whose parts would be memory."""
PAIRS = LENGTH * LENGTH


def peaks(attention, extra, dtype=torch.bfloat16) -> tuple[int, int]:
    q, k, v = (torch.randn(B, H, LENGTH, D, device="cuda", dtype=dtype) for _ in range(3))
    inputs = (q, k, v, None if extra is None else extra.cuda())
    pipeline = Pipeline("eager")
    compiled = torch.compile(attention, backend=pipeline, fullgraph=True)
    exact = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs]
    with torch.no_grad():
        assert_as_accurate_as_eager(compiled(*inputs), attention(*inputs), attention(*exact))
        assert pipeline.calls == 1
        return peak_memory(lambda: compiled(*inputs), "cuda"), peak_memory(lambda: attention(*inputs), "cuda")


@pytest.mark.parametrize("name", MASKS)
def test_no_mask_of_all_pairs_is_in_memory(name):
    keep, make = MASKS[name]

    def attention(q, k, v, extra):
        return (q @ k.mT * D**-0.5).masked_fill(~keep(q, k, extra), -math.inf).softmax(-1) @ v

    peak, eager = peaks(attention, make and make(LENGTH))
    assert eager > B * H * PAIRS * 2
    assert peak < PAIRS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["alibi", "alibi_of_keys", "alibi_in_both_directions"])
def test_alibi_is_one_number_per_head(name, dtype):
    bias, make = BIASES[name]

    def attention(q, k, v, extra):
        scores = q @ k.mT * D**-0.5 + bias(q, k, extra)
        if name != "alibi_in_both_directions":
            scores = scores.masked_fill(~top_left(q, k, None), -math.inf)
        return scores.softmax(-1) @ v

    peak, eager = peaks(attention, make(LENGTH), dtype)
    assert eager > B * H * PAIRS * dtype.itemsize
    assert peak < PAIRS
