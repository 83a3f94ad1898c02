"""Conjunctive normal form, kept small: a conjunction of disjunctions of literals without redundant members."""

from __future__ import annotations

import itertools

from .logic import Logic
from .predicate import Or, Predicate, conjuncts, disjuncts

_CLAUSE_LIMIT = 48
_SUBSUMPTION_LIMIT = 10


def to_clauses(logic: Logic, predicate: Predicate) -> list[Predicate]:
    """Conjuncts of `predicate`, each a literal or an `Or` of literals; one big clause where that would explode."""
    result: dict[Predicate, None] = {}
    for part in conjuncts(predicate):
        for clause in _distribute(logic, part):
            result[clause] = None
    return _without_implied(logic, list(result))


def _distribute(logic: Logic, part: Predicate) -> list[Predicate]:
    """One conjunct as clauses: `a | (b & c)` is `(a | b) & (a | c)`."""
    if not isinstance(part, Or):
        return [part]
    options = [[c for x in conjuncts(option) for c in _distribute(logic, x)] for option in disjuncts(part)]
    count = 1
    for option in options:
        count *= max(len(option), 1)
    if all(len(option) == 1 for option in options):
        return [part]
    if count > _CLAUSE_LIMIT:
        return [part]
    clauses: list[Predicate] = []
    for combination in itertools.product(*options):
        clauses += conjuncts(logic.any_of(combination))
    return _without_implied(logic, list(dict.fromkeys(clauses)))


def _without_implied(logic: Logic, clauses: list[Predicate]) -> list[Predicate]:
    """Drop clauses that another one implies."""
    if not any(isinstance(clause, Or) for clause in clauses):
        return clauses
    kept = list(clauses)
    for clause in sorted(clauses, key=lambda c: -len(disjuncts(c))):
        others = [other for other in kept if other is not clause]
        if len(kept) <= _SUBSUMPTION_LIMIT:
            implied = any(logic.implies([other], clause) for other in others)
        else:
            implied = any(set(disjuncts(other)) <= set(disjuncts(clause)) for other in others)
        if implied:
            kept = others
    return kept
