"""Hugging Face MLA models that read their latent cache: the same tokens, one compilation, the promised bytes."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from latent_models import FAMILIES, LAYERS, RANK, ROPE, build, prompt
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from rocm_attn_compile.integrations.transformers import NAME, SUPPORTED, use_latent_cache
from rocm_attn_compile.ops import mla_dispatch
from rocm_attn_compile.testing import assert_as_accurate_as_eager, cache_for, cache_of

pytestmark = pytest.mark.skipif(
    not hasattr(DeepseekV3Attention, "expand_kv"),
    reason="this transformers caches expanded keys and values: needs 5.17",
)
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def forms(monkeypatch):
    """ "decode" or "prefill" for each call of the op `mla`, in order."""
    taken: list[str] = []
    original = mla_dispatch.prefers_absorbed

    def note(*sizes, **settings):
        absorbed = original(*sizes, **settings)
        taken.append("decode" if absorbed else "prefill")
        return absorbed

    monkeypatch.setattr(mla_dispatch, "prefers_absorbed", note)
    return taken


@pytest.mark.parametrize("name", FAMILIES)
def test_generates_the_same_tokens(name, forms):
    """Greedy, padded on the left, against the model's own cache; and the op is what computed them."""
    model = build(name)
    tokens, mask = prompt()
    want = model.generate(tokens, attention_mask=mask, **GREEDY)
    assert len(set(want[0].tolist())) > 6, "a model that repeats itself proves little"
    assert not forms
    assert use_latent_cache(model) is model
    layers = sum(hasattr(module, "kv_b_proj") for module in model.modules())
    result = model.generate(tokens, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(result.sequences, want)
    assert isinstance(cache_of(result), hf.StaticCache)
    assert len(forms) == layers * GREEDY["max_new_tokens"]
    assert set(forms[layers:]) == {"decode"}


def test_other_caches_and_beams(forms):
    model = build("deepseek-v3")
    tokens, mask = prompt()
    settings = [
        {"cache_implementation": "dynamic"},
        {"num_beams": 3},
        {"num_beams": 2, "cache_implementation": "dynamic"},
        {"use_cache": False},
    ]
    want = [model.generate(tokens, attention_mask=mask, **GREEDY, **setting) for setting in settings]
    use_latent_cache(model)
    got = [model.generate(tokens, attention_mask=mask, **GREEDY, **setting) for setting in settings]
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert "decode" in forms


def test_the_cache_has_the_promised_bytes():
    model = use_latent_cache(build("deepseek-v3"))
    tokens, mask = prompt()
    result = model.generate(tokens, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    layers = cache_of(result).layers
    length = tokens.shape[1] + GREEDY["max_new_tokens"]
    got = sum(tensor.untyped_storage().nbytes() for layer in layers for tensor in (layer.keys, layer.values))
    assert got == LAYERS * len(tokens) * layers[0].max_cache_len * (RANK + ROPE) * 4
    assert layers[0].max_cache_len in (length - 1, length)


@pytest.mark.parametrize("backend", [pytest.param("inductor", marks=pytest.mark.slow), "rocm_attn"])
def test_a_compiled_decode_step(backend):
    """64 steps over a static cache: one graph with the op in it, the tokens of eager decoding."""
    model = use_latent_cache(build("deepseek-v3", first_k_dense_replace=1, num_hidden_layers=1))
    tokens, _ = prompt()
    counter = CompileCounterWithBackend(backend)
    runs = []
    for step in (model.forward, torch.compile(model.forward, backend=counter, fullgraph=True)):
        cache = hf.StaticCache(config=model.config, max_cache_len=90)
        with torch.no_grad():
            token = model(tokens, **cache_for(model, cache), use_cache=True).logits[:, -1:].argmax(-1)
            made = [token]
            for _ in range(64):
                token = step(token, **cache_for(model, cache), use_cache=True).logits[:, -1:].argmax(-1)
                made.append(token.clone())
        runs.append(torch.cat(made, 1))
    assert torch.equal(*runs)
    assert counter.frame_count == 1
    targets = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert targets.count("rocm_attn.mla.default") == 1


@pytest.mark.parametrize("padded", [False, True])
def test_without_a_cache(padded, forms):
    model = build("deepseek-v3", first_k_dense_replace=LAYERS).double()
    tokens, mask = prompt()
    arguments = {"input_ids": tokens, "attention_mask": mask if padded else None, "use_cache": False}
    with torch.no_grad():
        want = model(**arguments).logits
        got = use_latent_cache(model)(**arguments).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()])
    assert forms == ["prefill"] * LAYERS


def gradients(model, tokens, mask):
    torch.manual_seed(3)
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    return logits, torch.autograd.grad(logits[mask.bool()].sin().sum(), tuple(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_is_unaffected(dropout, forms):
    model = build("deepseek-v3", attention_dropout=dropout, first_k_dense_replace=LAYERS).double().train()
    tokens, mask = prompt()
    changed = use_latent_cache(copy.deepcopy(model))
    for padding in (mask, torch.ones_like(mask)):
        want, got = gradients(model, tokens, padding), gradients(changed, tokens, padding)
        torch.testing.assert_close(got, want)
    assert not forms


def test_a_prompt_in_chunks(forms):
    """Queries behind a filled part of a static cache, whose length is on the device."""
    model = build("deepseek-v3")
    tokens, _ = prompt()
    with torch.no_grad():
        want = model(tokens, use_cache=False).logits
        use_latent_cache(model)
        for cache in (hf.StaticCache(config=model.config, max_cache_len=40), hf.DynamicCache(config=model.config)):
            parts = [
                model(part, **cache_for(model, cache), use_cache=True).logits for part in tokens.split([5, 4, 2], 1)
            ]
            torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-4, rtol=1e-4)
    assert len(forms) == 2 * 3 * LAYERS


def test_autocast(forms):
    model = build("deepseek-v3", first_k_dense_replace=LAYERS)
    tokens, mask = prompt()

    def logits(model, autocast=True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            cache = hf.StaticCache(config=model.config, max_cache_len=20)
            model(tokens[:, :-1], attention_mask=mask[:, :-1], **cache_for(model, cache), use_cache=True)
            return model(tokens[:, -1:], attention_mask=mask, **cache_for(model, cache), use_cache=True).logits

    exact, eager = logits(model, autocast=False), logits(model)
    assert not forms
    ours = logits(use_latent_cache(model))
    assert ours.dtype == eager.dtype == torch.bfloat16
    assert forms == ["prefill"] * LAYERS + ["decode"] * LAYERS
    assert_as_accurate_as_eager(ours, eager, exact.double())


def test_other_attention_of_the_model_is_left_to_sdpa():
    """With the masks that it is given: none at all, of a static cache, packed."""
    from rocm_attn_compile.integrations import transformers as ours

    layer = nn.Module()
    layer.is_causal = False
    q, k = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 9, 8)
    settings = {"mask_function": ours.causal_mask_function}
    for keys, mask in [
        (9, None),
        (1, ours._mask(2, 1, 9, 0, **settings)),
        (5, ours._mask(2, 1, 9, 4, **settings)),
        (5, ours._mask(2, 1, 9, torch.tensor(4), **settings)),
        (5, ours._mask(2, 1, 9, torch.tensor(4), attention_mask=torch.ones(2, 5, dtype=torch.bool), **settings)),
    ]:
        got, _ = ours._attention(layer, q, k, k, mask, scaling=0.3)
        want = nn.functional.scaled_dot_product_attention(q, k[:, :, :keys], k[:, :, :keys], scale=0.3)
        torch.testing.assert_close(got, want.transpose(1, 2))


def test_a_prompt_of_one_token(forms):
    """Into a static cache whose other places hold nothing."""
    model = build("deepseek-v3", first_k_dense_replace=LAYERS)
    token = prompt()[0][1:, :1]
    want = model.generate(token, **GREEDY)
    with torch.no_grad():
        exact = model(token, use_cache=False).logits
        use_latent_cache(model)
        cache = hf.StaticCache(config=model.config, max_cache_len=20)
        torch.testing.assert_close(model(token, **cache_for(model, cache), use_cache=True).logits, exact)
    assert torch.equal(model.generate(token, **GREEDY), want)


def test_a_mask_of_ones_own(forms):
    """A 4-D mask has no closed form: the latents are expanded, as without us."""
    model = build("deepseek-v3", first_k_dense_replace=LAYERS).double()
    tokens, _ = prompt()
    own = torch.ones(1, 1, 11, 11, dtype=torch.bool).tril() & (torch.rand(1, 1, 11, 11) > 0.3) | torch.eye(11).bool()
    with torch.no_grad():
        want = model(tokens, attention_mask=own, use_cache=False).logits
        got = use_latent_cache(model)(tokens, attention_mask=own, use_cache=False).logits
    torch.testing.assert_close(got, want)
    assert not forms


def test_a_copy_has_weights_of_its_own():
    model = use_latent_cache(build("deepseek-v3"))
    copied = copy.deepcopy(model)
    tokens, mask = prompt()
    before = model.generate(tokens, attention_mask=mask, **GREEDY)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(model.generate(tokens, attention_mask=mask, **GREEDY), before)
    assert not torch.equal(copied.generate(tokens, attention_mask=mask, **GREEDY), before)


def test_a_setting_of_the_users_stays():
    model = build("deepseek-v3")
    model.generation_config.cache_implementation = "dynamic"
    use_latent_cache(model)
    assert model.generation_config.cache_implementation == "dynamic"
    assert model.config._attn_implementation == NAME


def test_a_model_without_latent_attention_is_refused():
    config = hf.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9
    )
    model = hf.LlamaForCausalLM(config)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no latent attention.*DeepseekV3Attention"):
        use_latent_cache(model)


def test_what_is_not_plain_is_refused():
    model = build("deepseek-v3")
    layer = model.model.layers[1].self_attn

    class Adapted(nn.Linear):
        """As an adapter library wraps a layer."""

    layer.kv_b_proj.__class__ = Adapted
    with pytest.raises(NotImplementedError, match=r"kv_b_proj of DeepseekV3Attention is Adapted.*merge adapters"):
        use_latent_cache(model)
    assert model.config._attn_implementation == "sdpa"
    layer.kv_b_proj.__class__ = nn.Linear
    type(layer).indexer = None
    try:
        layer.__class__ = type("OtherAttention", (type(layer),), {})
        with pytest.raises(NotImplementedError, match="OtherAttention selects keys by an indexer; allowed are"):
            use_latent_cache(model)
    finally:
        del layer.__class__.__mro__[1].indexer


def test_an_adapter_put_on_later_is_refused():
    model = use_latent_cache(build("deepseek-v3"))
    model.model.layers[0].self_attn.kv_b_proj.__class__ = type("Adapted", (nn.Linear,), {})
    with pytest.raises(NotImplementedError, match="is Adapted"):
        model.generate(*prompt()[:1], **GREEDY)


def test_another_expansion_is_refused():
    """The layout of the weight is checked by numbers, for the sake of versions of transformers to come."""
    model = build("deepseek-v3")
    layer = model.model.layers[0].self_attn
    original = layer.expand_kv
    layer.expand_kv = lambda kv_c, k_pe: tuple(part.flip(-1) for part in original(kv_c, k_pe))
    with pytest.raises(NotImplementedError, match="expands its latent in a new way"):
        use_latent_cache(model)
    layer.expand_kv = lambda kv_c, k_pe: tuple(part.flip(1) for part in original(kv_c, k_pe))
    with pytest.raises(NotImplementedError, match="expands its latent in a new way"):
        use_latent_cache(model)


def test_an_expanded_cache_is_refused(monkeypatch):
    """As versions of transformers before 5.17 have it."""
    model = build("deepseek-v3")
    monkeypatch.delattr(type(model.model.layers[0].self_attn), "expand_kv")
    with pytest.raises(NotImplementedError, match="caches expanded keys and values; update transformers"):
        use_latent_cache(model)


def test_random_numbers_go_on_as_before():
    model = build("deepseek-v3")
    state = torch.get_rng_state()
    use_latent_cache(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_latent_attention_of_transformers_is_named():
    """A new architecture is either supported or has an indexer; this fails until somebody has looked at it."""
    missing = []
    for path in Path(hf.__file__).parent.glob("models/*/modeling_*.py"):
        for text in re.split(r"^class ", path.read_text(), flags=re.MULTILINE)[1:]:
            name = re.match(r"\w+", text)[0]
            if "self.kv_a_proj_with_mqa = " in text and name not in SUPPORTED and "self.indexer = " not in text:
                missing.append(f"{path.stem}: {name}")
    assert not missing
