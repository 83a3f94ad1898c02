"""Real model code from transformers: equal layers are recognised once, with what recognition in full finds."""

from __future__ import annotations

import latent_models
import pytest
import torch
from again_harness import Both
from families import FAMILIES

LAYERS = 4

IN_FULL = {
    "llama": 1,
    "gemma2": 2,  # windows take turns with the whole
    "whisper": 3,  # the encoder's, and two of the decoder
    # The first layer makes the position bias, after its queries: in that order no other layer reads both.
    "t5": 6,
}


@pytest.mark.parametrize(
    "name", [n if n in ("gemma2", "t5") else pytest.param(n, marks=pytest.mark.slow) for n in IN_FULL]
)
def test_equal_layers_of_a_model(name):
    (family,) = [family for family in FAMILIES if family.name == name]
    config = family.config()
    for key in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"):
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, LAYERS)
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * LAYERS)[:LAYERS]
    torch.manual_seed(0)
    model = family.model._from_config(config, attn_implementation="eager").eval()
    both = Both()
    with torch.no_grad():
        torch.compile(model, backend=both)(**family.arguments(padded=family.inputs in ("text", "seq2seq")))
    assert len(both.found) >= LAYERS
    assert both.counts["in_full"] == IN_FULL[name]
    assert not both.codes


@pytest.mark.parametrize("trains", [False, True])
def test_equal_layers_of_latent_attention(trains):
    model = latent_models.build("youtu", num_hidden_layers=LAYERS)
    tokens, mask = latent_models.prompt()
    both = Both()
    with torch.set_grad_enabled(trains):
        torch.compile(model, backend=both)(input_ids=tokens, attention_mask=mask, use_cache=False)
    assert [site.spec.kind for site in both.found] == ["mla"] * LAYERS
    assert both.counts["in_full"] == 1
