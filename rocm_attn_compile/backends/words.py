"""Specs in words and as plain data, for reports and messages."""

from __future__ import annotations

from typing import Any

import torch

from ..spec import AttentionSpec, CacheSpec, EmptyRows, LatentSpec, MaskSpec
from ..symbolic import Size, is_one, same_size, to_expr

DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


def dtype_name(dtype: torch.dtype) -> str:
    """The short name: "bf16" for torch.bfloat16."""
    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def words(spec: AttentionSpec) -> str:
    """The spec as one line, such as "causal GQA attention, 32 query heads on 8 kv heads of 128, q_len 512, ..."."""
    parts = [f"{_kind(spec)}, {_heads(spec)}"]
    if spec.latent is not None:
        parts.append(_latent(spec.latent))
    if not is_one(spec.batch):
        parts.append(f"batch {spec.batch}")
    parts += [f"q_len {spec.q_len}", f"kv_len {spec.kv_len}", dtype_name(spec.dtype), f"scale {spec.softmax_scale:.3g}"]
    if spec.cache is not None:
        parts.append(_cache(spec.cache, spec.dtype))
    if spec.logits_soft_cap is not None:
        parts.append(f"soft cap {spec.logits_soft_cap:g}")
    if spec.score_floor is not None:
        parts.append(f"scores at least their largest {spec.score_floor:+g}")
    if spec.has_bias:
        parts.append("bias with gradient" if spec.bias_requires_grad else "bias")
    if spec.has_alibi:
        parts.append("ALiBi")
    if spec.has_sinks:
        parts.append("learned sinks")
    if spec.dropout_p:
        parts.append(f"dropout {spec.dropout_p:g}")
    if spec.requires_grad:
        parts.append("training")
    if spec.returned_weights is not None:
        parts.append("with its weights as a second result")
    return ", ".join(parts)


def _kind(spec: AttentionSpec) -> str:
    upper = spec.mask.band_upper
    causal = "causal " if upper is not None and (_zero(upper) or same_size(_end(spec), upper)) else ""
    window = "windowed " if spec.mask.band_lower is not None else ""
    masked = "masked " if not (causal or window or spec.mask.is_none) else ""
    if spec.kind == "mla":
        family = "latent attention (MLA)"
    elif same_size(spec.num_heads, spec.num_kv_heads):
        family = "attention"
    else:
        family = "MQA attention" if is_one(spec.num_kv_heads) else "GQA attention"
    return f"{causal}{window}{masked}{family}"


def _heads(spec: AttentionSpec) -> str:
    dims = f"{spec.head_dim}"
    if not same_size(spec.head_dim, spec.v_head_dim):
        dims += f" (values of {spec.v_head_dim})"
    if same_size(spec.num_heads, spec.num_kv_heads):
        return f"{spec.num_heads} {'head' if is_one(spec.num_heads) else 'heads'} of {dims}"
    plural = "head" if is_one(spec.num_kv_heads) else "heads"
    return f"{spec.num_heads} query heads on {spec.num_kv_heads} kv {plural} of {dims}"


def _cache(cache: CacheSpec, dtype: torch.dtype) -> str:
    parts = [] if cache.dtype == dtype else [f" in {dtype_name(cache.dtype)}"]
    parts += [] if cache.block_size is None else [f" in blocks of {cache.block_size}"]
    return "keys and values read from a cache" + "".join(parts)


def _latent(latent: LatentSpec) -> str:
    parts = [f"latent {latent.kv_lora_rank}"]
    parts += [f"rope {latent.qk_rope_head_dim}"] if latent.qk_rope_head_dim != 0 else []
    parts += [f"nope {latent.qk_nope_head_dim}"] if latent.qk_nope_head_dim is not None else []
    return " + ".join(parts) + ("" if latent.block_size is None else f" in blocks of {latent.block_size}")


FORMS = {
    "prefill": "prefill form: the keys are not put together with k_pe",
    "absorbed": "absorbed form: every head reads the latent itself",
    "runtime": "the op chooses between the prefill and the absorbed form",
}


def latent_sentences(spec: AttentionSpec, block_size: int) -> tuple[str, ...]:
    """How a latent attention is computed by TRITON_MLA, for the report; none for another attention."""
    latent = spec.latent
    if latent is None:
        return ()
    where = "of the cache in the graph" if latent.block_size is not None else "of a paged cache, if there were one"
    sentences = [
        FORMS[latent.form] + (f" ({latent.form_reason})" if latent.form_reason else ""),
        f"block_size {block_size} {where}: TRITON_MLA takes any but 1, which is ROCM_AITER_MLA's",
    ]
    if spec.device == "cpu":
        sentences.append("on CPU tensors the op runs ATen, whatever the backend")
    return tuple(sentences)


EMPTY_ROWS_WORDS = {
    EmptyRows.IMPOSSIBLE: "every row keeps a key",
    EmptyRows.NAN: "a row without a key is NaN",
    EmptyRows.NAN_ADDED: "a row without a key is NaN, and so is the gradient of its scores",
    EmptyRows.ZERO: "a row without a key is 0",
    EmptyRows.MEAN: "a row without a key is the mean of v",
    EmptyRows.MEAN_ADDED: "a row without a key is the mean of v, its scores keep a gradient",
}


def mask_words(mask: MaskSpec) -> str:
    """The mask in words, whether it is proved in closed form, and what becomes of rows without a key."""
    if mask.is_none:
        return "none"
    proved = "partly opaque: a tensor is left" if mask.has_attn_mask else "proved"
    return f"{mask.text} ({proved}; {EMPTY_ROWS_WORDS[mask.empty_rows]})"


def spec_data(spec: AttentionSpec) -> dict[str, Any]:
    """The spec as JSON-able data: symbolic sizes are strings, enums their values."""
    mask = spec.mask
    return {
        "batch": _plain(spec.batch),
        "num_heads": _plain(spec.num_heads),
        "num_kv_heads": _plain(spec.num_kv_heads),
        "q_len": _plain(spec.q_len),
        "kv_len": _plain(spec.kv_len),
        "head_dim": _plain(spec.head_dim),
        "v_head_dim": _plain(spec.v_head_dim),
        "dtype": dtype_name(spec.dtype),
        "device": spec.device,
        "softmax_scale": spec.softmax_scale,
        "logits_soft_cap": spec.logits_soft_cap,
        "score_floor": spec.score_floor,
        "has_bias": spec.has_bias,
        "has_alibi": spec.has_alibi,
        "bias_requires_grad": spec.bias_requires_grad,
        "has_sinks": spec.has_sinks,
        "dropout_p": spec.dropout_p,
        "requires_grad": spec.requires_grad,
        "returned_weights": None if spec.returned_weights is None else spec.returned_weights.value,
        "cache": None if spec.cache is None else _cache_data(spec.cache),
        "latent": None if spec.latent is None else _latent_data(spec.latent),
        "mask": {
            "band_lower": _plain(mask.band_lower),
            "band_upper": _plain(mask.band_upper),
            "has_kv_start": mask.has_kv_start,
            "has_kv_end": mask.has_kv_end,
            "has_key_mask": mask.has_key_mask,
            "has_segment_ids": mask.has_segment_ids,
            "has_attn_mask": mask.has_attn_mask,
            "empty_rows": mask.empty_rows.value,
            "text": mask.text,
        },
    }


def _cache_data(cache: CacheSpec) -> dict[str, Any]:
    return {"block_size": _plain(cache.block_size), "dtype": dtype_name(cache.dtype), "has_scale": cache.has_scale}


def _latent_data(latent: LatentSpec) -> dict[str, Any]:
    sizes = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "block_size")
    return {**{name: _plain(getattr(latent, name)) for name in sizes}, "form": latent.form}


def _plain(size: Size | None) -> int | str | None:
    if size is None:
        return None
    expr = to_expr(size)
    return int(expr) if expr.is_Integer else str(expr)


def _zero(size: Size) -> bool:
    return same_size(size, 0)


def _end(spec: AttentionSpec) -> Size:
    return to_expr(spec.kv_len) - to_expr(spec.q_len)
