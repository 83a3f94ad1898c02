"""Scores clamped to a range below their largest, and two softmaxes of the same scores (Grounding DINO)."""

from __future__ import annotations

import pytest
import torch

from rocm_attn_compile.testing import compile_and_capture


def make(dtype=torch.float64, image=11, text=7):
    torch.manual_seed(0)
    tensors = [torch.randn(6, n, 8, dtype=dtype).requires_grad_() for n in (image, text, image, text)]
    masks = [torch.rand(6, 1, n) < 0.3 for n in (image, text)]
    for mask in masks:
        mask[..., 0] = False
    return tensors, masks


def both_ways(lowest, highest):
    """As transformers' GroundingDinoBiMultiHeadAttention writes it."""

    def function(image, text, image_values, text_values, image_mask, text_mask):
        s = torch.bmm(image, text.transpose(1, 2))
        s = s - s.max()
        s = torch.clamp(s, min=lowest, max=highest)
        t = s.transpose(1, 2)
        t = t - torch.max(t, dim=-1, keepdim=True)[0]
        t = torch.clamp(t, min=lowest, max=highest)
        t.masked_fill_(image_mask, float("-inf"))
        s.masked_fill_(text_mask, float("-inf"))
        return torch.bmm(s.softmax(-1), text_values), torch.bmm(t.softmax(-1), image_values)

    return function


def gradients(results, tensors):
    weights = [torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view(r.shape) for r in results]
    return torch.autograd.grad(results, tensors, weights)


@pytest.mark.parametrize("sizes", [(11, 7), (8, 8)], ids=["", "equal"])
@pytest.mark.parametrize("lowest", [-50000, -2.5], ids=["far", "near"])
def test_both_directions_are_replaced_and_right(lowest, sizes):
    tensors, masks = make(image=sizes[0], text=sizes[1])
    function = both_ways(lowest, -lowest)
    compiled = compile_and_capture(function, *tensors, *masks, lowering="aot_eager")
    assert compiled.num_attention_calls == 2
    assert {site.data["score_floor"] for site in compiled.sites} == {lowest}
    want = function(*tensors, *masks)
    torch.testing.assert_close(compiled.result, want)
    torch.testing.assert_close(gradients(compiled.result, tensors), gradients(want, tensors))


def test_verify_agrees():
    tensors, masks = make()
    with torch.no_grad():
        compiled = compile_and_capture(both_ways(-50000, 50000), *tensors, *masks, options={"verify": True})
    assert compiled.num_attention_calls == 2


def test_one_direction_with_dynamic_lengths_and_inductor():
    def function(q, k, v):
        s = q @ k.mT * 0.3
        return (s - s.amax()).clamp(-50000, 50000).softmax(-1) @ v

    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 9, 9))
    compiled = compile_and_capture(function, q, k, v, dynamic=True, lowering="inductor")
    assert compiled.num_attention_calls == 1
    torch.testing.assert_close(compiled.result, function(q, k, v))


def one_way(steps):
    def function(q, k, v):
        return steps(q @ k.mT * 0.3).softmax(-1) @ v

    return function


REFUSED = {
    "no maximum": lambda s: s.clamp(-50000, 50000),
    "only a lowest number": lambda s: s.clamp(min=-50000),
    "a maximum of each row": lambda s: (s - s.amax(-1, keepdim=True)).clamp(-50000, 50000),
    "a maximum of each head": lambda s: (s - s.amax((-1, -2), keepdim=True)).clamp(min=-3.0),
    "cut off above": lambda s: (s - s.max()).clamp(-50000, -1.0),
    "raised to 0": lambda s: (s - s.max()).clamp(min=0.0),
    "a number in between": lambda s: (s - s.max() + 1.0).clamp(-50000, 50000),
    "after a mask": lambda s: (s - s.max()).masked_fill(s < 0, -torch.inf).clamp(-50000, 50000),
    "after a bias": lambda s: (s - s.max() + torch.arange(9.0)).clamp(-50000, 50000),
    "scaled afterwards": lambda s: (s - s.max()).clamp(-50000, 50000) * 0.5,
    "the maximum of something else": lambda s: (s - (2 * s).max()).clamp(-50000, 50000),
    "raised further": lambda s: _twice(s, -3.0, -2.0),
}


def _twice(s, first, second):
    s = (s - s.max()).clamp(min=first)
    return (s - s.amax(-1, keepdim=True)).clamp(min=second)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_such_clamp_is_left_alone(name):
    function, tensors = one_way(REFUSED[name]), [torch.randn(2, 3, n, 8) for n in (5, 9, 9)]
    compiled = compile_and_capture(function, *tensors)
    assert compiled.num_attention_calls == 0
    assert compiled.reason_codes & {"score_op", "after_clamp", "scores_used_elsewhere"}
    torch.testing.assert_close(compiled.result, function(*tensors), rtol=0, atol=0)


def _below_what_no_gradient_reaches(s):
    with torch.no_grad():
        largest = s.max()
    return (s - largest).clamp(min=-0.5)


@pytest.mark.parametrize(
    "steps",
    [lambda s: (s - s.max().detach()).clamp(-0.5, 0.5), _below_what_no_gradient_reaches],
    ids=["detach", "mode"],
)
def test_a_maximum_that_gets_no_gradient(steps):
    """Fuzz seeds 1001946, 1005247: the gradient of raised scores goes to the largest one, and here to nobody."""
    function, tensors = one_way(steps), [torch.randn(2, 3, n, 8).double().requires_grad_() for n in (5, 9, 9)]
    compiled = compile_and_capture(function, *tensors, lowering="aot_eager")
    assert compiled.num_attention_calls == 0
    assert "mixed_grad_mode" in compiled.reason_codes
    want = function(*tensors)
    torch.testing.assert_close(gradients([compiled.result], tensors), gradients([want], tensors))
    with torch.no_grad():
        compiled = compile_and_capture(function, *tensors)
    assert compiled.num_attention_calls == 1
    torch.testing.assert_close(compiled.result, want)


def test_a_clamp_that_does_nothing_is_seen_through():
    for steps in (
        lambda s: (s - s.amax(-1, keepdim=True)).clamp(max=0.5),
        lambda s: _twice(s, -3.0, -3.0),
    ):
        function, tensors = one_way(steps), [torch.randn(2, 3, n, 8).double() for n in (5, 9, 9)]
        compiled = compile_and_capture(function, *tensors)
        assert compiled.num_attention_calls == 1
        torch.testing.assert_close(compiled.result, function(*tensors))


def test_clamped_weights_are_left_alone():
    compiled = compile_and_capture(
        lambda q, k, v: (q @ k.mT).softmax(-1).clamp(-50000, 50000) @ v, *(torch.randn(2, 3, n, 8) for n in (5, 9, 9))
    )
    assert compiled.num_attention_calls == 0
    assert compiled.reason_codes == {"weights_changed"}


def test_half_of_two_attentions_is_left_alone_with_the_other():
    """Computing the scores for the softmax that stays would be all the work that the other saves."""

    def function(q, k, v, w):
        s = q @ k.mT
        t = (s.mT * w).softmax(-1)
        return s.softmax(-1) @ v, t + 1

    tensors = [torch.randn(2, 3, n, 8) for n in (5, 9, 9)]
    compiled = compile_and_capture(function, *tensors, torch.randn(9, 5))
    assert compiled.num_attention_calls == 0
    assert "scores_used_elsewhere" in compiled.reason_codes
