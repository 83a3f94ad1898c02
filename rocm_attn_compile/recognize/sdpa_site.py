"""`F.scaled_dot_product_attention` as an anchor: its axes are given by its definition."""

from __future__ import annotations

import math

import torch

from ..capture.trace import Value
from ..reasons import Refusal
from ..symbolic import divide, is_one, same_size, to_expr
from .axes import Atom, Dim, broadcast, resolve, unify
from .labels import Labels, cuts_gradient, is_cast, number_of
from .proof import Factor, Proof
from .scores import Step, bias_steps


def prove_sdpa_site(value: Value) -> Proof:
    """Label one "sdpa" value; raises Refusal for what the op cannot express."""
    args = value.kwargs
    q, k, v = args["query"], args["key"], args["value"]
    if not all(isinstance(t, Value) for t in (q, k, v)):
        raise Refusal(
            "sdpa_inputs", "scaled_dot_product_attention was called with something that is not a dense tensor"
        )
    if min(q.ndim, k.ndim, v.ndim) < 2 or not (q.dtype == k.dtype == v.dtype):
        raise Refusal(
            "sdpa_inputs",
            f"query, key, value have dtypes {q.dtype}, {k.dtype}, {v.dtype}, ranks {q.ndim}, {k.ndim}, {v.ndim}",
        )
    labels = Labels()
    factors = [Factor(t, Labels(operand=True)) for t in (q, k, v)]
    lq, lk, lv = (f.labels.of(f.value) for f in factors)
    unify(lq[-1], lk[-1])
    unify(lk[-2], lv[-2])
    if not resolve(lk[-2]):
        raise Refusal("single_key", "kv_len is 1")
    batch = _batch_dims(value, lq[:-2], lk[:-2], lv[:-2])
    score_dims = [*batch, lq[-2], lk[-2]]
    labels.set(value, [*batch, lq[-2], lv[-1]])
    scale = args.get("scale")
    steps = [Step("scale", value, _default_scale(q) if scale is None else scale)]
    mask = args.get("attn_mask")
    if args.get("is_causal"):
        if isinstance(mask, Value):
            raise Refusal("sdpa_inputs", "attn_mask and is_causal are both given")
        steps.append(Step("causal", value))
    own = {}
    for step in _mask_steps(value, mask) if isinstance(mask, Value) else ():
        steps.append(step)
        own[id(step)] = Labels(operand=True)
        own[id(step)].align(step.operand, score_dims)
    return Proof(
        anchor=value,
        output=value,
        labels=labels,
        q=factors[0],
        k=factors[1],
        v=factors[2],
        score_dims=score_dims,
        key=lk[-2],
        depth=lq[-1],
        query_free=resolve(lq[-2]),
        steps=steps,
        operand_labels=own,
        safe=True,
        dropout_p=float(args.get("dropout_p") or 0.0),
        values=[value],
    )


def _mask_steps(at: Value, mask: Value) -> list[Step]:
    """`attn_mask`: True keeps, or what is added. A bias with -inf in the place of what is dropped is a bias and a mask.

    That is exact: -inf that is added and a key that is dropped are the same to this softmax, also in an empty row.
    """
    if mask.dtype == torch.bool:
        return [Step("mask", at, mask, keeps=True, fill=-math.inf)]
    mask = _broadcast_source(mask)
    inner = _broadcast_source(mask, through_casts=True)  # in which -inf stays what it is
    if inner.name in ("masked_fill", "where") and not isinstance(inner.op, str) and len(inner.args) == 3:
        bias, condition, fill = inner.args if inner.name == "masked_fill" else (inner.args[i] for i in (1, 0, 2))
        keeps = inner.name == "where"
        if keeps and number_of(bias) is not None:
            keeps, bias, fill = False, fill, bias
        is_bias = isinstance(bias, Value) and number_of(bias) is None and bias.dtype.is_floating_point
        if is_bias and number_of(fill) == -math.inf and condition.dtype == torch.bool and not cuts_gradient(inner):
            return [*_mask_steps(at, bias), Step("mask", at, condition, keeps=keeps, fill=-math.inf)]
    return bias_steps(at, mask, 1)


def _broadcast_source(mask: Value, through_casts: bool = False) -> Value:
    """The tensor of which `mask` is a broadcast, or with `through_casts` a rounding."""
    while not isinstance(mask.op, str) and not cuts_gradient(mask):
        grows = mask.name == "expand" or (mask.name == "unsqueeze" and mask.args[1] in (0, -mask.ndim))
        if not grows and not (through_casts and is_cast(mask)):
            break
        mask = mask.args[0]
    return mask


def _default_scale(q: Value) -> float:
    return 1.0 / math.sqrt(int(q.shape[-1]))


def _batch_dims(value: Value, lq: list[Dim], lk: list[Dim], lv: list[Dim]) -> list[Dim]:
    """Batch and head axes after broadcasting, with `enable_gqa` resolved into (kv head, group)."""
    args = value.kwargs
    q, k, v = args["query"], args["key"], args["value"]
    sq, sk, sv = (list(t.shape[:-2]) for t in (q, k, v))
    if args.get("enable_gqa") and min(len(lq), len(lk), len(lv)) >= 1 and not same_size(sq[-1], sk[-1]):
        groups = divide(sq[-1], sk[-1])
        if groups is None or not same_size(sk[-1], sv[-1]):
            raise Refusal(
                "gqa_heads",
                f"{sq[-1]} query heads on {sk[-1]} key and {sv[-1]} value heads",
                needs_numbers=tuple(to_expr(size) for size in (sq[-1], sk[-1], sv[-1])),
            )
        unify(lk[-1], lv[-1])
        unify(lq[-1], (*resolve(lk[-1]), Atom(groups)))
        heads = lq[-1]
        outer = broadcast(value.ndim - 3, [(lq[:-1], sq[:-1]), (lk[:-1], sk[:-1]), (lv[:-1], sv[:-1])])
        return [*outer, heads]
    ndim = value.ndim - 2
    dims = broadcast(ndim, [(lq, sq), (lk, sk), (lv, sv)])
    return [() if is_one(value.shape[i]) else dim for i, dim in enumerate(dims)]
