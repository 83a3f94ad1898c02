"""`torch.ops.rocm_attn.lookup`: rows of a small table, whose gradient is a product instead of one addition per number.

    table   `(R, ...)`, the rows, floating point
    index   integers of any shape; each from 0 to R - 1, with `wraps` from -R on
    result  `(*index.shape, ...)`: `F.embedding(index, table)`, with `wraps` `table[index]`

For biases such as T5's, which look up 32 rows for each pair of a query and a key. PyTorch adds their gradient up
number by number, where 2^20 pairs wait for one another at 32 rows: 27 of 30 ms of a training step (two layers of T5
large, 1024 tokens, H200), in eager code (sorted) as under Inductor (atomic additions). Here it is a product with rows
of zeros and a one, in pieces of at most MAX_ONES numbers, or in one where sizes are symbols; nothing is atomic, so a
repeated call gives the same bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rocm_attn_compile import _torch_private as private
from rocm_attn_compile.ops.schemas import LIBRARY

LIBRARY.define("lookup(Tensor table, Tensor index, *, bool wraps=False) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
lookup = torch.ops.rocm_attn.lookup.default

aten = torch.ops.aten

MAX_ONES = 2**26
"""Numbers of a piece's zeros and ones: 128 MiB in half precision."""


def rows_of(table: Tensor, index: Tensor, *, wraps: bool = False) -> Tensor:
    """What the op gives, as ATen computes it."""
    return aten.index.Tensor(table, [index]) if wraps else aten.embedding.default(table, index)


def table_gradient(grad: Tensor, index: Tensor, rows: int) -> Tensor:
    """Sums of the rows of `grad` `(*index.shape, ...)` by `index`, `(rows, ...)` in float32 (float64 of float64).

    bfloat16 is multiplied as it is on a GPU, and each piece's result rounded to it; float16, whose sums could become
    infinite, and everything on a CPU is multiplied in float32 at least.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    dtype = grad.dtype if grad.dtype == torch.bfloat16 and grad.device.type != "cpu" else wide
    shape = grad.shape[index.ndim :]
    inner = math.prod(index.shape[1:])
    outer = index.shape[0] if index.ndim else 1
    index = index.reshape(outer, 1, inner)
    grad = grad.reshape(outer, inner, math.prod(shape)).to(dtype)
    numbers = torch.arange(rows, device=index.device, dtype=index.dtype)[:, None]
    pieces = [slice(None)]
    if isinstance(outer, int) and isinstance(inner, int):
        step = max(1, MAX_ONES // max(1, rows * inner))
        pieces = [slice(start, start + step) for start in range(0, outer, step)]
    total = grad.new_zeros((rows, grad.shape[-1]), dtype=wide)
    for piece in pieces:
        ones = (index[piece] == numbers).to(dtype)
        total = total + (ones @ grad[piece]).sum(0, dtype=wide)
    return total.reshape(rows, *shape)


class _Lookup(private.SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, wraps: bool) -> Tensor:
        ctx.save_for_backward(index)
        ctx.table, ctx.wraps = (table.shape[0], table.dtype), wraps
        with private.below_autograd():
            return rows_of(table, index, wraps=wraps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,), (rows, dtype) = ctx.saved_tensors, ctx.table
        if ctx.wraps:
            index = torch.where(index < 0, index + rows, index)
        return table_gradient(grad, index, rows).to(dtype), None, None


def _autograd(keyset: Any, table: Tensor, index: Tensor, *, wraps: bool = False) -> Tensor:
    if private.any_tangent((table,)):
        return rows_of(table, index, wraps=wraps)
    if torch.is_grad_enabled() and table.requires_grad:
        with private.single_level_functions_allowed():
            return _Lookup.apply(table, index, wraps)
    with private.below_autograd():
        return rows_of(table, index, wraps=wraps)


LIBRARY.impl("lookup", rows_of, "CompositeExplicitAutograd")
LIBRARY.impl("lookup", _autograd, "Autograd", with_keyset=True)
