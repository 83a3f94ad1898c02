"""What happened to every attention of a graph: data first, then text, JSON and logs made from it."""

from __future__ import annotations

import contextvars
import dataclasses
import json
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from . import _torch_private
from .backends.select import Choice, Rejected
from .backends.words import mask_words, spec_data, words
from .env import Environment
from .options import Options
from .reasons import Reason
from .report_text import codes, environment_lines, groups, plural, site_lines
from .spec import AttentionSpec

log = logging.getLogger(__name__)

source_of = _torch_private.source_of  # where a site is in the user's model, for `Site.source` and `Site.code`


@dataclass
class Site:
    """One attention, or one thing that looks like one.

    Attributes:
        kind: "attention" or "mla".
        replaced: The graph now calls our op here.
        backend: Name of the backend that computes it; None if it was not replaced.
        reasons: Why it was not replaced, or why not by the backend the rules chose; empty if all went as chosen.
        source: "file:line" of the user's model.
        code: That line of code.
        module: Path of the module in the model, such as "model.layers.0.self_attn"; "" if unknown.
        spec: What was recognised, in words; "" for a look-alike.
        mask: The mask in words, and whether it is proved.
        data: The spec as plain data; empty for a look-alike.
        choice: The sentences that led to the backend.
        rejected: Every other backend -> its reasons.
        impl: The op's `impl` argument, which is in the compile caches' keys.
        notes: What the site comes near to and is not, such as latent attention or ALiBi, each with why.
    """

    kind: str
    replaced: bool
    source: str
    backend: str | None = None
    reasons: list[Reason] = field(default_factory=list)
    code: str = ""
    module: str = ""
    spec: str = ""
    mask: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    choice: list[str] = field(default_factory=list)
    rejected: dict[str, list[Reason]] = field(default_factory=dict)
    impl: str = ""
    notes: list[Reason] = field(default_factory=list)

    @classmethod
    def recognized(
        cls,
        spec: AttentionSpec,
        outcome: Choice | Rejected,
        *,
        source: str,
        code: str = "",
        module: str = "",
        notes: Sequence[Reason] = (),
    ) -> Site:
        """A proved attention with what the selection said; `replaced` if it chose a backend.

        A caller that then does not replace it (no fuel left, say) clears `replaced` and `backend` and adds a reason.
        """
        chosen = isinstance(outcome, Choice)
        return cls(
            kind=spec.kind,
            replaced=chosen,
            backend=outcome.backend if isinstance(outcome, Choice) else None,
            reasons=list(outcome.reasons),
            source=source,
            code=code,
            module=module,
            spec=words(spec),
            mask=mask_words(spec.mask),
            data=spec_data(spec),
            choice=list(outcome.sentences),
            rejected={name: list(reasons) for name, reasons in outcome.rejected.items()},
            impl=outcome.impl if isinstance(outcome, Choice) else "",
            notes=list(notes),
        )

    @classmethod
    def refused(
        cls,
        reasons: Reason | Sequence[Reason],
        *,
        source: str,
        code: str = "",
        module: str = "",
        kind: str = "attention",
    ) -> Site:
        """Something that was not proved to be an attention, or that cannot be rewritten."""
        reasons = [reasons] if isinstance(reasons, Reason) else list(reasons)
        return cls(kind="attention", replaced=False, source=source, reasons=reasons, code=code, module=module)

    @property
    def headline(self) -> str:
        """What became of it, in a few words."""
        return f"replaced by {self.backend}" if self.replaced else "left as it is"


@dataclass
class Report:
    """Everything about one compiled graph.

    Attributes:
        graph: Name of the graph, Dynamo's compile id such as "0/0".
        sites: Every attention, replaced or not, in the order of the graph.
        look_alikes: Softmaxes that are no attention or could not be proved, each with its reason.
        environment: What the decisions were based on, as plain data.
        options: Ours, as plain data.
        timings: Stage -> seconds.
        recognized: How many sites and look-alikes were recognised "in_full", how many found "equal" to one that was.
        notes: Anything else to be said, one sentence each.
    """

    graph: str = "?"
    sites: list[Site] = field(default_factory=list)
    look_alikes: list[Site] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    recognized: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, graph: str, env: Environment, options: Options) -> Report:
        """An empty report of a graph."""
        return cls(graph=graph, environment=env.to_dict(), options=dataclasses.asdict(options))

    def summary(self) -> str:
        """One line: "graph 0/0: 3 attention sites: 2 TRITON_ATTN, 1 left as it is (opaque_mask); 1 look-alike"."""
        parts = [f"{n} {name}" for name, n in Counter(s.backend for s in self.sites if s.replaced).items()]
        left = [site for site in self.sites if not site.replaced]
        if left:
            parts.append(f"{len(left)} left as {'it is' if len(left) == 1 else 'they are'} ({codes(left)})")
        text = f"graph {self.graph}: {plural(len(self.sites), 'attention site')}"
        text += f": {', '.join(parts)}" if parts else ""
        if self.look_alikes:
            text += f"; {plural(len(self.look_alikes), 'look-alike')} refused ({codes(self.look_alikes)})"
        return text

    def __str__(self) -> str:
        lines = [f"rocm_attn, {self.summary()}", *(f"  {line}" for line in environment_lines(self))]
        for title, sites in (("attention", self.sites), ("look-alike", self.look_alikes)):
            for indices, site in groups(sites):
                lines += ["", f"  {title} {indices}: {site.headline}", *(f"    {line}" for line in site_lines(site))]
        lines += ["", *(f"  note: {note}" for note in self.notes)] if self.notes else []
        if self.timings:
            times = ", ".join(f"{stage} {seconds:.3f} s" for stage, seconds in self.timings.items())
            lines += ["", f"  time: {times}"]
        if equal := self.recognized.get("equal"):
            lines += [f"  recognized in full: {self.recognized['in_full']}; equal to one of these: {equal}"]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, complete: `from_dict` gives an equal report."""
        return dataclasses.asdict(self)

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`."""
        values = dict(data)
        for name in ("sites", "look_alikes"):
            values[name] = [_site_from_dict(site) for site in values.get(name, [])]
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))


# --- The store of reports ---


_lock = threading.Lock()
_reports: list[Report] = []
_collector: contextvars.ContextVar[list[Report] | None] = contextvars.ContextVar("rocm_attn_collector", default=None)


def reports() -> list[Report]:
    """Reports of every graph compiled so far in this process, oldest first."""
    with _lock:
        return list(_reports)


def reset_reports() -> None:
    """Forget all reports."""
    with _lock:
        _reports.clear()


def publish(report: Report) -> None:
    """Store a finished report, log it and write it to `TORCH_TRACE`.

    INFO has one line per graph, DEBUG the whole report: `TORCH_LOGS="+rocm_attn_compile"` shows both.
    """
    collected = _collector.get()
    with _lock:
        (_reports if collected is None else collected).append(report)
    log.info("%s", report.summary())
    log.debug("%s", report)
    _torch_private.trace_artifact("rocm_attn_report", report.to_json)


def withdraw(report: Report) -> None:
    """Take back a published report, of a graph that was given up."""
    collected = _collector.get()
    with _lock:
        (_reports if collected is None else collected).remove(report)


@contextmanager
def collect_reports() -> Iterator[list[Report]]:
    """Reports published inside go to the list it yields, not to the store: those of `explain` are not compilations."""
    collected: list[Report] = []
    token = _collector.set(collected)
    try:
        yield collected
    finally:
        _collector.reset(token)


def _site_from_dict(data: Mapping[str, Any]) -> Site:
    values = dict(data)
    for name in ("reasons", "notes"):
        values[name] = [Reason(**reason) for reason in values.get(name, [])]
    values["rejected"] = {
        name: [Reason(**reason) for reason in reasons] for name, reasons in values.get("rejected", {}).items()
    }
    return Site(**values)
