"""A cache of expanded keys: what it holds was expanded from a latent, but long ago and out of sight.

    k_cache[:, :, t] = cat([k_nope, k_pe])        or  cat([k_cache, k], 2), index_copy, slice_scatter
    scores = q k_cache^T

The attention reads keys of earlier calls, of which nothing is known, so it stays a plain one.
"""

from __future__ import annotations

from ..capture.trace import Value
from ..reasons import Reason
from ..symbolic import static
from .axes import Dim, atoms_of, fresh_dims, resolve
from .labels import is_exact_cast, is_view
from .pieces import pieces_of
from .region import Region

_WRITES = ("index_copy", "index_put", "slice_scatter", "select_scatter", "scatter", "copy")


def expanded_cache(region: Region) -> Reason | None:
    """A note for the report if k is read from a cache into which this call writes MLA's keys."""
    if not any(_is_mla_key(value) for value in _written(region.k.value)):
        return None
    return Reason(
        "latent_cache_expanded",
        "the cache holds expanded keys and values; with one of the latents (before kv_b_proj) this would be latent "
        "attention, see rocm_attn_compile.integrations.transformers.use_latent_cache",
    )


def _written(value: Value) -> list[Value]:
    """What this call puts into the tensor that `value` is read from."""
    found, todo, seen = [], [value], set()
    while todo:
        value = todo.pop()
        if value.id in seen:
            continue
        seen.add(value.id)
        if value.op == "view_scatter":
            base, source, _ = value.args
            todo += [base]
            found += [source, *(a for a in source.args if isinstance(a, Value) and not isinstance(source.op, str))]
        elif isinstance(value.op, str):
            continue
        elif is_view(value) or is_exact_cast(value) or value.name == "slice":
            todo.append(value.args[0])
        elif value.name == "cat":
            found += value.args[0]
        elif value.name in _WRITES:
            todo.append(value.args[0])
            found += [a for a in value.args[1:] if isinstance(a, Value)]
    return found


def _is_mla_key(value: Value) -> bool:
    """True if the last dimension is put together from a part with heads and a part that is expanded to them."""
    while is_view(value) or is_exact_cast(value):
        value = value.args[0]
    if value.ndim < 3 or static(value.shape[-1]) is None:
        return False
    dims: list[Dim] = fresh_dims(value.shape)
    own = [set(resolve(dim)) for dim in dims]
    pieces = pieces_of(value, dims, dims[-1])
    if len(pieces) < 2:
        return False
    have = [set(atoms_of(piece.operand()[0].dims)) for piece in pieces]
    shared = [any(axis and not axis & atoms for axis in (set(resolve(a)) for a in own[:-1])) for atoms in have]
    return any(shared) and not all(shared)
