"""What was found for one site, said of another: the same data, with other values and axes of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy
import torch

from ..capture.trace import Value
from ..reasons import Reason
from ..spec import AttentionSpec
from .axes import Atom
from .labels import Labels
from .mask.classify import ClosedForm, MaskContext
from .mask.integers import load, loaded_value, loads_in
from .mask.logic import Logic
from .mask.predicate import And, BoolLoad, Or, Rel
from .mask.values import If
from .region import (
    Alibi,
    CacheRead,
    Cut,
    KvCache,
    Latent,
    LookAlike,
    MaskTerm,
    Operand,
    PositionBias,
    Region,
    Roles,
    Tail,
)

OF_A_SITE = (
    *(Region, LookAlike, Roles, Operand, Cut, MaskTerm, Alibi, PositionBias, Latent, Tail, KvCache, CacheRead),
    *(ClosedForm, BoolLoad, Rel, If),
)
"""Taken apart, field by field."""

_OF_ALL = frozenset(
    (bool, int, float, str, type(None), torch.SymInt, torch.SymFloat, torch.dtype)
    + (Reason, AttentionSpec, MaskContext, Logic)
)
"""The same for every site: it has neither values nor axes."""


class Translation:
    """Translates a `Region` or `LookAlike`.

    Raises `KeyError` for a value without a partner.
    """

    def __init__(self, partner: dict[Value, Value]) -> None:
        self._partner = partner
        self._atoms: dict[Atom, Atom] = {}
        self._known: dict[int, Any] = {}  # by id: what is one object stays one

    def __call__(self, x: Any) -> Any:
        """The same of the other site."""
        kind = type(x)
        if kind is list or kind is tuple:
            return kind(map(self, x))
        if kind is Atom:
            return self._atom(x)
        if kind is Value:
            return self._partner[x]
        if kind in _OF_ALL:
            return x
        if isinstance(x, sympy.Basic):
            return self._expression(x)
        if kind is And or kind is Or:
            return kind(map(self, x.parts))
        if id(x) not in self._known:
            self._known[id(x)] = self._labels(x) if isinstance(x, Labels) else self._fields(x)
        return self._known[id(x)]

    def _fields(self, x: Any) -> Any:
        assert isinstance(x, OF_A_SITE), f"{type(x)} is not known to have values or axes, or none"
        fields = {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
        translated = {name: self(field) for name, field in fields.items()}
        if isinstance(x, ClosedForm) and translated["predicate"] == x.predicate:
            return x  # what was proved of a tensor that both sites read
        return type(x)(**translated)

    def _labels(self, labels: Labels) -> Labels:
        translated = Labels()
        for value, dims in labels.items():
            translated.set(self(value), self(dims))
        return translated

    def _atom(self, atom: Atom) -> Atom:
        if atom not in self._atoms:
            self._atoms[atom] = copy = Atom(atom.size)
            copy.parts = None if atom.parts is None else self(atom.parts)
        return self._atoms[atom]

    def _expression(self, expr: sympy.Basic) -> sympy.Basic:
        loads = loads_in(expr)
        if all(self._partner[value] is value for value in map(loaded_value, loads)):
            return expr
        return expr.replace(lambda e: e in loads, lambda e: load(self(loaded_value(e)), e.args))
