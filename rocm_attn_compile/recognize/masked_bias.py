"""A bias that has a fill in the place of what a mask drops is a bias and a mask, as Falcon writes ALiBi.

    scores + where(keep, bias, fill)   =   scores + bias + where(keep, 0, fill)

Beside a kept key a dropped one has weight 0 either way, if the fill is low enough and the bias is not. In a row that
keeps none both sums are the fill, if it absorbs what is added to it; whether it does is asked of every mask
(`empty_rows`). A gradient of the bias is 0 where it was replaced, and in a row that keeps none it would not be: a bias
that gets one is taken apart where no such row can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..capture.trace import Value
from . import mask as prover
from .empty_rows import Term
from .labels import aligned, cuts_gradient, number_of
from .numbers import rounded
from .region import Operand
from .symbols import Symbols


def take_apart(
    bias: Operand,
    symbols: Symbols,
    is_hard: Callable[[float], bool],
    is_moderate: Callable[[Operand], bool],
    requires_grad: Callable[[Value], bool],
    is_alone: bool,
) -> tuple[Operand, Term] | None:
    """The bias and the mask in it; None if it is no such choice, or something of the above is not proved.

    Args:
        bias: Of the site, with its axes.
        is_hard: Whether a number that is added drops a key.
        is_moderate: Whether a bias is nowhere as low as a fill.
        requires_grad: Whether a value gets a gradient.
        is_alone: The site has no other mask, and no other bias that may be one.
    """
    value = bias.value
    if bias.factor != 1 or value.op == "opaque" or cuts_gradient(value):
        return None
    if value.name == "masked_fill" and not isinstance(value.op, str):
        inner, condition, fill = value.args
        keeps = False
    elif value.name == "where" and not isinstance(value.op, str) and len(value.args) == 3:
        condition, inner, fill = value.args
        keeps = number_of(inner) is None
        if not keeps:
            inner, fill = fill, inner
    else:
        return None
    number = rounded(number_of(fill), bias.rounded_to or value.dtype)
    if not isinstance(number, (int, float)) or math.isnan(number) or not is_hard(number):
        return None
    if not isinstance(inner, Value) or inner.dtype != value.dtype or not isinstance(condition, Value):
        return None
    rest = Operand(inner, aligned(bias.dims, inner), rounded_to=bias.rounded_to, added_in=bias.added_in)
    if not is_moderate(rest):
        return None
    prove = prover.prove_keep if keeps else prover.prove_drop
    form = symbols.prove(prove, condition, [symbols.of(dim) for dim in aligned(bias.dims, condition)])
    if isinstance(form, prover.OpaqueMask) or form.residual:
        return None
    if requires_grad(inner) and not (is_alone and form.every_row_keeps_a_key()):
        return None
    return rest, Term(form, (number,), True, bias, True)
