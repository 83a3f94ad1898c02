"""Attention of x-transformers, vit-pytorch and diffusers, whose classes have no common configuration: a list each."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from .judge import Case
from .randomize import randomize

X_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "encoder": {"_layers": "Encoder"},
    "rotary": {"rotary_pos_emb": True},
    "xpos": {"rotary_xpos": True},
    "alibi": {"alibi_pos_bias": True},
    "t5_bias": {"rel_pos_bias": True},
    "dynamic_bias": {"dynamic_pos_bias": True},
    "multi_query": {"attn_one_kv_head": True},
    "grouped_query": {"attn_kv_heads": 2},
    "qk_norm": {"attn_qk_norm": True},
    "qk_rmsnorm": {"attn_qk_rmsnorm": True},
    "memory_kv": {"attn_num_mem_kv": 3},
    "zero_kv": {"attn_add_zero_kv": True},
    "learned_sinks": {"attn_head_learned_sink": True},
    "soft_clamp": {"attn_softclamp_logits": True},
    "gated_values": {"attn_gate_values": True},
    "head_scale": {"attn_head_scale": True},
    "talking_heads_before": {"attn_pre_talking_heads": True},
    "talking_heads_after": {"attn_post_talking_heads": True},
    "sparse_topk": {"attn_sparse_topk": 4},
    "max_attend_past": {"attn_max_attend_past": 5},
    "l2_distance": {"attn_l2_distance": True},
    "sigmoid": {"attn_sigmoid": True},
    "data_dependent_alibi": {"attn_data_dependent_alibi": True},
    "cope": {"attn_use_cope": True},
    "laser": {"attn_laser": True},
    "selective": {"attn_selective": True},
    "latent_kv": {"attn_use_latent_kv": True, "attn_dim_latent_kv": 24},
    "on_attention": {"attn_on_attn": True},
    "residual_attention": {"residual_attn": True},
    "macaron": {"macaron": True},
    "cross": {"_layers": "CrossAttender"},
}

VIT_PYTORCH: dict[str, dict[str, Any]] = {
    "vit.ViT": {},
    "simple_vit.SimpleViT": {},
    "deepvit.DeepViT": {},
    "cait.CaiT": {"depth": 2, "cls_depth": 2},
    "parallel_vit.ViT": {"num_parallel_branches": 2},
    "learnable_memory_vit.ViT": {},
    "local_vit.LocalViT": {},
    "rvt.RvT": {},
    "vit_for_small_dataset.ViT": {},
    "vit_with_patch_dropout.ViT": {},
    "vit_with_patch_merger.ViT": {"patch_merge_layer": 1, "patch_merge_num_tokens": 4},
    "simple_vit_with_qk_norm.SimpleViT": {},
    "simple_vit_with_register_tokens.SimpleViT": {},
    "simple_vit_with_fft.SimpleViT": {"freq_patch_size": 8},
    "simple_vit_with_value_residual.SimpleViT": {},
    "normalized_vit.nViT": {},
    "jumbo_vit.JumboViT": {"num_jumbo_cls": 1, "jumbo_cls_k": 2, "jumbo_ff_mult": 1},
    "efficient.ViT": {"_transformer": True},
    "cct.CCT": {"_only": {"img_size": 32, "embedding_dim": 64, "num_layers": 2, "num_heads": 4, "num_classes": 10}},
    "cvt.CvT": {"_only": {"num_classes": 10, "s1_emb_dim": 32, "s2_emb_dim": 48, "s3_emb_dim": 64, "s3_depth": 2}},
    "cross_vit.CrossViT": {"_only": {"image_size": 32, "num_classes": 10, "sm_dim": 32, "lg_dim": 48}},
    "crossformer.CrossFormer": {"_only": {"dim": (16, 32, 48, 64), "depth": (1, 1, 1, 1)}, "_size": 224},
    "levit.LeViT": {
        "_only": {
            "image_size": 64, "num_classes": 10, "dim": (32, 48, 64), "depth": 1, "heads": (2, 3, 4), "mlp_mult": 2,
        },
        "_size": 64,
    },
    "max_vit.MaxViT": {"_only": {"num_classes": 10, "dim": 32, "depth": (1, 1), "window_size": 4}, "_size": 32},
    "mobile_vit.MobileViT": {
        "_only": {
            "image_size": (64, 64), "dims": [32, 48, 64], "num_classes": 10,
            "channels": [8, 8, 16, 16, 24, 24, 32, 32, 48, 48, 64],
        },
        "_size": 64,
    },
    "nest.NesT": {
        "_only": {
            "image_size": 32, "patch_size": 4, "dim": 16, "heads": 2, "num_hierarchies": 2, "block_repeats": (1, 1),
            "num_classes": 10,
        },
    },
    "pit.PiT": {"_only": {"image_size": 32, "patch_size": 8, "dim": 64, "num_classes": 10, "depth": (1, 1), "heads": 4,
                          "mlp_dim": 96}},
    "regionvit.RegionViT": {"_only": {"dim": (16, 32, 48, 64), "depth": (1, 1, 1, 1), "num_classes": 10}, "_size": 224},
    "scalable_vit.ScalableViT": {
        "_only": {
            "num_classes": 10, "dim": 16, "heads": (2, 2, 2, 2), "depth": (1, 1, 1, 1), "ssa_dim_key": (8, 8, 8, 8),
            "reduction_factor": (4, 2, 1, 1), "window_size": (8, 4, None, None),
        },
        "_size": 64,
    },
    "sep_vit.SepViT": {
        "_only": {"num_classes": 10, "dim": 16, "depth": (1, 1, 1), "heads": (1, 2, 4), "window_size": 7}, "_size": 224,
    },
    "t2t.T2TViT": {"_only": {"image_size": 64, "num_classes": 10, "dim": 64, "depth": 2, "heads": 4, "mlp_dim": 96},
                   "_size": 64},
    "twins_svt.TwinsSVT": {"_only": {"num_classes": 10, "s1_emb_dim": 16, "s2_emb_dim": 32, "s3_emb_dim": 48,
                                     "s4_emb_dim": 64, "s3_depth": 1, "s4_depth": 1}, "_size": 224},
    "xcit.XCiT": {"depth": 2, "cls_depth": 1},
    "vit_5.ViT": {},
    "es_vit.EsViT": {},
}  # fmt: skip

DIFFUSERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "UNet2DConditionModel": (
        {
            "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 24, "attention_head_dim": 4,
        },
        {"sample": (2, 4, 8, 8), "timestep": 3, "encoder_hidden_states": (2, 7, 24)},
    ),
    "UNet2DModel": (
        {
            "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
            "down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        },
        {"sample": (2, 3, 8, 8), "timestep": 3},
    ),
    "AutoencoderKL": (
        {"block_out_channels": (16,), "norm_num_groups": 8, "sample_size": 16},
        {"sample": (2, 3, 16, 16)},
    ),
    "DiTTransformer2DModel": (
        {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2, "sample_size": 8,
         "norm_num_groups": 8},
        {"hidden_states": (2, 4, 8, 8), "timestep": "long", "class_labels": "long"},
    ),
    "PixArtTransformer2DModel": (
        {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "caption_channels": 24,
         "cross_attention_dim": 64, "norm_num_groups": 8},
        {"hidden_states": (2, 4, 8, 8), "timestep": "long", "encoder_hidden_states": (2, 7, 24)},
    ),
    "SD3Transformer2DModel": (
        {"sample_size": 8, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
         "caption_projection_dim": 64, "pos_embed_max_size": 8,
         "joint_attention_dim": 24, "pooled_projection_dim": 32, "in_channels": 4, "out_channels": 4},
        {"hidden_states": (2, 4, 8, 8), "timestep": "long", "encoder_hidden_states": (2, 7, 24),
         "pooled_projections": (2, 32)},
    ),
    "Transformer2DModel": (
        {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 16, "num_layers": 2, "norm_num_groups": 8,
         "cross_attention_dim": 24},
        {"hidden_states": (2, 16, 8, 8), "encoder_hidden_states": (2, 7, 24)},
    ),
    "PriorTransformer": (
        {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "embedding_dim": 24, "num_embeddings": 7,
         "additional_embeddings": 4},
        {"hidden_states": (2, 24), "timestep": 3, "proj_embedding": (2, 24), "encoder_hidden_states": (2, 7, 24)},
    ),
    "FluxTransformer2DModel": (
        {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
         "num_attention_heads": 4, "joint_attention_dim": 24, "pooled_projection_dim": 24, "axes_dims_rope": (4, 4, 8)},
        {"hidden_states": (2, 16, 4), "encoder_hidden_states": (2, 7, 24), "pooled_projections": (2, 24),
         "timestep": "float", "img_ids": (16, 3), "txt_ids": (7, 3)},
    ),
}  # fmt: skip


def names() -> list[str]:
    """All cases by "package/name"."""
    return [
        *(f"x-transformers/{name}" for name in X_TRANSFORMERS),
        *(f"vit-pytorch/{name}" for name in VIT_PYTORCH),
        *(f"diffusers/{name}" for name in DIFFUSERS),
    ]


def case(name: str, attention: str, padded: bool, gradients: bool) -> tuple[Case, dict[str, Any]]:
    """Build one; raises whatever the package does where it cannot be built."""
    package, _, what = name.partition("/")
    make = {"x-transformers": _x_transformers, "vit-pytorch": _vit_pytorch, "diffusers": _diffusers}[package]
    torch.manual_seed(0)
    model, arguments = make(what, attention, padded)
    model.eval()
    randomize(model)
    with torch.no_grad():
        model(**arguments)
    return Case(model, arguments, gradients), {"class": type(model).__name__, "inputs": list(arguments)}


def _x_transformers(name: str, attention: str, padded: bool) -> tuple[nn.Module, dict[str, Any]]:
    package = importlib.import_module("x_transformers")
    settings = dict(X_TRANSFORMERS[name])
    layers = settings.pop("_layers", "Decoder")
    stack = getattr(package, layers)(
        dim=64, depth=2, heads=4, attn_dim_head=16, attn_flash=attention == "sdpa", **settings
    )
    if layers == "CrossAttender":
        return stack, {"x": torch.randn(2, 11, 64), "context": torch.randn(2, 7, 64)}
    model = package.TransformerWrapper(num_tokens=99, max_seq_len=32, attn_layers=stack)
    arguments: dict[str, Any] = {"x": torch.randint(0, 99, (2, 11))}
    if padded:
        arguments["mask"] = torch.arange(11) < torch.tensor([[11], [8]])
    return model, arguments


def _vit_pytorch(name: str, attention: str, padded: bool) -> tuple[nn.Module, dict[str, Any]]:
    if attention == "sdpa":
        raise NotImplementedError("vit-pytorch writes its attention out")
    module, _, class_name = name.partition(".")
    model_class = getattr(importlib.import_module(f"vit_pytorch.{module}"), class_name)
    settings = dict(VIT_PYTORCH[name])
    size = settings.pop("_size", 32)
    usual = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 64, "depth": 2, "heads": 4, "mlp_dim": 96}
    model = model_class(**settings.pop("_only", None) or {**usual, **settings})
    return model, {next(iter(_parameters(model))): torch.randn(2, 3, size, size)}


def _diffusers(name: str, attention: str, padded: bool) -> tuple[nn.Module, dict[str, Any]]:
    package = importlib.import_module("diffusers")
    config, shapes = DIFFUSERS[name]
    model = getattr(package, name)(**config)
    if attention == "eager":
        from diffusers.models.attention_processor import Attention, AttnProcessor

        for module in model.modules():
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor())
    return model, {key: _make(value) for key, value in shapes.items()}


def _make(what: Any) -> Tensor | int:
    if what == "long":
        return torch.tensor([3, 5])
    if what == "float":
        return torch.tensor([0.3, 0.5])
    return torch.randn(what) if isinstance(what, tuple) else what


def _parameters(model: nn.Module) -> list[str]:
    import inspect

    return list(inspect.signature(model.forward).parameters)
