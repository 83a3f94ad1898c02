"""Models that count distances: what their ALiBi becomes."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import rocm_attn_compile
from rocm_attn_compile.pipeline import compile_graph
from rocm_attn_compile.testing import Float64Everywhere, assert_as_accurate_as_eager, to_float64

SIZES = {"hidden_size": 48, "num_attention_heads": 6, "vocab_size": 99}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def mpt():
    return hf.MptForCausalLM, hf.MptConfig(d_model=48, n_heads=6, n_layers=2, vocab_size=99, max_seq_len=64, **TOKENS)


def bloom():
    return hf.BloomForCausalLM, hf.BloomConfig(hidden_size=48, n_head=6, n_layer=2, vocab_size=99, **TOKENS)


def falcon():
    config = hf.FalconConfig(**SIZES, num_hidden_layers=2, alibi=True, new_decoder_architecture=False, **TOKENS)
    return hf.FalconForCausalLM, config


def build(make, attention="eager"):
    torch.manual_seed(0)
    model, config = make()
    return model._from_config(config, attn_implementation=attention).eval()


def ids(length, padded):
    torch.manual_seed(1)
    arguments = {"input_ids": torch.randint(3, 99, (2, length)), "use_cache": False}
    if padded:
        arguments["attention_mask"] = torch.ones(2, length, dtype=torch.long)
        arguments["attention_mask"][0, :4] = 0
    return arguments


class Kept:
    """A backend: our pipeline, keeping the shapes of bias and slopes."""

    def __init__(self):
        self.shapes = []

    def __call__(self, graph_module, inputs):
        run = compile_graph(graph_module, inputs, lowering="eager")
        for node in graph_module.graph.nodes:
            if node.target is torch.ops.rocm_attn.attention.default:
                bias, slopes = (None if i is None else i.meta["example_value"] for i in (node.args[3], node.args[12]))
                self.shapes.append([None if t is None else tuple(t.shape) for t in (bias, slopes)])
        return run


@pytest.mark.parametrize(
    ("make", "padded", "attention", "dtype"),
    [
        (mpt, False, "eager", torch.float32),
        (mpt, True, "eager", torch.float32),
        (bloom, True, "eager", torch.float32),
        (falcon, False, "eager", torch.bfloat16),
        (falcon, False, "eager", torch.float32),
        (falcon, True, "eager", torch.float32),
        (falcon, False, "sdpa", torch.bfloat16),
        (falcon, True, "sdpa", torch.float32),
    ],
)
def test_forward(make, padded, attention, dtype):
    """Positions are numbers in MPT; Bloom and Falcon count the tokens that are no padding: a number per head and key.

    Falcon rounds them to bfloat16, which a float32 model keeps, and puts the lowest number into them where a key is
    dropped.
    """
    model = build(make, attention).to(dtype)
    arguments = ids(13, padded)
    kept = Kept()
    with torch.no_grad():
        eager = model(**arguments).logits
        actual = torch.compile(model, backend=kept, fullgraph=True)(**arguments).logits
        with Float64Everywhere():
            exact = to_float64(model)(**arguments).logits
    (report,) = rocm_attn_compile.reports()
    assert [site.replaced for site in report.sites] == [True] * 2, str(report)
    counts = padded and make is not mpt
    stays = counts or (make is falcon and dtype == torch.float32)
    for site, (bias, slopes) in zip(report.sites, kept.shapes):
        assert (site.data["has_alibi"], site.data["has_bias"]) == (not stays, stays)
        assert ("alibi_rounded" in [note.code for note in site.notes]) == (stays and not counts)
        assert site.mask.startswith("causal")
        assert (slopes, bias) == ((None, (2, 6, 1, 13)) if stays else ((6,), None))
    assert_as_accurate_as_eager(actual, eager, exact)


def test_mpt_with_lengths_that_are_symbols():
    """It slices the bias of all positions to as many as there are keys, which only a guard says."""
    model = build(mpt)
    kept = Kept()
    compiled = torch.compile(model, backend=kept, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (13, 17):
            eager = model(**ids(length, False)).logits
            torch.testing.assert_close(compiled(**ids(length, False)).logits, eager, rtol=1e-4, atol=1e-5)
    (report,) = rocm_attn_compile.reports()
    assert [(site.replaced, site.data["has_alibi"]) for site in report.sites] == [(True, True)] * 2, str(report)
    assert kept.shapes == [[None, (6,)]] * 2


@pytest.mark.slow
def test_a_scale_that_is_a_dynamic_number_is_specialised():
    """Falcon divides its bias by the root of the head size, which is a symbol under dynamic=True."""
    model = build(falcon)
    arguments = ids(13, False)
    with torch.no_grad():
        actual = torch.compile(model, backend=Kept(), fullgraph=True, dynamic=True)(**arguments).logits
        torch.testing.assert_close(actual, model(**arguments).logits)
