"""Tiny random models of public Hugging Face architectures, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
WIDE_HEADS = {**GROUPED, "head_dim": 16}
ALTERNATING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        config: Makes the configuration.
        model: The class with a head.
        sites: Attention sites in one forward pass.
        inputs: "text", "seq2seq", "audio" or "image".
        attentions: Implementations transformers offers for it.
    """

    name: str
    config: Callable[[], hf.PretrainedConfig]
    model: type
    sites: int = 2
    inputs: str = "text"
    attentions: tuple[str, ...] = ("eager", "sdpa")

    def build(self, attention: str) -> torch.nn.Module:
        torch.manual_seed(0)
        return self.model._from_config(self.config(), attn_implementation=attention).eval()

    def arguments(self, padded: bool) -> dict[str, Tensor | bool]:
        torch.manual_seed(1)
        ids = torch.randint(3, 99, (2, 12))
        if self.inputs == "image":
            return {"pixel_values": torch.randn(2, 3, 16, 16)}
        if self.inputs == "audio":
            return {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": ids[:, :7], "use_cache": False}
        arguments: dict[str, Tensor | bool] = {"input_ids": ids}
        if padded:
            keep = torch.ones(2, 12, dtype=torch.long)
            keep[0, :4] = 0
            arguments["attention_mask"] = keep
        if self.inputs == "seq2seq":
            arguments["decoder_input_ids"] = ids[:, :7]
        if self.model not in (hf.BertForMaskedLM, hf.DebertaV2ForMaskedLM):
            arguments["use_cache"] = False
        return arguments


FAMILIES = [
    Family("llama", lambda: hf.LlamaConfig(**GROUPED), hf.LlamaForCausalLM),
    Family("mistral", lambda: hf.MistralConfig(**GROUPED, sliding_window=5), hf.MistralForCausalLM),
    Family(
        "gemma2",
        lambda: hf.Gemma2Config(**WIDE_HEADS, **ALTERNATING, query_pre_attn_scalar=8, attn_logit_softcapping=5.0),
        hf.Gemma2ForCausalLM,
        attentions=("eager",),
    ),
    Family(
        "gemma3",
        lambda: hf.Gemma3TextConfig(**WIDE_HEADS, **ALTERNATING, query_pre_attn_scalar=8),
        hf.Gemma3ForCausalLM,
    ),
    Family("qwen2", lambda: hf.Qwen2Config(**GROUPED), hf.Qwen2ForCausalLM),
    Family("qwen3", lambda: hf.Qwen3Config(**WIDE_HEADS), hf.Qwen3ForCausalLM),
    Family(
        "gpt2",
        lambda: hf.GPT2Config(
            n_embd=48, n_layer=2, n_head=6, vocab_size=99, n_positions=64, bos_token_id=1, eos_token_id=2
        ),
        hf.GPT2LMHeadModel,
    ),
    Family("gpt_neox", lambda: hf.GPTNeoXConfig(**SMALL), hf.GPTNeoXForCausalLM),
    Family(
        "t5",
        lambda: hf.T5Config(d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=6, vocab_size=99),
        hf.T5ForConditionalGeneration,
        sites=6,
        inputs="seq2seq",
    ),
    # a layer of a recurrent kind, whose padding mask is no mask of an attention
    Family(
        "lfm2",
        lambda: hf.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]),
        hf.Lfm2ForCausalLM,
        sites=1,
    ),
    Family("bert", lambda: hf.BertConfig(**SMALL), hf.BertForMaskedLM),
    Family(
        "whisper",
        lambda: hf.WhisperConfig(
            d_model=48,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=6,
            decoder_attention_heads=6,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            vocab_size=99,
            num_mel_bins=16,
            max_source_positions=20,
            max_target_positions=40,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        hf.WhisperForConditionalGeneration,
        sites=6,
        inputs="audio",
    ),
    Family(
        "vit",
        lambda: hf.ViTConfig(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=6,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
        ),
        hf.ViTForImageClassification,
        inputs="image",
    ),
    Family(
        "gpt_oss",
        lambda: hf.GptOssConfig(**WIDE_HEADS, **ALTERNATING, num_local_experts=4, num_experts_per_tok=2),
        hf.GptOssForCausalLM,
        attentions=("eager",),
    ),
    Family(
        "deberta-v2",  # positions in buckets of a logarithm
        lambda: hf.DebertaV2Config(
            **SMALL,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_biased_input=False,
            position_buckets=4,
            share_att_key=True,
            norm_rel_ebd="layer_norm",
        ),
        hf.DebertaV2ForMaskedLM,
        attentions=("eager",),
    ),
]
