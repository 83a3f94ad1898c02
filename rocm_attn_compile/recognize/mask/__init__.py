"""Which (q, k) pairs a mask tensor keeps, proved from how the program computes it.

    prove_keep(mask, index, context)       a tensor that is nonzero (True) where a key is kept
    prove_drop(mask, index, context)       a tensor that is nonzero (True) where a key is dropped
    prove_additive(mask, index, context)   a float tensor added to the scores: 0 keeps, a fill drops

`index` has one expression of the context's symbols per dimension of the tensor: 0 where it broadcasts, `b * H + h`
where batch and heads are merged. A result is a `ClosedForm` (or an `AdditiveMask` around one), or an `OpaqueMask` with
the reason: then the tensor has to be passed as it is, which is always correct.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import sympy
import torch

from ...reasons import Reason
from .additive import (
    Addend,
    AdditiveMask,
    AdditivePart,
    OpaqueMask,
    absorbs,
    is_hard,
    leaves_by_number,
)
from .bounds import Bounds
from .classify import Classifier, ClosedForm, MaskContext
from .emit import Builder, size_arithmetic
from .emit_parts import MaskEmitter
from .evaluate import Evaluator
from .integers import ZERO, expand
from .packed import use_packed_positions
from .predicate import Predicate
from .values import Opaque
from .words import mask_in_words

if TYPE_CHECKING:
    from ...capture.trace import Value

Index = Sequence[sympy.Expr]


def index_symbol(name: str) -> sympy.Symbol:
    """A symbol for a position in a dimension; names of shape symbols ("s0", "u1") must not be used."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def make_evaluator(context: MaskContext) -> Evaluator:
    """An evaluator that knows the ranges of the context's symbols; reuse it for several masks of one attention."""
    sizes = {context.q: context.q_len, context.k: context.kv_len, **context.batch, **context.heads}
    return Evaluator(Bounds({symbol: (ZERO, expand(size - 1)) for symbol, size in sizes.items()}))


def classify(evaluator: Evaluator, predicate: Predicate, context: MaskContext) -> ClosedForm:
    """The closed form of a predicate, for example of the conjunction of several masks' predicates."""
    return Classifier(evaluator.logic, context).classify(predicate)


def prove_keep(value: Value, index: Index, context: MaskContext) -> ClosedForm | OpaqueMask:
    """The closed form of a tensor that keeps the pairs where it is nonzero (True)."""
    return _prove_truth(value, index, context, keep=True)


def prove_drop(value: Value, index: Index, context: MaskContext) -> ClosedForm | OpaqueMask:
    """The closed form of a tensor that drops the pairs where it is nonzero (True)."""
    return _prove_truth(value, index, context, keep=False)


def prove_zero_one(value: Value, index: Index, context: MaskContext) -> ClosedForm | OpaqueMask:
    """As `prove_keep`, for a number that is proved to be 0 or 1, as a factor must be."""
    evaluator = make_evaluator(context)
    try:
        numbers = leaves_by_number(evaluator.values, evaluator.at(value, list(index)))
    except Opaque as why:
        return OpaqueMask(Reason("mask_not_zero_one", f"{value!r}: {why}"))
    if not numbers.keys() <= {0, 1}:
        return OpaqueMask(Reason("mask_not_zero_one", f"{value!r} takes the values {sorted(numbers)}, not 0 and 1"))
    return _closed(evaluator, numbers.get(1, False), context)


def prove_additive(
    value: Value, index: Index, context: MaskContext, *, subtracted: bool = False
) -> AdditiveMask | OpaqueMask:
    """The closed form of a float tensor of zeros and negative fills that is added to the scores, or `subtracted`.

    Whether the fills are large enough to stand for a mask is the caller's question: see `is_hard` and `absorbs`.
    """
    evaluator = make_evaluator(context)
    try:
        numbers = leaves_by_number(evaluator.values, evaluator.at(value, list(index)))
    except Opaque as why:
        return OpaqueMask(Reason("bias_not_mask", f"{value!r} is a bias: {why}"))
    if subtracted:
        numbers = {-number: where for number, where in numbers.items()}
    positive = [number for number in numbers if number > 0]
    if positive:
        return OpaqueMask(Reason("bias_not_mask", f"{value!r} is a bias: it adds {positive[0]} somewhere"))
    form = _closed(evaluator, numbers.pop(0, False), context)
    if isinstance(form, OpaqueMask):
        return form
    return AdditiveMask(form, tuple((float(number), where) for number, where in numbers.items()))


def prove_additive_sum(value: Value, index: Index, context: MaskContext) -> tuple[AdditivePart, ...]:
    """As `prove_additive`, but a sum that is no mask as a whole is taken apart into masks and biases."""
    whole = prove_additive(value, index, context)
    if isinstance(whole, AdditiveMask):
        return (whole,)
    terms = _terms(value, tuple(index))
    if len(terms) == 1:
        return (Addend(value, tuple(index), whole.reason),)
    return tuple(part for term, at in terms for part in prove_additive_sum(term, at, context))


def _terms(value: Value, index: tuple[sympy.Expr, ...]) -> list[tuple[Value, tuple[sympy.Expr, ...]]]:
    """The two operands of an addition of tensors of the same dtype, with their broadcast index."""
    if value.name != "add" or len(value.args) != 2 or value.kwargs.get("alpha", 1) != 1:
        return [(value, index)]
    if not all(getattr(x, "dtype", None) == value.dtype for x in value.args):
        return [(value, index)]
    terms = []
    for x in value.args:
        tail = index[len(index) - x.ndim :]
        terms.append((x, tuple(ZERO if size == 1 else i for i, size in zip(tail, x.shape))))
    return terms


def _prove_truth(value: Value, index: Index, context: MaskContext, keep: bool) -> ClosedForm | OpaqueMask:
    evaluator = make_evaluator(context)
    try:
        predicate = evaluator.values.cast(evaluator.at(value, list(index)), torch.bool)
    except Opaque as why:
        return OpaqueMask(Reason("mask_not_bool", f"{value!r} is no mask: {why}"))
    return _closed(evaluator, predicate if keep else evaluator.logic.negate(predicate), context)


def _closed(evaluator: Evaluator, predicate: Predicate, context: MaskContext) -> ClosedForm | OpaqueMask:
    predicate = use_packed_positions(evaluator, predicate, context)
    form = Classifier(evaluator.logic, context).classify(predicate)
    if form.is_dense_only:
        return OpaqueMask(form.notes[0])
    return form


__all__ = [
    "Addend",
    "AdditiveMask",
    "AdditivePart",
    "Builder",
    "ClosedForm",
    "MaskContext",
    "MaskEmitter",
    "OpaqueMask",
    "absorbs",
    "classify",
    "index_symbol",
    "is_hard",
    "make_evaluator",
    "mask_in_words",
    "prove_additive",
    "prove_additive_sum",
    "prove_drop",
    "prove_keep",
    "prove_zero_one",
    "size_arithmetic",
]
