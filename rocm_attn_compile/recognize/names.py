"""Names in what a report says of a site, and those that an equal site has in their place."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeAlias

from ..capture.questions import Record
from ..capture.trace import Value
from ..reasons import INTERNAL_ERROR, Reason
from .region import LookAlike, Region

Found: TypeAlias = Region | LookAlike

_NUMBER = re.compile(r"%|_\d")
"""In what is surely a name: `linear_1`, `l_x_0_`, `%12:mul[2, 4]`."""

_REPORTED = ("reason", "latent_note", "cache_note", "bias_note")


def is_about_one_site(found: Found, record: Record) -> bool:
    """True if equal sites need not have the same said of them: a defect of ours, a name that is no value's.

    So may be a name that is a word, too: in "the softmax input comes from ...", softmax is no name of a node.
    """
    for reason in _reasons(found).values():
        names = _names_in(reason, record)
        if reason.code == INTERNAL_ERROR or any(None in record.names[x] or not _NUMBER.search(x) for x in names):
            return True
    return False


def rename(found: Found, record: Record, partner: dict[Value, Value], reader: Any) -> bool:
    """Name what is reported of `found` as it is called at the other site; False if that is not one name for one.

    Args:
        found: Translated, but for the names.
        record: Of the site it was translated from.
        partner: That site's values -> those of this one.
        reader: Of the program of this one.
    """
    for field, reason in _reasons(found).items():
        names: dict[str, str] = {}
        for name in _names_in(reason, record):
            bearers = [bearer for bearer in record.names[name] if bearer is not None]
            now = {how(reader, partner[value]) if value in partner else "" for how, value in bearers}
            if len(now) != 1 or "" in now:
                return False
            (names[name],) = now
        if names:
            setattr(found, field, replace(reason, text=_replaced(reason.text, names)))
    return True


def _reasons(found: Found) -> dict[str, Reason]:
    reasons = ((field, getattr(found, field, None)) for field in _REPORTED)
    return {field: reason for field, reason in reasons if reason is not None}


def _names_in(reason: Reason, record: Record) -> list[str]:
    return [name for name in record.names if _pattern([name]).search(reason.text)]


def _replaced(text: str, names: dict[str, str]) -> str:
    return _pattern(names).sub(lambda match: names[match.group()], text)


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")
