"""Equal sites, as the layers of a model are, are recognised once.

While a site is recognised, everything that is asked of the program is on record (`capture.questions`). At the next site
the same questions are asked of the values in the same places. If every answer is the same, but for values that are
partners one to one, recognition would go the same way there, step by step, to the same result: so that is translated,
value for value. At the first answer that differs the site is recognised in full.

So nothing is assumed of what makes two layers equal: a scale, a mask, a stride, a dtype, one more reader of the weights
are each something that is asked for, or cannot matter. And the questions are those about one site: their number does
not grow with the layers below it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from ..capture.questions import Record
from ..capture.trace import Value
from ..normalize.softmax import SoftmaxAnchor
from .live import LiveUsers
from .names import Found, is_about_one_site, rename
from .pairing import Look, Pairing, look_of
from .translation import Translation

log = logging.getLogger(__name__)

Anchor: TypeAlias = SoftmaxAnchor | Value

_REMEMBERED = 8
"""Sites that a new one is compared with, the latest first; models have few kinds of layers, and take turns."""


@dataclass(frozen=True, eq=False)
class _Site:
    """One that was recognised in full."""

    anchor: Anchor
    found: Found
    record: Record


class Sites:
    """The sites of a program that were recognised in full so far."""

    def __init__(self) -> None:
        self._sites: list[_Site] = []
        self._looks: dict[Value, Look] = {}

    def recognize(self, anchor: Anchor, live: LiveUsers, in_full: Callable[[Anchor, LiveUsers], Found]) -> Found:
        """What is at `anchor`: translated from an equal site if there is one, else what `in_full` says."""
        for site in self._sites:
            found = self._translated(site, anchor, live)
            if found is not None:
                self._remember(site)
                return found
        with live.questions.recorded() as record:
            found = in_full(anchor, live)
        if not is_about_one_site(found, record):
            self._remember(_Site(anchor, found, record))
        return found

    def _translated(self, site: _Site, anchor: Anchor, live: LiveUsers) -> Found | None:
        pairing = Pairing(self._look)
        if not (pairing.fits(_parts(site.anchor), _parts(anchor)) and pairing.answers_alike(site.record, live)):
            return None
        try:
            found: Found = Translation(pairing.partner)(site.found)
        except Exception:  # a defect of ours: the site is recognised in full
            log.warning("while translating %s", site.found.anchor, exc_info=True)
            return None
        found.equal_to = site.found.anchor
        return found if rename(found, site.record, pairing.partner, live) else None

    def _remember(self, site: _Site) -> None:
        self._sites = [site, *(other for other in self._sites if other is not site)][:_REMEMBERED]

    def _look(self, value: Value) -> Look:
        if value not in self._looks:
            self._looks[value] = look_of(value)
        return self._looks[value]


def counts(items: Iterable[Found]) -> dict[str, int]:
    """How many were recognised "in_full", and how many are "equal" to one that was."""
    in_full = [item.equal_to is None for item in items]
    return {"in_full": sum(in_full), "equal": len(in_full) - sum(in_full)}


def _parts(anchor: Anchor) -> tuple:
    if isinstance(anchor, Value):
        return (anchor,)
    flags = (anchor.dim, anchor.safe, anchor.shifted, anchor.normalized)
    return anchor.weights, anchor.scores, flags, anchor.internals
