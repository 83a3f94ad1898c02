"""Axis algebra: which loop index of the attention every dimension of every tensor runs over.

A dimension is an ordered product of *atoms* (row-major, most significant first); an atom is one loop index with a size.
Views split atoms and regroup them, an expand makes an atom its source lacks, a contraction or a broadcast declares two
dimensions to be the same. Roles (batch, head, query, key, head_dim) are then read off as sets of atoms, whatever layout
the model was written in, and a proof fails exactly where two dimensions cannot be aligned.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import sympy

from ..reasons import Refusal
from ..symbolic import Size, divide, is_one, to_expr

_ids = itertools.count()


class Atom:
    """One loop index. When it is split or merged with another, `parts` says what it became."""

    __slots__ = ("id", "parts", "size")

    def __init__(self, size: Size) -> None:
        self.id = next(_ids)
        self.size: sympy.Expr = to_expr(size)
        self.parts: tuple[Atom, ...] | None = None

    def __repr__(self) -> str:
        return f"a{self.id}<{self.size}>"


Dim = tuple[Atom, ...]
"""A dimension: the atoms it is the row-major product of; empty for a dimension of size 1."""


def resolve(dim: Iterable[Atom]) -> Dim:
    """The atoms of `dim` as they stand now, after every split and merge."""
    out: list[Atom] = []
    for atom in dim:
        if atom.parts is None:
            out.append(atom)
        else:
            out.extend(resolve(atom.parts))
    return tuple(out)


def atoms_of(dims: Iterable[Dim]) -> list[Atom]:
    """All atoms of a tensor's dimensions, in order."""
    return [atom for dim in dims for atom in resolve(dim)]


def fresh_dims(shape: Sequence[Size]) -> list[Dim]:
    """New dimensions for a tensor nothing is known of."""
    return [() if is_one(size) else (Atom(size),) for size in shape]


def split(atom: Atom, major: sympy.Expr) -> tuple[Atom, Atom]:
    """Split `atom` into an outer index of size `major` and the rest."""
    minor = divide(atom.size, major)
    if minor is None:
        raise Refusal("axis_split", f"an axis of size {atom.size} cannot be split into {major} parts")
    first, second = Atom(major), Atom(minor)
    atom.parts = (first, second)
    return first, second


def unify(left: Dim, right: Dim) -> None:
    """Declare that two dimensions run over the same indices; splits and merges atoms to make them equal."""
    a, b = list(resolve(left)), list(resolve(right))
    while a and b:
        x, y = a[0], b[0]
        if x is y:
            a.pop(0), b.pop(0)
        elif x.size == y.size:
            y.parts = (x,)
            a.pop(0), b.pop(0)
        elif divide(x.size, y.size) is not None:
            split(x, y.size)
        elif divide(y.size, x.size) is not None:
            split(y, x.size)
        else:
            raise Refusal("axis_mismatch", f"axes of sizes {x.size} and {y.size} cannot be aligned")
        a, b = list(resolve(a)), list(resolve(b))
    if a or b:
        sizes = [str(atom.size) for atom in (*a, *b)]
        raise Refusal("axis_mismatch", f"axes do not cover the same indices; left over: {' x '.join(sizes)}")


def regroup(dims: Sequence[Dim], shape: Sequence[Size]) -> list[Dim]:
    """The dimensions after a view to `shape`: same row-major order, other borders."""
    flat = atoms_of(dims)
    out: list[Dim] = []
    for size in shape:
        remaining, current = to_expr(size), []
        while remaining != 1:
            flat = list(resolve(flat))
            if not flat:
                raise Refusal("axis_view", f"a view to {tuple(shape)} cannot be followed: sizes do not divide")
            quotient = divide(remaining, flat[0].size)
            if quotient is not None:
                current.append(flat.pop(0))
                remaining = quotient
            else:
                split(flat[0], remaining)
        out.append(tuple(current))
    if list(resolve(flat)):
        raise Refusal("axis_view", f"a view to {tuple(shape)} cannot be followed: sizes do not divide")
    return out


def broadcast(ndim: int, operands: Iterable[tuple[Sequence[Dim], Sequence[Size]]]) -> list[Dim]:
    """Dimensions of a pointwise result; `operands` are (dims, shape), aligned to the right."""
    out: list[Dim] = [()] * ndim
    for dims, shape in operands:
        offset = ndim - len(dims)
        for i, (dim, size) in enumerate(zip(dims, shape)):
            if is_one(size):
                continue
            if not out[offset + i]:
                out[offset + i] = dim
            else:
                unify(out[offset + i], dim)
    return out


def check_distinct(dims: Iterable[Dim], what: str) -> None:
    """Refuse a tensor in which one loop index appears twice: it was merged with itself (for example S + S^T)."""
    atoms = atoms_of(dims)
    if len({id(atom) for atom in atoms}) != len(atoms):
        raise Refusal("axis_repeated", f"{what} uses one axis twice (for example a matrix added to its own transpose)")
