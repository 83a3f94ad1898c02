"""Tiny random models of every Hugging Face architecture whose latent attention `use_latent_cache` takes."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor

RANK, NOPE, ROPE, VALUE, HEADS, LAYERS = 16, 8, 4, 10, 6, 2
SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "q_lora_rank": 20,
    "kv_lora_rank": RANK,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
}
EXPERTS = {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
HYBRID = {
    **EXPERTS,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_heads": 2,
    "linear_head_dim": 8,
}
LONGCAT = {
    "num_layers": 1,  # each has two attentions
    "ffn_hidden_size": 64,
    "expert_ffn_hidden_size": 16,
    "n_routed_experts": 4,
    "zero_expert_num": 1,
    "moe_topk": 2,
    "head_dim": ROPE,
}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
    "mscale": 0.7, "mscale_all_dim": 0.9, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek-v2": ("DeepseekV2", EXPERTS),
    "deepseek-v2-lite": ("DeepseekV2", {**EXPERTS, "q_lora_rank": None}),
    "deepseek-v3": ("DeepseekV3", EXPERTS),
    "deepseek-v3-yarn": ("DeepseekV3", {**EXPERTS, "rope_parameters": YARN}),
    "deepseek-v3-halves": ("DeepseekV3", {**EXPERTS, "rope_interleave": False}),
    "glm4-moe-lite": ("Glm4MoeLite", EXPERTS),
    "youtu": ("Youtu", {}),
    "axk1": ("AXK1", EXPERTS),
    "minicpm3": ("MiniCPM3", {}),
    "mistral4": ("Mistral4", EXPERTS),
    "longcat-flash": ("LongcatFlash", LONGCAT),
    "kimi-linear": ("KimiLinear", HYBRID),
    "bailing-hybrid": ("BailingHybrid", HYBRID),
}
FAMILIES = {name: family for name, family in _FAMILIES.items() if hasattr(hf, f"{family[0]}Config")}
"""Name -> prefix of the classes, settings. Those that this version of transformers has."""


def build(name: str, attention: str = "sdpa", **settings: Any) -> hf.PreTrainedModel:
    """A model in float32 with weights so large that its tokens vary."""
    prefix, own = FAMILIES[name]
    config = getattr(hf, f"{prefix}Config")(**{**SMALL, **own, **settings})
    torch.manual_seed(0)
    model = getattr(hf, f"{prefix}ForCausalLM")._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
    return model


def prompt(length: int = 11, padding: int = 4) -> tuple[Tensor, Tensor]:
    """Tokens of two prompts, the first one padded on the left, and the attention mask."""
    torch.manual_seed(1)
    tokens = torch.randint(3, 99, (2, length))
    mask = torch.ones_like(tokens)
    tokens[0, :padding] = mask[0, :padding] = 0
    return tokens, mask
