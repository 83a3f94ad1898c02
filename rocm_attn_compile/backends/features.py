"""The parts of a spec that a backend must take explicitly: default deny.

A feature is a way in which a spec can differ from the plainest attention. A backend lists the codes it takes; every
other feature a spec has is a reason against it, with the spec's values in the text. A spec field that nobody here
knows is a reason too, so that a new field is never computed wrongly by an old backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields

from ..reasons import Reason
from ..spec import AttentionSpec, EmptyRows
from ..symbolic import same_size, static


@dataclass(frozen=True)
class Feature:
    """One way to differ from plain attention.

    Attributes:
        code: The `Reason.code` of a backend that does not take it.
        summary: In words, for the docs table.
        reads: Spec fields it accounts for, those of the mask as "mask.<field>".
        values: The spec's values in words if it has the feature, else None.
    """

    code: str
    summary: str
    reads: tuple[str, ...]
    values: Callable[[AttentionSpec], str | None]


def _symbolic(*names: str) -> Callable[[AttentionSpec], str | None]:
    def values(spec: AttentionSpec) -> str | None:
        found = [f"{name}={getattr(spec, name)}" for name in names if static(getattr(spec, name)) is None]
        return ", ".join(found) or None

    return values


def _mask_flag(name: str, what: str) -> Feature:
    return Feature(name, what, (f"mask.has_{name}",), lambda spec: what if getattr(spec.mask, f"has_{name}") else None)


def _mask_band(name: str, relation: str, what: str) -> Feature:
    def values(spec: AttentionSpec) -> str | None:
        bound = getattr(spec.mask, name)
        return None if bound is None else f"k - q {relation} {bound}"

    return Feature(name, what, (f"mask.{name}",), values)


def _empty_rows(mode: EmptyRows, what: str) -> Feature:
    return Feature(
        f"empty_rows_{mode.value}",
        what,
        ("mask.empty_rows",),
        lambda spec: what if spec.mask.empty_rows is mode else None,
    )


FEATURES: tuple[Feature, ...] = (
    Feature(
        "gqa",
        "fewer key/value heads than query heads",
        ("num_heads", "num_kv_heads"),
        lambda s: (
            None
            if same_size(s.num_heads, s.num_kv_heads)
            else f"num_heads={s.num_heads}, num_kv_heads={s.num_kv_heads}"
        ),
    ),
    Feature(
        "v_head_dim_differs",
        "values of another size than keys",
        ("head_dim", "v_head_dim"),
        lambda s: None if same_size(s.head_dim, s.v_head_dim) else f"head_dim={s.head_dim}, v_head_dim={s.v_head_dim}",
    ),
    Feature(
        "negative_scale",
        "a softmax scale that is not positive",
        ("softmax_scale",),
        lambda s: None if s.softmax_scale > 0 else f"softmax_scale={s.softmax_scale}",
    ),
    Feature(
        "logits_soft_cap",
        "tanh soft cap on the scores",
        ("logits_soft_cap",),
        lambda s: None if s.logits_soft_cap is None else f"logits_soft_cap={s.logits_soft_cap}",
    ),
    Feature(
        "score_floor",
        "scores raised to a number below the largest of all",
        ("score_floor",),
        lambda s: None if s.score_floor is None else f"score_floor={s.score_floor:g}",
    ),
    Feature("sinks", "learned sinks", ("has_sinks",), lambda s: "a learned sink per head" if s.has_sinks else None),
    Feature("attn_bias", "a float bias tensor", ("has_bias",), lambda s: "a bias tensor" if s.has_bias else None),
    Feature(
        "alibi",
        "ALiBi: a number per head times the distance |k - q - (kv_len - q_len)|",
        ("has_alibi",),
        lambda s: "a slope per head" if s.has_alibi else None,
    ),
    Feature(
        "bias_gradient",
        "gradient of the bias",
        ("bias_requires_grad",),
        lambda s: "the bias requires grad" if s.bias_requires_grad else None,
    ),
    Feature(
        "dropout",
        "dropout of the weights",
        ("dropout_p",),
        lambda s: None if s.dropout_p == 0 else f"dropout_p={s.dropout_p}",
    ),
    Feature(
        "training",
        "backward (gradients of q, k, v)",
        ("requires_grad",),
        lambda s: "gradients are required" if s.requires_grad else None,
    ),
    Feature(
        "returned_weights",
        "the weights as a second result",
        ("returned_weights",),
        lambda s: None if s.returned_weights is None else "something else than the product with v reads them",
    ),
    Feature(
        "decode",
        "at most 16 queries, on another number of keys",
        ("q_len", "kv_len"),
        lambda s: f"q_len={s.q_len}, kv_len={s.kv_len}" if s.is_decode else None,
    ),
    _mask_band("band_upper", "<=", "causal and other upper bounds of k - q"),
    _mask_band("band_lower", ">=", "sliding window: a lower bound of k - q"),
    _mask_flag("kv_start", "a first key per row, from a tensor"),
    _mask_flag("kv_end", "an end of the keys per row, from a tensor"),
    _mask_flag("key_mask", "key padding mask"),
    _mask_flag("segment_ids", "packed documents, by ids"),
    _mask_flag("attn_mask", "a mask tensor without closed form"),
    _empty_rows(EmptyRows.NAN, "rows without a key give NaN"),
    _empty_rows(EmptyRows.NAN_ADDED, "rows without a key give NaN, their scores get a gradient of NaN"),
    _empty_rows(EmptyRows.ZERO, "rows without a key give 0"),
    _empty_rows(EmptyRows.MEAN, "rows without a key give the mean of v"),
    _empty_rows(EmptyRows.MEAN_ADDED, "rows without a key give the mean of v, their scores keep a gradient"),
    Feature(
        "paged_kv",
        "keys and values in blocks, by a block table",
        ("cache",),
        lambda s: None if s.cache is None or s.cache.block_size is None else f"block_size={s.cache.block_size}",
    ),
    Feature(
        "float8_kv",
        "keys and values in float8",
        ("cache",),
        lambda s: None if s.cache is None or s.cache.dtype == s.dtype else str(s.cache.dtype).removeprefix("torch."),
    ),
    Feature(
        "kv_scale",
        "a scale of the keys and values of a cache",
        ("cache",),
        lambda s: "a scale of a cache" if s.cache is not None and s.cache.has_scale else None,
    ),
    Feature(
        "symbolic_heads",
        "a dynamic number of heads",
        ("num_heads", "num_kv_heads"),
        _symbolic("num_heads", "num_kv_heads"),
    ),
    Feature(
        "symbolic_lengths",
        "dynamic batch or lengths",
        ("batch", "q_len", "kv_len"),
        _symbolic("batch", "q_len", "kv_len"),
    ),
)

FEATURE_CODES = frozenset(feature.code for feature in FEATURES)

MASK_FEATURES = frozenset(
    {"band_upper", "band_lower", "kv_start", "kv_end", "key_mask", "segment_ids", "attn_mask"}
    | {f"empty_rows_{mode.value}" for mode in EmptyRows if mode is not EmptyRows.IMPOSSIBLE}
)

_CHECKED_BY_BASE = {"dtype", "device", "kind", "latent", "mask", "mask.text"}
KNOWN_FIELDS = _CHECKED_BY_BASE.union(*(feature.reads for feature in FEATURES))
"""Spec fields that some check accounts for; "mask.text" is words only."""


def feature_reasons(spec: AttentionSpec, takes: frozenset[str]) -> Iterator[Reason]:
    """A reason for each feature of the spec that is not in `takes`."""
    for feature in FEATURES:
        values = feature.values(spec)
        if values is not None and feature.code not in takes:
            # A flag has no values to add to its summary.
            detail = "" if values == feature.summary else f" ({values})"
            yield Reason(feature.code, f"does not take {feature.summary}{detail}")


def unknown_field_reasons(spec: AttentionSpec) -> Iterator[Reason]:
    """A reason for each field that no check knows and that is not at its default."""
    for prefix, part in (("", spec), ("mask.", spec.mask)):
        for field in fields(part):
            name = prefix + field.name
            if name in KNOWN_FIELDS:
                continue
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            if getattr(part, field.name) != default:
                text = f"{name}={getattr(part, field.name)!r} is not known to the backends yet; add it to features.py"
                yield Reason("unknown_field", text)
