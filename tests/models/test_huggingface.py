"""Real model code from transformers: every attention is replaced, and the output is as accurate as eager's."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, Family

import rocm_attn_compile
from rocm_attn_compile.pipeline import compile_graph
from rocm_attn_compile.testing import Float64Everywhere, assert_as_accurate_as_eager, cache_for, to_float64


def cases():
    for family in FAMILIES:
        for attention in family.attentions:
            for padded in (False, True) if family.inputs in ("text", "seq2seq") else (False,):
                # in CI: eager attention with padding, SDPA without
                rest = len(family.attentions) > 1 and family.inputs == "text" and padded == (attention == "sdpa")
                name = f"{family.name}-{attention}-{'padded' if padded else 'full'}"
                yield pytest.param(family, attention, padded, id=name, marks=[pytest.mark.slow] if rest else [])


def rewritten(model, lowering="eager", **kwargs):
    return torch.compile(model, backend=lambda gm, inputs: compile_graph(gm, inputs, lowering=lowering), **kwargs)


@pytest.mark.parametrize(("family", "attention", "padded"), list(cases()))
def test_family(family: Family, attention: str, padded: bool):
    model, arguments = family.build(attention), family.arguments(padded)
    with torch.no_grad():
        eager = model(**arguments).logits
        wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in arguments.items()}
        exact_model = to_float64(model)
        exact_model.config._experts_implementation = "eager"  # the grouped matrix product has no float64 form
        with Float64Everywhere():
            exact = exact_model(**wide).logits
        actual = rewritten(model, fullgraph=True)(**arguments).logits
    (report,) = rocm_attn_compile.reports()
    assert [site.replaced for site in report.sites] == [True] * family.sites, str(report)
    assert not any(site.reasons for site in report.sites)
    assert {(site.kind, *site.notes) for site in report.sites} == {("attention",)}  # none is near latent attention
    assert all("/transformers/" in site.source for site in report.sites)
    assert_as_accurate_as_eager(actual, eager, exact)


@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
def test_weights_that_the_model_returns(name: str):
    """`output_attentions=True`: logits and every layer's weights, which the op gives as a second result."""
    family = next(f for f in FAMILIES if f.name == name)
    model, arguments = family.build("eager"), {**family.arguments(family.inputs == "text"), "output_attentions": True}
    wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in arguments.items()}

    def results(run, given):
        out = run(**given)
        weights = [w for key, value in out.items() if "attentions" in key for w in value]
        return [out.logits, *weights]

    with torch.no_grad():
        eager = results(model, arguments)
        with Float64Everywhere():
            exact = results(to_float64(model), wide)
        actual = results(rewritten(model), arguments)
    sites = [site for report in rocm_attn_compile.reports() for site in report.sites]
    assert len(eager) == 1 + family.sites == 1 + len(sites)
    assert all(site.replaced and site.data["returned_weights"] for site in sites), str(sites)
    assert_as_accurate_as_eager(actual, eager, exact)


def test_gradients_beside_biases_that_are_picked_by_a_logarithm():
    """DeBERTa's: what is picked is no fill, wherever the positions come from, beside padding that is one."""
    family = next(f for f in FAMILIES if f.name == "deberta-v2")
    model, arguments = family.build("eager"), family.arguments(True)

    def gradients(run, parameters):
        return torch.autograd.grad(run(**arguments).logits.square().sum(), parameters, allow_unused=True)

    eager = gradients(model, list(model.parameters()))
    with Float64Everywhere():
        wide = to_float64(model)
        exact = gradients(wide, list(wide.parameters()))
    actual = gradients(rewritten(model), list(model.parameters()))
    sites = [site for report in rocm_attn_compile.reports() for site in report.sites]
    assert [site.replaced for site in sites] == [True] * family.sites, str(sites)
    used = [i for i, gradient in enumerate(eager) if gradient is not None and gradient.abs().max() > 1e-6]
    assert_as_accurate_as_eager(*([each[i] for i in used] for each in (actual, eager, exact)), factor=8.0)


def test_masks_of_a_padded_window_model_are_proved():
    """Mistral, left-padded: the mask is in closed form, no tensor of queries by keys is left."""
    family = next(f for f in FAMILIES if f.name == "mistral")
    with torch.no_grad():
        rewritten(family.build("eager"))(**family.arguments(padded=True))
    for site in rocm_attn_compile.reports()[0].sites:
        assert site.mask.startswith("causal, window 5, key padding (proved")
        assert not site.data["mask"]["has_attn_mask"]
        assert not site.data["has_bias"]


def test_training_step_of_a_padded_model():
    """Gradients of every parameter, with rows that keep no key (left padding) in the loss."""
    family = next(f for f in FAMILIES if f.name == "llama")
    arguments = family.arguments(padded=True)

    def gradients(model, run):
        loss = run(**arguments).logits.float().square().mean()
        return tuple(torch.autograd.grad(loss, list(model.parameters())))

    model = family.build("eager").train()
    eager = gradients(model, model)
    actual = gradients(model, rewritten(model, lowering="aot_eager"))
    with Float64Everywhere():
        exact_model = to_float64(model).train()
        exact = torch.autograd.grad(exact_model(**arguments).logits.square().mean(), list(exact_model.parameters()))
    (report,) = rocm_attn_compile.reports()
    assert all(site.replaced for site in report.sites)
    assert_as_accurate_as_eager(actual, eager, exact)


def test_static_cache_generates_the_same_tokens():
    """Prefill and decode through a static cache: the cache position becomes a key limit, not a mask tensor."""
    from transformers import StaticCache

    family = next(f for f in FAMILIES if f.name == "llama")
    model, ids = family.build("eager"), family.arguments(padded=False)["input_ids"]

    def generate(run) -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=64)
        logits, tokens = run(ids, **cache_for(model, cache), use_cache=True).logits, []
        for _ in range(20):
            tokens.append(logits[:, -1:].argmax(-1))
            logits = run(tokens[-1], **cache_for(model, cache), use_cache=True).logits
        return torch.cat(tokens, 1)

    with torch.no_grad():
        want, got = generate(model), generate(rewritten(model))
    assert torch.equal(got, want)
    reports = rocm_attn_compile.reports()
    assert len(reports) <= 3
    assert all(site.replaced for report in reports for site in report.sites)
    assert all(site.mask.startswith("key limit (proved") for site in reports[-1].sites)


@pytest.mark.parametrize("attention", ["eager", pytest.param("sdpa", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["StaticCache", "DynamicCache"])
def test_inductor_decodes_200_tokens_and_compiles_at_most_twice(kind, attention):
    """All of what users run: `backend="rocm_attn"`, Inductor, a cache of fixed size and one that grows."""
    import transformers

    family = next(f for f in FAMILIES if f.name == "llama")
    model, ids = family.build(attention), family.arguments(padded=False)["input_ids"]
    options = {"max_cache_len": 256} if kind == "StaticCache" else {}

    def generate(run) -> torch.Tensor:
        cache = getattr(transformers, kind)(config=model.config, **options)
        logits, tokens = model(ids, **cache_for(model, cache), use_cache=True).logits, []
        for _ in range(200):
            tokens.append(logits[:, -1:].argmax(-1))
            logits = run(tokens[-1], **cache_for(model, cache), use_cache=True).logits
        return torch.cat(tokens, 1)

    with torch.no_grad():
        want = generate(model)
        got = generate(torch.compile(model, backend="rocm_attn", fullgraph=True))
    assert want.unique().numel() > 5  # a loop that sticks to one token shows nothing
    assert torch.equal(got, want)
    reports = rocm_attn_compile.reports()
    assert len(reports) <= 2
    assert all(site.replaced for report in reports for site in report.sites)
    masks = [site.data["mask"] for site in reports[-1].sites]
    assert not any(mask["has_attn_mask"] or mask["has_key_mask"] for mask in masks)
    assert all(mask["has_kv_end"] == (kind == "StaticCache") for mask in masks)
