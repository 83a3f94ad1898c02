"""Specs for the backend tests: for each declaration one that it takes, and each feature and limit put on top of one.

Made from the declarations, so a changed declaration is tested as changed.
"""

from dataclasses import replace

import sympy
import torch

from rocm_attn_compile.backends.base import AttentionBackend
from rocm_attn_compile.env import AiterPackage, Environment
from rocm_attn_compile.spec import AttentionSpec, CacheSpec, EmptyRows, LatentSpec, MaskSpec

Q_LEN, KV_LEN = 64, 96
END = KV_LEN - Q_LEN
SYMBOL = sympy.Symbol("s0", integer=True, positive=True)

LATENT = LatentSpec(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)

EVERYTHING_INSTALLED = AiterPackage(is_amd=True, version="0.1.20")


def first_dim(dims):
    return dims.listed[0] if dims.listed else max(dims.low, 64)


def first_arch(backend):
    return {"*": "gfx942", "gfx*": "gfx942"}.get(backend.archs[0], backend.archs[0])


def taken_spec(backend: AttentionBackend) -> AttentionSpec:
    """The plainest spec it takes: only what its limits force is there (causal, MLA's sizes)."""
    head_dim = first_dim(backend.head_dims)
    return AttentionSpec(
        batch=2,
        num_heads=16,
        num_kv_heads=16,
        q_len=Q_LEN,
        kv_len=KV_LEN,
        head_dim=head_dim,
        v_head_dim=first_dim(backend.v_head_dims),
        dtype=backend.dtypes[0],
        device="cuda",
        softmax_scale=0.125,
        mask=MaskSpec(band_upper=END, text="causal"),
        kind=sorted(backend.kinds)[0],
        latent=LATENT if backend.kinds == {"mla"} else None,
    )


def good_env(backend: AttentionBackend, **changes) -> Environment:
    """A machine it runs on, with every package."""
    arch = first_arch(backend)
    values = {"arch": arch, "arch_source": "device", "device_arch": arch, "aiter": EVERYTHING_INSTALLED}
    return Environment(**{**values, **changes})


def with_mask(**changes):
    return lambda spec: replace(spec, mask=replace(spec.mask, **changes))


def with_spec(**changes):
    return lambda spec: replace(spec, **changes)


def with_latent(**changes):
    return lambda spec: replace(spec, latent=replace(spec.latent or LATENT, **changes))


def with_cache(block_size=None, dtype=None, has_scale=False):
    return lambda spec: replace(spec, cache=CacheSpec(block_size, dtype or spec.dtype, has_scale))


def other_v_head_dim(spec):
    return replace(spec, v_head_dim=spec.head_dim // 2)


# Feature code -> a spec with it, from a taken one.
FEATURE_EXAMPLES = {
    "gqa": with_spec(num_kv_heads=4),
    "v_head_dim_differs": other_v_head_dim,
    "negative_scale": with_spec(softmax_scale=-0.125),
    "logits_soft_cap": with_spec(logits_soft_cap=30.0),
    "score_floor": with_spec(score_floor=-50000.0),
    "sinks": with_spec(has_sinks=True),
    "attn_bias": with_spec(has_bias=True),
    "alibi": with_spec(has_alibi=True),
    "bias_gradient": with_spec(bias_requires_grad=True),
    "dropout": with_spec(dropout_p=0.1),
    "training": with_spec(requires_grad=True),
    "returned_weights": with_spec(returned_weights=EmptyRows.ZERO),
    "decode": lambda spec: replace(spec, q_len=1, mask=replace(spec.mask, band_upper=spec.kv_len - 1)),
    "band_upper": with_mask(band_upper=END),
    "band_lower": with_mask(band_lower=END - 15),
    "kv_start": with_mask(has_kv_start=True),
    "kv_end": with_mask(has_kv_end=True),
    "key_mask": with_mask(has_key_mask=True),
    "segment_ids": with_mask(has_segment_ids=True),
    "attn_mask": with_mask(has_attn_mask=True),
    "empty_rows_nan": with_mask(empty_rows=EmptyRows.NAN),
    "empty_rows_nan_added": with_mask(empty_rows=EmptyRows.NAN_ADDED),
    "empty_rows_zero": with_mask(empty_rows=EmptyRows.ZERO),
    "empty_rows_mean": with_mask(empty_rows=EmptyRows.MEAN),
    "empty_rows_mean_added": with_mask(empty_rows=EmptyRows.MEAN_ADDED),
    "paged_kv": with_cache(block_size=16),
    "float8_kv": with_cache(dtype=torch.float8_e4m3fn),
    "kv_scale": with_cache(has_scale=True),
    "symbolic_heads": with_spec(num_heads=SYMBOL, num_kv_heads=SYMBOL),
    "symbolic_lengths": lambda spec: replace(
        spec, batch=SYMBOL, q_len=SYMBOL, kv_len=SYMBOL + END, mask=replace(spec.mask, band_upper=END)
    ),
}

# Limit code -> (spec change, environment change) pairs, each breaking it alone.
LIMIT_EXAMPLES = {
    "causal_bottom_right": [
        (with_mask(band_upper=None), {}),
        (with_mask(band_upper=0), {}),
        (with_mask(band_upper=END + 1), {}),
        (with_mask(band_upper=END - 1), {}),
        (with_mask(band_upper=SYMBOL), {}),
    ],
    "window_bottom_right": [
        (with_mask(band_lower=END + 1), {}),
        (with_mask(band_lower=-SYMBOL), {}),
        (with_mask(band_upper=END - 1), {}),
        (with_mask(band_upper=SYMBOL), {}),
    ],
    "soft_cap_backward": [(with_spec(logits_soft_cap=30.0, requires_grad=True), {})],
    "mla_dims": [(with_spec(head_dim=576, v_head_dim=128), {}), (with_spec(head_dim=192, v_head_dim=512), {})],
    "mla_num_heads": [(with_spec(num_heads=heads, num_kv_heads=heads), {}) for heads in (8, 17, 64)],
    "mla_latent": [
        (with_spec(latent=None), {}),
        (with_latent(kv_lora_rank=513), {}),
        (with_latent(kv_lora_rank=SYMBOL), {}),
        (with_latent(qk_rope_head_dim=129), {}),
        (with_latent(qk_nope_head_dim=200), {}),
        (with_latent(v_head_dim=257, form="runtime"), {}),
        (with_latent(block_size=24, form="absorbed"), {}),
    ],
    "kv_block_size": [(with_cache(block_size=size), {}) for size in (8, 24, SYMBOL)],
    "float8": [(with_cache(dtype=torch.float8_e4m3fnuz), {"arch": "gfx950", "device_arch": "gfx950"})],
    "block_size": [(with_spec(), {"block_size": 1}), (with_latent(block_size=1, form="absorbed"), {})],
}
