"""A closed form in words, for reports."""

from __future__ import annotations

import sympy

from .classify import ClosedForm
from .integers import expand


def mask_in_words(form: ClosedForm) -> str:
    """One line, such as "causal, window 128, key padding"."""
    if form.is_tautology:
        return "none"
    if form.is_contradiction:
        return "every key masked"
    parts = _band(form)
    if form.kv_start and form.kv_end:
        parts.append("key range per row")
    elif form.kv_end:
        parts.append("key limit per row" if _vary(form, form.kv_end) else "key limit")
    elif form.kv_start:
        parts.append("first key per row" if _vary(form, form.kv_start) else "first key")
    if form.key_masks:
        parts.append("key padding")
    if form.segment_ids:
        parts.append("segments")
    if form.residual:
        parts.append("dense mask")
    return ", ".join(parts)


def _vary(form: ClosedForm, limits: tuple) -> bool:
    return any(not isinstance(x, sympy.Expr) or form.context.q in x.free_symbols for x in limits)


def _band(form: ClosedForm) -> list[str]:
    lower, upper, context = form.band_lower, form.band_upper, form.context
    if upper is None and lower is None:
        return []
    if upper is None:
        return [f"k - q >= {lower}"]
    if lower is not None and expand(lower + upper) == 0:
        return [f"window |q - k| <= {upper}"]
    bottom_right = expand(context.kv_len - context.q_len)
    if upper == 0:
        parts = ["causal" if bottom_right == 0 else "causal (top-left)"]
    elif expand(upper - bottom_right) == 0:
        parts = ["causal (bottom-right)"]
    else:
        parts = [f"k - q <= {upper}"]
    if lower is not None:
        window = expand(upper - lower + 1)
        parts.append(f"window {window}")
    return parts
