"""`attention_floored`: scores raised to a number below the largest of all, against eager code."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rocm_attn_compile.ops as ops
from rocm_attn_compile.ops import floored
from rocm_attn_compile.testing import assert_as_accurate_as_eager

SCALE = 0.3
FLOORS = [-5e4, -3.0, -1.0]


def inputs(dtype=torch.float64, has_bias=False):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    bias = torch.randn(1, 4, 5, 7) if has_bias else None
    key_mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0], [1, 0, 1, 1, 0, 1, 1]]).bool()
    tensors = [None if t is None else t.to(dtype).requires_grad_() for t in (q, k, v, bias)]
    return tensors, key_mask


def eager(q, k, v, bias, key_mask, score_floor):
    s = q @ k.repeat_interleave(2, 1).mT * SCALE
    s = torch.clamp(s - s.max(), min=score_floor)
    s = s if bias is None else s + bias
    return s.masked_fill(~key_mask[:, None, None], -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)


def floored_attention(q, k, v, bias, key_mask, score_floor):
    return ops.attention_floored(q, k, v, bias, None, key_mask, softmax_scale=SCALE, score_floor=score_floor)[0]


def with_gradients(function, tensors, key_mask, score_floor):
    out = function(*tensors, key_mask, score_floor)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, [t for t in tensors if t is not None], weight)]


@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("score_floor", FLOORS)
def test_result_and_gradients_are_those_of_eager(score_floor, has_bias):
    tensors, key_mask = inputs(has_bias=has_bias)
    got = with_gradients(floored_attention, tensors, key_mask, score_floor)
    torch.testing.assert_close(got, with_gradients(eager, tensors, key_mask, score_floor))
    is_floored = floored.is_floored(tensors[0], tensors[1], SCALE, score_floor)
    assert is_floored == (score_floor > -5e4), "both ways are to be tested"


@pytest.mark.parametrize("score_floor", FLOORS)
def test_as_exact_as_eager_in_half_precision(score_floor):
    tensors, key_mask = inputs(torch.bfloat16)
    wide = [t if t is None else t.detach().double().requires_grad_() for t in tensors]
    got = with_gradients(floored_attention, tensors, key_mask, score_floor)
    want = with_gradients(eager, tensors, key_mask, score_floor)
    assert_as_accurate_as_eager(got, want, with_gradients(eager, wide, key_mask, score_floor))


def test_a_number_that_is_none_is_everywhere_as_in_eager():
    (q, k, v, _), key_mask = inputs()
    q.data[1, 2, 3, 4] = float("nan")
    with torch.no_grad():
        assert floored_attention(q, k, v, None, key_mask, -5e4).isnan().all()
        assert eager(q, k, v, None, key_mask, -5e4).isnan().all()


def test_no_floor_is_needed_only_if_no_score_can_be_so_low():
    q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4)
    q[0, 0, 0, 0], k[0, 0, 1, 0], k[0, 0, 2, 0] = 10.0, 10.0, -10.0  # scores from -100 to 100
    assert floored.is_floored(q, k, 1.0, -199.0)
    assert not floored.is_floored(q, k, 1.0, -202.0)
    assert floored.is_floored(q, k, -2.0, -202.0)


@pytest.mark.parametrize("score_floor", [-5e4, -1.0])
def test_schema_fake_and_autograd_agree(score_floor):
    (q, k, v, bias), key_mask = inputs(has_bias=True)
    settings = {"softmax_scale": SCALE, "score_floor": score_floor}
    torch.library.opcheck(ops.attention_floored, (q, k, v, bias, None, key_mask), settings)


@pytest.mark.parametrize("score_floor", [-5e4, -1.0])
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (3, 1, 0, 2)])
def test_gradients_lie_as_their_fake_ones(score_floor, order):
    """A compiled program views them by the fake kernel's strides; where these were others, it crashed."""
    tensors, key_mask = inputs(torch.float32, has_bias=True)
    moved = [t.detach().permute(order).contiguous().permute(*map(order.index, range(4))) for t in tensors]
    settings = {"softmax_scale": SCALE, "score_floor": score_floor}
    out, lse = ops.attention_floored(*moved, None, key_mask, **settings)
    optionals = (moved[3], None, key_mask, *[None] * 7)
    args = (torch.ones_like(out), *moved[:3], *optionals, out, lse, SCALE, score_floor)
    args = (*args, None, None, 0.0, "nan", "", [True, True, True, True, False])
    got = floored.attention_floored_backward(*args)
    with FakeTensorMode() as mode:
        fake = floored.attention_floored_backward(
            *(mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args)
        )
    assert [grad.stride() for grad in got] == [grad.stride() for grad in fake]
    assert [grad.stride() for grad in got[:4]] == [tensor.stride() for tensor in moved]
    contiguous = [t.contiguous() if isinstance(t, torch.Tensor) else t for t in args]
    torch.testing.assert_close(got, floored.attention_floored_backward(*contiguous))


def test_each_slice_under_vmap_has_its_own_largest_score():
    (q, k, v, _), key_mask = inputs()
    queries = torch.stack([q, 3 * q]).detach()
    got = torch.vmap(lambda q: floored_attention(q, k, v, None, key_mask, -1.0))(queries)
    torch.testing.assert_close(got, torch.stack([eager(q, k, v, None, key_mask, -1.0) for q in queries]))


def test_a_floor_that_is_not_below_0_is_refused():
    (q, k, v, _), key_mask = inputs()
    with pytest.raises(ValueError, match="score_floor is 0"):
        floored_attention(q, k, v, None, key_mask, 0.0)
