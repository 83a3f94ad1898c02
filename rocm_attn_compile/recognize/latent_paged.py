"""A paged latent cache: `cache[block_table].view(batch, -1, width)`, of which the op reads the blocks themselves.

cache (num_blocks, block_size, C)    block_table (batch, max_blocks)
               \\                      /
                index -> (batch, max_blocks, block_size, C)      key = (block of the row, row of the block)
"""

from __future__ import annotations

import torch

from ..capture.trace import Value
from ..reasons import Refusal
from ..symbolic import same_size, static
from .axes import Atom, Dim, atoms_of, resolve, unify
from .descent import descend, label
from .labels import Labels
from .region import Latent, Operand


def read_pages(latent: Latent) -> None:
    """Put the blocks and the table in the place of the gathered cache, if that is what it is."""
    found = [_pages(operand, latent) for operand in (latent.kv_c, latent.k_pe) if operand is not None]
    if None in found:
        return
    pages = [page for page in found if page is not None]
    if len({page[1].id for page in pages}) > 1:
        return
    if len(pages) == 2:  # one block, one row: the axes of the first cache are those of the second
        (first, _, _), (second, _, _) = pages
        if not same_size(first.value.shape[0], second.value.shape[0]):
            return
        second.dims[:2] = first.dims[:2]
        latent.k_pe = second
    latent.kv_c, table, dims = pages[0]
    latent.block_table = Operand(table, dims)
    latent.block = (list(latent.kv_c.dims[0]), list(latent.kv_c.dims[1]))


def _pages(operand: Operand, latent: Latent) -> tuple[Operand, Value, list[Dim]] | None:
    """The cache of blocks, the table and the axes of the table; None if the tensor is not gathered like this."""
    path, labels = descend(operand.value), Labels()
    cuts = [*label(labels, path), *operand.cuts]
    try:
        for own, given in zip(labels.of(operand.value), operand.dims):
            unify(given, own)
    except Refusal:
        return None
    value = path[-1]
    dims = labels.of(value)
    if isinstance(value.op, str) or value.name != "index" or len(value.args[1]) != 1:
        return None
    cache, (table,) = value.args
    if not isinstance(table, Value) or table.ndim != 2 or cache.ndim < 3:
        return None
    if table.dtype not in (torch.int32, torch.int64):  # bool and bytes are masks
        return None
    batch, blocks, row, *rest = dims
    roles = latent.roles
    if list(resolve(batch)) != list(resolve(roles.batch)) or static(cache.shape[1]) is None:
        return None
    if list(resolve((*blocks, *row))) != list(resolve(roles.key)):
        return None
    if any(set(resolve(cut.before)) & set(atoms_of((batch, blocks, row))) for cut in cuts):
        return None
    block: Dim = (Atom(cache.shape[0]),)
    return Operand(cache, [block, row, *rest], cuts=cuts), table, [batch, blocks]
