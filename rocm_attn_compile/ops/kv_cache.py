"""Keys and values in a cache: in pages, or as narrower numbers with a scale. What they are as plain tensors.

The op `attention` takes them by the arguments

    block_table   (B, max_blocks) int32 or int64: k and v are `(num_blocks, K, block_size, D)`, and the keys of batch
                  entry b are those of the blocks block_table[b], one after the other; a negative number counts from
                  the end. kv_len is max_blocks * block_size. Needs kv_end; behind it the table must hold blocks, too.
    k_scale, v_scale   (K,) or (1,): k and v are multiplied with it. They may then be float8.

Only a kernel for GPUs reads a cache as it is. Everything else, gradients included, is done with what `resolve` gives.

Letters as in schemas.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rocm_attn_compile.ops.checks import DTYPES, INTEGERS, check, check_dtype, check_shape

CACHE_TENSORS = ("block_table", "k_scale", "v_scale")
"""The last tensor arguments of the op."""

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)


_KV_END = 7
"""Its place among the op's arguments."""


def resolved(tensors: tuple, count: int) -> tuple:
    """The tensors of a call on plain keys and values: the first `count`, without those of a cache."""
    if len(tensors) <= count:
        return tensors
    table, k_scale, v_scale = (*tensors[count:], None, None)[:3]
    if table is k_scale is v_scale is None:
        return tensors[:count]
    q, k, v, *others = tensors[:count]
    check_cache(q, k, v, tensors[_KV_END], table, k_scale, v_scale)
    return (q, resolve(k, table, k_scale, q.dtype), resolve(v, table, v_scale, q.dtype), *others)


def resolve(cache: Tensor, block_table: Tensor | None, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys or values `(B, K, N, X)` of a cache, in the queries' dtype; differentiable."""
    if block_table is not None:
        cache = cache.transpose(1, 2)[block_table].flatten(1, 2).transpose(1, 2)
    if scale is None:
        return cache.to(dtype)
    # Not narrower than float32 until it is scaled; float8 has no arithmetic.
    wide = torch.promote_types(dtype, torch.float32)
    return (cache.to(wide) * scale.to(wide).view(-1, 1, 1)).to(dtype)


def check_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_end: Tensor | None,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments that make k and v a cache fit; what they are then is not checked here."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; need 4 dims")
    num_blocks, kv_heads, block_size, _ = k.shape
    check_shape("v", v, (num_blocks, kv_heads, block_size, v.shape[3]))
    if q.dtype not in DTYPES:
        raise ValueError(f"q is {q.dtype}; allowed are float16, bfloat16, float32 and float64")
    for name, cache, scale in (("k", k, k_scale), ("v", v, v_scale)):
        if cache.dtype != q.dtype and (scale is None or cache.dtype not in FP8):
            raise ValueError(f"{name} is {cache.dtype}, q {q.dtype}; need the same, or a float8 with {name}_scale")
        if scale is not None:
            check_shape(f"{name}_scale", scale, (kv_heads,), broadcast=1)
            check_dtype(f"{name}_scale", scale, scale.dtype.is_floating_point, "a float dtype")
        if scale is not None and scale.device != q.device:
            raise ValueError(f"{name}_scale is on {scale.device}, q on {q.device}; move it")
    if block_table is None:
        return
    if kv_end is None:
        raise ValueError("block_table needs kv_end, the end of each sequence's keys")
    check_shape("block_table", block_table, (q.shape[0], block_table.shape[-1]))
    check_dtype("block_table", block_table, block_table.dtype in INTEGERS, "int32 or int64")
    check(num_blocks >= 1, lambda: "k has no blocks")
    if block_table.device != q.device:
        raise ValueError(f"block_table is on {block_table.device}, q on {q.device}; move it")
