"""The launches of an attention, for an architecture that need not be here: to compile and to measure, not to run."""

from __future__ import annotations

from typing import Any

import torch

from . import configs
from .backward_launch import backward_launches
from .forward_launch import forward_launches
from .launch import Launch, Tuning
from .weights_launch import weights_launch


def launches(
    arch: str,
    dtype: torch.dtype,
    head_dim: int,
    v_head_dim: int | None = None,
    q_len: int = 1024,
    kv_len: int = 1024,
    causal: bool = True,
    backward: bool = True,
    num_splits: int | None = None,
    config: configs.KernelConfig | None = None,
    batch: int = 2,
    num_heads: int = 8,
    num_kv_heads: int = 2,
    tuning: Tuning | None = None,
    **features: Any,
) -> dict[str, Launch]:
    """The launches of one call on meta tensors, by kernel name.

    Args:
        arch: "gfx942" and so on.
        dtype: Of q, k, v.
        head_dim, v_head_dim, q_len, kv_len, batch, num_heads, num_kv_heads: Sizes.
        causal: Top-left aligned.
        backward: Whether the gradients' launches are wanted too.
        num_splits, config: As in launch.Tuning.
        tuning: All of it, with `arch`.
        features: Names of the op's optional tensors, with a true value; `soft_cap`, `band_lower`, `dropout_p`,
            `empty_rows`; `weights`, whether they are a second result; `page`, the block size of a paged cache, and
            `kv_dtype` and `scale` of narrower numbers.
    """
    sizes = {"B": batch, "H": num_heads, "M": q_len, "N": kv_len}
    page, kv_dtype = features.get("page"), features.get("kv_dtype", dtype)
    entries, rows = (2 * batch * kv_len // page, page) if page else (batch, kv_len)
    q = torch.empty((batch, num_heads, q_len, head_dim), dtype=dtype, device="meta")
    # The heads of a token lie side by side.
    k, v = (
        torch.empty((entries, rows, num_kv_heads, width), dtype=kv_dtype, device="meta").transpose(1, 2)
        if page
        else torch.empty((batch, num_kv_heads, kv_len, width), dtype=kv_dtype, device="meta")
        for width in (head_dim, v_head_dim or head_dim)
    )
    tensors: dict[str, Any] = {"q": q, "k": k, "v": v}
    cache = {
        "block_table": torch.empty((batch, kv_len // page), dtype=torch.int32, device="meta") if page else None,
        **dict.fromkeys(
            ("k_scale", "v_scale"), torch.empty(num_kv_heads, device="meta") if features.get("scale") else None
        ),
    }
    kinds = {
        "attn_bias": ("BHMN", dtype), "attn_mask": ("BHMN", torch.bool), "key_mask": ("BN", torch.bool),
        "kv_start": ("BM", torch.int32), "kv_end": ("BM", torch.int64), "q_ids": ("BM", torch.int32),
        "kv_ids": ("BN", torch.int32), "sinks": ("H", dtype), "dropout_seed": ("", torch.int64),
        "alibi_slopes": ("H", torch.float32),
    }  # fmt: skip
    for name, (letters, kind) in kinds.items():
        wanted = features.get(name, name == "dropout_seed" and features.get("dropout_p"))
        tensors[name] = torch.empty([sizes[x] for x in letters], dtype=kind, device="meta") if wanted else None
    scalars = {
        "softmax_scale": 0.1,
        "logits_soft_cap": features.get("soft_cap"),
        "band_lower": features.get("band_lower"),
        "band_upper": 0 if causal else None,
        "dropout_p": features.get("dropout_p", 0.0),
        "empty_rows": features.get("empty_rows", "impossible"),
    }
    tuning = tuning or Tuning(arch=arch, num_splits=num_splits, config=config)
    found, out, lse = forward_launches(**tensors, **scalars, out_layout="bhsd", tuning=tuning, **cache)
    if backward:
        found += backward_launches(
            torch.empty_like(out), **tensors, out=out, lse=lse, **scalars, output_mask=[True] * 5, tuning=tuning
        )[0]
    if features.get("weights"):
        weights = torch.empty((batch, num_heads, q_len, kv_len), dtype=dtype, device="meta")
        found.append(weights_launch(tensors, scalars, lse, weights, scalars["empty_rows"], tuning))
    return {launch.kernel.__name__: launch for launch in found}
