"""MLA models of transformers: prefill without a cache, and a step on the stock cache, against float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from families import SMALL, Family

import rocm_attn_compile
from rocm_attn_compile.pipeline import compile_graph
from rocm_attn_compile.testing import Float64Everywhere, assert_as_accurate_as_eager, cache_for, to_float64

LATENT = {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "num_key_value_heads": 6}
MOE = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}


def family(name: str, model: str, **changes: Any) -> Family:
    cls = getattr(hf, model)
    config = {**SMALL, **LATENT, "q_lora_rank": 24, **changes}
    return Family(name, lambda: cls.config_class(**config), cls)


FAMILIES = [
    family("deepseek_v3", "DeepseekV3ForCausalLM", **MOE),
    family("deepseek_v2_without_q_lora", "DeepseekV2ForCausalLM", **{**MOE, "q_lora_rank": None}),
    family("minicpm3", "MiniCPM3ForCausalLM"),
    family("glm4_moe_lite", "Glm4MoeLiteForCausalLM", **MOE),
    family("youtu", "YoutuForCausalLM"),
    family("mistral4", "Mistral4ForCausalLM", **MOE),
]
IN_CI = {("deepseek_v3", "eager"), ("deepseek_v2_without_q_lora", "sdpa")}
CASES = [
    pytest.param(f, a, id=f"{f.name}-{a}", marks=[] if (f.name, a) in IN_CI else pytest.mark.slow)
    for f in FAMILIES
    for a in f.attentions
]


def rewritten(model, **kwargs):
    return torch.compile(model, backend=lambda gm, inputs: compile_graph(gm, inputs, lowering="eager"), **kwargs)


def exact_of(model):
    exact = to_float64(model)
    exact.config._experts_implementation = "eager"  # the grouped matrix product has no float64 form
    return exact


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_prefill_is_latent(family: Family, attention: str):
    model, arguments = family.build(attention), family.arguments(padded=True)
    with torch.no_grad():
        eager = model(**arguments).logits
        with Float64Everywhere():
            exact = exact_of(model)(**arguments).logits
        actual = rewritten(model, fullgraph=True)(**arguments).logits
    (report,) = rocm_attn_compile.reports()
    assert [(s.kind, s.backend, s.reasons, s.notes) for s in report.sites] == [("mla", "TRITON_MLA", [], [])] * 2
    assert {site.data["latent"]["form"] for site in report.sites} == {"prefill"}
    assert_as_accurate_as_eager(actual, eager, exact)


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_a_step_on_the_stock_cache(family: Family, attention: str):
    """transformers 5 keeps the latents: absorbed. Older ones keep expanded keys: plain attention, and a note."""
    model, arguments = family.build(attention), family.arguments(padded=True)
    ids, keep = arguments["input_ids"], arguments["attention_mask"]
    cache = hf.StaticCache(config=model.config, max_cache_len=90)
    later = {"input_ids": ids[:, :1], "attention_mask": torch.cat([keep, keep[:, -1:]], 1)}

    with torch.no_grad():
        model(input_ids=ids, attention_mask=keep, **cache_for(model, cache))
        wide = copy.deepcopy(cache)
        for layer in wide.layers:
            layer.keys, layer.values = layer.keys.double(), layer.values.double()
        eager = model(**later, **cache_for(model, copy.deepcopy(cache))).logits
        with Float64Everywhere():
            exact = exact_of(model)(**later, **cache_for(model, wide)).logits
        actual = rewritten(model)(**later, **cache_for(model, cache)).logits
    sites = [site for report in rocm_attn_compile.reports() for site in report.sites]
    holds_latents = cache.layers[0].keys.shape[1] == 1
    wanted = ("mla", "TRITON_MLA", []) if holds_latents else ("attention", "TRITON_ATTN", ["latent_cache_expanded"])
    assert [(s.kind, s.backend, [note.code for note in s.notes]) for s in sites] == [wanted] * 2
    if holds_latents:
        assert {site.data["latent"]["form"] for site in sites} == {"absorbed"}
    assert_as_accurate_as_eager(actual, eager, exact)
