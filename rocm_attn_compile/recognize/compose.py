"""Compose the steps between q k^T and softmax into the op's form, or refuse.

    logits = cap(scale * q k^T) + biases, then masks          cap(s) = c * tanh(s / c)

Order matters: a scale after a bias scales the bias, a bias before the cap has no equal, a finite fill may be moved by
what follows it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ..capture.trace import Value
from ..reasons import Refusal
from .axes import Atom, Dim, atoms_of, resolve, unify
from .maximum import includes_own_row, maximum_chain
from .numbers import narrows, rounded
from .proof import Proof
from .region import Operand, Roles
from .score_floor import fold_clamp
from .scores import Step


@dataclass(eq=False)
class MaskStep:
    """A boolean mask on the scores: `fill` is put in the place of the score, or is what an additive mask adds."""

    value: Value
    dims: list[Dim]
    shape: tuple
    keeps: bool
    fill: float
    is_followed_by_bias: bool = False
    biases_before: int = 0
    dtype: torch.dtype = torch.float32


@dataclass(eq=False)
class Logits:
    """The composed form. `scale` is a number or SymFloat; `cap` None if there is none; `sinks_rescale` the output."""

    scale: Any = 1.0
    cap: Any = None
    q_factors: list[tuple[Operand, bool]] = field(default_factory=list)
    k_factors: list[tuple[Operand, bool]] = field(default_factory=list)
    biases: list[Operand] = field(default_factory=list)
    masks: list[MaskStep] = field(default_factory=list)
    is_causal: bool = False
    is_shifted: bool = False
    row_shifted: bool = False
    bias_cast_after_shift: bool = False
    sinks: Operand | None = None
    sinks_rescale: bool = False
    is_floored: bool = False
    score_floor: float | None = None
    second_scale: Any = 1.0


def compose(proof: Proof, roles: Roles) -> Logits:
    """Fold all steps; raises Refusal where the order or kind of a step cannot be expressed."""
    logits = Logits()
    for step in proof.steps:
        if logits.sinks is not None and step.kind not in ("row_shift", "cast"):
            raise Refusal("after_sinks", f"a {step.kind} follows the concatenation of the sinks")
        if logits.score_floor is not None and step.kind not in ("row_shift", "cast", "clamp", "mask", "bias"):
            raise Refusal("after_clamp", f"a {step.kind} follows the clamping of the scores")
        if logits.is_floored and step.kind not in ("row_shift", "cast"):
            raise Refusal("after_floor", f"a {step.kind} follows the raising of low scores to the lowest number")
        _FOLD[step.kind](logits, step, proof, roles)
    for step in proof.steps:
        column = None if step.factor is None else "first" if step.invert else "last"
        if step.kind == "sinks" and proof.cuts_sink != column:
            raise Refusal("sink_axis", "the sink column is not cut off before the product with V")
    if proof.cuts_sink and logits.sinks is None:
        raise Refusal("weights_changed", "the attention weights are sliced along the keys")
    return logits


def _scale(logits: Logits, step: Step, proof: Proof, roles: Roles) -> None:
    factor = step.operand
    if isinstance(factor, (int, float)) and not math.isfinite(factor):
        raise Refusal("scale_not_finite", f"the scores are scaled by {factor}")
    if isinstance(factor, (int, float)) and factor == 1:
        return
    if logits.masks or logits.is_causal:
        for mask in logits.masks:
            if not (isinstance(factor, (int, float)) and factor > 0):
                raise Refusal(
                    "scale_after_mask", f"masked scores are scaled by {factor}, which is not known to be positive"
                )
            mask.fill = rounded(mask.fill * factor, step.at.dtype)
    for bias in logits.biases:
        if bias.rounded_to is not None:
            raise Refusal("scale_after_cast", f"scores with a bias are scaled after a cast to {bias.rounded_to}")
        if _magnitude(bias.factor) > 1 > _magnitude(factor):
            raise Refusal(
                "scale_up_and_down", "scores with a bias are scaled up and down again: it may be infinite then"
            )
        bias.factor = bias.factor * factor
    if logits.cap is not None:  # f (c tanh(s) + bias) = (f c) tanh(s) + f bias
        logits.cap = logits.cap * factor
        return
    logits.scale = logits.scale * factor


def _magnitude(factor: Any) -> float:
    return abs(factor) if isinstance(factor, (int, float)) else 1.0


def _cast(logits: Logits, step: Step, proof: Proof, roles: Roles) -> None:
    """A cast rounds the scores, which only costs accuracy; a fill or a bias may become -inf.

    Not so in an empty row from which its maximum, a fill, was subtracted before. And not so beside a bias of float64,
    for which the op runs in float64: of scores next to -1e9 float32 keeps nothing, and float64 all.
    """
    source_dtype = step.at.args[0].dtype if isinstance(step.at.args[0], Value) else step.at.dtype
    if logits.biases and source_dtype == torch.float64 and step.at.dtype != torch.float64:
        raise Refusal("cast_after_bias", f"scores with a bias are rounded from {source_dtype} to {step.at.dtype}")
    for mask in logits.masks:
        fill = rounded(mask.fill, step.at.dtype)
        if logits.row_shifted and math.isinf(fill) and not math.isinf(mask.fill):
            raise Refusal("cast_after_shift", f"a fill of {mask.fill:g} becomes {fill:g} after a maximum is subtracted")
        mask.fill = fill
    for bias in logits.biases:
        source = bias.rounded_to or bias.value.dtype
        logits.bias_cast_after_shift |= logits.row_shifted and narrows(source, step.at.dtype)
        _round_bias(bias, source, step.at.dtype)


def _round_bias(bias: Operand, source: torch.dtype, target: torch.dtype) -> None:
    if narrows(source, target):
        bias.rounded_to = target


def _tensor_scale(logits: Logits, step: Step, proof: Proof, roles: Roles) -> None:
    if logits.masks or logits.biases or logits.cap is not None or logits.is_causal:
        raise Refusal("scale_after_bias", "a tensor scale is applied after a bias, a mask or a soft cap")
    factor = _operand(proof, step)
    atoms = set(atoms_of(factor.dims))
    if not atoms & {*roles.key} and atoms <= {*roles.batch, *roles.heads, *roles.query}:
        logits.q_factors.append((factor, step.invert))
    elif not atoms & {*roles.query, *roles.groups} and atoms <= {*roles.batch, *roles.kv_heads, *roles.key}:
        if logits.is_shifted or logits.row_shifted:
            raise Refusal("scale_after_shift", "shifted scores are scaled by a tensor that varies with the key")
        logits.k_factors.append((factor, step.invert))
    else:
        raise Refusal("scale_tensor", "the scores are multiplied by a tensor that varies with both queries and keys")


def _tanh(logits: Logits, step: Step, proof: Proof, roles: Roles) -> None:
    if logits.cap is not None or logits.biases or logits.masks or logits.is_causal or logits.is_shifted:
        raise Refusal("bias_before_cap", "a bias, a mask or another cap lies inside the soft cap")
    logits.cap = 1.0


def _bias(logits: Logits, step: Step, proof: Proof, roles: Roles) -> None:
    value: Value = step.operand
    if not value.dtype.is_floating_point and value.dtype != torch.bool:  # True counts as 1
        raise Refusal("integer_bias", f"a tensor of {value.dtype} is added to the scores")
    for mask in logits.masks:
        mask.is_followed_by_bias = True
    bias = _operand(proof, step)
    bias.factor = step.factor
    bias.added_in = step.at.dtype if step.at.op != "sdpa" else None
    _round_bias(bias, value.dtype, step.at.dtype)  # 0-d, or added in place
    logits.biases.append(bias)


def _mask(logits: Logits, step: Step, proof: Proof, roles: Roles) -> None:
    value: Value = step.operand
    if value.dtype != torch.bool:
        raise Refusal("mask_dtype", f"a mask of {value.dtype} is used as a condition")
    logits.masks.append(
        MaskStep(
            value,
            proof.score_dims if step.at.op == "sdpa" else proof.labels.of(step.at),
            step.at.shape if step.at.op != "sdpa" else _score_shape(proof),
            step.keeps,
            rounded(float(step.fill), step.at.dtype),
            biases_before=len(logits.biases),
            dtype=step.at.dtype,
        )
    )


def _score_shape(proof: Proof) -> tuple:
    args = proof.anchor.kwargs
    return (*proof.anchor.shape[:-1], args["key"].shape[-2])


def _shift(logits: Logits, step: Step, proof: Proof, roles: Roles) -> None:
    if not (isinstance(step.operand, (int, float)) and math.isfinite(step.operand)):
        raise Refusal("shift_not_finite", f"{step.operand} is added to the scores")
    for mask in logits.masks:
        if math.isinf(rounded(mask.fill + step.operand, step.at.dtype)):
            mask.fill = -math.inf
    logits.is_shifted = True


def _row_shift(logits: Logits, step: Step, proof: Proof, roles: Roles) -> None:
    scores: Value = step.at.args[0]
    dims, key = proof.labels.of(scores), set(roles.key)
    logits.row_shifted = True
    if logits.cap is None and any(later.kind == "tanh" for later in proof.steps):
        raise Refusal("bias_before_cap", "the scores are shifted inside the soft cap")
    key_dims = {i for i, dim in enumerate(dims) if key & set(resolve(dim))}
    if not includes_own_row(maximum_chain(step.operand, scores), scores, key_dims):
        raise Refusal("shift_axis", "what is subtracted from the scores is not the maximum of the row, or of more")


def _floor(logits: Logits, step: Step, proof: Proof, roles: Roles) -> None:
    """Only what a mask made -inf is below the lowest number; `prove_masks` looks at that."""
    if not step.operand <= torch.finfo(step.at.dtype).min:
        raise Refusal("score_op", f"scores below {step.operand:g} are raised to it, which is not the lowest number")
    logits.is_floored = True


def _clamp(logits: Logits, step: Step, proof: Proof, roles: Roles) -> None:
    if logits.masks or logits.biases or logits.cap is not None or logits.is_causal:
        raise Refusal("score_op", "scores with a bias, a mask or a soft cap are clamped to a range")
    logits.score_floor = fold_clamp(proof.steps, step, logits.score_floor)


def _sinks(logits: Logits, step: Step, proof: Proof, roles: Roles) -> None:
    if logits.is_shifted or logits.row_shifted:
        raise Refusal(
            "shift_before_sinks", "scores are shifted before the sinks join them, which changes the sinks' weight"
        )
    last = len(proof.score_dims) - 1
    if step.factor is not None and (step.factor != last or resolve(proof.score_dims[-1]) != resolve(proof.key)):
        raise Refusal("sink_axis", "the sinks are not a column of the softmax axis, the last one of the scores")
    logits.sinks = _operand(proof, step)
    logits.sinks_rescale = step.factor is None


def _second(logits: Logits, step: Step, proof: Proof, roles: Roles) -> None:
    if logits.cap is not None or logits.biases or logits.masks or logits.q_factors or logits.k_factors:
        raise Refusal("two_products", "a second q k^T is added after a bias, mask, cap or tensor scale")
    logits.second_scale = logits.scale


def _causal(logits: Logits, step: Step, proof: Proof, roles: Roles) -> None:
    logits.is_causal = True


_FOLD = {
    "cast": _cast,
    "scale": _scale,
    "tensor_scale": _tensor_scale,
    "tanh": _tanh,
    "bias": _bias,
    "mask": _mask,
    "shift": _shift,
    "row_shift": _row_shift,
    "sinks": _sinks,
    "second": _second,
    "causal": _causal,
    "floor": _floor,
    "clamp": _clamp,
}


def _operand(proof: Proof, step: Step) -> Operand:
    """The step's tensor behind views and exact casts, labelled (so that a broadcast is not materialised)."""
    labels, value = proof.labels_of(step), step.operand
    labels.of(value)
    value = labels.source_of(value)
    labels.check_distinct()
    return Operand(value, labels.of(value))


def sink_atoms(proof: Proof) -> list[Atom]:
    """Axes of the learned sinks, before roles are assigned."""
    for step in proof.steps:
        if step.kind == "sinks":
            value = step.operand
            dims = proof.labels.of(value)
            scores = proof.labels.of(step.at)
            for i, dim in enumerate(dims):
                if i != step.factor:
                    _unify_if_wide(dim, scores[i])
            return atoms_of(_operand(proof, step).dims)
    return []


def _unify_if_wide(left: Dim, right: Dim) -> None:
    if resolve(left) and resolve(right):
        unify(right, left)
