"""Tiny configurations of transformers' architectures, derived from their defaults by the names of the fields."""

from __future__ import annotations

import re
from typing import Any

HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = 4, 2, 16, 1, 99
WIDTH = HEADS * HEAD_DIM

# The first pattern that matches the whole name of an integer field gives its value.
_INTEGERS: list[tuple[str, int]] = [
    (r"num_feat_extract_layers", 99),  # as many as its lists have
    (r"upsample_groups", WIDTH),
    (r"mamba_n_heads", 2 * HEADS),
    (r"mamba_(d_head|headdim|head_dim)", HEAD_DIM),
    (r"original_max_position_embeddings", 64),
    (r".*vocab_size(_per_layer_input)?|vocab", VOCAB),
    (r"(num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num|swa_num_key_value_heads)", KV_HEADS),
    (r"(.*_)?num_key_value_heads", KV_HEADS),
    (r"(.*_)?(num_attention_heads|num_heads|n_heads?|attention_heads|nhead|num_attention_heads_per_.*)", HEADS),
    (r"(head_dim|d_kv|attention_head_dim|kv_channels|v_head_dim|qk_nope_head_dim|global_head_dim|d_head)", HEAD_DIM),
    (r"(.*_)?head_dim", HEAD_DIM),
    (r"(rotary_dim|qk_rope_head_dim)", HEAD_DIM // 2),
    (r"(q_lora_rank|index_head_dim)", 24),
    (r"(kv_lora_rank)", 16),
    (r"(num_experts_per_tok|num_experts_per_token|moe_topk|moe_top_k|moe_k|top_k_experts|experts_per_token)", 2),
    (r"(n_group|topk_group|num_expert_group|n_groups_moe|topk_groups)", 1),
    (r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts|ffn_num_experts)", 4),
    (r"(.*_)?(intermediate_size|intermediate_dim|ffn_dim|d_ff|d_inner|n_inner|ffn_hidden_size|dim_feedforward)", 96),
    (r"(moe_.*_size|expert_ffn_hidden_size|shared_expert_intermediate_size)", 32),
    (r"(.*_)?(num_hidden_layers|n_layers?|num_layers|layers|depth|num_blocks|num_(?!feat_extract).*_layers)", LAYERS),
    (r"(hidden_size_per_layer_input)", 16),
    (
        r"(.*_)?(hidden_size|d_model|n_embd|emb_dim|embed_dim|hidden_dim|model_dim|embedding_size|width|hidden_sizes?)",
        WIDTH,
    ),
    (r"(.*_)?(projection_dim|word_embed_proj_dim|projector_hidden_size|proj_dim|embedding_dim)", WIDTH),
    (r"(dim|kv_dim|output_dim|output_hidden_size|out_dim|attention_hidden_size|decoder_hidden_dim)", WIDTH),
    (r"(.*_)?(mask_feature_size|fpn_hidden_size|feature_size|fusion_hidden_size|neck_hidden_size)", WIDTH),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|max_seq_length|seq_length)", 64),
    (r"(max_target_positions|max_text_len|max_2d_position_embeddings.*)", 128),
    (r"(max_source_positions)", 20),
    (r"(image_size|img_size|input_image_size|crop_size)", 32),
    (r"(patch_size)", 8),
    (r"(num_mel_bins|n_mels|num_mels)", 16),
    (r"(sliding_window|attention_chunk_size)", 5),
    (r"attention_window", 4),
    (r"(num_conv_pos_embeddings)", 16),
    (r"(num_conv_pos_embedding_groups)", 2),
    (r"(state_size|d_state|mamba_d_state)", 8),
    (r"(relative_attention_.*|max_relative_positions?)", 8),
    (r"first_k_dense_replace", 0),
    (r"(num_queries|num_latents|num_query_tokens|num_query)", 9),
    (r"(pooler_num_.*)", 2),
]
_TOKEN = re.compile(r".*(token_id|_token_index|_id|_index)s?$")
_KEEP = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2}
_FIRST_SPECIAL = 80
"""Ordinary ids are 3 to 79; every other special token gets an id of its own from here on."""


def tiny(config_class: type, overrides: dict[str, Any]) -> Any:
    """A configuration of the class with one layer of each kind, few heads and channels.

    Args:
        config_class: A subclass of `transformers.PretrainedConfig`.
        overrides: Values that win over the derived ones; "sub.field" reaches into a nested configuration.
    """
    values = config_class().to_dict()
    _shrink(values, _Tokens())
    for name, value in overrides.items():
        *path, last = name.split(".")
        place = values
        for part in path:
            place = place.get(part) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place[last] = value
    return config_class.from_dict(values)


class _Tokens:
    """Hands out ids for special tokens."""

    def __init__(self) -> None:
        self.next = _FIRST_SPECIAL

    def new(self) -> int:
        self.next = min(self.next + 1, VOCAB - 1)
        return self.next


def _shrink(values: dict[str, Any], tokens: _Tokens) -> None:
    values.pop("per_layer_config", None)
    original = dict(values)
    for name, value in list(values.items()):
        if isinstance(value, dict):
            if name.endswith(("config", "rope_parameters", "rope_scaling")) or "model_type" in value:
                _shrink(value, tokens)
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int):
            values[name] = _integer(name, value, tokens)
        elif isinstance(value, (list, tuple)) and value:
            values[name] = _sequence(name, list(value), values, tokens)
    if isinstance(values.get("layer_types"), list):
        _layers_of_each_type(values)
    if "stage_names" in values and "depths" not in values:
        _stages_of_a_plain_backbone(values)
    if values.get("kv_lora_rank"):  # all heads share one latent
        values["num_key_value_heads"] = HEADS
        if original.get("head_dim") == original.get("qk_rope_head_dim"):
            values["head_dim"] = values["qk_rope_head_dim"]
    if "use_cache" in values:
        values["use_cache"] = False
    # a width that the heads divide, where stages have head counts of their own
    heads = values.get("num_heads") or values.get("num_attention_heads")
    if isinstance(heads, list) and isinstance(values.get("embed_dim"), int):
        values["embed_dim"] = heads[0] * HEAD_DIM


def _stages_of_a_plain_backbone(values: dict[str, Any]) -> None:
    """As many layers as there are outputs; each layer is a stage."""
    wanted = len(values.get("out_indices") or [1])
    values["num_hidden_layers"] = layers = max(wanted, LAYERS)
    for name in ("out_features", "out_indices", "stage_names"):
        values.pop(name, None)
    if wanted > 1:
        values["out_indices"] = list(range(layers - wanted + 1, layers + 1))


def _integer(name: str, value: int, tokens: _Tokens) -> int:
    if name in _KEEP:
        return _KEEP[name]
    if _TOKEN.fullmatch(name) and (value >= 3 or value < 0):
        return value if value < 0 else tokens.new()
    for pattern, small in _INTEGERS:
        if re.fullmatch(pattern, name):
            return min(value, small) if value >= 0 else value
    return value


_DEPTHS = re.compile(r"(depths?|num_blocks|layers|encoder_depths|decoder_depths|depths_per_stage|num_encoder_blocks)")


def _sequence(name: str, value: list, values: dict, tokens: _Tokens) -> Any:
    if all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        if _TOKEN.fullmatch(name):
            return [_KEEP.get("eos_token_id") if "eos" in name else tokens.new() for _ in value]
        if _DEPTHS.fullmatch(name):
            return [min(v, 2 if i == 0 else 1) for i, v in enumerate(value)]  # two: with and without shifted windows
        if name in ("image_size", "img_size"):
            return [32 for _ in value]
        if name == "conv_dim":
            return [32 for _ in value]
        if name == "mrope_section":
            return [HEAD_DIM // 4, HEAD_DIM // 8, HEAD_DIM // 8]
        if name == "attention_window":
            return [4 for _ in value]
    return value


def _layers_of_each_type(values: dict[str, Any]) -> None:
    """As few layers as have every type once."""
    kinds = list(dict.fromkeys(values["layer_types"]))
    old = len(values["layer_types"])
    values["layer_types"] = kinds
    for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        if name in values:
            values[name] = len(kinds)
    for name, value in values.items():  # other lists with one entry per layer
        if isinstance(value, list) and len(value) == old and name != "layer_types":
            values[name] = value[: len(kinds)]
