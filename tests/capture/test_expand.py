"""Composites are spliced in as their parts, or left exactly as they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import nn
from torch.utils.checkpoint import checkpoint

from rocm_attn_compile.capture import expand
from rocm_attn_compile.capture.composites import COMPOSITES, transformer_encoder_layer


def close_to_eager(actual, eager, exact, factor=4):
    error, bound = (actual - exact).abs().max(), (eager - exact).abs().max()
    assert error <= factor * max(bound, torch.finfo(eager.dtype).eps), (error, bound)


def has_composites(graph_module):
    return any(node.target in COMPOSITES for node in graph_module.graph.nodes)


@pytest.fixture
def mha():
    return nn.MultiheadAttention(32, 4, batch_first=True)


@pytest.mark.parametrize("dynamic", [None, True])
def test_multi_head_attention_without_weights_becomes_sdpa(captured, mha, dynamic):
    x = torch.randn(2, 16, 32)
    seen = captured(lambda x: mha(x, x, x, need_weights=False)[0], x, expanded=True, dynamic=dynamic)
    assert seen.expansion.expanded == ["multi_head_attention_forward"] and not has_composites(seen.graph_module)
    assert seen.names.count("sdpa") == 1 and not seen.codes and seen.new_guards == []
    torch.testing.assert_close(seen.result, mha(x, x, x, need_weights=False)[0], rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [None, True])
def test_multi_head_attention_with_weights_and_padding(captured, mha, dynamic):
    def function(x, padding):
        out, weights = mha(x, x, x, key_padding_mask=padding)
        return out, weights

    x, padding = torch.randn(2, 16, 32), torch.zeros(2, 16, dtype=torch.bool)
    padding[0, 10:] = True
    seen = captured(function, x, padding, expanded=True, dynamic=dynamic)
    assert "_softmax" in seen.names and "mean" in seen.names and not seen.codes
    torch.testing.assert_close(seen.result, function(x, padding), rtol=0, atol=0)


def test_unused_weights_leave_no_dead_code(captured, mha):
    seen = captured(lambda x: mha(x, x, x)[0], torch.randn(2, 16, 32), expanded=True)
    assert "mean" not in seen.names
    assert all(node.users or node.op in ("output", "placeholder") for node in seen.graph_module.graph.nodes)


def test_gradients_flow_through_the_parts(captured, mha):
    x = torch.randn(2, 16, 32, requires_grad=True)
    seen = captured(lambda x: mha(x, x, x, need_weights=False)[0], x, expanded=True)
    (gradient,) = torch.autograd.grad(seen.result.pow(2).sum(), x)
    (expected,) = torch.autograd.grad(mha(x, x, x, need_weights=False)[0].pow(2).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


def test_dropout_in_training_stays_dropout(captured):
    mha = nn.MultiheadAttention(32, 4, dropout=0.25)
    seen = captured(lambda x: mha(x, x, x, need_weights=True)[0], torch.randn(16, 2, 32), expanded=True)
    assert seen.value("dropout").args[1:] == (0.25, True)


def test_parts_run_under_the_autocast_of_their_place(captured, mha):
    def function(x):
        with torch.autocast("cpu", torch.bfloat16):
            return mha(x, x, x, need_weights=False)[0]

    x = torch.randn(2, 16, 32)
    seen = captured(function, x, expanded=True)
    assert seen.expansion.expanded and seen.result.dtype == torch.bfloat16 and not seen.codes
    torch.testing.assert_close(seen.result, function(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("mask", "activation", "norm_first", "dynamic"),
    [
        ("none", "relu", False, None),
        ("none", "gelu", True, True),
        ("padding", "relu", True, None),
        ("attention", "gelu", False, None),
        ("both", "relu", False, True),
    ],
)
def test_encoder_layer_fast_path(captured, mask, activation, norm_first, dynamic):
    layer = nn.TransformerEncoderLayer(32, 4, 64, activation=activation, norm_first=norm_first, batch_first=True).eval()
    x, padding = torch.randn(2, 16, 32), torch.zeros(2, 16, dtype=torch.bool)
    padding[0, 10:] = True
    masks = {}
    if dynamic and Version(torch.__version__) < Version("2.13"):
        pytest.skip("Dynamo of torch before 2.13 cannot trace this layer with symbolic sizes")
    if mask in ("padding", "both"):
        masks["src_key_padding_mask"] = padding
    if mask in ("attention", "both"):
        masks["src_mask"] = torch.ones(16, 16, dtype=torch.bool).triu(1)

    def function(x, masks):
        return layer(x, **masks)

    with torch.no_grad():
        seen = captured(function, x, masks, expanded=True, dynamic=dynamic)
        eager = function(x, masks)
        exact = layer.double()(x.double(), **masks)
    assert seen.expansion.expanded == ["_transformer_encoder_layer_fwd"] and not seen.codes
    assert seen.names.count("sdpa" if mask == "none" else "_softmax") == 1
    close_to_eager(seen.result, eager, exact)


def test_encoder_layer_rows_without_keys_stay_nan():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x, padding = torch.randn(2, 16, 32), torch.zeros(2, 16, dtype=torch.bool)
    padding[1] = True
    attention, first, second = layer.self_attn, layer.linear1, layer.linear2
    with torch.no_grad():
        args = (
            x, 32, 4, attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight,
            attention.out_proj.bias, False, False, 1e-5, layer.norm1.weight, layer.norm1.bias, layer.norm2.weight,
            layer.norm2.bias, first.weight, first.bias, second.weight, second.bias, padding, 1,
        )  # fmt: skip
        theirs, ours = torch._transformer_encoder_layer_fwd(*args), transformer_encoder_layer(*args)
    assert theirs[1].isnan().all() and not theirs[0].isnan().any()
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_composites_in_regions_are_expanded(captured, mha):
    def function(x):
        return checkpoint(lambda x: mha(x, x, x, need_weights=False)[0], x, use_reentrant=False)

    x = torch.randn(2, 16, 32)
    seen = captured(function, x, expanded=True)
    (subtrace,) = seen.trace.subtraces.values()
    assert "sdpa" in [value.name for value in subtrace.values]
    torch.testing.assert_close(seen.result, function(x), rtol=0, atol=0)


def test_failure_leaves_the_graph_untouched(captured, mha, monkeypatch):
    def broken(*args, **kwargs):
        F.linear(args[0], args[5])
        raise RuntimeError("no such thing")

    monkeypatch.setitem(COMPOSITES, F.multi_head_attention_forward, broken)
    seen = captured(lambda x: mha(x, x, x, need_weights=False)[0], torch.randn(2, 16, 32))
    code = seen.graph_module.code
    expansion = expand(seen.graph_module)
    ((node, text),) = expansion.refused
    assert expansion.expanded == [] and node.name == "multi_head_attention_forward" and "no such thing" in text
    assert seen.graph_module.code == code and has_composites(seen.graph_module)


@pytest.mark.parametrize(
    ("replacement", "text"),
    [
        (lambda x, *a, **k: (x * torch.tensor([1.0] * 32), None), "constant"),
        (lambda x, *a, **k: (x.clone().add_(1), None), "write in place"),
        (lambda x, *a, **k: (x[1:], None), "Dynamo noted"),
    ],
)
def test_parts_that_cannot_stand_in_are_refused(captured, mha, monkeypatch, replacement, text):
    monkeypatch.setitem(COMPOSITES, F.multi_head_attention_forward, replacement)
    seen = captured(lambda x: mha(x, x, x, need_weights=False)[0], torch.randn(2, 16, 32))
    code = seen.graph_module.code
    ((_, why),) = expand(seen.graph_module).refused
    assert text in why and seen.graph_module.code == code


def test_inside_vmap_nothing_is_expanded(captured, mha):
    seen = captured(lambda x: torch.vmap(lambda x: mha(x, x, x, need_weights=False)[0])(x), torch.randn(3, 2, 16, 32))
    expansion = expand(seen.graph_module)
    assert not expansion.expanded and len(expansion.refused) == sum(
        node.target in COMPOSITES for node in seen.graph_module.graph.nodes
    )
