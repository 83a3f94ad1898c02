"""ALiBi: a bias that grows with the distance of query and key, `slope[h] * (k - q)`.

A softmax does not see a number that is added to a whole row, so such a bias is `slope[h] * (k - c)` for any c: one
number per head and key instead of one per pair. Whatever else it adds per row goes, too. Of `-slope[h] * |k - q|` that
is true under a causal mask, where the distance has one sign.

    slope * (k - q)  =  slope * (k - (kv_len - 1))  +  slope * (kv_len - 1 - q)
                        stays, (1, H, 1, N)            the same for all keys of a row

The left one is as large as the longest distance also beside the query, where the distance is small. In float32 that
costs digits which eager keeps, so it is done for operands of half precision, whose scores eager itself rounds more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from ..capture.trace import Value
from ..symbolic import is_one
from . import mask as prover
from .axes import Atom, Dim, atoms_of
from .compose import Logits
from .labels import number_of
from .live import LiveUsers
from .mask.evaluate import Evaluator
from .mask.integers import ZERO, expand
from .mask.values import FloatLoad, If, Opaque
from .masks import Symbols
from .region import Bias, MaskTerm, Operand, PositionBias, Roles

_DEPTH_LIMIT = 12
_HALF = (torch.float16, torch.bfloat16)


def with_positions(
    biases: list[Bias],
    roles: Roles,
    logits: Logits,
    keep: prover.ClosedForm,
    dtype: torch.dtype,
    live: LiveUsers,
    requires_grad: Callable[[Value], bool],
) -> tuple[list[Bias], bool]:
    """The biases, those of them that are ALiBi as positions where that is shorter; and whether there are such."""
    if logits.sinks is not None or not biases or any(isinstance(bias, MaskTerm) for bias in biases):
        return biases, False  # sinks see what is added to a whole row
    symbols = Symbols(roles, live.proofs)
    found = [find_position_bias(b, symbols, roles, keep, requires_grad) for b in biases if isinstance(b, Operand)]
    shorter = [bias if new is None or not new.varies or dtype not in _HALF else new for bias, new in zip(biases, found)]
    return shorter, any(new is not None for new in found)


@dataclass(frozen=True)
class _Term:
    """`factor * load * expr`."""

    factor: float
    load: FloatLoad | None
    expr: sympy.Expr


@dataclass(frozen=True)
class _Part:
    """`factor * load * k` if it `moves`, else the same for all keys of a row."""

    factor: float
    load: FloatLoad | None
    moves: bool


def find_position_bias(
    bias: Operand, symbols: Symbols, roles: Roles, keep: prover.ClosedForm, requires_grad: Callable[[Value], bool]
) -> PositionBias | None:
    """The bias as slopes and positions, or None if it is anything else.

    Args:
        bias: A bias of the site, with its axes.
        symbols, roles: The site's.
        keep: What the masks keep; nothing is said about the bias elsewhere.
        requires_grad: Whether a value gets a gradient, which only the tensor as it is can have.
    """
    if bias.factors or not isinstance(bias.factor, (int, float)):
        return None
    if torch.float16 in (bias.value.dtype, bias.rounded_to, bias.added_in):
        return None  # in which a long distance is infinite
    evaluator = prover.make_evaluator(symbols.context)
    element = evaluator.at(bias.value, [symbols.of(dim) for dim in bias.dims])
    try:
        parts = [_by_position(term, symbols.context) for term in _terms(evaluator, element, keep.predicate, 0)]
    except Opaque:
        return None
    loads = {part.load for part in parts if part.moves}
    tensors = {part.load for part in parts if part.load is not None}
    if len(loads) != 1 or any(requires_grad(tensor.value) for tensor in tensors):
        return None
    (load,) = loads
    factor = bias.factor * math.fsum(part.factor for part in parts if part.moves)
    if factor == 0 or not math.isfinite(factor):
        return None
    slopes = None
    if load is not None:
        dims = [dim for index in load.index if (dim := _dim_of(index, symbols, roles)) is not None]
        if len(dims) < len(load.index):
            return None
        slopes = Operand(load.value, dims)
    return PositionBias(slopes, factor, varies=bool({*roles.query} & {*atoms_of(bias.dims)}))


def _terms(evaluator: Evaluator, scalar: Any, keep: Any, depth: int) -> Iterator[_Term]:
    """The element as a sum; raises Opaque where it is none."""
    scalar = _given(evaluator, scalar, keep)
    if isinstance(scalar, (bool, If)) or depth > _DEPTH_LIMIT:
        raise Opaque("a choice")
    if isinstance(scalar, sympy.Expr):
        yield _Term(1.0, None, scalar)
    elif isinstance(scalar, float):
        if not math.isfinite(scalar):
            raise Opaque("a fill")
        yield _Term(scalar, None, sympy.Integer(1))
    elif isinstance(scalar, FloatLoad):
        yield from _terms_of(evaluator, scalar, keep, depth + 1)
    else:
        raise Opaque("a condition")


def _given(evaluator: Evaluator, scalar: Any, keep: Any) -> Any:
    """The element where the mask keeps the pair: there |k - q| of a causal mask is q - k."""
    scalar = evaluator.values.given(scalar, keep)
    if isinstance(scalar, sympy.Expr):
        for larger in scalar.atoms(sympy.Max):
            for one in larger.args:
                if all(evaluator.logic.implies([keep], evaluator.logic.le(expand(x - one))) for x in larger.args):
                    scalar = expand(scalar.xreplace({larger: one}))
                    break
    return scalar


def _terms_of(evaluator: Evaluator, load: FloatLoad, keep: Any, depth: int) -> Iterator[_Term]:
    """A tensor that is computed from others, element by element."""
    value = load.value

    def operand(x: Any) -> list[_Term]:
        number = number_of(x)
        if isinstance(number, (int, float)):
            return [_Term(float(number), None, sympy.Integer(1))]
        return list(_terms(evaluator, evaluator.operand(x, load.index), keep, depth))

    if isinstance(value.op, str) or value.dtype == torch.float16:
        yield _Term(1.0, load, sympy.Integer(1))
    elif value.name == "mul":
        left, right = (operand(x) for x in value.args[:2])
        for a in left:
            for b in right:
                if a.load is not None and b.load is not None:
                    raise Opaque("a product of tensors")
                yield _Term(a.factor * b.factor, a.load or b.load, expand(a.expr * b.expr))
    elif value.name in ("add", "sub") and isinstance(value.kwargs.get("alpha", 1), (int, float)):
        sign = (1.0 if value.name == "add" else -1.0) * value.kwargs.get("alpha", 1)
        yield from operand(value.args[0])
        yield from (_Term(t.factor * sign, t.load, t.expr) for t in operand(value.args[1]))
    elif value.name == "div" and number_of(value.args[1]) not in (None, 0) and len(value.args) == 2:
        number = float(number_of(value.args[1]))
        yield from (_Term(t.factor / number, t.load, t.expr) for t in operand(value.args[0]))
    elif value.name == "neg":
        yield from (_Term(-t.factor, t.load, t.expr) for t in operand(value.args[0]))
    elif value.name == "_to_copy":
        yield from operand(value.args[0])  # rounding is not meaning
    else:
        yield _Term(1.0, load, sympy.Integer(1))


def _by_position(term: _Term, context: prover.MaskContext) -> _Part:
    """The part of the term that moves with the key, or that there is none; raises Opaque if it is not linear in it."""
    symbols = {s for i in term.load.index for s in i.free_symbols} if term.load is not None else set()
    step = expand(term.expr.coeff(context.k, 1))
    if expand(term.expr - step * context.k).has(context.k) or not step.is_number or context.k in symbols:
        raise Opaque("not linear in the position of the key")
    if step == 0:
        return _Part(term.factor, term.load, moves=False)
    if context.q in symbols:
        raise Opaque("slopes that vary with the query")
    return _Part(term.factor * float(step), term.load, moves=True)


def _dim_of(index: sympy.Expr, symbols: Symbols, roles: Roles) -> Dim | None:
    """The axes that an index runs over, batch and heads only."""
    if index == ZERO:
        return ()
    atoms: list[Atom] = [*roles.batch, *roles.heads]
    candidates: list[Dim] = [tuple(atoms[i:j]) for i in range(len(atoms)) for j in range(i + 1, len(atoms) + 1)]
    candidates = [dim for dim in candidates if not any(is_one(atom.size) for atom in dim)]
    return next((dim for dim in candidates if expand(symbols.of(dim) - index) == 0), None)
