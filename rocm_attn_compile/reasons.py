"""Why something was not done, as data: a stable code for tests and JSON, a text with values for people."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """One reason for a refusal, a fallback or a choice.

    Attributes:
        code: Stable identifier in snake_case, for tests, JSON and the docs table. Never reworded.
        text: What was got, what is allowed, and what to do; carries the values. May be improved.
    """

    code: str
    text: str

    def __str__(self) -> str:
        return f"{self.code}: {self.text}"


INTERNAL_ERROR = "internal_error"
"""Code of a defect of ours: the site, or the graph, is left as it was, and a warning asks to report it."""


class Refusal(Exception):
    """Raised inside a stage to leave one site alone; the pipeline turns it into a report entry.

    Never escapes to the user: `strict` mode raises its own error that lists all reasons.

    Attributes:
        reason: Why.
        needs_numbers: Symbolic sizes (sympy) that the proof needs as numbers; the pipeline may specialise, try again.
    """

    def __init__(self, code: str, text: str, needs_numbers: tuple = ()) -> None:
        super().__init__(f"{code}: {text}")
        self.reason = Reason(code, text)
        self.needs_numbers = needs_numbers
