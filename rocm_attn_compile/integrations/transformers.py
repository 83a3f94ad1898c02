"""Latent attention (MLA) of Hugging Face models out of a latent cache, without expanding it.

    model = use_latent_cache(model)

Models of DeepSeek's kind keep one latent of `kv_lora_rank + qk_rope_head_dim` values a token and layer in their cache,
but expand all of it into keys and values per head at every step. After the line above, `rocm_attn::mla` reads the
latents instead, and `model.generate()` uses a static cache unless told otherwise. Any cache of transformers does; the
weights stay where they are. With gradients enabled the model is what it was, with `attn_implementation="sdpa"`.

How: transformers keeps attention and masks behind registries. We register one of each, and replace the method that
expands the cache. `generate()` lets no mask through but a 4-D tensor, so what closed form has is packed into one:

- None: causal, and there are M keys.
- uint8 `(B or 1, 1, 1, N)`: causal, the last query with the last of N keys, and a key mask; a static cache may be
  longer. int8 of one batch: the same without a key mask.
- int32 `(B or 1, 1, 1, M)`: each query's end among the keys, from the length of a static cache on its device; or
  `(B, 1, 1, N + M)`: the same behind a key mask.

Letters: B batch, H query heads, M q_len, N kv_len, P qk_nope_head_dim, R qk_rope_head_dim, C kv_lora_rank,
E v_head_dim.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from rocm_attn_compile import ops
from rocm_attn_compile.backends.fingerprint import sources_digest
from rocm_attn_compile.ops.impl import MARK

__all__ = ["NAME", "SUPPORTED", "use_latent_cache"]

NAME = "rocm_attn_mla"
"""The `attn_implementation` that `use_latent_cache` sets."""

SUPPORTED = (
    "AXK1Attention",
    "BailingHybridAttention",
    "DeepseekV2Attention",
    "DeepseekV3Attention",
    "Glm4MoeLiteAttention",
    "KimiLinearAttention",
    "LongcatFlashMLA",
    "MiniCPM3Attention",
    "Mistral4Attention",
    "YoutuAttention",
)
"""Attention classes of transformers for which it is tested. Others of its MLA classes select keys by an indexer."""

_MARK = "reads_latents"
# With a hash of the op's sources: what compilers make of it stays in their caches under this name.
_IMPL = f"TRITON_MLA@{sources_digest()[:16]}{MARK}"


def use_latent_cache(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Let a model's latent attention read its cache as it is. Changes the model in place, and returns it.

    Args:
        model: A model with an attention of `SUPPORTED`, on any device. Other attention layers that it may have are left
            to `F.scaled_dot_product_attention`.

    Raises:
        ValueError: No layer is latent attention.
        NotImplementedError: A latent attention is of another class, its weights are not a plain `nn.Linear`, or this
            version of transformers keeps expanded keys and values, or expands latents in a way we do not know.
    """
    layers = [module for module in model.modules() if hasattr(module, "kv_a_proj_with_mqa")]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no latent attention (no layer with kv_a_proj_with_mqa); models with one have "
            f"layers of {', '.join(SUPPORTED)}"
        )
    for layer in layers:
        _check(layer)
    model.set_attn_implementation(NAME)
    for layer in layers:
        setattr(layer, _MARK, True)
        layer.expand_kv = types.MethodType(_expand_kv, layer)  # type: ignore[assignment]
    config = getattr(model, "generation_config", None)
    if config is not None and config.cache_implementation is None:
        config.cache_implementation = "static"
    return model


def _check(layer: Any) -> None:
    name = type(layer).__name__
    if name not in SUPPORTED or not type(layer).__module__.startswith("transformers."):
        reason = " selects keys by an indexer" if hasattr(layer, "indexer") else " is not known"
        raise NotImplementedError(f"the latent attention {name}{reason}; allowed are {', '.join(SUPPORTED)}")
    if not hasattr(layer, "expand_kv"):
        raise NotImplementedError(
            f"{name} of transformers {transformers.__version__} caches expanded keys and values; update transformers, "
            "5.17 is known to cache latents"
        )
    w_uk, w_uv = _weights(layer)
    if w_uk.is_meta:
        return
    # Some numbers; not random ones, which would take from the user's generator.
    C, R = w_uk.shape[2], layer.qk_rope_head_dim
    some = torch.arange(2 * (C + R), device=w_uk.device).sin().to(w_uk.dtype).view(1, 1, 2, C + R)
    latent, rope = some.split([C, R], 3)
    with torch.no_grad():
        key, value = layer.expand_kv(latent, rope)
        ours = torch.cat([latent @ w_uk.mT, rope.expand(-1, w_uk.shape[0], -1, -1)], -1), latent @ w_uv.mT
    for got, want in zip(ours, (key, value)):
        # Another layout is another matrix; rounding, also to tf32, is far less.
        if got.shape != want.shape or bool((got - want).abs().max() > 0.05 * want.abs().max()):
            raise NotImplementedError(
                f"{name} of transformers {transformers.__version__} expands its latent in a new way"
            )


def _weights(layer: Any) -> tuple[Tensor, Tensor]:
    """W_uk `(H, P, C)` and W_uv `(H, E, C)`, views of the layer's weight.

    Raises:
        NotImplementedError: It is not plain: quantized, sharded, or with an adapter.
    """
    linear = layer.kv_b_proj
    if type(linear) is not nn.Linear or linear.bias is not None or not linear.weight.is_floating_point():
        raise NotImplementedError(
            f"kv_b_proj of {type(layer).__name__} is {type(linear).__name__}; a latent cache needs a plain nn.Linear "
            "without bias: merge adapters, leave it out of quantization"
        )
    P, E = layer.qk_nope_head_dim, layer.v_head_dim
    # Not unflatten: Dynamo of torch 2.11 cannot trace it inside `with torch.device(...)`.
    w_uk, w_uv = linear.weight.view(-1, P + E, linear.in_features).split([P, E], 1)
    return w_uk, w_uv


def _reads_latents(layer: Any) -> bool:
    return getattr(layer, _MARK, False) and not torch.is_grad_enabled()


def _expand_kv(layer: Any, kv_c: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
    """In the place of a layer's `expand_kv`: the latents `(B, 1, N, C)` and `(B, 1, N, R)` as they are."""
    if _reads_latents(layer):
        return kv_c, k_pe
    return type(layer).expand_kv(layer, kv_c, k_pe)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> Tensor | None:
    """transformers' mask interface: a causal mask packed, another one as SDPA takes it, None for causal alone."""
    if mask_function is not causal_mask_function or kv_offset != 0:
        offsets: Any = (q_offset, kv_offset)
        settings |= {"mask_function": mask_function, "attention_mask": attention_mask, "device": device}
        return sdpa_mask(batch_size, q_length, kv_length, *offsets, **settings)
    if isinstance(q_offset, int):
        if attention_mask is None and q_offset == 0 and kv_length == q_length:
            return None
        kv_length = q_offset + q_length
        if attention_mask is None:
            return torch.zeros(1, dtype=torch.int8, device=device).expand(1, 1, 1, kv_length)
    if attention_mask is not None:
        missing = kv_length - attention_mask.shape[1]
        key_mask = nn.functional.pad(attention_mask, (0, missing))  # or cut, if it is negative
        if isinstance(q_offset, int):
            return key_mask.to(torch.uint8)[:, None, None]
    end = (torch.arange(1, q_length + 1, device=device) + q_offset).to(torch.int32)[None]
    if attention_mask is not None:
        end = torch.cat([key_mask.to(torch.int32), end.expand(key_mask.shape[0], -1)], 1)
    return end[:, None, None]


def _unpacked(mask: Tensor, q_len: int, kv_len: int) -> tuple[dict[str, Any], int]:
    """A mask as arguments of the op, none if it is not a packed one, and how many of the keys they are about."""
    if mask.dtype in (torch.int8, torch.uint8):
        kv_len = mask.shape[3]
        key_mask = {} if mask.dtype == torch.int8 else {"key_mask": mask[:, 0, 0].bool()}
        return {**key_mask, "band_upper": kv_len - q_len}, kv_len
    if mask.dtype != torch.int32:
        return {}, kv_len
    keys, end = mask[:, 0, 0].tensor_split([mask.shape[3] - q_len], 1)
    return {"kv_end": end} if keys.shape[1] == 0 else {"key_mask": keys.bool(), "kv_end": end}, kv_len


def _dense(
    kv_len: int,
    q_len: int,
    device: torch.device,
    key_mask: Tensor | None = None,
    kv_end: Tensor | None = None,
    band_upper: int = 0,
) -> Tensor:
    """An unpacked mask as SDPA takes it, bool `(B or 1, 1, M, N)`."""
    if kv_end is None:
        kv_end = torch.arange(1 + band_upper, q_len + 1 + band_upper, device=device)[None]
    keep = torch.arange(kv_len, device=device) < kv_end[:, None, :, None]
    return keep if key_mask is None else keep & key_mask[:, None, None, :]


def _attention(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **settings: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query `(B, H, M, P + R)`, key and value as `_expand_kv` leaves them.

    Returns:
        `(B, M, H, E)`, and no weights.
    """
    masks: dict[str, Any] = {"band_upper": 0}
    if attention_mask is not None:
        masks, kv_len = _unpacked(attention_mask, query.shape[2], key.shape[2])
        key, value = key[:, :, :kv_len], value[:, :, :kv_len]
    if not (masks and _reads_latents(layer) and not dropout):
        if attention_mask is not None and masks:
            attention_mask = _dense(key.shape[2], query.shape[2], query.device, **masks)
        if _reads_latents(layer):
            key, value = type(layer).expand_kv(layer, key, value)
        return sdpa_attention_forward(layer, query, key, value, attention_mask, dropout, scaling, **settings)
    w_uk, w_uv = _weights(layer)
    q_nope, q_pe = query.split([w_uk.shape[1], query.shape[3] - w_uk.shape[1]], 3)
    tensors: tuple[Tensor, ...] = (q_nope, q_pe, key[:, 0], value[:, 0], w_uk, w_uv)
    if torch.is_autocast_enabled(query.device.type):
        # The op leaves calls with an `impl` alone.
        dtype = torch.get_autocast_dtype(query.device.type)
        tensors = tuple(tensor.to(dtype) for tensor in tensors)
    out, _ = ops.mla(*tensors, softmax_scale=scaling, empty_rows="zero", out_layout="bshd", impl=_IMPL, **masks)
    return out.transpose(1, 2), None


ops.register()
AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
