"""Weights cut to bfloat16 instead of rounded (common.truncate), on GPUs without an instruction that rounds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gcnsim.triton_launch import simulated_device

from rocm_attn_compile.kernels.triton import common
from rocm_attn_compile.kernels.triton.attention import attention_forward

SHARE = common.TRUNCATION.value


def cut(p: Tensor) -> Tensor:
    """What the kernel makes of weights p: made larger, cut, and in sums made larger once more, over the larger ones."""
    larger = p * torch.tensor(2.0).pow(common.TRUNCATION_LOG2.value)
    return (larger.view(torch.int32) >> 16 << 16).view(torch.float32)


def error(p: Tensor, rounded: Tensor) -> Tensor:
    """Of each weight, in units of its last place in bfloat16."""
    return (rounded.double() - p.double()) / torch.exp2(torch.floor(torch.log2(p.double())) - 7)


def test_constants() -> None:
    assert pytest.approx(common.TRUNCATION_LOG2.value, abs=1e-12) == math.log2(1 + SHARE)


def test_every_bfloat16_survives() -> None:
    """Among them 1: a row with one key gives its value, unchanged."""
    p = torch.arange(0x0080, 0x7F80).to(torch.int16).view(torch.bfloat16).float()
    assert torch.equal(cut(p), p)


def test_as_accurate_as_rounding() -> None:
    """Over a binade, logarithms uniform: no bias, and errors within the bounds that the docstring states."""
    p = torch.exp2(-torch.linspace(0, 4, 1_000_001)[1:])
    by_cutting, by_rounding = error(p, cut(p)), error(p, p.bfloat16().float())
    relative = (cut(p).double() - p.double()) / p.double()
    assert abs(relative.mean().item()) < 1e-3 * 2**-8
    assert by_cutting.abs().max().item() < 0.72
    assert by_cutting.square().mean().sqrt().item() < 1.08 * by_rounding.square().mean().sqrt().item()
    assert by_rounding.abs().max().item() > 0.49  # the comparison is one of equals


@pytest.mark.parametrize("masked", [False, True])
def test_equal_scores_are_exact(masked: bool) -> None:
    """Weights of 1, also where finfo.min was added to all scores: values that are all the same come out as they are."""
    q, k = torch.zeros(1, 1, 40, 64).bfloat16(), torch.randn(1, 1, 70, 64).bfloat16()
    v = torch.randn(1, 1, 1, 64).bfloat16().expand(1, 1, 70, 64).contiguous()
    bias = torch.full((1, 1, 40, 70), torch.finfo(torch.float32).min) if masked else None
    with simulated_device("gfx942"):
        out, _ = attention_forward(q, k, v, bias, softmax_scale=0.125, band_upper=30, empty_rows="zero")
    assert torch.equal(out, v[:, :, :40])
