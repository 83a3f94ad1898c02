"""The algebra under the masks: bounds are sound, simplification keeps the meaning, floor division is Python's."""

from __future__ import annotations

import itertools
import random

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from rocm_attn_compile.recognize.mask.bounds import Bounds
from rocm_attn_compile.recognize.mask.classify import solve
from rocm_attn_compile.recognize.mask.integers import FloorDiv, expand, from_size, modulo
from rocm_attn_compile.recognize.mask.logic import Logic
from rocm_attn_compile.recognize.mask.predicate import And, Or, Rel

Q, K = (sympy.Symbol(name, integer=True, nonnegative=True) for name in "qk")
M, N = (sympy.Symbol(name, integer=True, positive=True) for name in "MN")
QUICK = settings(max_examples=120, derandomize=True, deadline=None, database=None)


def static_bounds(m: int, n: int) -> Bounds:
    return Bounds({Q: (sympy.Integer(0), sympy.Integer(m - 1)), K: (sympy.Integer(0), sympy.Integer(n - 1))})


def symbolic_bounds() -> Bounds:
    return Bounds({Q: (sympy.Integer(0), M - 1), K: (sympy.Integer(0), N - 1)})


def number(expr, env) -> int:
    if isinstance(expr, sympy.Integer):
        return int(expr)
    if isinstance(expr, sympy.Symbol):
        return env[expr]
    parts = [number(argument, env) for argument in expr.args]
    if isinstance(expr, sympy.Add):
        return sum(parts)
    if isinstance(expr, FloorDiv):
        return parts[0] // parts[1]
    if isinstance(expr, sympy.Pow):
        return parts[0] ** parts[1]
    if isinstance(expr, (sympy.Max, sympy.Min)):
        return (max if isinstance(expr, sympy.Max) else min)(parts)
    return sympy.prod(parts)


def random_expression(rng: random.Random, depth: int, symbols=(Q, K)):
    if depth == 0:
        return rng.choice([*symbols, sympy.Integer(rng.randint(-4, 4))])
    a, b = random_expression(rng, depth - 1, symbols), random_expression(rng, rng.randint(0, depth - 1), symbols)
    c = sympy.Integer(rng.choice([-3, -2, 2, 3]))
    kinds = [
        lambda: a + b,
        lambda: a - b,
        lambda: c * a,
        lambda: FloorDiv(a, c),
        lambda: modulo(a, abs(c)),
        lambda: sympy.Max(a, b),
        lambda: sympy.Min(a, b),
        lambda: expand(a * b),
    ]
    return expand(rng.choice(kinds)())


@QUICK
@given(st.integers(-40, 40), st.integers(-5, 5).filter(bool), st.integers(-3, 3), st.integers(-7, 7))
def test_floor_division_is_pythons(value, divisor, factor, offset):
    expr = FloorDiv(factor * Q + offset, sympy.Integer(divisor))
    assert number(expr, {Q: value}) == (factor * value + offset) // divisor
    assert (
        number(modulo(factor * Q + offset, sympy.Integer(divisor)), {Q: value}) == (factor * value + offset) % divisor
    )
    nested = FloorDiv(FloorDiv(factor * Q + offset, sympy.Integer(divisor)), sympy.Integer(3))
    assert number(nested, {Q: value}) == (factor * value + offset) // divisor // 3


@QUICK
@given(st.randoms(use_true_random=False))
def test_what_bounds_prove_is_true(rng):
    expr = random_expression(rng, rng.randint(1, 3))
    m, n = rng.randint(1, 5), rng.randint(1, 5)
    claim = static_bounds(m, n).never_positive(expr)
    if claim:
        for q, k in itertools.product(range(m), range(n)):
            assert number(expr, {Q: q, K: k}) <= 0, expr


@QUICK
@given(st.randoms(use_true_random=False))
def test_what_bounds_prove_for_all_sizes_is_true(rng):
    expr = random_expression(rng, rng.randint(1, 2), (Q, K, M, N))
    if symbolic_bounds().never_positive(expr):
        for m, n in itertools.product((1, 2, 3, 5), repeat=2):
            for q, k in itertools.product(range(m), range(n)):
                assert number(expr, {Q: q, K: k, M: m, N: n}) <= 0, expr


@pytest.mark.parametrize(
    ("expr", "proved"),
    [
        (Q - M + 1, True),
        (Q - M, True),
        (Q - M + 2, False),
        (K * Q - (M - 1) * (N - 1), True),
        (Q * Q - 2 * Q - 1, False),  # not affine: -1 at both 0 and 2, but a prototype looked at the ends only
        (-Q * Q + 3 * Q - 2, False),  # at most 0 at both ends of 0..4, but not in between
        (Q - 4 * FloorDiv(Q, sympy.Integer(4)) - 3, True),
        (Q - 4 * FloorDiv(Q, sympy.Integer(4)) - 2, False),
        (4 * FloorDiv(Q, sympy.Integer(4)) - Q, True),
        (sympy.Max(Q, K) - M - N + 1, True),
        (sympy.Min(Q, K) - M + 1, True),
        (-M * N + 1, True),
        (M - N, False),
    ],
)
def test_bounds_of_known_expressions(expr, proved):
    assert symbolic_bounds().never_positive(expr) == proved


def random_predicate(rng: random.Random, logic: Logic, depth: int):
    """A simplified predicate and a plain Python function of the same meaning."""
    if depth == 0:
        expr = random_expression(rng, rng.randint(0, 2))
        op = rng.choice(["le", "eq", "ne"])
        meaning = {"le": lambda x: x <= 0, "eq": lambda x: x == 0, "ne": lambda x: x != 0}[op]
        return getattr(logic, op)(expr), lambda env: meaning(number(expr, env))
    parts = [random_predicate(rng, logic, rng.randint(0, depth - 1)) for _ in range(rng.randint(2, 4))]
    kind = rng.choice(["and", "or", "not", "choose"])
    if kind == "and":
        return logic.all_of([p for p, _ in parts]), lambda env: all(f(env) for _, f in parts)
    if kind == "or":
        return logic.any_of([p for p, _ in parts]), lambda env: any(f(env) for _, f in parts)
    if kind == "not":
        return logic.negate(parts[0][0]), lambda env: not parts[0][1](env)
    (a, fa), (b, fb), (c, fc) = [*parts, *parts][:3]
    return logic.choose(a, b, c), lambda env: fb(env) if fa(env) else fc(env)


def holds(x, env) -> bool:
    if isinstance(x, bool):
        return x
    if isinstance(x, And):
        return all(holds(part, env) for part in x.parts)
    if isinstance(x, Or):
        return any(holds(part, env) for part in x.parts)
    assert isinstance(x, Rel)
    value = number(x.expr, env)
    return {"le": value <= 0, "eq": value == 0, "ne": value != 0}[x.op]


@QUICK
@given(st.randoms(use_true_random=False))
def test_simplification_keeps_the_meaning(rng):
    m, n = rng.randint(1, 5), rng.randint(1, 5)
    logic = Logic(static_bounds(m, n))
    predicate, meaning = random_predicate(rng, logic, rng.randint(1, 3))
    for q, k in itertools.product(range(m), range(n)):
        env = {Q: q, K: k}
        assert holds(predicate, env) == meaning(env), predicate
        assert holds(logic.negate(predicate), env) != meaning(env)


@QUICK
@given(st.randoms(use_true_random=False))
def test_limits_solved_for_k_are_equivalent(rng):
    c, d, e = rng.choice([-3, -2, -1, 1, 2, 3]), rng.randint(1, 4), rng.choice([-2, -1, 1, 2])
    inner = FloorDiv(rng.choice([1, 2]) * K + rng.randint(-3, 3), sympy.Integer(d))
    expr = expand(c * inner + e * Q + rng.randint(-5, 5))
    solved = solve(Logic(static_bounds(9, 9)), expr, K)
    assert solved is not None
    side, limit = solved
    for q, k in itertools.product(range(9), range(9)):
        bound = number(limit, {Q: q})
        assert (k <= bound if side == "upper" else k >= bound) == (number(expr, {Q: q, K: k}) <= 0)


def test_torch_shape_functions_become_ours():
    functions = pytest.importorskip("torch.utils._sympy.functions")
    assert from_size(functions.FloorDiv(M, 2)) == FloorDiv(M, sympy.Integer(2))
    assert number(from_size(functions.Mod(M, 3)), {M: 7}) == 1
    assert from_size(functions.Max(M, N)) == sympy.Max(M, N)
    assert isinstance(from_size(5), sympy.Integer)


def test_contradictions_and_tautologies_are_constants():
    logic = Logic(symbolic_bounds())
    assert logic.all_of([logic.le(K - Q), logic.le(Q + 1 - K)]) is False
    assert logic.any_of([logic.le(K - 4), logic.le(5 - K)]) is True
    assert logic.all_of([logic.le(K - Q), logic.le(K - Q - 3)]) == Rel("le", K - Q)
    assert logic.all_of([logic.le(K - Q), logic.le(Q - K)]) == logic.eq(K - Q)
    assert logic.eq(2 * K - 2 * Q - 1) is False
    assert logic.le(2 * K - 2 * Q - 1) == Rel("le", K - Q)
    assert logic.ne(K) == Rel("le", 1 - K)
