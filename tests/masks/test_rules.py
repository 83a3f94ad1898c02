"""One program per evaluation rule: the element is exact at every index, and nothing was read that could be computed."""

from __future__ import annotations

import pytest
import torch
from mask_harness import Recorded, context_of, points, scalar

from rocm_attn_compile.recognize.mask import make_evaluator
from rocm_attn_compile.recognize.mask.rules import RULES

X = torch.zeros(6, 8)


def grid(x):
    return torch.arange(x.shape[0] * x.shape[1]).view(x.shape[0], x.shape[1])


PROGRAMS = {
    "arange_from_step": lambda x: torch.arange(3, 19, 2)[None].expand(6, 8).clone(),
    "arange_of_floats": lambda x: torch.arange(8, dtype=torch.float32)[None].expand(6, 8) * 3.0,
    "eye": lambda x: torch.eye(6, 8),
    "full_like": lambda x: torch.full_like(x, 3.0),
    "new_full": lambda x: x.new_full((6, 8), -1e9),
    "new_ones": lambda x: x.new_ones((6, 8), dtype=torch.bool).triu(1),
    "scalar_tensor": lambda x: torch.where(grid(x) % 5 == 0, torch.scalar_tensor(-2.5), 0.25),
    "zero": lambda x: torch.empty(6, 8).zero_(),
    "flatten_and_unflatten": lambda x: grid(x).flatten().unflatten(0, (2, 3, 8)).reshape(6, 8),
    "reshape_across": lambda x: grid(x).reshape(4, 12).t().reshape(6, 8),
    "reshape_with_ones": lambda x: grid(x).view(1, 6, 1, 8, 1).squeeze(),
    "unbind": lambda x: torch.stack(list(reversed(grid(x).unbind(1))), 1),
    "split": lambda x: torch.cat(list(reversed(grid(x).split(3, 1))), 1),
    "split_with_sizes": lambda x: torch.cat(list(reversed(grid(x).split([1, 2, 5], 1))), 1),
    "chunk": lambda x: torch.cat(list(reversed(grid(x).chunk(2, 0))), 0),
    "slice_of_negative_start": lambda x: torch.cat([grid(x)[-2:], grid(x)[:-2]]),
    "slice_with_step": lambda x: torch.cat([grid(x)[:, ::2], grid(x)[:, 1::2]], 1),
    "slice_start_before_the_front": lambda x: grid(x)[-100:, :],
    "select_negative": lambda x: grid(x)[-1][None] + grid(x)[:, -2][:, None],
    "stack_dim_1": lambda x: torch.stack([grid(x)[:, :4], grid(x)[:, 4:]], 1).view(6, 8),
    "repeat": lambda x: grid(x)[:2, :4].repeat(3, 2),
    "repeat_interleave": lambda x: grid(x)[:3].repeat_interleave(2, 0),
    "flip": lambda x: grid(x).flip(0, 1),
    "roll": lambda x: grid(x).roll((2, -3), (0, 1)),
    "unfold": lambda x: torch.arange(13).unfold(0, 8, 1),
    "pad_asymmetric": lambda x: torch.nn.functional.pad(grid(x), (2, -2, -1, 1), value=-7),
    "transposes": lambda x: grid(x).t().mT.transpose(0, 1).permute(1, 0),
    "movedim_of_five": lambda x: grid(x).view(2, 3, 2, 2, 2).permute(3, 0, 4, 1, 2).reshape(6, 8),
    "gather": lambda x: grid(x).gather(1, (grid(x) % 3)),
    "take_along_dim": lambda x: torch.take_along_dim(grid(x), grid(x) % 2, 0),
    "index_select": lambda x: grid(x).index_select(1, torch.arange(7, -1, -1)),
    "index_pair": lambda x: grid(x)[torch.arange(5, -1, -1)[:, None], torch.arange(8)[None]],
    "index_apart": lambda x: grid(x).view(6, 2, 4)[torch.arange(6) % 2, :, torch.arange(6) % 3].repeat(1, 4),
    "index_negative": lambda x: grid(x)[:, torch.arange(8) - 8],
    "cumsum_of_ones": lambda x: torch.ones(6, 8, dtype=torch.long).cumsum(1),
    "cumsum_of_rows": lambda x: torch.arange(6)[:, None].expand(6, 8).cumsum(1),
    "any_of_broadcast": lambda x: (torch.arange(6)[:, None] > 2).expand(6, 8).any(1, keepdim=True).expand(6, 8),
    "all_of_broadcast": lambda x: (torch.arange(6)[:, None] > 2).expand(6, 8).all(1)[:, None].expand(6, 8),
    "any_of_everything": lambda x: grid(x) + torch.ones(3, 3, dtype=torch.bool).any(),
    "copy": lambda x: torch.empty(6, 8).copy_(grid(x)[0]),
    "fill": lambda x: torch.empty(6, 8).fill_(torch.tensor(3.5)),
    "slice_scatter": lambda x: grid(x).slice_scatter(-grid(x)[:, :3], 1, 2, 8, 2),
    "select_scatter": lambda x: grid(x).select_scatter(-grid(x)[0], 0, -2),
    "index_put_rows": lambda x: grid(x).index_put((torch.arange(2) + 1,), torch.tensor(-1)),
    "index_put_block": lambda x: grid(x).index_put(
        (torch.arange(2)[:, None], torch.arange(3)[None] + 4), -grid(x)[:2, :3]
    ),
    "index_put_mask": lambda x: grid(x).index_put((grid(x) % 7 == 0,), torch.tensor(-1)),
    "write_through_transpose": lambda x: written(grid(x), lambda y: y.t()[2:4]),
    "write_through_view": lambda x: written(grid(x), lambda y: y.view(3, 2, 8)[:, 1, 3:]),
    "write_through_unsqueeze": lambda x: written(grid(x), lambda y: y[None].permute(2, 0, 1)[-3:, 0, ::2]),
    "masked_fill_with_tensor": lambda x: grid(x).masked_fill(grid(x) > 9, torch.tensor(4)),
    "logical_ops": lambda x: torch.logical_xor(grid(x) > 5, grid(x) % 2) | torch.logical_not(grid(x) % 3),
    "clamp_float": lambda x: (torch.arange(8.0)[None] - torch.arange(6.0)[:, None]).clamp(-1.0, 2.0),
    "sign_and_clamp": lambda x: torch.sign(grid(x) - 20) + (grid(x) - 30).clamp(min=0),
    "integer_maximum": lambda x: torch.maximum(grid(x), torch.tensor(7)) - torch.minimum(grid(x), torch.tensor(30)),
    "floor_division_by_negative": lambda x: torch.div(grid(x) - 20, -3, rounding_mode="floor"),
    "remainder_by_negative": lambda x: (grid(x) - 20) % -3,
    "int8_that_fits": lambda x: torch.arange(8, dtype=torch.int8)[None] - torch.arange(6, dtype=torch.int8)[:, None],
    "reciprocal_of_constants": lambda x: torch.where(grid(x) > 9, 4.0, 0.5).reciprocal().sqrt(),
    "exp_of_fill": lambda x: torch.exp(torch.where(grid(x) > 9, 0.0, float("-inf"))),
    "bool_arithmetic": lambda x: (grid(x) > 5) * (grid(x) < 30) + (grid(x) == 40),
    "nan_to_num": lambda x: torch.nan_to_num(torch.where(grid(x) > 9, 0.0, float("-inf")) * 0.0, nan=2.0),
}


def written(base, view):
    base = base.clone()  # a storage of its own, whose value after the write is what is returned
    view(base).fill_(-5)
    return base


@pytest.mark.parametrize("name", PROGRAMS)
def test_rule(name):
    captured = Recorded(PROGRAMS[name], X)
    index, context = context_of(captured)
    evaluator = make_evaluator(context)
    element = evaluator.at(captured.value, index)
    for env, at in points(captured, context):
        assert scalar(element, env, captured) == captured.real[at].item(), element
    assert not evaluator.unknown, evaluator.unknown


# What could round, wrap or depend on the device is read, not computed; it must still be exact.
READ = {
    "int8_that_wraps": lambda x: (torch.arange(6, dtype=torch.int8)[:, None] * 50) + torch.zeros(8, dtype=torch.int8),
    "uint8_below_zero": lambda x: torch.arange(6, dtype=torch.uint8)[:, None] - torch.arange(8, dtype=torch.uint8),
    "bfloat16_above_256": lambda x: (torch.arange(6)[:, None] * 100 + torch.arange(8)).to(torch.bfloat16),
    "true_division": lambda x: grid(x) / 3,
    "division_by_negative_zero": lambda x: torch.ones(6, 8) / (torch.zeros(6, 8) * (grid(x) - 9)),
    "exp_of_one": lambda x: torch.exp(torch.where(grid(x) > 9, 0.0, 1.0)),
    "cumsum_of_steps": lambda x: (grid(x) % 3 == 0).cumsum(1),
    "bits_of_floats": lambda x: torch.where(grid(x) > 9, 0.0, 1.0).view(torch.int32),
    "strided": lambda x: grid(x).clone().as_strided((6, 8), (1, 2)),
    "int64_overflow": lambda x: torch.arange(8)[None] + torch.full((6, 1), 2**63 - 1),
}


@pytest.mark.parametrize("name", READ)
def test_what_has_no_exact_rule_is_read(name):
    captured = Recorded(READ[name], X)
    index, context = context_of(captured)
    evaluator = make_evaluator(context)
    element = evaluator.at(captured.value, index)
    for env, at in points(captured, context):
        assert scalar(element, env, captured) == captured.real[at].item(), element
    assert evaluator.unknown


def test_every_rule_belongs_to_an_op():
    missing = [name for name in RULES if name != "view_scatter" and not hasattr(torch.ops.aten, name)]
    assert not missing
