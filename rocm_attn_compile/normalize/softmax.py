"""Every way to write a softmax, as one form.

softmax(x, d)                       torch.softmax, F.softmax(dtype=...), SDPA's safe softmax
e / e.sum(d, keepdim=True)          with e = exp(x), exp(x - amax(x)), exp(x - max(x).values)
exp(log_softmax(x, d)),  exp(x - logsumexp(x, d, keepdim=True))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..capture.trace import Trace, Value


@dataclass(frozen=True, eq=False)
class SoftmaxAnchor:
    """One softmax over one dimension.

    Attributes:
        weights: The normalised result.
        scores: What it is taken of.
        dim: Non-negative dimension index.
        safe: A row of -inf gives 0 instead of NaN.
        shifted: The maximum is subtracted, so a row of equal finite fills is uniform (it underflows to NaN otherwise).
        normalized: A row of equal finite fills sums to 1. `exp(x - logsumexp(x))` does not: the logarithm of the number
            of keys is lost beside the fill, and every weight is 1.
        internals: Values between scores and weights, both excluded.
    """

    weights: Value
    scores: Value
    dim: int
    safe: bool = False
    shifted: bool = True
    normalized: bool = True
    internals: tuple[Value, ...] = ()


def find_softmaxes(trace: Trace) -> Iterator[SoftmaxAnchor]:
    """All softmaxes of the trace, in order of execution."""
    for value in trace.values:
        anchor = _as_softmax(value)
        if anchor is not None:
            yield anchor


def _as_softmax(value: Value) -> SoftmaxAnchor | None:
    if isinstance(value.op, str):
        return None
    if value.name in ("_softmax", "_safe_softmax", "softmax"):
        dim = value.args[1] if len(value.args) > 1 else value.kwargs["dim"]
        if value.ndim == 0:
            return None
        return SoftmaxAnchor(value, value.args[0], dim % value.ndim, safe=value.name == "_safe_softmax")
    if value.name == "exp":
        return _from_log(value)
    if value.name in ("div", "mul") and len(value.args) >= 2 and not value.kwargs.get("rounding_mode"):
        return _from_quotient(value)
    return None


def _from_log(value: Value) -> SoftmaxAnchor | None:
    source = value.args[0]
    if isinstance(source.op, str) or source.ndim == 0:
        return None
    if source.name in ("_log_softmax", "log_softmax"):
        return SoftmaxAnchor(value, source.args[0], source.args[1] % source.ndim, internals=(source,))
    if source.name == "sub" and isinstance(source.args[1], Value) and source.kwargs.get("alpha", 1) == 1:
        norm, restored, values = _behind_unsqueeze(source.args[1])
        if norm.name == "logsumexp" and norm.args[0] is source.args[0] and len(norm.args[1]) == 1:
            dim = norm.args[1][0] % source.ndim
            if restored == ([] if _keepdim(norm) else [dim]):
                return SoftmaxAnchor(value, source.args[0], dim, normalized=False, internals=(source, norm, *values))
    return None


def _behind_unsqueeze(value: Value) -> tuple[Value, list[int], list[Value]]:
    """What is unsqueezed, at which dimensions, and the values that do."""
    dims: list[int] = []
    values: list[Value] = []
    while value.name == "unsqueeze":
        dims.append(value.args[1] % value.ndim)
        values.append(value)
        value = value.args[0]
    return value, dims, values


def _from_quotient(value: Value) -> SoftmaxAnchor | None:
    numerator, denominator = value.args[:2]
    if not (isinstance(numerator, Value) and isinstance(denominator, Value)):
        return None
    internals: list[Value] = [numerator]
    if value.name == "mul":
        if denominator.name != "reciprocal":
            numerator, denominator = denominator, numerator
        if denominator.name != "reciprocal":
            return None
        internals = [numerator, denominator]
        denominator = denominator.args[0]
    internals.append(denominator)
    if numerator.name != "exp" or denominator.name != "sum" or denominator.args[0] is not numerator:
        return None
    if (
        len(denominator.args) < 2
        or not denominator.args[1]
        or len(denominator.args[1]) != 1
        or not _keepdim(denominator)
    ):
        return None
    if denominator.dtype != numerator.dtype:
        return None
    dim = denominator.args[1][0] % numerator.ndim
    shifted = numerator.args[0]
    if not isinstance(shifted.op, str) and shifted.name == "sub" and shifted.kwargs.get("alpha", 1) == 1:
        maximum = _row_maximum(shifted.args[1], shifted.args[0], dim)
        if maximum:
            return SoftmaxAnchor(value, shifted.args[0], dim, internals=(*internals, shifted, *maximum))
    return SoftmaxAnchor(value, shifted, dim, shifted=False, internals=tuple(internals))


def _row_maximum(maximum: object, scores: Value, dim: int) -> tuple[Value, ...]:
    """The values from `maximum` to the reduction, if it is the maximum of the row in which it is subtracted.

    Without a dimension of size 1 at `dim` it is aligned with other axes, and no error says so where sizes are equal.
    """
    values: list[Value] = []
    restored = 0
    while isinstance(maximum, Value) and maximum.name in ("detach", "alias", "unsqueeze"):
        if maximum.name == "unsqueeze":
            if maximum.args[1] % maximum.ndim != dim:
                return ()
            restored += 1
        values.append(maximum)
        maximum = maximum.args[0]
    if not isinstance(maximum, Value) or isinstance(maximum.op, str) or not maximum.args:
        return ()
    if maximum.args[0] is not scores or restored + _keepdim(maximum) != 1:
        return ()
    if maximum.name == "amax":
        dims = maximum.args[1] if len(maximum.args) > 1 else []
    elif maximum.name == "max" and len(maximum.args) > 1 and maximum.output_index == 0:
        dims = [maximum.args[1]]
    else:
        return ()
    return (*values, maximum) if [d % scores.ndim for d in dims] == [dim] else ()


def _keepdim(value: Value) -> bool:
    return bool(value.kwargs.get("keepdim", value.args[2] if len(value.args) > 2 else False))
