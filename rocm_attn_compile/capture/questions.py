"""What a recogniser asks of a captured program: the record by which an equal site is known again.

A program is read through its values. What a value *is* (op, shape, strides, dtype, device) says nothing of its
surroundings; whatever leads on (its arguments, its users, its node) is a question. While a record is kept, each
question is on it with its answer, so nothing can be read that is not. If another value answers every question alike,
whoever asked would have come to the same result there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ..reasons import Refusal

T = TypeVar("T")


class Record:
    """Questions and answers.

    Attributes:
        answers: `(ask, *arguments)` -> answer, in the order in which they were first asked. `ask` is called with a
            reader of the program (see `recognize.live`) and the arguments. A raised `Refusal` is an answer, too.
        names: What was called by name in texts -> `(how, value)` for each value that is called so, where
            `how(reader, value)` is the name; None for what is no value.
    """

    def __init__(self) -> None:
        self.answers: dict[tuple, Any] = {}
        self.names: dict[str, set[tuple[Callable[[Any, Any], str], Any] | None]] = {}

    def add(self, other: Record) -> None:
        """Put what is on another record on this one."""
        for question, answer in other.answers.items():
            self.answers.setdefault(question, answer)
        self.add_names(other)

    def add_names(self, other: Record) -> None:
        """Put the names that are on another record on this one."""
        for name, bearers in other.names.items():
            self.names.setdefault(name, set()).update(bearers)


class Questions:
    """Where the questions to the values of one trace go.

    Attributes:
        record: The record that is kept at the moment, or None.
    """

    def __init__(self) -> None:
        self.record: Record | None = None

    @contextmanager
    def recorded(self) -> Iterator[Record]:
        """Keep a record; what is asked inside is on an outer record as well."""
        outer, inner = self.record, Record()
        self.record = inner
        try:
            yield inner
        finally:
            self.record = outer
            if outer is not None:
                outer.add(inner)

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Keep no record inside. For what is asked again wherever it matters: see `ask`."""
        outer, self.record = self.record, None
        try:
            yield
        finally:
            self.record = outer

    def ask(self, ask: Callable[..., Any], reader: Any, *arguments: Any) -> Any:
        """`ask(reader, *arguments)` as one question, in the place of all those that it asks itself."""
        outer = self.record
        if outer is None:
            return ask(reader, *arguments)
        question = (ask, *arguments)
        if question not in outer.answers:
            self.record = inner = Record()
            try:
                answer = ask(reader, *arguments)
            except Refusal as refusal:
                answer = refusal
            finally:
                self.record = outer
            outer.answers[question] = answer
            outer.add_names(inner)
        answer = outer.answers[question]
        if isinstance(answer, Refusal):
            raise answer
        return answer

    def called(self, name: str, how: Callable[[Any, Any], str] | None = None, value: Any = None) -> str:
        """`name`, which is on its way into a text: `how(reader, value)`, if it is a value's."""
        if self.record is not None:
            self.record.names.setdefault(name, set()).add(None if how is None else (how, value))
        return name


class Edge:
    """An attribute that leads from a value to others; reading it is a question."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, value: Any, owner: type | None = None) -> Any:
        if value is None:
            return self
        fields = value.__dict__
        answer = fields[self.name]
        record = fields["questions"].record
        if record is not None:
            record.answers.setdefault((self, value), answer)
        return answer

    def __set__(self, value: Any, answer: Any) -> None:
        value.__dict__[self.name] = answer

    def __call__(self, reader: Any, value: Any) -> Any:
        """The question."""
        return value.__dict__[self.name]


def edges(*names: str) -> Callable[[type[T]], type[T]]:
    """Make attributes of a class edges; its instances have their `Questions` in the attribute `questions`."""

    def decorate(cls: type[T]) -> type[T]:
        for name in names:
            setattr(cls, name, Edge(name))
        return cls

    return decorate
