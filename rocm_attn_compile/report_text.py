"""The text of a report: the lines that `str(report)` is made of."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from .options import Options

if TYPE_CHECKING:
    from .report import Report, Site


def environment_lines(report: Report) -> Iterator[str]:
    """What the decisions were based on."""
    env = report.environment
    if env:
        origin = f" ({env['arch_source']})" if env.get("arch") else ""
        versions = ", ".join(f"{name} {version}" for name, version in env.get("versions", {}).items() if version)
        yield f"target {env.get('arch') or 'no GPU'}{origin}; {versions}; aiter {env.get('aiter')}"
        if env.get("variables"):
            yield "variables " + ", ".join(f"{name}={value}" for name, value in env["variables"].items())
    defaults = dataclasses.asdict(Options())
    set_options = {name: value for name, value in report.options.items() if value != defaults.get(name)}
    if set_options:
        yield "options " + ", ".join(f"{name}={value!r}" for name, value in set_options.items())


def site_lines(site: Site) -> Iterator[str]:
    """Everything that is known of one site."""
    yield f"at {site.source}" + (f"  {site.code}" if site.code else "")
    if site.module:
        yield f"in {site.module}"
    if site.spec:
        yield site.spec
        yield f"mask: {site.mask}"
    for sentence in site.choice:
        yield f"because {sentence}"
    for reason in site.reasons:
        yield f"reason {reason}"
    for note in site.notes:
        yield f"note {note}"
    for name, reasons in site.rejected.items():
        yield f"not {name}: " + "; ".join(map(str, reasons))


def groups(sites: Sequence[Site]) -> Iterator[tuple[str, Site]]:
    """Equal sites, which the layers of a model give, once each with all their numbers."""
    groups: dict[str, tuple[list[int], Site]] = {}
    for index, site in enumerate(sites):
        same = json.dumps(dataclasses.asdict(dataclasses.replace(site, module="")), sort_keys=True)
        groups.setdefault(same, ([], site))[0].append(index)
    for indices, site in groups.values():
        if len(indices) > 1:
            site = dataclasses.replace(site, module=f"{site.module} and {len(indices) - 1} more" if site.module else "")
        yield _ranges(indices), site


def _ranges(indices: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` as "0-2, 5"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def codes(sites: Iterable[Site]) -> str:
    """The codes of all reasons, each once."""
    return ", ".join(dict.fromkeys(reason.code for site in sites for reason in site.reasons)) or "no reason"


def plural(count: int, noun: str) -> str:
    """ "1 site", "2 sites"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
