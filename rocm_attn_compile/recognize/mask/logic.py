"""Builds predicates and simplifies them: every step is an equivalence under the proved bounds of the symbols."""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from .bounds import Bounds
from .integers import expand
from .literals import (
    constant_and_divisor,
    flatten,
    leading_coefficient,
    linear_extremum,
    raw_negation,
    related,
    tighten,
    upper_sides,
)
from .predicate import And, BoolLoad, Or, Predicate, Rel, conjuncts


class Logic:
    """Builds predicates and simplifies them by what `bounds` proves. Every simplification is an equivalence."""

    _PAIRWISE_LIMIT = 12

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds

    # comparisons

    def le(self, expr: sympy.Expr) -> Predicate:
        """`expr <= 0`."""
        expr = expand(expr)
        if isinstance(expr, sympy.Number):
            return bool(expr <= 0)
        split = linear_extremum(expr)
        if split is not None:
            atom, slope = split
            parts = [self.le(expr.xreplace({atom: argument})) for argument in atom.args]
            every = isinstance(atom, sympy.Max) == bool(slope > 0)
            return self.all_of(parts) if every else self.any_of(parts)
        if self.bounds.never_positive(expr):
            return True
        if self.bounds.positive(expr):
            return False
        return Rel("le", tighten(expr))

    def eq(self, expr: sympy.Expr) -> Predicate:
        """`expr == 0`."""
        expr = expand(expr)
        if isinstance(expr, sympy.Number):
            return bool(expr == 0)
        if linear_extremum(expr) is not None:
            return self.all_of([self.le(expr), self.le(-expr)])
        at_most, at_least = self.bounds.never_positive(expr), self.bounds.never_negative(expr)
        if at_most or at_least:
            # One side holds everywhere, so equality is the other side.
            return self.le(-expr) if at_most else self.le(expr)
        if self.bounds.positive(expr) or self.bounds.positive(-expr):
            return False
        constant, divisor = constant_and_divisor(expr)
        if constant % divisor:
            return False
        expr = expand(expr / divisor)
        return Rel("eq", -expr if leading_coefficient(expr) < 0 else expr)

    def ne(self, expr: sympy.Expr) -> Predicate:
        """`expr != 0`."""
        return self.negate(self.eq(expr))

    # connectives

    def negate(self, x: Predicate) -> Predicate:
        """`not x`."""
        if isinstance(x, bool):
            return not x
        if isinstance(x, BoolLoad):
            return BoolLoad(x.value, x.index, not x.negated)
        if isinstance(x, Rel):
            if x.op == "le":
                return self.le(1 - x.expr)
            return Rel("ne" if x.op == "eq" else "eq", x.expr)
        parts = [self.negate(part) for part in x.parts]
        return self.any_of(parts) if isinstance(x, And) else self.all_of(parts)

    def all_of(self, parts: Iterable[Predicate]) -> Predicate:
        """Every one of `parts`."""
        flat = flatten(parts, And)
        if flat is None:
            return False
        reduced = self._unit_propagation(flat)
        if reduced is None:
            return False
        reduced = self._merge_comparisons(reduced)
        if reduced is None:
            return False
        if len(reduced) <= 1:
            return reduced[0] if reduced else True
        return And(reduced)

    def any_of(self, parts: Iterable[Predicate]) -> Predicate:
        """At least one of `parts`."""
        flat = flatten(parts, Or)
        if flat is None:
            return True
        if len(flat) <= 1:
            return flat[0] if flat else False
        common = frozenset.intersection(*(frozenset(conjuncts(part)) for part in flat))
        if common:
            # (a & b) | (a & c) == a & (b | c): a becomes a conjunct of its own.
            rests = [And([p for p in conjuncts(part) if p not in common]) for part in flat]
            kept = [part for part in conjuncts(flat[0]) if part in common]
            return self.all_of([*kept, self.any_of([self.all_of(rest.parts) for rest in rests])])
        # De Morgan: one set of simplifications serves both connectives.
        negated = [raw_negation(part) for part in flat]
        reduced = self._unit_propagation(negated)
        if reduced is None:
            return True
        reduced = self._merge_comparisons(reduced)
        if reduced is None:
            return True
        result = [raw_negation(part) for part in reduced]
        if len(result) <= 1:
            return result[0] if result else False
        return Or(result)

    def choose(self, condition: Predicate, then: Predicate, otherwise: Predicate) -> Predicate:
        """`then if condition else otherwise`."""
        if isinstance(condition, bool):
            return then if condition else otherwise
        if then == otherwise:
            return then
        return self.any_of([self.all_of([condition, then]), self.all_of([self.negate(condition), otherwise])])

    def substitute(self, x: Predicate, replacement: dict[sympy.Expr, sympy.Expr]) -> Predicate:
        """`x` with symbols or loads replaced, simplified again."""
        if isinstance(x, Rel):
            return getattr(self, x.op)(x.expr.xreplace(replacement))
        if isinstance(x, BoolLoad):
            return BoolLoad(x.value, tuple(expand(i.xreplace(replacement)) for i in x.index), x.negated)
        if isinstance(x, And):
            return self.all_of([self.substitute(part, replacement) for part in x.parts])
        if isinstance(x, Or):
            return self.any_of([self.substitute(part, replacement) for part in x.parts])
        return x

    def implies(self, facts: Iterable[Predicate], goal: Predicate) -> bool:
        """True if `goal` is proved to hold wherever all `facts` do."""
        return self.all_of([*facts, self.negate(goal)]) is False

    def _unit_propagation(self, parts: list[Predicate]) -> list[Predicate] | None:
        """Use each single literal of a conjunction inside its disjunctions; None if the conjunction is False."""
        literals: list[Predicate] = [part for part in parts if not isinstance(part, Or)]
        if not literals or len(literals) == len(parts):
            return None if any(raw_negation(x) in set(literals) for x in literals) else parts
        known = set(literals)
        if any(raw_negation(literal) in known for literal in literals):
            return None
        result: list[Predicate] = list(literals)
        changed = False
        for part in parts:
            if not isinstance(part, Or):
                continue
            if any(option in known or self._follows(option, literals) for option in part.parts):
                continue
            options = [x for x in part.parts if not self._excluded(x, known, literals)]
            if not options:
                return None
            changed |= len(options) < len(part.parts)
            simplified = options[0] if len(options) == 1 else Or(options)
            result.extend(conjuncts(simplified))
        return self._unit_propagation(list(dict.fromkeys(result))) if changed else result

    def _excluded(self, option: Predicate, known: set[Predicate], literals: list[Predicate]) -> bool:
        if raw_negation(option) in known:
            return True
        if isinstance(option, And):
            return any(self._excluded(part, known, literals) for part in option.parts)
        return isinstance(option, Rel) and self._follows(raw_negation(option), literals)

    def _follows(self, goal: Predicate, literals: list[Predicate]) -> bool:
        """True if a comparison follows from one of the literals, or from the sum of two."""
        if isinstance(goal, And):
            return all(self._follows(part, literals) for part in goal.parts)
        if not isinstance(goal, Rel) or goal.op != "le":
            return goal in literals
        facts = [e for x in literals if isinstance(x, Rel) for e in upper_sides(x)]
        if len(facts) > self._PAIRWISE_LIMIT:
            return False
        sums = facts + [a + b for i, a in enumerate(facts) for b in facts[i + 1 :]]
        return any(related(goal.expr, fact) and self.bounds.never_positive(goal.expr - fact) for fact in sums)

    def _merge_comparisons(self, parts: list[Predicate]) -> list[Predicate] | None:
        """Drop comparisons that follow from another, join `a <= b <= a`; None on a contradiction."""
        rels = [part for part in parts if isinstance(part, Rel)]
        if len(rels) < 2 or len(rels) > self._PAIRWISE_LIMIT:
            return parts
        dropped: set[Predicate] = set()
        joined: list[Predicate] = []  # what replaces the dropped ones
        for i, first in enumerate(rels):
            for second in rels[i + 1 :]:
                if first in dropped or second in dropped:
                    continue
                if not related(first.expr, second.expr):
                    continue
                verdict = self._compare(first, second)
                if verdict is None:
                    continue
                if verdict is False:
                    return None
                dropped |= {first, second}
                if verdict is not True:
                    joined.append(verdict)
        if not dropped:
            return parts
        rest = [part for part in parts if part not in dropped]
        return self._merge_comparisons(list(dict.fromkeys([*rest, *joined])))

    def _compare(self, first: Rel, second: Rel) -> Predicate | None:
        """`first and second` if that is False or a single comparison, else None."""
        for a in upper_sides(first):
            for b in upper_sides(second):
                if self.bounds.positive(a + b):
                    return False
        if first.op == second.op == "le":
            if expand(first.expr + second.expr) == 0:
                return self.eq(first.expr)
            if self.bounds.never_positive(first.expr - second.expr):
                return second
            if self.bounds.never_positive(second.expr - first.expr):
                return first
        for rel, other in ((first, second), (second, first)):
            sides = upper_sides(other)
            if rel.op == "eq" and other.op == "le":
                # An equality makes a comparison with the same varying part true or false.
                if any(self.bounds.never_positive(other.expr - side) for side in upper_sides(rel)):
                    return rel
            if rel.op == "ne" and sides:
                if any(self.bounds.positive(side + e) for side in (rel.expr, -rel.expr) for e in sides):
                    return other
                if other.op == "le" and any(expand(other.expr - side) == 0 for side in (rel.expr, -rel.expr)):
                    return self.le(other.expr + 1)
        return None
