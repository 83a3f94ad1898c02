"""ALiBi: a bias that falls with the distance of query and key, `-slope[h] * |k - q - (kv_len - q_len)|`.

The op computes it from the slopes, so that no tensor over all pairs is needed. A bias is handed to it so where it is
proved to be that for every pair that the masks keep, but for a number per query: a softmax does not see what is added
to a whole row. Under a causal mask the distance has one sign, and `slope[h] * (k - c)` is ALiBi for any c.

    slope * (k - q)  =  -slope * |k - q|                    where k <= q
    slope * (k - c)  =  -slope * |k - q|  +  slope * (q - c)
                                             the same for all keys of a row

Sinks do see what is added to a whole row. Beside them, the bias has to be the op's to the last term.

Where the distance may have both signs, `slope[h] * (k - q)` is one number per head and key, `slope[h] * (k - (kv_len -
1))`. That is as large as the longest distance also beside the query, where the distance is small: in float32 it costs
digits which eager keeps, so it is done for operands of half precision, whose scores eager itself rounds more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch

from ..capture.trace import Value
from ..reasons import Reason
from ..symbolic import is_one
from . import mask as prover
from .addends import Addends, symbols_of, total
from .axes import Atom, Dim, atoms_of
from .compose import Logits
from .labels import is_cast, is_view
from .live import LiveUsers
from .mask.integers import ZERO, expand, loaded_value, loads_in
from .mask.values import FloatLoad, Opaque
from .moderate import is_moderate
from .region import Alibi, Bias, MaskTerm, Operand, PositionBias, Roles
from .symbols import Symbols

_HALF = (torch.float16, torch.bfloat16)
_PARTS = frozenset(("slice", "select"))
_LARGEST_FACTOR, _LARGEST_POSITION = 1e4, 1e8
"""Of positions in a bias that is no mask. Half of the lowest float16 is the smallest fill, and -1e9 beside it."""


def with_positions(
    biases: list[Bias],
    roles: Roles,
    logits: Logits,
    keep: prover.ClosedForm,
    dtype: torch.dtype,
    live: LiveUsers,
    requires_grad: Callable[[Value], bool],
) -> tuple[list[Bias], Reason | None]:
    """The biases, those of them that are ALiBi as such, or as positions where that is shorter; and a note.

    Args:
        biases: Of the site, with their axes.
        keep: What the masks keep; nothing is said about a bias elsewhere.
        dtype: Of the op.
        requires_grad: Whether a value gets a gradient, which only the tensor as it is can have.
    """
    note = next(filter(None, (_note_of(bias, roles, live) for bias in biases)), None)
    if not biases or any(isinstance(bias, MaskTerm) for bias in biases):
        return biases, note
    symbols = Symbols(roles, live)
    found: list[Bias] = []
    for bias in biases:
        line = _line_of(bias, symbols, roles, keep, live) if isinstance(bias, Operand) else None
        if line is not None and any(requires_grad(tensor) for tensor in line.tensors):
            note = Reason("alibi_learned", "ALiBi whose slopes get a gradient stays a tensor")
            line = None
        if line is not None and line.is_rounded and dtype not in _HALF:
            note = Reason(
                "alibi_rounded", f"ALiBi of {dtype} scores that is made in half precision stays as it is rounded"
            )
            line = None
        if line is None or not isinstance(bias, Operand):
            found.append(bias)
        else:
            found.append(_form(bias, line, roles, logits.sinks is not None, dtype))
    return found, note


def _note_of(bias: Bias, roles: Roles, live: LiveUsers) -> Reason | None:
    """What is worth saying of a bias: that it comes into the graph as it is (ALiBi of x-transformers), or is a mask."""
    if isinstance(bias, Operand) and bias.value.dtype == torch.bool:
        return Reason("bool_bias", "a bool mask is added, where True counts as +1; to mask, use where or masked_fill")
    if not isinstance(bias, Operand) or not all({*atoms_of(bias.dims)} & {*axis} for axis in (roles.query, roles.key)):
        return None
    value = bias.value
    while is_view(value) or is_cast(value) or (value.name in _PARTS and not isinstance(value.op, str)):
        value = value.args[0]
    if value.op != "input" or is_moderate(value, live):
        return None
    return Reason(
        "bias_is_input",
        f"the bias {live.describe(value)} is an input or a buffer of the graph: what it holds is not known when "
        "compiling, so it stays a tensor over all pairs",
    )


def is_of_positions(bias: Operand, symbols: Symbols, live: LiveUsers) -> bool:
    """True if each tensor in the bias is multiplied with a number that changes from key to key, or is moderate.

    Such a bias is no mask, whatever the tensor holds: it is as low as a fill only where slopes are. A position that is
    multiplied with a huge number may be a mask, and so may a tensor: `(1 - attention_mask) * finfo.min`, of integers or
    not, also of float16.
    """
    context = symbols.context
    evaluator = prover.make_evaluator(context)
    element = evaluator.at(bias.value, [symbols.of(dim) for dim in bias.dims])
    try:
        sums = total(Addends(evaluator, True, context).of(element))
    except (Opaque, ValueError):
        return False
    return all(
        _is_distance(expr, _LARGEST_POSITION if load is None or expr.has(context.k) else _LARGEST_FACTOR)
        and all(is_moderate(loaded_value(one), live) for one in loads_in(expr))
        and (load is None or is_moderate(load.value, live) or _changes_with_the_key(load, expr, context))
        for load, expr in sums.items()
    )


def _changes_with_the_key(load: FloatLoad, expr: sympy.Expr, context: prover.MaskContext) -> bool:
    """Of `load * expr`: true of a distance, and not of `lowest * (1 - attention_mask)`, whose mask is looked up."""
    return expr.has(context.k) and not loads_in(expr) and not symbols_of(load, ZERO) & {context.q, context.k}


def _is_distance(expr: sympy.Expr, largest: float) -> bool:
    """False if positions are multiplied with a number that makes fills of them, or one beyond `largest` is added."""
    for term, factor in expr.as_coefficients_dict().items():
        if abs(factor) > (largest if term == 1 else _LARGEST_FACTOR):
            return False
        extrema = term.atoms(sympy.Max, sympy.Min)
        if not all(_is_distance(expand(factor * one), largest) for extremum in extrema for one in extremum.args):
            return False
    return True


@dataclass(frozen=True)
class _Line:
    """`factor * slopes * (k - c)`, or `-factor * slopes * |k - q - (kv_len - q_len)|`, plus a number per query.

    Attributes:
        tensors: All that is read.
        is_absolute: It is the second form.
        is_causal: Of the first: k - q is at most kv_len - q_len for every pair that is kept.
        is_exact: Nothing is added per query, and c is q + kv_len - q_len.
        is_of_keys: Nothing at all depends on the query.
        is_tight: The mask keeps k - q = kv_len - q_len.
        is_far: Of the first: c is at least q + kv_len - q_len.
        is_half: Something is computed in float16, in which a long distance is infinite.
        is_rounded: Something is computed in float16 or bfloat16.
    """

    slopes: Operand | None
    factor: float
    tensors: list[Value]
    is_absolute: bool
    is_causal: bool
    is_exact: bool
    is_of_keys: bool
    is_tight: bool
    is_far: bool
    is_half: bool
    is_rounded: bool


def _form(bias: Operand, line: _Line, roles: Roles, has_sinks: bool, dtype: torch.dtype) -> Bias:
    """The bias in the form that needs least and loses nothing."""
    is_alibi = line.is_absolute or line.is_causal
    if is_alibi and (line.is_exact if has_sinks else line.is_absolute or _keeps_digits(line, dtype)):
        return Alibi(line.slopes, line.factor)
    varies = bool({*roles.query} & {*atoms_of(bias.dims)})
    if varies and not (line.is_absolute or has_sinks or line.is_half) and dtype in _HALF:
        return PositionBias(line.slopes, line.factor)
    return bias


def _keeps_digits(line: _Line, dtype: torch.dtype) -> bool:
    """Whether the op's distance is no longer than eager's, beside the query: c may be far from q + kv_len - q_len.

    A bias of keys alone is as large as the longest distance somewhere, and so no better; where the query is at the last
    key that it sees, the op's is 0 there. In a cache that is not full yet it is far from 0, and still no longer than
    eager's if c is not before the last key that a causal mask keeps.
    """
    return line.is_exact or line.is_far or (line.is_of_keys and line.is_tight) or dtype in _HALF


def _line_of(bias: Operand, symbols: Symbols, roles: Roles, keep: prover.ClosedForm, live: LiveUsers) -> _Line | None:
    """The bias as slopes and distances, or None if it is anything else."""
    if bias.factors or not isinstance(bias.factor, (int, float)):
        return None
    context = symbols.context
    evaluator = prover.make_evaluator(context)
    element = evaluator.at(bias.value, [symbols.of(dim) for dim in bias.dims])
    try:
        addends = Addends(evaluator, keep.predicate, context)
        sums = total(addends.of(element))
        (load,) = [load for load, expr in sums.items() if context.k in symbols_of(load, expr)]
        expr = sums.pop(load)
        if symbols_of(load, ZERO) & {context.k, context.q}:
            return None  # slopes that vary
        diagonal = expand(context.k - context.q - (context.kv_len - context.q_len))
        factor, rest, is_absolute = _line_in(expr, context.k, diagonal)
    except (Opaque, ValueError):
        return None
    slopes = None
    if load is not None:
        dims = [dim for index in load.index if (dim := _dim_of(index, symbols, roles)) is not None]
        if len(dims) < len(load.index):
            return None
        slopes = Operand(load.value, dims)
    # A number that is added to a whole row changes nothing, but -inf does.
    if any(one is not None and not is_moderate(one.value, live) for one in sums):
        return None
    dtypes = (bias.value.dtype, bias.rounded_to, bias.added_in)
    # The last term of factor * diagonal.
    is_zero = rest == 0 if is_absolute else expand(rest - factor * (diagonal - context.k)) == 0
    # c - (q + kv_len - q_len), which is k - diagonal
    ahead = None if is_absolute or sums else expand(-rest / factor - (context.k - diagonal))
    number = float(factor) * bias.factor
    if number == 0 or not math.isfinite(number):
        return None
    return _Line(
        slopes,
        number,
        [one.value for one in (load, *sums) if one is not None],
        is_absolute,
        is_absolute or evaluator.logic.implies([keep.predicate], evaluator.logic.le(diagonal)),
        is_exact=is_zero and not sums,
        is_of_keys=not is_absolute and not any(context.q in symbols_of(*one) for one in (*sums.items(), (None, rest))),
        is_tight=not (keep.kv_end or keep.key_masks)
        and (keep.band_upper is None or expand(keep.band_upper - (context.kv_len - context.q_len)) == 0),
        is_far=ahead is not None and evaluator.logic.bounds.never_negative(ahead),
        is_half=addends.is_half or torch.float16 in dtypes,
        is_rounded=addends.is_rounded or any(dtype in _HALF for dtype in dtypes),
    )


def _line_in(expr: sympy.Expr, k: sympy.Symbol, diagonal: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr, bool]:
    """`(factor, rest, is_absolute)`: the expression is factor * k + rest, or -factor * |diagonal| + rest."""
    maxima = [one for one in expr.atoms(sympy.Max) if one.has(k)]
    if not maxima:
        factor = expr.coeff(k, 1)
        rest = expand(expr - factor * k)
    elif len(maxima) == 1 and len(maxima[0].args) == 2 and expand(sum(maxima[0].args)) == 0:
        if not any(expand(one - diagonal) == 0 for one in maxima[0].args):
            raise Opaque("a distance from elsewhere")
        factor = -expr.coeff(maxima[0], 1)
        rest = expand(expr + factor * maxima[0])
    else:
        raise Opaque("a distance that is cut off")
    if rest.has(k) or not factor.is_number:
        raise Opaque("not linear in the position of the key")
    return factor, rest, bool(maxima)


def _dim_of(index: sympy.Expr, symbols: Symbols, roles: Roles) -> Dim | None:
    """The axes that an index runs over, batch and heads only."""
    if index == ZERO:
        return ()
    atoms: list[Atom] = [*roles.batch, *roles.heads]
    candidates: list[Dim] = [tuple(atoms[i:j]) for i in range(len(atoms)) for j in range(i + 1, len(atoms) + 1)]
    candidates = [dim for dim in candidates if not any(is_one(atom.size) for atom in dim)]
    return next((dim for dim in candidates if expand(symbols.of(dim) - index) == 0), None)
