"""Recognise every softmax attention of a captured program.

    anchors (softmax, SDPA) -> Proof (labelled axes, steps) -> Roles -> Logits (the op's form) -> masks proved -> Region

Whatever fails raises Refusal inside and becomes a LookAlike with its reason.
"""

from __future__ import annotations

import logging
import math
from functools import partial

import torch

from ..capture.trace import Trace, Value
from ..normalize.softmax import SoftmaxAnchor, find_softmaxes
from ..reasons import INTERNAL_ERROR, Reason, Refusal
from ..spec import AttentionSpec
from ..symbolic import product
from .again import Sites
from .alibi import with_positions
from .axes import Atom, atoms_of, resolve
from .compose import Logits, compose, sink_atoms
from .empty_rows import score_dtype
from .kinship import stands_between_products
from .kv_cache import add_cache
from .latent import add_latent
from .live import LiveUsers
from .masks import prove_masks
from .proof import Factor, Proof
from .region import Alibi, LookAlike, Operand, Region, Roles
from .returned import check_returned
from .roles import assign_roles
from .row_sinks import masks_beside_row_sinks, take_row_sinks
from .scores import ScoreWalk
from .sdpa_site import prove_sdpa_site
from .shared_scores import without_halves
from .softmax_site import prove_softmax_site
from .unseen import quotients, unseen

log = logging.getLogger(__name__)

_PRECISION = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


def recognize(trace: Trace, sites: Sites | None = None) -> tuple[list[Region], list[LookAlike]]:
    """All attentions of the trace in order of execution, and all softmaxes that are none (with reasons).

    With `sites`, those that equal one of them are not recognised anew.
    """
    live = LiveUsers(trace)
    regions: list[Region] = []
    softmaxes = list(find_softmaxes(trace))
    others = [*unseen(trace), *quotients(trace, softmaxes)]
    anchors: list[tuple[int, SoftmaxAnchor | Value]] = [(a.weights.id, a) for a in softmaxes]
    anchors += [(value.id, value) for value in trace.values if value.op == "sdpa"]
    for _, anchor in sorted(anchors, key=lambda pair: pair[0]):
        found = _in_full(anchor, live) if sites is None else sites.recognize(anchor, live, _in_full)
        regions += [found] if isinstance(found, Region) else []
        others += [found] if isinstance(found, LookAlike) else []
    regions, halves = without_halves(regions)
    return regions, [*others, *halves]


def _in_full(anchor: SoftmaxAnchor | Value, live: LiveUsers) -> Region | LookAlike:
    value = anchor if isinstance(anchor, Value) else anchor.weights
    try:
        region = recognize_site(anchor, live)
        # Not for the ops that take plain keys and values only.
        if region.spec.score_floor is None and region.weights is None:
            add_latent(region, live)
            add_cache(region)
        return region
    except Refusal as refusal:
        return LookAlike(value, refusal.reason, _is_kin(anchor), refusal.needs_numbers)
    except Exception as error:  # a defect of ours; other sites are independent of it
        log.warning("while proving %s", value, exc_info=True)
        return LookAlike(value, Reason(INTERNAL_ERROR, repr(error)), is_attention=True)


def _is_kin(anchor: SoftmaxAnchor | Value) -> bool:
    return isinstance(anchor, Value) or stands_between_products(anchor.scores, anchor.weights)


def recognize_site(anchor: SoftmaxAnchor | Value, live: LiveUsers) -> Region:
    """The attention around one anchor; raises Refusal."""
    if isinstance(anchor, Value):
        return build_region(prove_sdpa_site(anchor), live)
    first: Refusal | None = None
    for choice in ("concat", "left", "right", "first"):
        walk = ScoreWalk(choice)
        try:
            return build_region(prove_softmax_site(anchor, live, choice, walk), live)
        except Refusal as refusal:
            first = first or refusal
        if not walk.ambiguous:
            break
    assert first is not None
    raise first


def build_region(proof: Proof, live: LiveUsers) -> Region:
    """Roles, composition, masks and spec of a labelled proof; raises Refusal."""
    roles, has_row_sinks = _assign_roles(proof)
    logits = compose(proof, roles)
    for bias in logits.biases:
        bias.factor = float(bias.factor)  # as the scale is, in the end: a dynamic one is specialised
    row_sinks = take_row_sinks(logits) if has_row_sinks else None
    dtype = _op_dtype(proof)
    q, k, v = (_operand(factor) for factor in (proof.q, proof.k, proof.v))
    # a number on q or k is a number on the scores; without rounding in between it is only more accurate
    scale = logits.scale * q.factor * k.factor
    second = _second_operands(proof, logits, scale / logits.scale if proof.second else 1)
    if v.factor != 1:
        v = _scaled_values(proof.v, v, roles)
    q.factor = k.factor = 1
    q.factors, k.factors = logits.q_factors, logits.k_factors
    cap = logits.cap
    if cap is not None:
        cap, scale = float(cap), float(scale) * float(cap)
        if cap == 0 or not math.isfinite(cap):
            raise Refusal("cap_not_finite", f"the scores are {cap} * tanh(...)")
        if cap < 0:
            cap = -cap  # c tanh(s / c) is even in c; the product above already carries the sign
    requires_grad = _requires_grad(proof, live)
    if proof.returned is not None:
        check_returned(proof, proof.returned, roles, requires_grad, row_sinks is not None, live)
    tracks = partial(_value_requires_grad, live=live)
    if row_sinks is None:
        masks = prove_masks(proof, roles, logits, requires_grad, live, tracks)
        biases, note = with_positions(masks.biases, roles, logits, masks.closed, dtype, live, tracks)
    else:
        masks = masks_beside_row_sinks(proof, roles, logits, live)
        biases, note = masks.biases, None
    learned = [bias.value for bias in masks.biases if isinstance(bias, Operand)]
    learned += [row_sinks.value] if row_sinks is not None else []
    spec = AttentionSpec(
        batch=_size(roles.batch),
        num_heads=_size(roles.heads),
        num_kv_heads=_size(roles.kv_heads),
        q_len=_size(roles.query),
        kv_len=_size(roles.key, more=row_sinks is not None),
        head_dim=_joined_depth(roles, second),
        v_head_dim=_size(roles.value_depth),
        dtype=dtype,
        device=proof.output.device.type,
        softmax_scale=float(scale),
        logits_soft_cap=cap,
        score_floor=logits.score_floor,
        mask=masks.spec,
        has_bias=any(not isinstance(bias, Alibi) for bias in biases) or row_sinks is not None,
        has_alibi=any(isinstance(bias, Alibi) for bias in biases),
        bias_requires_grad=requires_grad and any(map(tracks, learned)),
        has_sinks=logits.sinks is not None,
        dropout_p=proof.dropout_p,
        requires_grad=requires_grad,
        returned_weights=None if proof.returned is None else masks.returned or masks.spec.empty_rows,
    )
    return Region(
        spec=spec,
        roles=roles,
        q=q,
        k=k,
        v=v,
        output=Operand(proof.output, proof.labels.of(proof.output)),
        anchor=proof.anchor,
        labels=proof.labels,
        second=second,
        biases=biases,
        masks=masks.terms,
        closed_mask=masks.closed,
        mask_context=masks.context,
        sinks=logits.sinks,
        row_sinks=row_sinks,
        weights=None if proof.returned is None else Operand(proof.returned, proof.labels.of(proof.returned)),
        values=proof.values,
        notes=masks.notes,
        bias_note=note,
        shared=proof.shared,
    )


def _operand(factor: Factor) -> Operand:
    source, number = factor.labels.scaled_source_of(factor.value)
    return Operand(source, factor.labels.of(source), factor=number)


def _scaled_values(factor: Factor, unscaled: Operand, roles: Roles) -> Operand:
    """v as the model scaled it, if it did so before it repeated the heads; else scaled by the rewrite."""
    scaled = factor.labels.source_of(factor.value)
    dims = factor.labels.of(scaled)
    is_repeated = bool({*atoms_of(dims)} & {*roles.groups})
    return unscaled if is_repeated and isinstance(unscaled.factor, (int, float)) else Operand(scaled, dims)


def _second_operands(proof: Proof, logits: Logits, first_factor) -> list[tuple[Operand, Operand, list[Atom]]]:
    """Further products, with the factor that puts them on the first one's scale, given to q."""
    out = []
    for q2, k2, factor, depth in proof.second:
        q, k = _operand(q2), _operand(k2)
        relative = q.factor * k.factor * factor / (logits.second_scale * first_factor)
        q.factor, k.factor = relative, 1
        out.append((q, k, list(resolve(depth))))
    return out


def _joined_depth(roles: Roles, second) -> int:
    total = product(a.size for a in roles.depth)
    for _, _, depth in second:
        total = total + product(a.size for a in depth)
    return int(total) if total.is_number else total


def _assign_roles(proof: Proof) -> tuple[Roles, bool]:
    """The roles, and whether there are sinks that are no number per head."""
    atoms = sink_atoms(proof)
    try:
        return assign_roles(proof, atoms), False
    except Refusal as refusal:
        if refusal.reason.code != "sink_axis":
            raise
    return assign_roles(proof, []), True


def _size(atoms: list[Atom], more: bool = False):
    size = product(atom.size for atom in atoms) + int(more)
    return int(size) if size.is_number else size


def _op_dtype(proof: Proof) -> torch.dtype:
    """The dtype in which the op must run to lose nothing that eager keeps.

    Widening casts of q, k, v are undone (the kernel accumulates in float32 anyway) as far as the product with V, the
    last rounding of the weights, and every source allow. A softmax in float64 is one.
    """
    if score_dtype(proof) == torch.float64:
        return torch.float64
    dtypes = {factor.labels.scaled_source_of(factor.value)[0].dtype for factor in proof.factors()}
    dtypes |= {proof.output.dtype}
    for dtype in dtypes:
        if dtype not in _PRECISION:
            raise Refusal("dtype", f"attention in {dtype}; float16, bfloat16, float32 and float64 are known")
    widest = max(_PRECISION[d] for d in dtypes)
    candidates = [d for d in dtypes if _PRECISION[d] == widest]
    return candidates[0] if len(candidates) == 1 else torch.float32


def _requires_grad(proof: Proof, live: LiveUsers) -> bool:
    if not proof.output.grad_mode:
        return False
    tensors = [factor.value for factor in proof.factors()]
    tensors += [
        s.operand for s in proof.steps if s.kind in ("bias", "sinks", "tensor_scale") and isinstance(s.operand, Value)
    ]
    return any(_value_requires_grad(t, live) for t in tensors)


def _value_requires_grad(value: Value, live: LiveUsers) -> bool:
    """Whether autograd tracks the value; True where it cannot be told."""
    if not value.dtype.is_floating_point or value.op == "constant":
        return False
    if known := live.requires_grad(value):
        return known[0]
    if isinstance(value.op, str):
        return True
    return value.grad_mode and any(_value_requires_grad(a, live) for a in value.args if isinstance(a, Value))
