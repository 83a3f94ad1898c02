"""The symbols in which the masks and biases of a site are proved."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import sympy

from ..capture.trace import Value
from ..reasons import Refusal
from ..symbolic import is_one, product
from . import mask as prover
from .axes import Atom, Dim, resolve
from .live import LiveUsers
from .mask.integers import FloorDiv, modulo
from .region import Roles

T = TypeVar("T")


class Symbols:
    """Index symbols for the atoms of a site, as `recognize.mask` wants them, and what is proved with them."""

    def __init__(self, roles: Roles, live: LiveUsers) -> None:
        self._live = live
        self._of: dict[Atom, sympy.Expr] = {}
        # Dynamo's shape symbols are s0, u1, ...: these names must stay apart from them
        q, k = (prover.index_symbol(name) for name in ("q", "k"))
        self._spread(q, roles.query)
        self._spread(k, roles.key)
        batch, heads = self._each("b", roles.batch), self._each("h", roles.heads)
        self.context = prover.MaskContext(
            q=q,
            k=k,
            q_len=product(a.size for a in roles.query),
            kv_len=product(a.size for a in roles.key),
            batch=batch,
            heads=heads,
        )

    def _each(self, prefix: str, atoms: list[Atom]) -> dict[sympy.Symbol, sympy.Expr]:
        sizes = {}
        for i, atom in enumerate(atoms):
            symbol = prover.index_symbol(f"{prefix}{i}" if len(atoms) > 1 else prefix)
            self._of[atom] = symbol
            sizes[symbol] = atom.size
        return sizes

    def _spread(self, symbol: sympy.Symbol, atoms: list[Atom]) -> None:
        """One symbol for a whole axis; its atoms are quotients and remainders of it."""
        if len(atoms) == 1:
            self._of[atoms[0]] = symbol
            return
        rest: sympy.Expr = symbol
        for atom in reversed(atoms):
            is_first = atom is atoms[0]
            self._of[atom] = rest if is_first else modulo(rest, atom.size)
            rest = FloorDiv(rest, atom.size)

    def prove(self, how: Callable[..., Any], value: Value, index: list[sympy.Expr], **kwargs: Any) -> Any:
        """`how(value, index, context, **kwargs)`, one of the functions of `recognize.mask`."""
        if self._live.proofs.first(value) is not value:  # else the proof's own questions are enough
            value = self._live.first_alike(value)
        key = (how, value.id, tuple(index), *kwargs.values())
        return self.once(key, lambda: how(value, index, self.context, **kwargs))

    def once(self, key: Hashable, prove: Callable[[], T]) -> T:
        """What was proved under `key` with the same symbols and sizes."""
        context = self.context
        sizes = (context.q_len, context.kv_len, *context.batch.items(), *context.heads.items())
        return self._live.proofs.once((key, sizes), prove)

    def are_equal(self, left: Value, right: Value) -> bool:
        """True if two values are computed alike from the same values."""
        return self._live.are_alike(left, right)

    def index(self, dims: list[Dim], shape: tuple, value: Value) -> list[sympy.Expr]:
        """Index of `value`, broadcast against a tensor with axes `dims` (aligned right)."""
        offset = len(dims) - value.ndim
        return [sympy.Integer(0) if is_one(s) else self.of(dims[offset + i]) for i, s in enumerate(value.shape)]

    def of(self, dim: Dim) -> sympy.Expr:
        """Row-major index of a dimension."""
        total: sympy.Expr = sympy.Integer(0)
        for atom in resolve(dim):
            if atom not in self._of:
                raise Refusal("axis_left_over", "a mask varies along an axis that is no axis of the scores")
            total = total * atom.size + self._of[atom]
        return total
