"""The packed-sequence lemma, for masks of sequences packed into one row.

    starts   = position_ids differ from their predecessor by something else than 1
    segment  = cumsum(starts)
    mask     = segment[q] == segment[k]  and  position_ids[k] <= position_ids[q]      (Hugging Face, any model)

A running sum of a predicate never decreases, so equal sums at q and k mean that the predicate is False everywhere in
between: there positions grow by exactly one, and `position_ids[k] - position_ids[q] == k - q`. The comparison of
positions becomes a plain causal mask, of which kernels can skip blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
from sympy.core.function import AppliedUndef

from .integers import expand, loaded_value, loads_in
from .logic import Logic
from .predicate import Predicate, Rel, conjuncts, disjuncts, expressions, is_predicate
from .rules_reduce import fresh_symbol

if TYPE_CHECKING:
    from .classify import MaskContext
    from .evaluate import Evaluator


def use_packed_positions(evaluator: Evaluator, predicate: Predicate, context: MaskContext) -> Predicate:
    """An equivalent predicate in which positions within a segment are replaced by q and k where that is proved."""
    for equality in conjuncts(predicate):
        load = _segment_equality(equality, context)
        if load is None or loaded_value(load) not in evaluator.running_sums:
            continue
        replacement = _positions(evaluator, load, context, predicate)
        if not replacement:
            continue
        logic = evaluator.logic
        others = [part for part in conjuncts(predicate) if part != equality]
        predicate = logic.all_of([equality, *(logic.substitute(part, replacement) for part in others)])
    return predicate


def _segment_equality(part: Predicate, context: MaskContext) -> AppliedUndef | None:
    """The load at q, if `part` says that one tensor has the same element at q and at k."""
    if not isinstance(part, Rel) or part.op != "eq":
        return None
    for load in loads_in(part.expr):
        if load.has(context.q) and expand(part.expr - load + load.xreplace({context.q: context.k})) == 0:
            return load
        if load.has(context.q) and expand(part.expr + load - load.xreplace({context.q: context.k})) == 0:
            return load
    return None


def _positions(
    evaluator: Evaluator, load: AppliedUndef, context: MaskContext, predicate: Predicate
) -> dict[sympy.Expr, sympy.Expr]:
    """`{position[k]: position[q] + k - q}` if the summand is False exactly where positions grow by one."""
    source, dim = evaluator.running_sums[loaded_value(load)]
    if load.args[dim] != context.q or any(i.has(context.q) for d, i in enumerate(load.args) if d != dim):
        return {}
    symbol = fresh_symbol(evaluator, evaluator.size(source, dim))
    point = [symbol if d == dim else i for d, i in enumerate(load.args)]
    # `False` must force the step also where the summand is a number: only predicates cast to 0 and 1 are understood.
    summand = evaluator.at(source, point)
    if not is_predicate(summand):
        return {}
    step = _forced_step(evaluator.logic, summand, symbol)
    if step is None:
        return {}
    at_q, at_k = step.xreplace({symbol: context.q}), step.xreplace({symbol: context.k})
    if not any(expr.has(at_k) for expr in expressions(predicate)):
        return {}
    return {at_k: at_q + context.k - context.q}


def _forced_step(logic: Logic, summand: Predicate, symbol: sympy.Symbol) -> AppliedUndef | None:
    """The load p with `p[symbol] - p[symbol - 1] == 1` wherever the summand is False and `symbol >= 1`."""
    for part in disjuncts(logic.negate(summand)):
        if logic.implies([part], logic.le(symbol)):
            continue  # only at the first position, which has no predecessor
        if not isinstance(part, Rel) or part.op != "eq":
            return None
        for load in loads_in(part.expr):
            before = load.xreplace({symbol: symbol - 1})
            if load.has(symbol) and load != before:
                step = load - before - 1
                if expand(part.expr - step) == 0 or expand(part.expr + step) == 0:
                    return load
        return None
    return None
