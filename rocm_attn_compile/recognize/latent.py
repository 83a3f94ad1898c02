"""Multi-head latent attention (MLA): prove that keys and values of an attention come from one latent per token.

    expanded   k = [c W_uk | k_pe, the same for all heads]      v = c W_uv      q = [q_nope | q_pe]
    absorbed   scores = (q_nope W_uk) c^T + q_pe k_pe^T         p c             DeepSeek's inference code

The attention itself is proved already, from the softmax outwards; this is a further step inwards. Axes are copied
first: a proof that fails half-way must not have merged any of the attention's own. What is nearly latent attention
stays a plain one, with a reason.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch.utils import _pytree as pytree

from ..capture.trace import Value
from ..reasons import INTERNAL_ERROR, Reason, Refusal
from ..spec import EmptyRows, LatentSpec
from ..symbolic import static
from .descent import origin
from .labels import is_contraction, operands_of
from .latent_absorbed import find_absorbed
from .latent_cache import expanded_cache
from .latent_expanded import find_expanded
from .latent_form import form_of, latent_spec
from .latent_paged import read_pages
from .latent_terms import Attempt
from .latent_weights import add_weights
from .live import LiveUsers
from .mask.predicate import free_symbols
from .region import Latent, Operand, Region

log = logging.getLogger(__name__)


def add_latent(region: Region, live: LiveUsers) -> None:
    """Make `region` one of kind "mla" with its `latent`, if that is proved; if it comes near, say what it lacks."""
    roles, spec = region.roles, region.spec
    try:
        _try(region, live)
        if region.latent is None and _batch_may_be_heads(region):
            # Without a batch the heads are the first axis, and were taken for it.
            region.roles = replace(roles, batch=[], kv_heads=roles.batch)
            region.spec = replace(spec, batch=1, num_heads=spec.batch, num_kv_heads=spec.batch)
            _try(region, live)
    except Exception as error:  # a defect of ours; the plain attention is proved all the same
        log.warning("while looking for the latent of %s", region.anchor, exc_info=True)
        region.latent, region.latent_note = None, Reason(INTERNAL_ERROR, repr(error))
    if region.latent is None:
        region.roles, region.spec = roles, spec


def _batch_may_be_heads(region: Region) -> bool:
    closed = region.closed_mask
    if region.roles.heads or not region.roles.batch or region.masks or region.biases:
        return False
    return closed is None or not set(closed.context.batch) & free_symbols(closed.predicate)


def _try(region: Region, live: LiveUsers) -> None:
    try:
        attempt = Attempt(region)
    except Refusal:
        return
    try:
        absorbed = find_absorbed(region, attempt)
        if absorbed is not None:
            add_weights(region, absorbed, attempt, live)
        latent = absorbed or find_expanded(region, attempt)
        attempt.is_near = bool(latent.rope) or latent.q_latent is not None
        _check_features(region, latent)
    except Refusal as refusal:
        region.latent_note = _note(refusal) if attempt.is_near else expanded_cache(region)
        return
    region.latent_note = None
    if latent.q_latent is not None:
        _name_the_heads(region, latent)
    # The mean of all values needs a number of keys, which blocks do not tell.
    is_mean = region.spec.mask.empty_rows in (EmptyRows.MEAN, EmptyRows.MEAN_ADDED)
    if form_of(region.spec, latent)[0] != "prefill" and not is_mean:
        read_pages(latent)
    spec = latent_spec(region.spec, latent)
    if not latent.rope and _is_plain(spec):
        return
    # One range of a cache may be taken twice, once for the keys and once for the values.
    latent.leaves = [origin(operand.value) for operand in _operands(latent)]
    latent.values = [*_between(region, latent), *(latent.tail.values if latent.tail is not None else ())]
    region.latent = latent
    region.spec = replace(region.spec, kind="mla", latent=spec)


def forget_latent(region: Region, reason: Reason) -> bool:
    """Make `region` a plain attention again, with a note; False if it is one."""
    if region.latent is None:
        return False
    region.latent, region.spec = None, replace(region.spec, kind="attention", latent=None)
    region.latent_note = Reason("latent_unavailable", f"the latents are not there where the attention is: {reason}")
    return True


def _name_the_heads(region: Region, latent: Latent) -> None:
    """One query of many heads: where all read one key, the heads look like queries, and the mask tells nothing else."""
    spec, closed = region.spec, region.closed_mask
    count = static(spec.q_len)
    if region.roles.heads or count is None or not 1 < count <= 128:
        return
    if closed is not None and closed.context.q in free_symbols(closed.predicate):
        return
    region.roles = replace(region.roles, groups=region.roles.query, query=[])
    latent.roles = replace(latent.roles, groups=latent.roles.query, query=[])
    region.spec = replace(spec, num_heads=count, q_len=1)


def _is_plain(spec: LatentSpec) -> bool:
    """Without a rotary half any keys and values that are wider than the hidden states are maps of a latent.

    The prefill form of those is plain attention, and the kernels read no latents wider than 512.
    """
    return spec.form == "prefill" or (static(spec.kv_lora_rank) or 0) > 512


def _note(refusal: Refusal) -> Reason:
    """The reason as the report has it; that of the axis algebra is one of axes."""
    reason = refusal.reason
    return reason if reason.code.startswith("latent_") else Reason("latent_axes", reason.text)


def _check_features(region: Region, latent: Latent) -> None:
    """The MLA ops take bands, key masks and bounds per row; everything else is refused."""
    spec = region.spec
    refused = (
        (bool(region.q.factors or region.k.factors), "latent_tensor_scale", "the scores are scaled by a tensor"),
        (region.v.factor != 1, "latent_not_linear", "the values are scaled after their heads were repeated"),
        (spec.has_bias or spec.has_alibi, "latent_attn_bias", "a bias is added to the scores"),
        (spec.logits_soft_cap is not None, "latent_soft_cap", "the scores have a soft cap"),
        (spec.has_sinks, "latent_sinks", "the softmax has learned sinks"),
        (spec.dropout_p != 0, "latent_dropout", "the attention weights pass a dropout"),
        (spec.mask.has_segment_ids, "latent_segment_ids", "documents are packed"),
        (spec.mask.has_attn_mask, "latent_attn_mask", "a part of the mask has no closed form"),
        (
            latent.w_uv is None and spec.requires_grad,
            "latent_training",
            "it is written in its absorbed form, which has no gradients",
        ),
    )
    for is_there, code, text in refused:
        if is_there:
            raise Refusal(code, f"latent attention, but {text}, which the MLA ops do not take")


def _operands(latent: Latent) -> Iterator[Operand]:
    """What the latent form is computed from. k_nope and v are not: they are maps of kv_c."""
    query = latent.q_latent if latent.q_nope is None else latent.q_nope
    found = (query, latent.q_pe, latent.kv_c, latent.k_pe, latent.w_uk, latent.w_uv)
    yield from (operand for operand in found if operand is not None)


def _between(region: Region, latent: Latent) -> Iterator[Value]:
    """Everything that is computed from the leaves on the way to the attention."""
    inside = {value.id for value in region.values}
    stop = {value.id for value in latent.leaves} | inside
    todo = [factor for value in region.values for factor in factors_of(value) if factor.id not in inside]
    while todo:
        value = todo.pop()
        if value.id in stop:
            continue
        stop.add(value.id)
        yield value
        todo += _tensors((value.args, value.kwargs))


def factors_of(value: Value) -> Iterable[Value]:
    if value.op == "sdpa":
        return [value.kwargs[name] for name in ("query", "key", "value")]
    return operands_of(value) if is_contraction(value) else ()


def _tensors(tree: object) -> list[Value]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Value)]
