"""Tensor descriptors of latent attention's cache and queries, and which tensors can have them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .launch import Descriptor, Layout, aligned, is_whole
from .sizes import known


def are_whole(sizes: Iterable[int], strides: Iterable[int], itemsize: int) -> bool:
    """Whether the tensor memory accelerator can address outer dimensions: strides of whole 16 bytes."""
    return all(known(size == 1) or is_whole(stride, itemsize) for size, stride in zip(sizes, strides))


def takes_tma(where: Layout, itemsize: int) -> bool:
    """The same of a cache, whose rows also have to be at least 32 bytes wide."""
    if where is None:
        return True
    shape, strides = where
    return are_whole(shape[:2], strides[:2], itemsize) and shape[2] * itemsize >= 32


def token_descriptor(cache: Tensor, tokens: int, columns: int, swizzle: int = 0) -> Descriptor:
    """The descriptor of a `(batch or blocks, tokens, width)` cache, read in blocks of `tokens` x `columns`."""
    # The stride of a dimension of size 1 says nothing, but must be valid.
    outer = zip(cache.shape[:2], cache.stride()[:2])
    itemsize = cache.element_size()
    strides = [stride if known(size > 1) or is_whole(stride, itemsize) else 16 for size, stride in outer]
    return Descriptor(cache, tuple(cache.shape), (*strides, 1), (1, tokens, columns), swizzle)


def head_descriptor(queries: Tensor, rows: int, columns: int) -> Descriptor:
    """The descriptor of `(B, H, M, width)` queries as `(B, M, H, width)`, read in boxes of `rows` heads x `columns`."""
    batch, heads, q_len, width = queries.shape
    outer = zip((batch, q_len, heads), (queries.stride(0), queries.stride(2), queries.stride(1)))
    strides = (*(stride if size > 1 else 16 for size, stride in outer), 1)
    swizzle = min(128, columns * queries.element_size())
    return Descriptor(queries, (batch, q_len, heads, width), strides, (1, 1, rows, columns), swizzle)


def share_descriptor(partial: Tensor, out: Tensor, num_splits: int, rows: int, columns: int) -> Descriptor:
    """The descriptor of the shares of a result `(B, H, M, width)`, as `(B, M, H, splits, width)`, written so."""
    batch, heads, q_len, width = out.shape
    strides = (heads * q_len * num_splits * width, num_splits * width, q_len * num_splits * width, width, 1)
    return Descriptor(partial, (batch, q_len, heads, num_splits, width), strides, (1, 1, rows, 1, columns), 128)


def takes_query_boxes(queries: Tensor | None, rows: int) -> bool:
    """Whether a tile's rows are heads of one position, and a descriptor can address the `(B, H, M, width)` queries."""
    if queries is None:
        return True
    _, heads, q_len, width = queries.shape
    itemsize = queries.element_size()
    one_position = q_len == 1 or heads % rows == 0
    # Rows of float32, as shares are stored, are whole 16 bytes, too.
    is_plain = aligned(queries) and queries.stride(3) == 1 and width * itemsize >= 32 and width % 4 == 0
    return one_position and is_plain and are_whole(queries.shape[:3], queries.stride()[:3], itemsize)


def query_boxes(q: Tensor, q_pe: Tensor | None, rows: int, columns: int, pe_columns: int) -> dict[str, Any]:
    """The arguments of Hopper's own kernels by which they read queries through descriptors, where they can.

    Args:
        q, q_pe: `(B, H, M, width)`.
        rows: Heads of a tile.
        columns, pe_columns: Of a box of q and of q_pe.
    """
    fits = takes_query_boxes(q, rows) and takes_query_boxes(q_pe, rows)
    return {
        "QUERY_TMA": fits,
        "q_boxes": head_descriptor(q, rows, columns) if fits else None,
        "q_pe_boxes": head_descriptor(q_pe, rows, pe_columns) if fits and q_pe is not None else None,
    }
