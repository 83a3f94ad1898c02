"""What a bias may hold, and biases that the op cannot take: as low as a fill, where eager rounds or cancels that."""

from __future__ import annotations

import math

import torch

from ..reasons import Refusal
from .alibi import is_of_positions
from .compose import Logits
from .empty_rows import score_dtype
from .live import LiveUsers
from .moderate import is_moderate, is_never_low, multiplies_by_infinity
from .proof import Proof
from .region import Operand
from .symbols import Symbols

_LARGEST_FACTOR = 1e4
"""A bias is scaled by no more than this, or it may be as low as a fill."""


def is_moderate_bias(bias: Operand, symbols: Symbols, live: LiveUsers) -> bool:
    """True if the bias is nowhere as low as a fill."""
    is_small = abs(bias.factor) <= _LARGEST_FACTOR
    return is_small and (is_moderate(bias.value, live) or is_of_positions(bias, symbols, live))


def holds_nan(bias: Operand) -> bool:
    """True if the graph itself multiplies by infinity for it: 1e9 in float16 is infinite, and times 0 NaN."""
    return math.isinf(bias.factor) or multiplies_by_infinity(bias.value)


def refuse_casts(proof: Proof, logits: Logits) -> None:
    """Refuse what absorbs scores in eager, being as low as a fill, and would not in the op, which adds all at once.

    Beside -1e9 float32 keeps nothing of a score, and float64, in which the op runs for queries of float64, all. And
    beside float16's lowest number float16 keeps nothing; but what is added after a cast counts.
    """
    masked_in_half = {
        step.biases_before for step in logits.masks if step.dtype == torch.float16 and not math.isinf(step.fill)
    }
    in_half = False
    for at, bias in enumerate(logits.biases):
        added_in = bias.added_in or score_dtype(proof)
        if proof.q.value.dtype == torch.float64 != added_in:
            raise Refusal("bias_after_cast", f"a bias is added in {added_in} to scores of queries in torch.float64")
        in_half |= at in masked_in_half
        if in_half and added_in != torch.float16:
            raise Refusal("bias_after_cast", f"a bias is added in {added_in} to scores that were masked in float16")
        in_half |= added_in == torch.float16


def refuse_raised(proof: Proof, logits: Logits, biases: list[Operand], symbols: Symbols, live: LiveUsers) -> None:
    """A bias that may hold a mask's fill, subtracted: it raises scores out of all bounds, over those that masks lower.

    On its own it is a number like others, which is added, and a mask after it replaces the sum. But the lowest number
    minus the lowest is 0, without the score; and minus -inf gives NaN in rows that have keys, to be zeroed.
    """
    for bias in biases:
        if bias.factor > 0:
            continue
        before = logits.biases.index(bias)
        meets_fill = logits.is_causal or any(mask.biases_before <= before for mask in logits.masks)
        others = any(other is not bias and not is_moderate_bias(other, symbols, live) for other in logits.biases)
        may_cancel = meets_fill or others or proof.zeroed
        if may_cancel and not (is_never_low(bias.value, live) or is_of_positions(bias, symbols, live)):
            raise Refusal(
                "bias_subtracted", f"a bias that may be as low as a mask's fill is taken {bias.factor:g} times"
            )
