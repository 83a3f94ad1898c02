"""Scores that two attentions share: of queries over keys, and of keys over queries (Grounding DINO).

    s = q k^T;   softmax(s) v   and   softmax(s^T) w        w lies along the queries

Each is an attention of its own, and neither needs the scores once both are replaced.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..capture.trace import Value
from ..reasons import Reason
from .labels import is_cast, is_view
from .live import LiveUsers
from .region import LookAlike, Region

_SOFTMAXES = frozenset(["_softmax", "_safe_softmax", "_log_softmax"])
_ON_THE_WAY = frozenset(["add", "sub", "mul", "div", "max", "amax", "clamp", "clamp_min", "masked_fill", "where"])
_LONGEST = 16


def softmaxes_of(value: Value, live: LiveUsers, longest: int = _LONGEST) -> list[Value]:
    """The softmaxes that everything computed from `value` ends in; empty if anything ends elsewhere."""
    if isinstance(value.op, str) or longest == 0:
        return []
    if value.name in _SOFTMAXES:
        return [value]
    if not (is_view(value) or is_cast(value) or value.name in _ON_THE_WAY):
        return []
    found: list[Value] = []
    for user in live.users(value, "scores_used_elsewhere"):
        others = softmaxes_of(user, live, longest - 1)
        if not others:
            return []
        found += [other for other in others if other not in found]
    return found


def without_halves(regions: Sequence[Region]) -> tuple[list[Region], list[LookAlike]]:
    """The regions without those that share their scores with a softmax that is none, as which they become.

    The scores would be computed for that one all the same.
    """
    kept, halves = list(regions), list[LookAlike]()
    while True:
        anchors = {region.anchor for region in kept}
        now = [region for region in kept if not anchors.issuperset(region.shared)]
        if not now:
            return kept, halves
        kept = [region for region in kept if region not in now]
        text = "the scores are also those of another softmax, which is not replaced"
        halves += [LookAlike(r.anchor, Reason("scores_used_elsewhere", text), is_attention=True) for r in now]
