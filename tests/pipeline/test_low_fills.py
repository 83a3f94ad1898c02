"""Fills that become -inf on their way to the softmax, and rows in which a float tensor masks what a fill left over."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pipeline_harness import SCALE, B, H, M, Pipeline, causal, check, rand, sites, square


def dropped(lengths=(0, 4)):
    """True for keys that are padding; nothing is left of the first sequence."""
    return torch.arange(M) >= torch.tensor(lengths)[:, None, None, None]


def fill_doubled(q, k, v):
    return ((q @ k.mT).masked_fill(dropped(), torch.finfo(q.dtype).min) * 2).softmax(-1) @ v


def fill_cast(q, k, v):
    return (q @ k.mT).masked_fill(dropped(), torch.finfo(q.dtype).min).bfloat16().softmax(-1).to(v.dtype) @ v


def fill_in_float16(q, k, v):
    q, k, v = q.half(), k.half(), v.half()
    return torch.where(dropped(), -1e9, q @ k.mT * SCALE).softmax(-1) @ v


def fill_tensor_in_float16(q, k, v):
    q, k, v = q.half(), k.half(), v.half()
    fill = torch.full([], -1e9).half()
    return torch.where(dropped(), fill, q @ k.mT * SCALE).softmax(-1) @ v


@pytest.mark.parametrize("function", [fill_doubled, fill_cast, fill_in_float16, fill_tensor_in_float16])
def test_fill_that_overflows_gives_nan_rows(function):
    check(function, square, calls=1, rounds_to=torch.bfloat16)
    assert sites()[0].data["mask"]["empty_rows"] == "nan"


def test_scale_of_lower_precision_is_rounded_as_eager_rounds_it():
    check(lambda q, k, v: ((q @ k.mT) * torch.tensor(0.3, dtype=torch.bfloat16)).softmax(-1) @ v, square, calls=1)
    assert math.isclose(sites()[0].data["softmax_scale"], float(torch.tensor(0.3, dtype=torch.bfloat16)))


def test_bias_that_overflows_in_a_cast_gives_nan_rows():
    def function(q, k, v, bias):
        return (q @ k.mT + bias).half().softmax(-1).to(v.dtype) @ v

    masked = lambda: (*square(), torch.zeros(B, 1, 1, M).masked_fill(dropped(), -1e9))  # noqa: E731
    check(function, masked, calls=1, rounds_to=torch.half)


def left_padding(fill):
    """Float mask of an input, for two sequences of which the first has three padded positions at its left."""
    return torch.zeros(B, 1, 1, M).masked_fill(torch.arange(M) < torch.tensor([3, 0])[:, None, None, None], fill)


def filled_then_added(q, k, v, bias):
    return (torch.where(causal(M), q @ k.mT, torch.finfo(q.dtype).min) + bias).softmax(-1) @ v


def added_then_filled(q, k, v, bias):
    return (q @ k.mT + bias).masked_fill(~causal(M), torch.finfo(q.dtype).min).softmax(-1) @ v


def both_added(q, k, v, bias):
    mask = torch.zeros(M, M, dtype=q.dtype).masked_fill(~causal(M), torch.finfo(q.dtype).min)
    return (q @ k.mT + mask + bias).softmax(-1) @ v


@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min], ids=["inf", "finfo_min"])
@pytest.mark.parametrize("function", [filled_then_added, added_then_filled, both_added])
def test_left_padded_rows_spread_over_the_future_as_in_eager(function, fill):
    """A class of miscompiles of the peer: nothing is left of a causal row but padding, which is as low as the fill."""
    check(function, lambda: (*square(), left_padding(fill)), calls=1, rounds_to=torch.float32)
    assert sites()[0].data["mask"]["band_upper"] is None


def test_left_padded_rows_by_an_integer_mask():
    def gpt2(q, k, v, attention_mask):
        lowest = torch.finfo(q.dtype).min
        scores = torch.where(causal(M), q @ k.mT * SCALE, lowest)
        return (scores + (1.0 - attention_mask[:, None, None, :].to(q.dtype)) * lowest).softmax(-1) @ v

    check(gpt2, lambda: (*square(), (left_padding(1.0)[:, 0, 0] == 0).long()), calls=1)


LOW = [
    lambda mask: (1 - mask.float()) * -1000000000,
    lambda mask: ((1 - mask) * -1000000000).float(),
    lambda mask: (-((1 - mask) << 31)).float(),
    lambda mask: (1 - mask.float()) * -1e4 * 1e4 * 1e4,
    lambda mask: -(((mask == 0) * 8.0) ** 10),
    lambda mask: (1 - mask) * torch.tensor([-1e9, -1e9, -1e9])[:, None, None],
]


@pytest.mark.parametrize("bias", LOW)
def test_integers_may_make_a_bias_as_low_as_a_fill(bias):
    """Each was taken for a moderate bias, no float in it being large; eager spreads the first rows over the future."""

    def function(q, k, v, attention_mask):
        scores = torch.where(causal(M), q @ k.mT * SCALE, -1e9)
        return (scores + bias(attention_mask[:, None, None, :])).softmax(-1) @ v

    inputs = lambda: (*square(), (left_padding(1.0)[:, 0, 0] == 0).long())  # noqa: E731
    check(function, inputs, calls=0, refused="bias_beside_finite_fill", rounds_to=torch.float32)


def test_a_number_of_an_input_times_an_integer_mask_may_be_low():
    """GPT-2 kept the fill in a buffer."""

    def function(q, k, v, attention_mask, fill):
        scores = torch.where(causal(M), q @ k.mT * SCALE, torch.finfo(q.dtype).min)
        return (scores + (1 - attention_mask[:, None, None, :]) * fill).softmax(-1) @ v

    fill = torch.tensor(torch.finfo(torch.float32).min)
    check(
        function,
        lambda: (*square(), (left_padding(1.0)[:, 0, 0] == 0).long(), fill),
        calls=1,
        rounds_to=torch.float32,
    )


def test_in_training_a_float_tensor_beside_a_finite_fill_is_refused():
    check(
        filled_then_added,
        lambda: (*square(), left_padding(-math.inf)),
        calls=0,
        refused="bias_beside_finite_fill",
        trains=True,
        rounds_to=torch.float32,
    )


def test_a_learned_bias_beside_a_finite_fill_leaves_the_mask_in_closed_form():
    table = torch.nn.Parameter(rand(H, M, M))

    def function(q, k, v):
        return (q @ k.mT + table.to(q.dtype)).masked_fill(~causal(M), torch.finfo(q.dtype).min).softmax(-1) @ v

    check(function, square, calls=1, trains=True)
    assert sites()[0].data["mask"]["band_upper"] == 0


def test_a_product_of_parameters_over_a_square_root_is_no_mask():
    """DeBERTa-v2 in training was refused: its divisor is the root of a number that is a tensor."""
    positions = torch.nn.Parameter(rand(H, M, 8))

    def function(q, k, v):
        scale = torch.sqrt(torch.tensor(q.shape[-1], dtype=torch.float) * 3).to(q.dtype)
        bias = (positions @ positions.mT).to(q.dtype) / scale
        return (q @ k.mT / scale + bias).masked_fill(dropped(), torch.finfo(q.dtype).min).softmax(-1) @ v

    check(function, square, calls=1, trains=True)
    assert sites()[0].data["mask"]["empty_rows"] == "mean"


@pytest.mark.parametrize("divisor", [lambda q: -1e-9, lambda q: -torch.sqrt(torch.tensor(1e-18)).to(q.dtype)])
def test_over_a_small_number_a_mask_may_be_as_low_as_a_fill(divisor):
    def function(q, k, v, keep):
        s = q @ k.mT + (1.0 - keep.to(q.dtype)).square() / divisor(q)
        return s.masked_fill(~causal(M), torch.finfo(q.dtype).min).softmax(-1) @ v

    check(
        function,
        lambda: (*square(), torch.arange(M) >= torch.tensor([3, 0])[:, None, None, None]),
        calls=0,
        refused="bias_beside_finite_fill",
        trains=True,
        rounds_to=torch.float32,
    )


def test_the_log_of_a_mask_may_be_as_low_as_a_fill():
    def function(q, k, v):
        below = torch.ones(M, M).tril(-1).to(q.dtype)
        return (q @ k.mT - (-below.log())).softmax(-1) @ v

    check(function, square, calls=1)
    assert sites()[0].data["mask"]["empty_rows"] == "nan_added"


def test_sdpa_with_a_finite_float_mask_is_uniform_where_all_is_masked():
    """SDPA's rows are 0 only where the mask is -inf."""

    def function(q, k, v):
        mask = torch.zeros(B, 1, 1, M, dtype=q.dtype).masked_fill(dropped(), torch.finfo(q.dtype).min)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    check(function, square, calls=1)
    assert sites()[0].data["mask"]["empty_rows"] == "mean_added"


def one_by_one(scores, mask, bias):
    return scores + mask + bias


def as_a_sum(scores, mask, bias):
    return scores + (mask + bias)


@pytest.mark.parametrize("add", [one_by_one, as_a_sum])
def test_narrow_biases_are_added_in_the_dtype_in_which_eager_adds_them(add):
    """Found by the fuzzer: float32's -1e9 keeps another bias when float64 scores are added first, and only then."""

    def attention(q, k, v, mask, bias):
        scores = add(q @ k.mT * SCALE, mask, bias)
        return scores.masked_fill(~causal(M), -math.inf).softmax(-1) @ v

    inputs = (*(t.double() for t in square()), torch.where(dropped(), -1e9, 0.0), torch.arange(M) * 0.5)
    pipeline = Pipeline("eager")
    got = torch.compile(attention, backend=pipeline)(*inputs)
    torch.testing.assert_close(got, attention(*inputs), rtol=1e-6, atol=1e-6)
    assert pipeline.calls == 1


def test_two_pairs_of_document_ids():
    first, second = torch.tensor([[0, 0, 1, 1, 1, 2]] * B), torch.tensor([[0, 1, 1, 1, 2, 2], [0] * M])

    def function(q, k, v, a, b):
        keep = (a[:, :, None] == a[:, None, :]) & (b[:, :, None] == b[:, None, :])
        return (q @ k.mT).masked_fill(~keep[:, None], -math.inf).softmax(-1) @ v

    check(function, lambda: (*square(), first, second), calls=1)


def write_result(q, k, v):
    out = (q @ k.mT).softmax(-1) @ v
    out += 1.0
    return out


def write_repeated_keys(q, k, v):
    keys = k * 1.5
    out = (q @ keys[:, :1].expand(B, H, M, k.shape[-1]).mT).softmax(-1) @ v
    keys.mul_(2.0)
    return out, keys


@pytest.mark.parametrize("function", [write_result, write_repeated_keys])
def test_what_autograd_saves_is_copied_if_it_is_written_later(function):
    check(function, square, calls=1, trains=True)


def float16_additive(q, k, v, keep):
    q, k, v = q.half(), k.half(), v.half()
    bias = torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, torch.finfo(q.dtype).min)
    return F.softmax(q @ k.mT * SCALE + bias, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def float16_float_mask(q, k, v, keep):
    """Two masks: the first stays a tensor, and the op adds it in float32, where -65504 absorbs nothing."""
    q, k, v = q.half(), k.half(), v.half()
    bias = torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, torch.finfo(q.dtype).min)
    return (q @ k.mT * SCALE + bias).masked_fill(~causal(M), -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("function", [float16_additive, float16_float_mask])
def test_the_lowest_float16_makes_rows_uniform(function):
    check(function, lambda: (*square(), ~dropped()), calls=1)


def test_a_learned_bias_beside_the_lowest_float16_keeps_its_gradient():
    def function(q, k, v, slopes, infinite, padding):
        q, k, v = q.half(), k.half(), v.half()
        s = q @ k.mT * SCALE + slopes.half() * torch.arange(M)
        s = s.masked_fill(infinite, -math.inf)
        return (s + torch.zeros(padding.shape, dtype=s.dtype).masked_fill(padding, torch.finfo(s.dtype).min)).softmax(
            -1
        ) @ v

    nothing = torch.zeros(B, 1, 1, M, dtype=torch.bool)
    inputs = lambda: (*square(), rand(H, 1, 1), nothing, dropped())  # noqa: E731
    check(function, inputs, calls=1, trains=True, rounds_to=torch.half)


def sdpa_filled(q, k, v, bias, keep):
    return F.scaled_dot_product_attention(q, k, v, bias.masked_fill(~keep, -math.inf))


def sdpa_chosen(q, k, v, bias, keep):
    return F.scaled_dot_product_attention(q, k, v, torch.where(keep, bias, -math.inf)[None])


def sdpa_summed(q, k, v, bias, keep):
    mask = torch.zeros(keep.shape, dtype=bias.dtype).masked_fill(~keep, -math.inf)
    return F.scaled_dot_product_attention(q, k, v, (bias + mask).expand(B, H, M, M))


def sdpa_filled_and_summed(q, k, v, bias, keep):
    return F.scaled_dot_product_attention(q, k, v, torch.where(keep, bias, -math.inf) + bias.sin())


@pytest.mark.parametrize("function", [sdpa_filled, sdpa_chosen, sdpa_summed, sdpa_filled_and_summed])
def test_the_mask_in_the_bias_of_sdpa_is_a_mask(function):
    """An empty row, the fourth, is 0 and has no gradient, however the mask comes in."""

    def make():
        keep = torch.ones(M, M, dtype=torch.bool).tril()
        keep[3] = False
        return (*square(), rand(H, M, M), keep)

    check(function, make, calls=1, trains=True)
    assert sites()[0].data["mask"]["has_attn_mask"] == (function in (sdpa_filled, sdpa_chosen))
