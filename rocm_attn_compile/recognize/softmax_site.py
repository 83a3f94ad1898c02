"""Softmax-anchored attention: prove that a softmax lies between two contractions over the right axes.

    q      k                    labels: scores[..., query, key] = q[..., query, depth] k[..., key, depth]
     \\    /
    contraction over depth      every step keeps labels or re-groups them
        |
scale, cap, bias, mask
        |
  softmax over key   <- must be the free axis of k ...
        |
  cast, dropout, ...
        |    v
    contraction over key        ... and exactly the axis contracted with v
"""

from __future__ import annotations

from itertools import pairwise

from ..capture.trace import Value
from ..normalize.softmax import SoftmaxAnchor
from ..reasons import Refusal
from ..symbolic import same_size
from .axes import Dim, atoms_of, broadcast, resolve
from .labels import Labels, is_cast, is_view, label_contraction, operands_of, product_under_sum
from .live import LiveUsers
from .maximum import maximum_chain
from .proof import Factor, Proof
from .rescale import Rescale, find_rescale, label_rescale
from .scores import ScorePath, ScoreWalk, Step
from .shared_scores import softmaxes_of
from .weights import WeightsPath, follow_weights


def prove_softmax_site(anchor: SoftmaxAnchor, live: LiveUsers, choice: str, walk: ScoreWalk) -> Proof:
    """Label the attention around `anchor`; raises Refusal naming the axis or op that stopped the proof."""
    path = walk.walk(anchor.scores)
    weights = follow_weights(anchor, live)
    rescale = find_rescale(anchor, path, weights, live)
    shared = _check_scores_stay_inside(path, anchor, weights, rescale, live)
    labels = Labels()
    left, right = (Factor(value, Labels(operand=True)) for value in operands_of(path.contraction))
    depth = label_contraction(labels, path.contraction, left.labels, right.labels)
    seconds = _label_seconds(labels, path)
    operand_labels = _label_scores(labels, path)
    score_dims = labels.of(anchor.scores)
    key = score_dims[anchor.dim]
    if not resolve(key):
        raise Refusal("single_key", f"the softmax runs over dimension {anchor.dim}, which has one element")
    labels.set(anchor.weights, score_dims)
    v = Factor(_other_factor(weights), Labels(operand=True))
    contracted = _label_weights(labels, weights, v)
    if weights.cut_at is not None and resolve(labels.of(weights.cut_at)[-1]) != resolve(key):
        raise Refusal("sink_axis", "the attention weights are sliced along another axis than the keys")
    if resolve(contracted) != resolve(key):
        raise Refusal(
            "softmax_axis",
            f"the softmax runs over dimension {anchor.dim} of the scores {list(anchor.scores.shape)}, "
            f"but the product with V sums over another axis (sizes {_sizes(key)} and {_sizes(contracted)})",
        )
    if rescale is not None:
        label_rescale(labels, rescale, anchor)
    q, k = _query_and_key(left, right, key)
    second = []
    for other, factors, other_depth in seconds:
        q2, k2 = _query_and_key(*factors, key)
        second.append((q2, k2, _direct_factor(other), other_depth))
    values = [path.contraction, *path.values, *anchor.internals, *weights.values, weights.contraction]
    values += rescale.values if rescale is not None else []
    for other, _, _ in seconds:
        values += [other.contraction, *other.values]
    products = (product_under_sum(path.contraction), product_under_sum(weights.contraction))
    values += [product for product in products if product is not None]
    return Proof(
        anchor=anchor.weights,
        output=weights.contraction if rescale is None else rescale.output,
        labels=labels,
        q=q,
        k=k,
        v=v,
        score_dims=score_dims,
        key=key,
        depth=depth,
        query_free=tuple(
            a for a in atoms_of(labels.of(path.contraction)) if a not in set(atoms_of(k.labels.of(k.value)))
        ),
        second=second,
        steps=path.steps if rescale is None else [*path.steps, rescale.step],
        operand_labels=operand_labels,
        shifted=anchor.shifted,
        normalized=anchor.normalized,
        safe=anchor.safe,
        zeroed=weights.zeroed,
        returned=_returned(weights, rescale, live),
        zeroed_in_returned=weights.zeroed_in_returned,
        dropout_p=weights.dropout_p,
        cuts_sink=weights.cuts_sink,
        shared=shared,
        values=values,
    )


def _returned(weights: WeightsPath, rescale: Rescale | None, live: LiveUsers) -> Value | None:
    """The weights that something else reads; raises Refusal where they are not those of the op."""
    if weights.returned is None:
        return None
    cut = weights.cut_at
    has_sinks = cut is not None and weights.values.index(weights.returned) < weights.values.index(cut)
    if has_sinks or rescale is not None:
        raise Refusal(
            "weights_used_elsewhere",
            f"the attention weights are read elsewhere, {'with' if has_sinks else 'without'} what the sinks take",
        )
    return weights.returned


def _sizes(dim: Dim) -> str:
    return " x ".join(str(atom.size) for atom in resolve(dim)) or "1"


def _label_scores(labels: Labels, path: ScorePath) -> dict[int, Labels]:
    """Label every value of a score path; returns, per step with a tensor, labels of that tensor for this use.

    A bias or mask gets labels of its own for each use: one vector may stand along the queries here and along the keys
    there without making the two axes one.
    """
    steps: dict[int, list[Step]] = {}
    for step in path.steps:
        steps.setdefault(step.at.id, []).append(step)
    found: dict[int, Labels] = {}
    previous = path.contraction
    for value in (path.contraction, *path.values):
        own = [s for s in steps.get(value.id, ()) if isinstance(s.operand, Value) and s.kind != "sinks"]
        for step in own:
            found[id(step)] = Labels(operand=True)
        if value is not path.contraction:
            _label_score(labels, previous, value, [(found[id(s)], s.operand) for s in own])
        for step in own:
            found[id(step)].align(step.operand, labels.of(value))
        previous = value
    return found


def _label_score(labels: Labels, score: Value, value: Value, others: list[tuple[Labels, Value]]) -> None:
    """Label one value of the score path from the score it is computed from."""
    if is_view(value) or is_cast(value):
        labels.of(value)
    elif value.name == "cat":  # scores with a sink column: the key axis keeps its label, the column has none
        labels.set(value, labels.of(score))
    elif value.name == "add" and sum(labels.known(a) for a in value.args if isinstance(a, Value)) == 2:
        labels.pointwise(value)  # two products
    else:
        operands = [(labels.of(score), score.shape), *((own.of(v), v.shape) for own, v in others)]
        wide = [pair for pair in operands[1:] if not _covers(score, value)]
        labels.set(value, broadcast(value.ndim, [operands[0], *wide]))


def _covers(score: Value, value: Value) -> bool:
    """True if the score alone has the size of the result: nothing broadcasts it."""
    return score.ndim == value.ndim and all(same_size(a, b) for a, b in zip(score.shape, value.shape))


def _label_seconds(labels: Labels, path: ScorePath) -> list[tuple[ScorePath, tuple[Factor, Factor], Dim]]:
    found = []
    for step in path.steps:
        if step.kind == "second":
            other: ScorePath = step.operand
            left, right = (Factor(value, Labels(operand=True)) for value in operands_of(other.contraction))
            depth = label_contraction(labels, other.contraction, left.labels, right.labels)
            found.append((other, (left, right), depth))
            _label_scores(labels, other)
    return found


def _direct_factor(path: ScorePath):
    factor = 1
    for step in path.steps:
        if step.kind == "scale":
            factor = factor * step.operand
    return factor


def _label_weights(labels: Labels, path: WeightsPath, v: Factor) -> Dim:
    """Label the weights up to the product with V; returns the axis that product sums over."""
    for source, value in pairwise(path.values):
        if is_view(value) or is_cast(value):
            labels.of(value)
            continue
        if value.name != "slice" and not all(same_size(a, b) for a, b in zip(value.shape, source.shape)):
            raise Refusal("weights_changed", f"{value.name} broadcasts the attention weights")
        labels.set(value, labels.of(source))
    contraction = path.contraction
    if contraction.name in ("baddbmm", "addmm"):
        if contraction.kwargs.get("beta", 1) != 0 or contraction.kwargs.get("alpha", 1) != 1:
            raise Refusal("weights_changed", f"{contraction.name} adds to the product with V")
    left, _ = operands_of(contraction)
    if left is path.operand:
        return label_contraction(labels, contraction, labels, v.labels)
    return label_contraction(labels, contraction, v.labels, labels)


def _other_factor(path: WeightsPath) -> Value:
    left, right = operands_of(path.contraction)
    if left is right:
        raise Refusal("weights_used_elsewhere", "the attention weights are multiplied with themselves")
    return right if left is path.operand else left


def _query_and_key(left: Factor, right: Factor, key: Dim) -> tuple[Factor, Factor]:
    wanted = set(resolve(key))
    in_left, in_right = (wanted & set(atoms_of(f.labels.of(f.value))) for f in (left, right))
    if in_right == wanted and not in_left:
        return left, right
    if in_left == wanted and not in_right:
        return right, left
    raise Refusal("key_axis", "the softmax axis is not a free axis of exactly one factor of q k^T")


_SHAPE_ONLY = frozenset(
    ["zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"]
)
"""Ops that read the shape of a tensor and nothing else, as a mask is made from scores."""


def _check_scores_stay_inside(
    path: ScorePath, anchor: SoftmaxAnchor, weights: WeightsPath, rescale: Rescale | None, live: LiveUsers
) -> list[Value]:
    """Raises Refusal where something else reads the scores; returns other softmaxes of them, see `shared_scores`."""
    shared: list[Value] = []
    inside = {v.id for v in (path.contraction, *path.values, *anchor.internals, anchor.weights)}
    if rescale is not None:
        inside.add(rescale.lse.id)
    for step in path.steps:
        if step.kind == "row_shift":
            inside |= {v.id for v in maximum_chain(step.operand, step.at.args[0])}
    for value in (path.contraction, *path.values):
        users = live.users(value, "scores_used_elsewhere")
        outside = [u for u in users if u.id not in inside and u.name not in _SHAPE_ONLY]
        for user in outside:
            others = softmaxes_of(user, live)
            if not others or anchor.weights in others:
                raise Refusal("scores_used_elsewhere", f"the scores are also read by {user.name}")
            shared += [other for other in others if other not in shared]
    site = [path.contraction, *path.values, *weights.values, weights.contraction]
    site += rescale.values if rescale is not None else []
    # What is subtracted from all scores of a row has no influence on the gradient, so it may be made under no_grad.
    site += [v for v in anchor.internals if v.name not in ("amax", "max", "detach", "alias", "unsqueeze")]
    for step in path.steps:
        if step.kind == "second":
            site += [step.operand.contraction, *step.operand.values]
    modes = {v.grad_mode for v in site}
    if len(modes) > 1:
        raise Refusal("mixed_grad_mode", "part of the attention is computed under no_grad and part is not")
    return shared
