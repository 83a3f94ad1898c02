"""Keys and values read from a cache: blocks behind a table, numbers in float8 with a scale.

    k_cache (num_blocks, block_size, heads, head_dim)   block_table (batch, max_blocks)
               \\                                         /
                index, index_select or gather -> (batch, max_blocks, block_size, heads, head_dim)
                   |  .to(bf16) * k_scale, of one number or one per head
                   |  views
                   k (batch, heads, kv_len, head_dim), kv_len = (block of the row, row of the block)

The attention on what was gathered is proved already. This is a further step inwards, on copies of the axes; where it
fails the attention stays what it is, and reads what the graph has gathered.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

from ..capture.trace import Value
from ..ops.kv_cache import FP8
from ..reasons import INTERNAL_ERROR, Reason, Refusal
from ..spec import CacheSpec
from ..symbolic import product, same_size
from .axes import Atom, Dim, atoms_of, resolve, unify
from .cache_walk import Walk, walk
from .descent import is_same_tensor
from .latent import factors_of
from .latent_terms import Frame
from .region import CacheRead, KvCache, Operand, Region, Roles

log = logging.getLogger(__name__)


def add_cache(region: Region) -> None:
    """Give `region` its `cache`, if that is proved; if it comes near, a note says what it lacks."""
    if region.latent is not None:
        return
    try:
        walks = [walk(operand.value) for operand in (region.k, region.v)]
        if not any(found.table is not None or found.root.dtype in FP8 for found in walks):
            return
        region.cache = _prove(region, *walks)
        region.spec = replace(region.spec, cache=_spec(region.cache))
    except Refusal as refusal:
        code = refusal.reason.code
        region.cache_note = Reason(code if code.startswith("cache_") else "cache_axes", refusal.reason.text)
    except Exception as error:  # a defect of ours; the attention is proved all the same
        log.warning("while looking for the cache of %s", region.anchor, exc_info=True)
        region.cache_note = Reason(INTERNAL_ERROR, repr(error))


def forget_cache(region: Region, reasons: str) -> bool:
    """Let `region` read what the graph has gathered, with a note; False if it does already."""
    if region.cache is None:
        return False
    region.cache, region.spec = None, replace(region.spec, cache=None)
    region.cache_note = Reason("cache_gathered", f"keys and values are gathered before the attention: {reasons}")
    return True


def _prove(region: Region, k: Walk, v: Walk) -> KvCache:
    _check_site(region, k, v)
    frame = Frame(region.roles)
    for found, operand in ((k, region.k), (v, region.v)):
        found.label(operand.value, frame.dims(operand.dims))
    roles = frame.roles
    table = None
    block: tuple[list[Atom], list[Atom]] | None = None
    if k.table is not None and v.table is not None:
        _check_tables(k, v)
        table = Operand(k.table, k.table_dims)
        block = _blocks(k, v, roles)
    reads = [_read(found, block, roles, width) for found, width in ((k, roles.depth), (v, roles.value_depth))]
    return KvCache(roles, reads[0], reads[1], table, block, list(_between(region, {k.root.id, v.root.id})))


def _between(region: Region, roots: set[int]) -> Iterator[Value]:
    """Everything on the way from the caches to the attention's products."""
    for value in region.values:
        for factor in factors_of(value):
            path = walk(factor).path
            if path[-1].id in roots:
                yield from path[:-1]


def _check_site(region: Region, k: Walk, v: Walk) -> None:
    dtypes = {found.root.dtype for found in (k, v)}
    known = {region.spec.dtype} if region.spec.dtype.itemsize > 2 else {region.spec.dtype, *FP8}
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    refused = (
        (region.spec.requires_grad, "cache_training", "gradients are wanted, which flow through what was gathered"),
        (region.spec.dropout_p != 0, "cache_dropout", "the attention weights pass a dropout"),
        (bool(region.second), "cache_pieces", "the keys are put together from several tensors"),
        (region.row_sinks is not None, "cache_pieces", "the keys get one more for the sinks"),
        (bool(region.k.factors), "cache_scale", "the keys have a factor of their own besides a cache's scale"),
        (region.v.factor != 1, "cache_scale", "the values are scaled after their heads were repeated"),
        ((k.table is None) != (v.table is None), "cache_tables", "only one of keys and values is in blocks"),
        (len(dtypes) > 1 or not dtypes <= known, "cache_dtype", f"a cache of {names} for {region.spec.dtype}"),
    )
    for is_so, code, text in refused:
        if is_so:
            raise Refusal(code, f"a cache, but {text}")


def _check_tables(k: Walk, v: Walk) -> None:
    assert k.table is not None
    assert v.table is not None
    if not is_same_tensor(k.table, v.table):
        raise Refusal("cache_tables", "keys and values are gathered by different tables")
    for found in (k, v):
        if any(set(resolve(cut.before)) & set(atoms_of(found.table_dims)) for cut in found.cuts):
            raise Refusal("cache_slice", "only a part of what was gathered is read")
    same = [resolve(dim) for dim in k.table_dims] == [resolve(dim) for dim in v.table_dims]
    if not same or not same_size(k.blocks[0].size, v.blocks[0].size):
        raise Refusal("cache_tables", "keys and values are gathered differently by one table")


def _blocks(k: Walk, v: Walk, roles: Roles) -> tuple[list[Atom], list[Atom]]:
    """The axes of the blocks in the caches, and of the rows of a block."""
    batch, key = list(resolve(roles.batch)), list(resolve(roles.key))
    of_table = atoms_of(k.table_dims)
    blocks = [atom for atom in of_table if atom not in batch]
    if not set(batch) <= set(of_table):
        raise Refusal("cache_table", "the table is the same for the whole batch")
    if not blocks or key[: len(blocks)] != blocks:
        raise Refusal("cache_order", "the keys are not the rows of the table's blocks in their order")
    rows = key[len(blocks) :]
    if not rows:
        raise Refusal("cache_layout", "the blocks have no rows")
    unify((k.blocks[0],), (v.blocks[0],))
    return list(resolve(k.blocks)), rows


def _read(found: Walk, block: tuple[list[Atom], list[Atom]] | None, roles: Roles, width: list[Atom]) -> CacheRead:
    outer, rows = (roles.batch, roles.key) if block is None else block
    groups = [list(resolve(group)) for group in (outer, roles.kv_heads, rows, width)]
    kept = [dim for dim in map(resolve, _after_cuts(found)) if dim]
    if not {atom for dim in kept for atom in dim} <= {atom for group in groups for atom in group}:
        raise Refusal("cache_axes", "the cache has an axis that its place in the op does not have")
    for group in groups:
        # Splitting a dimension is a view; joining what lies apart would copy the cache.
        if len(group) > 1 and not any(_has_run(dim, group) for dim in kept):
            raise Refusal("cache_layout", "heads, rows or channels of the cache are spread over several dimensions")
    scales = [Operand(value, dims) for value, dims, _ in found.scales]
    for scale in scales:
        if not set(atoms_of(scale.dims)) <= set(groups[1]):
            raise Refusal("cache_scale", "the scale is neither one number nor one per head")
    factors = [(scale, divides) for scale, (_, _, divides) in zip(scales, found.scales)]
    return CacheRead(Operand(found.root, found.root_dims, cuts=found.cuts), factors, found.number)


def _after_cuts(found: Walk) -> Iterator[Dim]:
    after = {resolve(cut.before): cut.after for cut in found.cuts}
    for dim in found.root_dims:
        dim = resolve(dim)
        while dim in after:
            dim = resolve(after[dim])
        yield dim


def _has_run(dim: Dim, group: list[Atom]) -> bool:
    """True if the atoms of `group` follow each other in `dim`."""
    return any(list(dim[i : i + len(group)]) == group for i in range(len(dim)))


def _spec(cache: KvCache) -> CacheSpec:
    size = None if cache.block is None else product(atom.size for atom in cache.block[1])
    return CacheSpec(
        block_size=size if size is None or not size.is_number else int(size),
        dtype=cache.k.operand.value.dtype,
        has_scale=any(read.factors or read.number != 1 for read in (cache.k, cache.v)),
    )


def leaves(cache: KvCache) -> list[Value]:
    """What both the gathered and the direct reading start from."""
    found = [cache.k.operand.value, cache.v.operand.value]
    found += [scale.value for read in (cache.k, cache.v) for scale, _ in read.factors]
    return found if cache.table is None else [*found, cache.table.value]
