"""Limits shared by declarations: each names one cross-field rule and says with values how a spec breaks it.

Serving kernels (AITER, paged attention) align their masks bottom-right: query row q sits at position
`q + kv_len - q_len` of the keys. A band of the canonical op is top-left, so `k - q` is compared after that shift.
"""

from __future__ import annotations

import sympy
import torch

from ..env import Environment
from ..spec import AttentionSpec
from ..symbolic import Size, is_one, same_size, static, to_expr
from .base import Limit


def _shifted(bound: Size, spec: AttentionSpec) -> sympy.Expr:
    """The bound relative to the bottom-right diagonal; 0 is the diagonal itself."""
    return sympy.expand(to_expr(bound) - (to_expr(spec.kv_len) - to_expr(spec.q_len)))


def _causal_bottom_right(spec: AttentionSpec, env: Environment) -> str | None:
    upper = spec.mask.band_upper
    if upper is None:
        # One query that sees all keys is the last row of a bottom-right causal mask.
        return None if is_one(spec.q_len) else f"only causal; q_len={spec.q_len} rows see keys after their own"
    if same_size(_shifted(upper, spec), 0):
        return None
    return f"only bottom-right causal, k - q <= kv_len - q_len; this site keeps k - q <= {upper}"


CAUSAL_BOTTOM_RIGHT = Limit("causal_bottom_right", "causal only, aligned bottom-right", _causal_bottom_right)


def _window_bottom_right(spec: AttentionSpec, env: Environment) -> str | None:
    """The kernels take the number of keys left (and right) of the diagonal: non-negative constants."""
    lower, upper = spec.mask.band_lower, spec.mask.band_upper
    left = 0 if lower is None else static(-_shifted(lower, spec))
    right = 0 if upper is None else static(_shifted(upper, spec))
    if left is None or left < 0:
        return f"a window must reach back from the bottom-right diagonal by a constant; k - q >= {lower} does not"
    if right is None or right < 0:
        return f"a mask must reach the bottom-right diagonal and a constant past it; k - q <= {upper} does not"
    return None


WINDOW_BOTTOM_RIGHT = Limit(
    "window_bottom_right",
    "a window is a constant number of keys around the bottom-right diagonal",
    _window_bottom_right,
)

SOFT_CAP_FORWARD_ONLY = Limit(
    "soft_cap_backward",
    "no backward through a soft cap",
    lambda spec, env: (
        f"logits_soft_cap={spec.logits_soft_cap} has no backward here, and gradients are required"
        if spec.logits_soft_cap is not None and spec.requires_grad
        else None
    ),
)

MLA_DIMS = ((576, 512), (192, 128))
"""(head_dim, v_head_dim): absorbed on the latent cache (512 + 64 rope, values 512), and naive for prefill."""

MLA_SHAPES = Limit(
    "mla_dims",
    "head_dim/v_head_dim 576/512 (absorbed) or 192/128 (naive)",
    lambda spec, env: (
        None
        if (static(spec.head_dim), static(spec.v_head_dim)) in MLA_DIMS
        else f"head_dim={spec.head_dim} with v_head_dim={spec.v_head_dim}; takes 576 with 512, or 192 with 128"
    ),
)


def _latent_sizes(spec: AttentionSpec, env: Environment) -> str | None:
    """Sizes the Triton kernels have; on the CPU, without an explicit architecture, ATen takes any."""
    latent = spec.latent
    if latent is None:
        return "the latent is not known"
    if spec.device == "cpu" and not env.arch_is_explicit:
        return None
    rank, rope = static(latent.kv_lora_rank), static(latent.qk_rope_head_dim)
    if rank is None or not 1 <= rank <= 512:
        return f"kv_lora_rank={latent.kv_lora_rank}; takes up to 512"
    if rope is None or rope > 128:
        return f"qk_rope_head_dim={latent.qk_rope_head_dim}; takes up to 128"
    if latent.form != "absorbed":
        nope, value = (static(size or 0) for size in (latent.qk_nope_head_dim, latent.v_head_dim))
        if nope is None or value is None or nope + rope > 256 or value > 256:
            sizes = f"{latent.qk_nope_head_dim} + {rope} with v_head_dim={latent.v_head_dim}"
            return f"head_dim={sizes} in the {latent.form} form; takes up to 256 of both"
    size = latent.block_size
    if size is not None and static(size) != 1 and (static(size) is None or to_expr(size) % 16 != 0):
        return f"a cache in blocks of {size}; takes multiples of 16"
    return None


MLA_LATENT = Limit(
    "mla_latent",
    "kv_lora_rank up to 512, qk_rope_head_dim up to 128, expanded head sizes up to 256, blocks of 16, 32, ... rows",
    _latent_sizes,
)

MLA_HEADS = Limit(
    "mla_num_heads",
    "16 or 128 query heads",
    lambda spec, env: (
        None if static(spec.num_heads) in (16, 128) else f"num_heads={spec.num_heads}; kernels exist for 16 and 128"
    ),
)


def block_size_of(spec: AttentionSpec, env: Environment) -> int | None:
    """That of the paged cache in the graph, else the one given as an option; None is the default, 16."""
    paged = None if spec.latent is None or spec.latent.block_size is None else static(spec.latent.block_size)
    return env.block_size if paged is None else paged


def _block_size(spec: AttentionSpec, env: Environment) -> str | None:
    size = None if spec.cache is None else spec.cache.block_size
    # On the CPU, without an explicit architecture, ATen reads what was gathered.
    if size is None or (spec.device == "cpu" and not env.arch_is_explicit):
        return None
    number = static(size)
    return f"a cache in blocks of {size}; takes multiples of 16" if number is None or number % 16 else None


BLOCK_SIZE_16 = Limit("kv_block_size", "blocks of 16, 32, ... rows", _block_size)


def _float8(spec: AttentionSpec, env: Environment) -> str | None:
    if spec.cache is None or spec.cache.dtype == spec.dtype or (spec.device == "cpu" and not env.arch_is_explicit):
        return None
    arch = env.arch_for(spec.device) or env.device_arch
    if spec.cache.dtype == torch.float8_e4m3fnuz and arch != "gfx942":
        return f"float8_e4m3fnuz on {arch}; only gfx942 converts it, others take float8_e4m3fn and float8_e5m2"
    return None


FLOAT8 = Limit("float8", "float8_e4m3fn and float8_e5m2, on gfx942 also float8_e4m3fnuz", _float8)

BLOCK_SIZE_NOT_1 = Limit(
    "block_size",
    "block_size other than 1",
    lambda spec, env: "block_size=1; takes any other" if block_size_of(spec, env) == 1 else None,
)
