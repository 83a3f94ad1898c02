"""`options={"verify": True}`: what is right stays rewritten, what a defect of ours makes wrong is refused."""

from __future__ import annotations

import math

import pytest
import torch
from pipeline_harness import SCALE, B, M, causal, check, codes, rand, sites, square
from recorder import Recorder
from spellings import SPELLINGS, inputs_of

import rocm_attn_compile
from rocm_attn_compile.rewrite import replace
from rocm_attn_compile.rewrite.masks import MaskArguments


def padded(q, k, v, attention_mask):
    bias = (1.0 - attention_mask[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    return (q @ k.mT * SCALE + bias).masked_fill(~causal(M), -math.inf).softmax(-1) @ v


def make_padded():
    return (*square(), torch.ones(B, M, dtype=torch.long))


def biased(q, k, v, bias):
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


def make_biased():
    return (*square(), rand(M, M))


CHECKED = [
    "llama_repeat_kv",
    "gpt_oss_sinks",
    "mla_two_products",
    "sdpa_bool_mask",
    "t5_relative_bias",
    "two_dimensional",
]


@pytest.mark.parametrize(("dtype", "trains", "dynamic"), [(torch.float32, True, None), (torch.bfloat16, False, True)])
@pytest.mark.parametrize("name", CHECKED)
def test_what_is_right_stays(name, dtype, trains, dynamic):
    spelling, recorder = SPELLINGS[name], Recorder(lowering="eager", verify=True)
    torch.compile(spelling.function, backend=recorder, dynamic=dynamic)(*inputs_of(spelling, dtype, dtype, trains))
    assert recorder.calls == 1, rocm_attn_compile.reports()[-1]


def test_a_cache_that_is_written_and_dropout():
    def step(q, k, v, cache, position):
        cache.index_copy_(2, position, k)
        p = torch.nn.functional.dropout((q @ cache.mT * SCALE).softmax(-1), 0.25)
        return p @ torch.cat([v, v[:, :, :1]], 2)

    recorder = Recorder(lowering="eager", verify=True)
    torch.compile(step, backend=recorder)(*square(), rand(B, 3, M + 1, 8), torch.arange(M))
    assert recorder.calls == 1, rocm_attn_compile.reports()[-1]


def test_the_users_random_numbers_are_not_touched():
    def drop_randomly(q, k, v):
        return (q @ k.mT * SCALE).masked_fill(torch.rand(M, M) < 0.3, -math.inf).softmax(-1) @ v

    inputs = square()
    recorder = Recorder(lowering="eager", verify=True)
    torch.manual_seed(5)
    got = torch.compile(drop_randomly, backend=recorder)(*inputs)
    torch.manual_seed(5)
    torch.testing.assert_close(got, drop_randomly(*inputs), equal_nan=True)
    assert recorder.calls == 1, rocm_attn_compile.reports()[-1]


def _without_masks(monkeypatch):
    monkeypatch.setattr(replace, "emit_masks", lambda builder, region: MaskArguments())


def _band_off_by_one(monkeypatch):
    emit = replace.emit_masks

    def emit_masks(builder, region):
        masks = emit(builder, region)
        masks.band_upper = masks.band_upper + 1
        return masks

    monkeypatch.setattr(replace, "emit_masks", emit_masks)


def _bias_detached(monkeypatch):
    """Only the gradient is wrong."""
    emit = replace.emit_bias

    def emit_bias(builder, region):
        return builder.call(torch.ops.aten.detach.default, emit(builder, region))

    monkeypatch.setattr(replace, "emit_bias", emit_bias)


def _lengths_reversed(monkeypatch):
    emit = replace.Rewriter._operand

    def emit_operand(self, builder, operand, groups, dtype):
        node = emit(self, builder, operand, groups, dtype)
        return builder.call(torch.ops.aten.flip.default, node, [2])

    monkeypatch.setattr(replace.Rewriter, "_operand", emit_operand)


@pytest.mark.parametrize(
    ("break_it", "function", "make", "trains"),
    [
        (_without_masks, padded, make_padded, False),
        (_band_off_by_one, padded, make_padded, False),
        (_bias_detached, biased, make_biased, True),
        (_lengths_reversed, padded, make_padded, False),
    ],
)
def test_a_defect_is_found_and_the_site_left_alone(monkeypatch, break_it, function, make, trains):
    break_it(monkeypatch)
    # With everything as passed the padding mask masks nothing: an adversarial one has to show the first defect.
    check(function, make, calls=0, refused="verify_failed", trains=trains, verify=True)
    assert "off by" in sites()[0].reasons[0].text or "finite" in sites()[0].reasons[0].text


def test_sizes_that_depend_on_data_cannot_be_verified():
    def function(q, k, v, keep):
        k, v = k[:, :, keep.nonzero()[:, 0]], v[:, :, keep.nonzero()[:, 0]]
        return (q @ k.mT).softmax(-1) @ v

    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    try:
        recorder = Recorder(lowering="eager", verify=True)
        torch.compile(function, backend=recorder)(*square(), torch.arange(M) < 4)
    finally:
        torch._dynamo.config.capture_dynamic_output_shape_ops = False
    assert recorder.calls == 0
    assert "verify_impossible" in codes()
