"""What a launch knows of a KV cache beyond k and v: a block table if it is paged, and the scales of narrower numbers.

k and v of a paged cache are `(num_blocks, K, block_size, D)` and the keys of batch entry b those of the blocks
`block_table[b]`, one after the other. Letters as in attention.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import DTYPES, Layout, broadcast_strides, check_modes, layout

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)
"""What a cache may hold besides the dtype of the queries."""

MIN_PAGE = 16
"""The least block size, of which all others are multiples; combine.py reads as many keys at once."""


def is_cache(q: Tensor, k: Tensor, block_table: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None) -> bool:
    """Whether keys and values are more than `(B, K, N, D)` and `(B, K, N, E)` of the queries' dtype."""
    return any(x is not None for x in (block_table, k_scale, v_scale)) or k.dtype in FP8


class CacheLayout(NamedTuple):
    """All that a plan depends on: layouts of block_table `(B, max_blocks)`, k_scale and v_scale; dtype of k and v."""

    block_table: Layout = None
    k_scale: Layout = None
    v_scale: Layout = None
    dtype: torch.dtype | None = None

    @property
    def feature(self) -> str:
        """The suffix of its rows in the configuration tables, see configs.TABLES."""
        words = ["float8"] if self.dtype in FP8 else []
        return "_".join(words + ([] if self.block_table is None else ["pages"]))

    def sequences(self, cache: Layout, batch: int) -> Layout:
        """The sizes of k or v as they would be without pages; the first stride stays that of a block."""
        if self.block_table is None or cache is None:
            return cache
        (_, kv_heads, block_size, width), strides = cache
        return torch.Size((batch, kv_heads, self.block_table[0][1] * block_size, width)), strides

    def arguments(self, k: Layout) -> dict[str, Any]:
        """The kernels' arguments that depend on it."""
        assert k is not None
        table = (None, None) if self.block_table is None else self.block_table[1]
        scales = [None if scale is None else broadcast_strides(scale, 1)[0] for scale in (self.k_scale, self.v_scale)]
        return {
            "stride_tb": table[0], "stride_tn": table[1], "stride_k_scale": scales[0], "stride_v_scale": scales[1],
            "num_blocks": None if self.block_table is None else k[0][0],
            "PAGE": 0 if self.block_table is None else k[0][2],
            "HAS_K_SCALE": self.k_scale is not None, "HAS_V_SCALE": self.v_scale is not None,
        }  # fmt: skip


NO_CACHE = CacheLayout()

COMBINE_NAMES = ("stride_tb", "stride_tn", "stride_v_scale", "num_blocks", "PAGE", "HAS_V_SCALE")
"""Those of the arguments that combine.py's kernel takes, too."""


def cache_layout(k: Tensor, block_table: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None) -> CacheLayout:
    """The layout of a call's cache."""
    return CacheLayout(layout(block_table), layout(k_scale), layout(v_scale), k.dtype)


def check_cache(
    q: Tensor, k: Tensor, v: Tensor, kv_end: Tensor | None, block_table: Tensor | None, k_scale: Tensor | None,
    v_scale: Tensor | None, dropout_p: float, empty_rows: str, out_layout: str, arch: str,
) -> None:  # fmt: skip
    """Raise on a cache that the kernels cannot read.

    Raises:
        ValueError: Sizes that do not fit, or a paged cache without kv_end.
        NotImplementedError: A dtype or block size outside what the kernels were built for, or dropout.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v must be 4-D; got {q.dim()}-D, {k.dim()}-D, {v.dim()}-D")
    (batch, heads, _, head_dim), (_, kv_heads, block_size, _) = q.shape, k.shape
    if k.shape[3] != head_dim or v.shape[:3] != k.shape[:3] or (block_table is None and k.shape[0] != batch):
        raise ValueError(f"k and v must fit q: got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads; got {kv_heads} and {heads}")
    check_modes(head_dim, v.shape[3], empty_rows, out_layout)
    known = (q.dtype, *FP8) if q.dtype.itemsize == 2 else (q.dtype,)
    if q.dtype not in DTYPES or k.dtype not in known or k.dtype != v.dtype:
        raise NotImplementedError(
            "q must be float16, bfloat16 or float32, and k and v the same, or with 16-bit queries a float8 dtype; got "
            f"{q.dtype}, {k.dtype}, {v.dtype}"
        )
    if k.dtype == torch.float8_e4m3fnuz and arch.startswith("sm"):
        raise NotImplementedError("NVIDIA GPUs have no float8_e4m3fnuz; convert the cache to float8_e4m3fn")
    if dropout_p > 0.0:
        raise NotImplementedError("dropout is for training, which has no cache")
    if block_table is not None:
        if kv_end is None:
            raise ValueError("a paged cache needs kv_end, the number of keys of each sequence")
        if (
            block_table.dim() != 2
            or block_table.shape[0] != batch
            or block_table.dtype not in (torch.int32, torch.int64)
        ):
            raise ValueError(
                f"block_table must be int32 or int64 ({batch}, max_blocks); got {block_table.dtype} "
                f"{tuple(block_table.shape)}"
            )
        if block_size < MIN_PAGE or block_size % MIN_PAGE:
            raise NotImplementedError(f"block_size must be a multiple of {MIN_PAGE}; got {block_size}")
