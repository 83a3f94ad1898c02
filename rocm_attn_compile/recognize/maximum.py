"""A maximum of the scores that is subtracted from them, which softmax does not notice if it is one number per row."""

from __future__ import annotations

from typing import Any

from ..capture.trace import Value

_VIEWS = ("detach", "alias", "expand", "unsqueeze")


def maximum_chain(shift: Any, scores: Value) -> list[Value]:
    """The values from the reduction of `scores` to `shift`, the reduction first; empty if it is no maximum of them."""
    chain: list[Value] = []
    while isinstance(shift, Value) and shift.name in _VIEWS and not isinstance(shift.op, str):
        chain.append(shift)
        shift = shift.args[0]
    if not isinstance(shift, Value) or isinstance(shift.op, str) or not shift.args or shift.args[0] is not scores:
        return []
    is_maximum = shift.name == "amax" or (shift.name == "max" and (len(shift.args) == 1 or shift.output_index == 0))
    return [shift, *reversed(chain)] if is_maximum else []


def includes_own_row(chain: list[Value], scores: Value, key_dims: set[int]) -> bool:
    """True if what is subtracted from each score is the maximum of elements that include all of its row.

    Such a maximum is -inf, or a finite fill, only where the whole row is masked. Any other one may be -inf beside
    scores that are not, and equal sizes let a model align it with axes that it was not taken over.

    Args:
        chain: What `maximum_chain` gave.
        scores: What the maximum is taken of and subtracted from.
        key_dims: Dimensions of `scores` along which a row extends.
    """
    kept = _kept_dims(chain[0], scores.ndim)
    for value in chain[1:]:
        if value.name == "unsqueeze":
            kept.insert(value.args[1] % value.ndim, None)
        elif value.name == "expand":
            kept = [*[None] * (value.ndim - len(kept)), *kept]
    offset = scores.ndim - len(kept)
    is_aligned = all(dim is None or dim == offset + i for i, dim in enumerate(kept))
    return is_aligned and key_dims.isdisjoint(kept)


def is_of_all(chain: list[Value], scores: Value) -> bool:
    """True if the maximum was taken over all of `scores`."""
    return not any(dim is not None for dim in _kept_dims(chain[0], scores.ndim))


def _kept_dims(reduction: Value, ndim: int) -> list[int | None]:
    """For each dimension of the reduction's result the one of its operand; None if that was reduced to size 1."""
    dims = reduction.args[1] if len(reduction.args) > 1 else reduction.kwargs.get("dim", [])
    keepdim = reduction.args[2] if len(reduction.args) > 2 else reduction.kwargs.get("keepdim", False)
    reduced = {d % ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])} or set(range(ndim))
    return [None if d in reduced else d for d in range(ndim) if keepdim or d not in reduced]
