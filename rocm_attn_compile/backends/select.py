"""The choice of a backend for one site: the documented rules first, then what can really take the site."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..env import Environment, Flags
from ..options import Options
from ..reasons import Reason
from ..spec import AttentionSpec
from . import BACKENDS, by_name, rules
from .base import HARDWARE_CODES
from .fingerprint import implementation_tag
from .limits import block_size_of
from .words import latent_sentences

log = logging.getLogger(__name__)

OPTION = 'options["attention_backend"]'


class BackendUnavailableError(ValueError):
    """The backend named explicitly needs a GPU or a package that is not there."""


class StrictError(NotImplementedError):
    """`options={"strict": True}`: some site is not computed by the backend chosen for it.

    Attributes:
        problems: Per site, its name (source line, spec in words) and the reasons.
    """

    def __init__(self, problems: Sequence[tuple[str, Sequence[Reason]]]) -> None:
        self.problems = [(site, list(reasons)) for site, reasons in problems]
        lines = ['options={"strict": True}, and these attention sites are not computed as chosen:']
        for site, reasons in self.problems:
            lines.append(f"  {site}")
            lines += [f"    {reason}" for reason in reasons]
        lines.append("Change the model or the choice, or drop strict to fall back with a warning.")
        super().__init__("\n".join(lines))

    @property
    def reasons(self) -> list[Reason]:
        """All reasons of all sites."""
        return [reason for _, reasons in self.problems for reason in reasons]


@dataclass(frozen=True)
class Rejected:
    """No backend takes the site; the graph stays as it is.

    Attributes:
        preferred: What the rules chose.
        sentences: How it came to this, in order.
        rejected: Backend -> its reasons, for every declared backend.
    """

    preferred: str
    sentences: tuple[str, ...]
    rejected: Mapping[str, tuple[Reason, ...]]

    @property
    def reasons(self) -> list[Reason]:
        """All reasons, the text led by the backend's name; the preferred backend first."""
        names = sorted(self.rejected, key=lambda name: name != self.preferred)
        return [Reason(r.code, f"{name}: {r.text}") for name in names for r in self.rejected[name]]


@dataclass(frozen=True)
class Choice:
    """The backend that computes the site.

    Attributes:
        backend: Its name.
        impl: The op's `impl` argument, "<backend>@<hash>" or "<backend>@<hash>+inline".
        preferred: What the rules chose; differs from `backend` after a fallback.
        sentences: How it came to this, in order.
        rejected: Every other declared backend -> its reasons; "lower_priority" is one that could.
    """

    backend: str
    impl: str
    preferred: str
    sentences: tuple[str, ...]
    rejected: Mapping[str, tuple[Reason, ...]]

    @property
    def fell_back(self) -> bool:
        """True if the backend the rules chose cannot take the site."""
        return self.backend != self.preferred

    @property
    def reasons(self) -> list[Reason]:
        """Why the preferred backend does not take the site; empty if it does."""
        return list(self.rejected[self.preferred]) if self.fell_back else []


def select(spec: AttentionSpec, env: Environment, options: Options) -> Choice | Rejected:
    """Choose a backend.

    Args:
        spec: The proved attention.
        env: Of this compilation; warns through it once per graph and message.
        options: `attention_backend` and `inline` are used. `strict` is not: the caller collects all sites first, then
            raises `StrictError` for those that fell back or were rejected.

    Raises:
        ValueError, RuntimeError: An explicit choice that breaks the documented rules, see `rules.documented_choice`.
        BackendUnavailableError: An explicit choice whose hardware or package is missing.
    """
    flags, source = _requested(env, options)
    arch, aiter = env.arch_for(spec.device), env.aiter.is_amd
    block_size = block_size_of(spec, env)
    preferred, sentence = rules.documented_choice(flags, arch, spec.kind, block_size, aiter, source)
    order = _unique((preferred, *rules.enabled_order(flags, arch, spec.kind, block_size, aiter)))
    reasons = {backend.name: tuple(backend.reasons(spec, env)) for backend in (*BACKENDS, by_name(preferred))}

    missing = [reason for reason in reasons[preferred] if reason.code in HARDWARE_CODES]
    if flags.attention_backend is not None and missing:
        text = "; ".join(reason.text for reason in missing)
        raise BackendUnavailableError(f"{preferred}, named by {source}, cannot run here: {text}")

    chosen = next((name for name in order if not reasons[name]), None)
    if chosen == preferred:
        latent = latent_sentences(spec, block_size or rules.DEFAULT_BLOCK_SIZE)
        return _choice(chosen, preferred, (sentence, *latent), reasons, env, options)
    why = f"{preferred} cannot take it ({'; '.join(map(str, reasons[preferred]))})"
    if chosen is None:
        log.debug("no backend takes the site: %s", reasons)
        env.warn(
            f"attention left as it is: {why}, and no other backend can; rocm_attn_compile.explain() lists all reasons"
        )
        return Rejected(preferred, (sentence, why, f"tried {', '.join(order)}: none can"), reasons)
    env.warn(f"attention runs on {chosen} instead of {preferred}: {why}")
    return _choice(chosen, preferred, (sentence, why, f"{chosen}: the next in order that can"), reasons, env, options)


def _choice(
    chosen: str,
    preferred: str,
    sentences: tuple[str, ...],
    reasons: Mapping[str, tuple[Reason, ...]],
    env: Environment,
    options: Options,
) -> Choice:
    could = (Reason("lower_priority", f"could take it; {chosen} comes first"),)
    rejected = {name: found or could for name, found in reasons.items() if name != chosen}
    return Choice(chosen, implementation_tag(chosen, env, options.inline), preferred, sentences, rejected)


def _requested(env: Environment, options: Options) -> tuple[Flags, str]:
    """The flags with the explicit choice in force, and where that comes from."""
    by_variable, by_option = env.flags.attention_backend, options.attention_backend
    if by_variable is None and by_option is not None:
        return replace(env.flags, attention_backend=by_option), OPTION
    if by_variable is not None and by_option is not None and by_variable != by_option:
        env.warn(f"{rules.VARIABLE}={by_variable} overrides {OPTION}={by_option!r}: the environment wins")
    return env.flags, rules.VARIABLE


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
