"""Attention over paged and float8 caches, as engineers write it in plain PyTorch: recognised, and near misses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

B, H, K, D, SIZE, PER_ROW, BLOCKS = 2, 6, 2, 24, 16, 3, 9
N = SIZE * PER_ROW


@dataclass(frozen=True)
class Program:
    """A function of q, k_cache, v_cache, table, lengths and what `more` gives.

    Attributes:
        name: Of the spelling.
        function: The model.
        inputs: Its arguments.
        note: Code of the note that says why the cache is gathered; None: the op reads the cache.
    """

    name: str
    function: Callable[..., torch.Tensor]
    inputs: tuple[Any, ...]
    note: str | None = None


def make(dtype: torch.dtype = torch.float32, layout: str = "nbhd", q_len: int = 1, **sizes: int) -> tuple:
    """q `(B, H, q_len, D)`, two caches, the table and the lengths."""
    torch.manual_seed(0)
    size, heads = sizes.get("size", SIZE), sizes.get("heads", K)
    shape = {"nbhd": (BLOCKS, size, heads, D), "nhbd": (BLOCKS, heads, size, D), "flat": (BLOCKS, size, heads * D)}[
        layout
    ]
    q = torch.randn(B, H, q_len, D, dtype=dtype)
    caches = (torch.randn(shape).to(dtype) for _ in range(2))
    table = torch.tensor([[3, 0, 8], [5, 2, 1]], dtype=torch.int32)
    return q, *caches, table, torch.tensor([[37], [20]])


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Masked attention of `(B, H, M, D)` on `(B, N, K, D)`, heads repeated."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[2], dim=2).transpose(1, 2) for x in (k, v))
    keep = torch.arange(k.shape[2], device=k.device) < lengths[:, None, None]
    scores = (q @ k.mT / math.sqrt(q.shape[3])).masked_fill(~keep, -math.inf)
    return scores.softmax(-1) @ v


def by_index(q, k_cache, v_cache, table, lengths):
    k, v = (cache[table].flatten(1, 2) for cache in (k_cache, v_cache))
    return attend(q, k, v, lengths)


def by_reshape_and_sdpa(q, k_cache, v_cache, table, lengths):
    k, v = (cache[table.long()].reshape(q.shape[0], -1, K, D).transpose(1, 2) for cache in (k_cache, v_cache))
    keep = torch.arange(k.shape[2], device=k.device) < lengths
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None], enable_gqa=True)


def by_index_select(q, k_cache, v_cache, table, lengths):
    k, v = (torch.index_select(cache, 0, table.view(-1)).view(q.shape[0], -1, K, D) for cache in (k_cache, v_cache))
    return attend(q, k, v, lengths)


def by_gather(q, k_cache, v_cache, table, lengths):
    index = table.long().reshape(-1, 1, 1, 1).expand(-1, SIZE, K, D)
    k, v = (cache.gather(0, index).reshape(q.shape[0], -1, K, D) for cache in (k_cache, v_cache))
    return attend(q, k, v, lengths)


def heads_first(q, k_cache, v_cache, table, lengths):
    k, v = (cache[table].permute(0, 1, 3, 2, 4).reshape(q.shape[0], -1, K, D) for cache in (k_cache, v_cache))
    return attend(q, k, v, lengths)


def flat_channels(q, k_cache, v_cache, table, lengths):
    k, v = (cache[table].reshape(q.shape[0], -1, K, D) for cache in (k_cache, v_cache))
    return attend(q, k, v, lengths)


def one_buffer(q, kv, _unused, table, lengths):
    k, v = (kv[:, i][table].flatten(1, 2) for i in (0, 1))
    return attend(q, k, v, lengths)


def grouped_einsum(q, k_cache, v_cache, table, lengths):
    k, v = (cache[table].flatten(1, 2) for cache in (k_cache, v_cache))
    q = q.view(q.shape[0], K, -1, *q.shape[2:])  # not unflatten: Dynamo of torch 2.11 under a default device
    scores = torch.einsum("bkgmd,bnkd->bkgmn", q, k) * D**-0.5
    keep = torch.arange(k.shape[1], device=k.device) < lengths
    scores = torch.where(keep[:, None, None, None], scores, torch.finfo(scores.dtype).min)
    return torch.einsum("bkgmn,bnkd->bkgmd", scores.softmax(-1), v).flatten(1, 2)


def causal_chunk(q, k_cache, v_cache, table, lengths):
    k, v = (cache[table].flatten(1, 2) for cache in (k_cache, v_cache))
    k, v = (x.repeat_interleave(H // K, dim=2).transpose(1, 2) for x in (k, v))
    at = lengths - q.shape[2] + torch.arange(q.shape[2], device=q.device)
    keep = torch.arange(k.shape[2], device=k.device) <= at[..., None]
    scores = (q @ k.mT / math.sqrt(D)).masked_fill(~keep[:, None], -math.inf)
    return scores.softmax(-1) @ v


def written_before(q, k_cache, v_cache, table, lengths, new, slots):
    for cache in (k_cache, v_cache):
        cache.view(-1, K, D)[slots] = new
    return by_index(q, k_cache, v_cache, table, lengths)


def written_by_copy(q, k_cache, v_cache, table, lengths, new, slots):
    k_cache.view(-1, K, D).index_copy_(0, slots, new)
    v_cache.view(-1, K, D).index_copy_(0, slots, new + 1)
    return by_index(q, k_cache, v_cache, table, lengths)


def dequantised(q, k_cache, v_cache, table, lengths, k_scale, v_scale):
    k, v = (c[table].to(q.dtype) * s for c, s in ((k_cache, k_scale), (v_cache, v_scale)))
    return attend(q, k.flatten(1, 2), v.flatten(1, 2), lengths)


def dequantised_in_float32(q, k_cache, v_cache, table, lengths, k_scale, v_scale):
    k, v = ((c[table].float() * s).to(q.dtype) for c, s in ((k_cache, k_scale), (v_cache, v_scale)))
    return attend(q, k.flatten(1, 2), v.flatten(1, 2), lengths)


def dequantised_contiguous(q, k_cache, v_cache, lengths, k_scale, v_scale):
    k, v = (c.to(q.dtype) * s for c, s in ((k_cache, k_scale), (v_cache, v_scale)))
    return attend(q, k, v, lengths)


def dequantised_by_number(q, k_cache, v_cache, lengths):
    return attend(q, k_cache.to(q.dtype) * 0.25, v_cache.to(q.dtype) / 0.8, lengths)


def dequantised_before(q, k_cache, v_cache, table, lengths, k_scale, v_scale):
    k, v = ((c.to(q.dtype) * s)[table] for c, s in ((k_cache, k_scale), (v_cache, v_scale)))
    return attend(q, k.flatten(1, 2), v.flatten(1, 2), lengths)


def float8(kind: torch.dtype = torch.float8_e4m3fn, per_head: bool = False, contiguous: bool = False) -> tuple:
    q, k, v, table, lengths = make(torch.bfloat16)
    if contiguous:
        k, v = (c[table].flatten(1, 2) for c in (k, v))
    scale = torch.tensor([[0.5], [1.75]], dtype=torch.bfloat16) if per_head else torch.tensor(0.375)
    caches = k.to(kind), v.to(kind)
    return (q, *caches, *(() if contiguous else (table,)), lengths, scale, scale * 2)


_q, _k, _v, _table, _lengths = make()
_new = torch.randn(B, K, D)
_slots = torch.tensor([3 * SIZE + 2, 5 * SIZE + 7])

RECOGNISED = (
    Program("index", by_index, make()),
    Program("index, bf16", by_index, make(torch.bfloat16)),
    Program("reshape, SDPA, int64 table", by_reshape_and_sdpa, make()),
    Program("index_select", by_index_select, make()),
    Program("torch.gather", by_gather, make()),
    Program("heads before rows", heads_first, make(layout="nhbd")),
    Program("heads and channels in one dimension", flat_channels, make(layout="flat")),
    Program("keys and values in one buffer", one_buffer, (_q, torch.stack([_k, _v], 1), None, _table, _lengths)),
    Program("grouped einsum, finite fill", grouped_einsum, make()),
    Program("one head of keys", by_index, make(heads=1)),
    Program("a chunk of queries, causal", causal_chunk, make(q_len=5)),
    Program("negative numbers in the table", by_index, (_q, _k, _v, _table - BLOCKS, _lengths)),
    Program("written before", written_before, (*make(), _new, _slots)),
    Program("written by index_copy_", written_by_copy, (*make(), _new, _slots)),
    Program("float8 pages, one scale", dequantised, float8()),
    Program("float8 pages, scale per head", dequantised, float8(per_head=True)),
    Program("float8 pages, float32 in between", dequantised_in_float32, float8(torch.float8_e5m2)),
    Program("float8 pages, dequantised before", dequantised_before, float8(per_head=True)),
    Program("float8", dequantised_contiguous, float8(contiguous=True, per_head=True)),
    Program("float8 e4m3fnuz", dequantised_contiguous, float8(torch.float8_e4m3fnuz, contiguous=True)),
    Program("float8, numbers", dequantised_by_number, float8(contiguous=True)[:4]),
)


def other_axis(q, k_cache, v_cache, table, lengths):
    """The table counts along the rows of a block; what is gathered has the shape of blocks."""
    rows = table % SIZE
    k, v = (cache[:, rows].permute(1, 0, 2, 3, 4)[:, :PER_ROW] for cache in (k_cache, v_cache))
    return attend(q, *(x.flatten(1, 2) for x in (k, v)), lengths)


def permuted_after(q, k_cache, v_cache, table, lengths):
    k, v = (cache[table].transpose(1, 2).flatten(1, 2) for cache in (k_cache, v_cache))
    return attend(q, k, v, lengths)


def flipped_after(q, k_cache, v_cache, table, lengths):
    k, v = (cache[table].flip(1).flatten(1, 2) for cache in (k_cache, v_cache))
    return attend(q, k, v, lengths)


def two_tables(q, k_cache, v_cache, table, lengths, other):
    return attend(q, k_cache[table].flatten(1, 2), v_cache[other].flatten(1, 2), lengths)


def only_keys(q, k_cache, v, table, lengths):
    return attend(q, k_cache[table].flatten(1, 2), v, lengths)


def cache_written_after(q, k_cache, v_cache, table, lengths, new, slots):
    k, v = (cache[table].flatten(1, 2) for cache in (k_cache, v_cache))
    k_cache.view(-1, K, D)[slots] = new
    return attend(q, k, v, lengths)


def table_written_after(q, k_cache, v_cache, table, lengths):
    k, v = (cache[table].flatten(1, 2) for cache in (k_cache, v_cache))
    table.add_(1)
    return attend(q, k, v, lengths)


def some_heads(q, k_cache, v_cache, table, lengths):
    k, v = (cache[table][..., 1:3, :].flatten(1, 2) for cache in (k_cache, v_cache))
    return attend(q, k, v, lengths)


def part_of_the_blocks(q, k_cache, v_cache, table, lengths):
    k, v = (cache[table][:, :, :8].flatten(1, 2) for cache in (k_cache, v_cache))
    return attend(q, k, v, lengths)


def first_keys(q, k_cache, v_cache, table, lengths):
    k, v = (cache[table].flatten(1, 2)[:, :40] for cache in (k_cache, v_cache))
    return attend(q, k, v, lengths)


def rows_differ(q, k_cache, v_cache, table, lengths):
    index = table.long()[:, :, None, None, None].expand(-1, -1, SIZE, K, D).reshape(-1, SIZE, K, D)
    index = (index + torch.arange(SIZE, device=table.device)[:, None, None]) % BLOCKS
    k, v = (cache.gather(0, index).reshape(q.shape[0], -1, K, D) for cache in (k_cache, v_cache))
    return attend(q, k, v, lengths)


def same_for_all(q, k_cache, v_cache, table, lengths):
    k, v = (cache[table[0]].flatten(0, 1).expand(q.shape[0], -1, -1, -1) for cache in (k_cache, v_cache))
    return attend(q, k, v, lengths)


def requantised(q, k, v, lengths, k_scale, v_scale):
    """Keys are rounded to float8 here: what lies before is not what is read."""
    k, v = ((x.to(q.dtype) * s).to(torch.float8_e4m3fn).to(q.dtype) for x, s in ((k, k_scale), (v, v_scale)))
    return attend(q, k, v, lengths)


def per_token(q, k_cache, v_cache, lengths, k_scale, v_scale):
    return dequantised_contiguous(q, k_cache, v_cache, lengths, k_scale, v_scale)


def values_scaled_after_they_are_repeated(q, k_cache, v_cache, table, lengths):
    k, v = (cache[table].flatten(1, 2).repeat_interleave(H // K, dim=2).transpose(1, 2) for cache in (k_cache, v_cache))
    keep = torch.arange(k.shape[2]) < lengths[:, None, None]
    scores = (q @ k.mT / math.sqrt(D)).masked_fill(~keep, -math.inf)
    return scores.softmax(-1) @ (v * 0.5)


_fp8 = float8(contiguous=True)
_tokens = (torch.rand(B, N, 1, 1) + 0.5).bfloat16()
_channels = (torch.rand(D) + 0.5).bfloat16()

NEAR = (
    Program("the table counts another axis", other_axis, make(size=BLOCKS), "cache_order"),
    Program("blocks and rows swapped after", permuted_after, make(), "cache_order"),
    Program("blocks flipped after", flipped_after, make(), ""),
    Program("two tables", two_tables, (*make(), _table.flip(1)), "cache_tables"),
    Program("only the keys in blocks", only_keys, (_q, _k, torch.randn(B, N, K, D), _table, _lengths), "cache_tables"),
    Program("cache written after the gather", cache_written_after, (*make(), _new, _slots), "cache_gathered"),
    Program("table written after the gather", table_written_after, make(), None),
    Program("some heads", some_heads, make(heads=4), None),
    Program("a part of each block", part_of_the_blocks, make(), None),
    Program("the first keys", first_keys, make(), "cache_slice"),
    Program("rows gathered from different blocks", rows_differ, make(), "cache_layout"),
    Program("one row of the table for all", same_for_all, make(), None),
    Program("values scaled after they are repeated", values_scaled_after_they_are_repeated, make(), "cache_scale"),
    Program("quantised in the graph", requantised, _fp8, None),
    Program("scale per token", per_token, (*_fp8[:4], _tokens, _tokens), "cache_scale"),
    Program("scale per channel", per_token, (*_fp8[:4], _channels, _channels), "cache_scale"),
)
"""All stay right. A note of "" is none, and no cache; None says that the op may read the cache, if it is right."""
