"""Where the derived configuration or inputs do not fit an architecture: fields to set, `_inputs` to give."""

from __future__ import annotations

from typing import Any

import torch

_DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}


def _sections(*sizes: int) -> dict[str, Any]:
    """Multimodal rotary sections, in the model itself or in its text part."""
    return {"rope_parameters.mrope_section": list(sizes), "text_config.rope_parameters.mrope_section": list(sizes)}


def _ids() -> torch.Tensor:
    return torch.randint(3, 80, (2, 12))


def _two_sizes_of_image() -> dict[str, Any]:
    keep = (torch.arange(16) < torch.tensor([[16], [12]])).long()
    grids = torch.tensor([[4, 4], [3, 4]])
    return {"pixel_values": torch.randn(2, 16, 192), "pixel_attention_mask": keep, "spatial_shapes": grids}


def _text_and_images() -> dict[str, Any]:
    return {"input_ids": _ids(), **_two_sizes_of_image()}


def _time_series() -> dict[str, Any]:
    past, future = 15, 4  # the context of 8, and 7 lags
    given = {"past_values": torch.randn(2, past), "past_observed_mask": torch.ones(2, past), "use_cache": False}
    features = {"past_time_features": torch.randn(2, past, 0), "future_time_features": torch.randn(2, future, 0)}
    return {**given, **features, "future_values": torch.randn(2, future)}


def _regions_of_an_image() -> dict[str, Any]:
    keep = (torch.arange(12) < torch.tensor([[12], [8]])).long()
    image = {"visual_feats": torch.randn(2, 5, 2048), "visual_pos": torch.rand(2, 5, 4)}
    return {"input_ids": _ids(), "attention_mask": keep, **image}


def _padded_series() -> dict[str, Any]:
    zeros = torch.zeros(2, 65, dtype=torch.long)
    return {"past_values": torch.randn(2, 64), "past_values_padding": zeros[:, 1:], "freq": zeros[:, :1]}


_FORECAST = {"prediction_length": 4, "context_length": 8, "num_time_features": 0, "_inputs": _time_series}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

OVERRIDES: dict[str, dict[str, Any]] = {
    "deberta": {**_DISENTANGLED, "max_relative_positions": 8},
    "deberta-v2": {**_DISENTANGLED, "position_buckets": 4, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    **dict.fromkeys(
        (
            *("glm4v", "glm4v_text", "glm46v", "glmga", "glm_image", "glm_image_text", "glm_ocr", "glm_ocr_text"),
            *("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "paddleocr_vl"),
        ),
        _sections(4, 2, 2),
    ),
    "glm4v_moe": _sections(2, 1, 1),
    "glm4v_moe_text": _sections(2, 1, 1),
    "mamba2": {"num_heads": 8},
    "esm": {"vocab_size": 99, "pad_token_id": 0, "mask_token_id": 32},
    "glm5_next_text": {"num_key_value_heads": 4},
    "esmc": {"num_key_value_heads": 4, "vocab_size": 99},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "donut-swin": {"image_size": 128, "window_size": 4},
    "swin": {"image_size": 128, "window_size": 4},
    "swinv2": {"image_size": 128, "window_size": 4},
    "maskformer-swin": {"image_size": 128, "window_size": 4},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "emu3_text_model": {"pad_token_id": 0},
    "xmod": {"default_language": "en_XX"},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1, "num_hidden_layers": 3},
    "wav2vec2-bert": {"feature_projection_input_dim": 16},
    "autoformer": {"prediction_length": 4, "context_length": 8},
    "informer": _FORECAST,
    "time_series_transformer": _FORECAST,
    "xlnet": {"d_head": 16, "n_head": 4, "d_model": 64},
    "reformer": {"axial_pos_shape": [4, 4], "axial_pos_embds_dim": [32, 32]},
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1], "num_decoder_layers": 1},
    "zamba": {"num_hidden_layers": 2, "layer_types": ["mamba", "hybrid"], "layers_block_type": ["mamba", "hybrid"]},
    "gpt_neo": {
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2, "num_attention_heads": 4, "hidden_size": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "siglip2": {"_inputs": _text_and_images},
    "siglip2_vision_model": {"_inputs": _two_sizes_of_image},
    "lxmert": {"_inputs": _regions_of_an_image},
    "timesfm": {"_inputs": _padded_series},
    "mistral4": {"rope_parameters.partial_rotary_factor": 1.0, "qk_rope_head_dim": 8, "head_dim": 8},
    "longcat_flash": {"qk_rope_head_dim": 8, "head_dim": 8, "qk_head_dim": 24},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "step3p7": {"text_config.sliding_window": 5, "sliding_window": 5},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granite_speech5_encoder": {"context_size": 16},
    "speech_to_text": {"num_conv_layers": 2},
    "mobilebert": {"embedding_size": 64, "true_hidden_size": 64, "intra_bottleneck_size": 64, "trigram_input": False},
    "sew-d": {**_DISENTANGLED, "position_buckets": 4},
}

CAPTURES_SCALARS = frozenset({"deberta", "jetmoe"})
CAPTURES_SCALARS_FROM_2_13 = frozenset({"grounding-dino", "mm-grounding-dino"})
"""Models that read a number out of a tensor (`.item()`), for which Dynamo breaks the graph in the midst of an attention
or behind one that returns its weights. It says how to avoid that, `torch._dynamo.config.capture_scalar_outputs = True`,
and that is how their gradients are computed, by Inductor, too. PyTorch 2.11 cannot compile the last two so, without us
either."""


def captures_scalars(name: str, gradients: bool) -> bool:
    """Whether a model is compiled with that setting by this PyTorch; never without gradients."""
    is_new = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"
    return gradients and (name in CAPTURES_SCALARS or (is_new and name in CAPTURES_SCALARS_FROM_2_13))
