"""Additive masks: fills, sums, factors, and what must stay a bias; results that stay opaque say why."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from mask_harness import B, Captured, H, K, Q, Recorded, assert_exact, context_of, emitted_mask, parts_of

from rocm_attn_compile.recognize.mask import (
    Addend,
    AdditiveMask,
    ClosedForm,
    MaskContext,
    OpaqueMask,
    absorbs,
    is_hard,
    mask_in_words,
    prove_additive,
    prove_additive_sum,
    prove_drop,
    prove_keep,
    prove_zero_one,
)

INFINITY = float("inf")
X, Y = torch.zeros(7, 2), torch.zeros(9, 2)
PADDING = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0], [1] * 9])


def tril(x, y):
    return torch.ones(x.shape[0], y.shape[0]).tril()


@pytest.mark.parametrize(
    ("fill", "dtype", "hard"),
    [
        (-INFINITY, torch.float16, True),
        (-INFINITY, torch.float64, True),
        (torch.finfo(torch.float32).min, torch.float32, True),
        (torch.finfo(torch.bfloat16).min, torch.bfloat16, True),
        (torch.finfo(torch.bfloat16).min, torch.float32, True),
        (torch.finfo(torch.float16).min, torch.float16, True),
        (torch.finfo(torch.float16).min, torch.float32, False),
        (-1e9, torch.float32, True),
        (-1e9, torch.bfloat16, True),
        (-1e9, torch.float64, True),
        (-1e4, torch.float32, False),
        (-1e4, torch.float16, False),
        (-33000.0, torch.float16, True),
        (-1e8, torch.float32, False),
        (0.0, torch.float32, False),
        (1e30, torch.float32, False),
    ],
)
def test_hard_fills(fill, dtype, hard):
    assert is_hard(fill, dtype) == hard


@pytest.mark.parametrize(
    ("fill", "dtype", "absorbing"),
    [
        (-INFINITY, torch.float32, True),
        (torch.finfo(torch.float32).min, torch.float32, True),
        (torch.finfo(torch.bfloat16).min, torch.bfloat16, True),
        (
            torch.finfo(torch.float16).min,
            torch.float16,
            True,
        ),  # neighbours are 32 apart: scores below 16 do not survive
        (-60000.0, torch.float16, False),
        (-1e9, torch.float32, False),  # 64 apart
        (-1e9, torch.bfloat16, True),  # 4194304 apart
        (-1e30, torch.float32, True),
        (-1e30, torch.float64, True),
        (torch.finfo(torch.float64).min, torch.float64, True),
        (torch.finfo(torch.float64).max, torch.float64, True),
        (-(2.0**45), torch.float32, True),  # the next number towards zero is 2**21 away
        (-(2.0**44) - 2**22, torch.float32, True),
        (-(2.0**44), torch.float32, False),  # 2**20 away
        (-1e9, torch.float64, False),
        (0.0, torch.float32, False),
    ],
)
def test_absorbing_fills(fill, dtype, absorbing):
    assert absorbs(fill, dtype) == absorbing
    scores = torch.linspace(1 - 2.0**20, 2.0**20 - 1, 1001, dtype=torch.float64).to(dtype)
    if absorbing and dtype != torch.float16:
        rounded = torch.tensor(fill, dtype=torch.float64).to(dtype)
        assert bool((scores + rounded == rounded).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fill_is_the_number_that_really_arrives(dtype):
    captured = Recorded(lambda x, y: ((1.0 - tril(x, y)) * torch.finfo(torch.float32).min).to(dtype), X, Y)
    result = prove_additive(captured.value, *context_of(captured))
    assert isinstance(result, AdditiveMask)
    # finfo(float32).min is too large for the half types: the cast makes it -inf.
    assert result.fill == (torch.finfo(torch.float32).min if dtype == torch.float32 else -INFINITY)
    assert_exact(result.keep, captured, captured.real == 0)


def test_two_masks_added_have_several_fills():
    def mask(x, y, padding):
        lowest = torch.finfo(torch.float32).min
        causal = (1.0 - tril(x, y)) * lowest
        return causal + torch.where(padding[:, None, None, :] == 0, lowest, 0.0)

    captured = Recorded(mask, X, Y, PADDING)
    result = prove_additive(captured.value, *context_of(captured))
    assert isinstance(result, AdditiveMask)
    assert result.fill is None
    assert {number for number, _ in result.fills} == {torch.finfo(torch.float32).min, -INFINITY}
    assert parts_of(result.keep) == {"band", "key"}
    assert_exact(result.keep, captured, captured.real == 0)


def test_a_sum_of_mask_and_bias_comes_apart():
    def mask(x, y, bias, padding):
        return torch.where(tril(x, y).bool(), 0.0, -1e9) + (bias + (1.0 - padding[:, None, None, :].float()) * -1e4)

    captured = Recorded(mask, X, Y, torch.randn(1, 4, 7, 9), PADDING)
    parts = prove_additive_sum(captured.value, *context_of(captured))
    masks = [part for part in parts if isinstance(part, AdditiveMask)]
    biases = [part for part in parts if isinstance(part, Addend)]
    assert [(mask.fill, mask_in_words(mask.keep)) for mask in masks] == [(-1e9, "causal (top-left)")]
    assert [part.reason.code for part in biases] == ["bias_not_mask", "bias_not_mask"]
    assert [tuple(part.value.shape) for part in biases] == [(1, 4, 7, 9), (2, 1, 1, 9)]
    total = torch.where(emitted_mask(masks[0].keep, captured), 0.0, -1e9)
    total = total + sum(captured.tensor(part.value) for part in biases)
    assert torch.allclose(total.expand_as(captured.real), captured.real)


@pytest.mark.parametrize(
    "bias",
    [
        lambda x, y: (torch.arange(9)[None] - torch.arange(7)[:, None]).float(),  # ALiBi's slope 1
        lambda x, y: torch.where(tril(x, y).bool(), 0.0, 5.0),  # a positive "fill" prefers those keys
        lambda x, y: tril(x, y) * math.nan,
        lambda x, y: tril(x, y).bool().float(),  # a bool mask added by mistake
    ],
)
def test_what_is_no_mask_stays_a_bias(bias):
    captured = Recorded(bias, X, Y)
    result = prove_additive(captured.value, *context_of(captured))
    assert isinstance(result, OpaqueMask)
    assert result.reason.code == "bias_not_mask"


def test_zero_times_infinity_is_not_taken_for_zero():
    captured = Recorded(lambda x, y: (1.0 - tril(x, y)) * -INFINITY, X, Y)
    assert captured.real.isnan().any()
    result = prove_additive(captured.value, *context_of(captured))
    assert isinstance(result, OpaqueMask)


def test_factors_must_be_zero_or_one():
    captured = Recorded(tril, X, Y)
    form = prove_zero_one(captured.value, *context_of(captured))
    assert isinstance(form, ClosedForm)
    assert form.band_upper == 0
    doubled = Recorded(lambda x, y: tril(x, y) * 2, X, Y)
    assert prove_zero_one(doubled.value, *context_of(doubled)).reason.code == "mask_not_zero_one"
    loaded = Recorded(lambda x, y, p: p[:, None, None, :].expand(2, 1, 7, 9).clone(), X, Y, PADDING)
    assert prove_zero_one(loaded.value, *context_of(loaded)).reason.code == "mask_not_zero_one"


def test_keep_and_drop_are_opposites():
    captured = Recorded(lambda x, y: tril(x, y).bool(), X, Y)
    keep, drop = (f(captured.value, *context_of(captured)) for f in (prove_keep, prove_drop))
    assert (keep.band_lower, keep.band_upper) == (None, 0)
    assert (drop.band_lower, drop.band_upper) == (1, None)


def test_a_registered_buffer_is_opaque():
    captured = Captured(
        lambda x, y, buffer: buffer[:, :, : x.shape[0], : y.shape[0]] == 0, X, Y, torch.ones(1, 1, 12, 12)
    )
    result = prove_drop(captured.value, *context_of(captured))
    assert isinstance(result, OpaqueMask)
    assert result.reason.code == "mask_op_opaque"
    captured = Captured(lambda x, y, buffer: buffer[:7, :9], X, Y, torch.ones(12, 12, dtype=torch.bool))
    result = prove_keep(captured.value, *context_of(captured))
    assert result.reason.code == "mask_is_input"


def test_a_mask_that_differs_between_heads_stays_dense():
    def mask(x, y):
        q, k, h = torch.arange(7)[:, None], torch.arange(9), torch.arange(4)[:, None, None]
        return (k <= q) & (k > q - h - 1)

    captured = Recorded(mask, X, Y)
    form = prove_keep(captured.value, *context_of(captured))
    assert isinstance(form, ClosedForm)
    assert form.band_upper == 0
    assert [note.code for note in form.notes] == ["mask_per_head"]
    assert_exact(form, captured, captured.real)


def test_random_contents_are_opaque():
    captured = Captured(lambda x, y: torch.sin(x[:, :1] * y[:, 0]) > 0, X, Y)
    result = prove_keep(captured.value, *context_of(captured))
    assert result.reason.code == "mask_op_opaque"


def test_merged_batch_and_heads_are_taken_apart():
    """nn.MultiheadAttention's key_padding_mask: expanded to heads and viewed as (batch * heads, 1, kv_len)."""
    heads = 4

    def mask(x, y, padding):
        return (padding == 0).view(2, 1, 1, 9).expand(-1, heads, -1, -1).reshape(2 * heads, 1, 9)

    captured = Recorded(mask, X, Y, PADDING)
    two, four = sympy.Integer(2), sympy.Integer(heads)
    context = MaskContext(Q, K, sympy.Integer(7), sympy.Integer(9), {B: two}, {H: four})
    form = prove_drop(captured.value, [B * heads + H, sympy.Integer(0), K], context)
    assert isinstance(form, ClosedForm)
    assert parts_of(form) == {"key"}
    assert torch.equal(emitted_mask(form, captured), (PADDING != 0)[:, None, None, :].expand(2, 1, 7, 9))


def test_several_batch_symbols_become_one_dimension():
    """Windows: batch and window number are both batch for the op."""
    window = sympy.Symbol("w", integer=True, nonnegative=True)

    def mask(x, y, keep):
        return keep[:, :, None, :].expand(2, 3, 7, 9).clone()

    keep = torch.rand(2, 3, 9) < 0.5
    captured = Recorded(mask, X, Y, keep)
    sizes = {B: sympy.Integer(2), window: sympy.Integer(3)}
    context = MaskContext(Q, K, sympy.Integer(7), sympy.Integer(9), sizes, {})
    form = prove_keep(captured.value, [B, window, Q, K], context)
    assert parts_of(form) == {"key"}
    assert torch.equal(emitted_mask(form, captured), keep.view(6, 1, 1, 9).expand(6, 1, 7, 9))


WORDS = {
    "causal": lambda q, k: k <= q,
    "causal, window 3": lambda q, k: (k <= q) & (k > q - 3),
    "window |q - k| <= 2": lambda q, k: (k - q).abs() <= 2,
    "k - q <= 2": lambda q, k: k <= q + 2,
    "k - q >= -1": lambda q, k: k >= q - 1,
    "causal, key range per row": lambda q, k: (k <= q) & (k // 4 == q // 4),
    "key limit": lambda q, k: (k < 5) & (q >= 0),
    "first key": lambda q, k: (k > 1) & (q >= 0),
    "none": lambda q, k: k + q >= 0,
    "every key masked": lambda q, k: k + q < 0,
}


@pytest.mark.parametrize("words", WORDS)
def test_words(words):
    captured = Recorded(lambda x: WORDS[words](torch.arange(8)[:, None], torch.arange(8)[None]), X)
    assert mask_in_words(prove_keep(captured.value, *context_of(captured))) == words


def test_words_name_the_alignment():
    def causal(offset):
        return lambda x, y: torch.arange(9)[None] <= torch.arange(7)[:, None] + offset

    for offset, words in ((0, "causal (top-left)"), (2, "causal (bottom-right)")):
        captured = Recorded(causal(offset), X, Y)
        assert mask_in_words(prove_keep(captured.value, *context_of(captured))) == words
