"""Models that count distances: what their ALiBi becomes, in float32."""

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


def build(make):
    torch.manual_seed(0)
    model, config = make()
    return model._from_config(config, attn_implementation="eager").eval()


def rewritten(model, **kwargs):
    return torch.compile(model, backend=lambda gm, inputs: compile_graph(gm, inputs, lowering="eager"), **kwargs)


@pytest.mark.parametrize("make", [mpt, bloom, falcon])
def test_forward(make):
    """Positions are numbers in MPT; Bloom and Falcon count the tokens that are no padding."""
    model = build(make)
    torch.manual_seed(1)
    arguments = {"input_ids": torch.randint(3, 99, (2, 13)), "use_cache": False}
    if make is not mpt:
        arguments["attention_mask"] = torch.ones(2, 13, dtype=torch.long)
        arguments["attention_mask"][0, :4] = 0
    with torch.no_grad():
        eager = model(**arguments).logits
        actual = rewritten(model, fullgraph=True)(**arguments).logits
        with Float64Everywhere():
            exact = to_float64(model)(**arguments).logits
    (report,) = rocm_attn_compile.reports()
    assert [site.replaced for site in report.sites] == [True] * 2, str(report)
    for site in report.sites:
        assert (site.data["has_alibi"], site.data["has_bias"]) == ((True, False) if make is mpt else (False, True))
    if make is mpt:
        assert all(site.mask.startswith("causal (proved; every row keeps a key") for site in report.sites)
    assert_as_accurate_as_eager(actual, eager, exact)


@pytest.mark.slow
def test_a_scale_that_is_a_dynamic_number_is_specialised():
    """Falcon divides its bias by the root of the head size, which is a symbol under dynamic=True."""
    model = build(falcon)
    arguments = {"input_ids": torch.randint(3, 99, (2, 13)), "use_cache": False}
    with torch.no_grad():
        actual = rewritten(model, fullgraph=True, dynamic=True)(**arguments).logits
        torch.testing.assert_close(actual, model(**arguments).logits)
