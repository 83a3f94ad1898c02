"""From a predicate over (batch, head, q, k) to the parts that kernels know.

The predicate becomes a conjunction of clauses, each a disjunction of literals. A clause is, in this order:

* a limit on the diagonal `k - q`                      -> band_lower, band_upper
* a limit on k that depends on batch and q only         -> kv_start, kv_end   (`k <= a or k <= b`: `k < max(a, b) + 1`)
* free of q and of heads                                -> key_masks
* an equality of something of (b, q) and of (b, k)      -> segment_ids
* anything else                                         -> residual
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import sympy

from ...reasons import Reason
from .clauses import to_clauses
from .integers import ZERO, FloorDiv, expand, loads_in
from .logic import Logic
from .predicate import BoolLoad, Predicate, Rel, conjuncts, disjuncts, free_symbols
from .values import If

RowValue: TypeAlias = sympy.Expr | If
"""A number per (batch, q): an expression, or one of two by a predicate."""


@dataclass(frozen=True)
class MaskContext:
    """The symbols of a mask's index and their sizes.

    Attributes:
        q, k: Query and key position, `0 <= q < q_len`, `0 <= k < kv_len`.
        q_len, kv_len: Their sizes.
        batch: Symbols that number the batch, with sizes; the op's batch index is their row-major combination.
        heads: Likewise the query heads.
    """

    q: sympy.Symbol
    k: sympy.Symbol
    q_len: sympy.Expr
    kv_len: sympy.Expr
    batch: dict[sympy.Symbol, sympy.Expr] = field(default_factory=dict)
    heads: dict[sympy.Symbol, sympy.Expr] = field(default_factory=dict)


@dataclass(frozen=True)
class ClosedForm:
    """Which (q, k) attend: the conjunction of everything set here, equal to `predicate` at every index.

    Attributes:
        context: The symbols used.
        predicate: The whole mask, True keeps.
        band_lower, band_upper: `band_lower <= k - q <= band_upper`; expressions of sizes.
        kv_start, kv_end: Each gives `k >= start(b, q)`, `k < end(b, q)`; several are combined by max and min.
        key_masks: Predicates of (batch, k), True keeps.
        segment_ids: Pairs `(expression of (b, q), expression of (b, k))` that must be equal.
        residual: Conjuncts without a closed form; a dense mask is needed for them.
        notes: Why parts are residual.
        logic: What simplified it, for further questions.
    """

    context: MaskContext
    predicate: Predicate
    band_lower: sympy.Expr | None
    band_upper: sympy.Expr | None
    kv_start: tuple[RowValue, ...]
    kv_end: tuple[RowValue, ...]
    key_masks: tuple[Predicate, ...]
    segment_ids: tuple[tuple[sympy.Expr, sympy.Expr], ...]
    residual: tuple[Predicate, ...]
    notes: tuple[Reason, ...] = ()
    logic: Logic = field(repr=False, compare=False, default=None)  # type: ignore[assignment]

    @property
    def is_tautology(self) -> bool:
        """True if every pair attends."""
        return self.predicate is True

    @property
    def is_contradiction(self) -> bool:
        """True if no pair attends."""
        return self.predicate is False

    @property
    def is_dense_only(self) -> bool:
        """True if no part has a closed form."""
        parts = (self.kv_start, self.kv_end, self.key_masks, self.segment_ids)
        return bool(self.residual) and self.band_lower is None and self.band_upper is None and not any(parts)

    def every_row_keeps_a_key(self) -> bool:
        """True if it is proved that each query attends to at least one key, for all sizes and tensor contents."""
        return self._every_row_keeps_a_key

    @cached_property
    def _every_row_keeps_a_key(self) -> bool:
        if self.predicate is True:
            return self.logic.bounds.positive(self.context.kv_len)
        if self.predicate is False:
            return False
        return any(self._is_kept(witness) for witness in self._witnesses())

    def _witnesses(self) -> Iterable[sympy.Expr]:
        """Keys worth trying: the ends of every range, and the diagonal."""
        q, last = self.context.q, self.context.kv_len - 1
        plain = [q, ZERO, last, q + self.context.kv_len - self.context.q_len]
        plain += [q + offset for offset in (self.band_upper, self.band_lower) if offset is not None]
        plain += [start for start in self.kv_start if isinstance(start, sympy.Expr)]
        plain += [end - 1 for end in self.kv_end if isinstance(end, sympy.Expr)]
        for witness in dict.fromkeys(expand(x) for x in plain):
            yield witness
            if witness not in (ZERO, last):
                yield sympy.Min(witness, last)
                yield sympy.Max(witness, ZERO)

    def _is_kept(self, key: sympy.Expr) -> bool:
        bounds = self.logic.bounds
        if not (bounds.never_negative(key) and bounds.never_positive(key - self.context.kv_len + 1)):
            return False
        return self.logic.substitute(self.predicate, {self.context.k: key}) is True


class Classifier:
    """Sorts the clauses of one predicate."""

    def __init__(self, logic: Logic, context: MaskContext) -> None:
        self.logic = logic
        self.context = context
        self.lower: list[sympy.Expr] = []
        self.upper: list[sympy.Expr] = []
        self.kv_start: list[RowValue] = []
        self.kv_end: list[RowValue] = []
        self.key_masks: list[Predicate] = []
        self.segment_ids: list[tuple[sympy.Expr, sympy.Expr]] = []
        self.residual: list[Predicate] = []
        self.notes: list[Reason] = []

    def classify(self, predicate: Predicate) -> ClosedForm:
        """The closed form of `predicate`."""
        if predicate is False:
            self.kv_end.append(ZERO)
        else:
            for clause in to_clauses(self.logic, predicate):
                self._place(clause)
        return ClosedForm(
            self.context,
            predicate,
            self._tightest(self.lower, upper=False),
            self._tightest(self.upper, upper=True),
            tuple(dict.fromkeys(self.kv_start)),
            tuple(dict.fromkeys(self.kv_end)),
            tuple(self.key_masks),
            tuple(self.segment_ids),
            tuple(self.residual),
            tuple(self.notes),
            self.logic,
        )

    def _place(self, clause: Predicate) -> None:
        symbols = free_symbols(clause)
        if symbols & self.context.heads.keys():
            self._leave(clause, "mask_per_head", "it differs between heads")
        elif self.context.k not in symbols:
            self.kv_end.append(If(clause, self.context.kv_len, ZERO))
        elif not (self._as_equal_limits(clause) or self._as_limit(clause)):
            if self.context.q not in symbols:
                self.key_masks.append(clause)
            elif not self._as_segment_ids(clause):
                self._leave(clause, *_why_dense(clause))

    def _leave(self, clause: Predicate, code: str, why: str) -> None:
        self.residual.append(clause)
        self.notes.append(Reason(code, f"{clause} stays a dense mask: {why}"))

    def _as_equal_limits(self, clause: Predicate) -> bool:
        """`k == f(b, q)`, or `floor(k / c) == f(b, q)`: a limit from either side."""
        if not isinstance(clause, Rel) or clause.op != "eq":
            return False
        first, second = (solve(self.logic, sign * clause.expr, self.context.k) for sign in (1, -1))
        if first is None or second is None or first[0] == second[0]:
            return False
        for side, limit in (first, second):
            self._add_limits(side, [limit], False)
        return True

    def _as_limit(self, clause: Predicate) -> bool:
        """A disjunction of limits from one side and of conditions on the row."""
        conditions: list[Predicate] = []
        limits: list[tuple[str, sympy.Expr]] = []
        for literal in disjuncts(clause):
            if self.context.k not in free_symbols(literal):
                conditions.append(literal)
                continue
            is_limit = isinstance(literal, Rel) and literal.op == "le"
            solved = solve(self.logic, literal.expr, self.context.k) if is_limit else None  # type: ignore[union-attr]
            if solved is None:
                return False
            limits.append(solved)
        if len({side for side, _ in limits}) != 1:
            return False
        side = limits[0][0]
        self._add_limits(side, [x for _, x in limits], self.logic.any_of(conditions))
        return True

    def _add_limits(self, side: str, limits: list[sympy.Expr], unlimited: Predicate) -> None:
        """`k <= some limit` or `k >= some limit`, except on rows that are `unlimited`.

        On the diagonal where every limit runs parallel to it, else per row.
        """
        upper = side == "upper"
        # The only query is query 0, so that every limit is on a diagonal.
        q = ZERO if self.context.q_len == 1 else self.context.q
        offsets = [expand(limit - q) for limit in limits]
        if unlimited is False and all(map(self._is_size, offsets)):
            (self.upper if upper else self.lower).append(sympy.Max(*offsets) if upper else sympy.Min(*offsets))
            return
        row: RowValue = expand(sympy.Max(*limits) + 1) if upper else sympy.Min(*limits)
        if unlimited is not False:
            row = If(unlimited, self.context.kv_len if upper else ZERO, row)
        (self.kv_end if upper else self.kv_start).append(row)

    def _is_size(self, expr: sympy.Expr) -> bool:
        """True if the expression is the same for the whole attention."""
        return not loads_in(expr) and expr.free_symbols.isdisjoint({self.context.q, *self.context.batch})

    def _as_segment_ids(self, clause: Predicate) -> bool:
        """`f(b, q) == g(b, k)`."""
        if not isinstance(clause, Rel) or clause.op != "eq":
            return False
        of_key, of_query = ZERO, ZERO
        for term in sympy.Add.make_args(clause.expr):
            if term.has(self.context.k):
                of_key += term
            else:
                of_query -= term
        if of_key.has(self.context.q):
            return False
        if of_key.could_extract_minus_sign():
            of_key, of_query = -of_key, -of_query
        self.segment_ids.append((expand(of_query), expand(of_key)))
        return True

    def _tightest(self, offsets: list[sympy.Expr], upper: bool) -> sympy.Expr | None:
        """The one that implies all others, or their min or max where that depends on the sizes."""
        bounds = self.logic.bounds
        best: sympy.Expr | None = None
        for offset in offsets:
            slack = None if best is None else (offset - best if upper else best - offset)
            if slack is None or bounds.never_positive(slack):
                best = offset
            elif not bounds.never_negative(slack):
                best = sympy.Min(best, offset) if upper else sympy.Max(best, offset)
        return best


def _why_dense(clause: Predicate) -> tuple[str, str]:
    """Reason code and text for a clause that couples q and k."""
    loads = [part for literal in disjuncts(clause) for part in conjuncts(literal) if isinstance(part, BoolLoad)]
    if len(loads) == 1 and loads[0] == clause:
        value = loads[0].value
        if value.op == "input":
            return "mask_is_input", f"its elements are an input or a buffer of the graph ({value!r})"
        return "mask_op_opaque", f"how {value!r} is computed has no closed form"
    return "mask_general", "it couples q and k in a way that has no closed form"


def solve(logic: Logic, expr: sympy.Expr, k: sympy.Symbol) -> tuple[str, sympy.Expr] | None:
    """`expr <= 0` as `("upper", u)` for `k <= u` or `("lower", l)` for `k >= l`, with k on the left only.

    Sees through one floor division of k by a positive number. None if k is anywhere else.
    """
    terms = [term for term in sympy.Add.make_args(expr) if term.has(k)]
    rest = expand(-(expr - sympy.Add(*terms)))
    if len(terms) != 1:
        return None
    coefficient, atom = terms[0].as_coeff_Mul()
    if not isinstance(coefficient, sympy.Integer):
        return None
    # coefficient * atom <= rest
    positive = coefficient > 0
    limit = FloorDiv(rest, coefficient) if positive else expand(-FloorDiv(rest, -coefficient))
    if atom == k:
        return ("upper" if positive else "lower"), limit
    if not isinstance(atom, FloorDiv):
        return None
    base, divisor = atom.args
    if divisor.has(k) or not logic.bounds.positive(divisor):
        return None
    # floor(base / d) <= limit is base <= d * limit + d - 1;  floor(base / d) >= limit is base >= d * limit
    if positive:
        return solve(logic, expand(base - divisor * limit - divisor + 1), k)
    return solve(logic, expand(divisor * limit - base), k)
