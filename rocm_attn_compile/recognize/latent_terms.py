"""The scores of an attention as a sum of products over pieces of the head dimension.

    [q_nope | q_pe] [k_nope | k_pe]^T  =  q_nope k_nope^T + q_pe k_pe^T

The left side is one product over concatenated tensors, the right side two products that are added: both give the same
terms here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..reasons import Refusal
from .axes import Atom, Dim, atoms_of, resolve, unify
from .pieces import Piece, pieces_of
from .region import Operand, Region, Roles


class Frame:
    """Copies of a region's axes: what is unified or split here leaves the region's own as they are."""

    def __init__(self, roles: Roles) -> None:
        self._copies: dict[Atom, Atom] = {}
        self.roles = Roles(
            batch=self.axis(roles.batch),
            kv_heads=self.axis(roles.kv_heads),
            groups=self.axis(roles.groups),
            query=self.axis(roles.query),
            key=self.axis(roles.key),
            depth=self.axis(roles.depth),
            value_depth=self.axis(roles.value_depth),
        )

    def axis(self, atoms: Iterable[Atom]) -> list[Atom]:
        """Copies of atoms, in order; the same copy for the same atom."""
        return [self._copies.setdefault(atom, Atom(atom.size)) for atom in resolve(atoms)]

    def dims(self, dims: Iterable[Dim]) -> list[Dim]:
        """The axes of a tensor in copies."""
        return [tuple(self.axis(dim)) for dim in dims]


@dataclass(eq=False)
class Term:
    """One product of the sum: a piece of k, what q has at the same place, and a number on q (or 1)."""

    q: Piece
    k: Piece
    factor: Any = 1

    def rope_operands(self) -> tuple[Operand, Operand, list[Atom]]:
        """q_pe, k_pe and their axis, for a piece that all heads share."""
        k, axis = self.k.operand()
        q, own = self.q.operand()
        unify(axis, own)
        q.factor = self.factor
        return q, k, list(axis)

    def varies_with(self, atoms: Iterable[Atom]) -> bool:
        """True if this piece of k has one of the axes in memory."""
        wanted = set(resolve(atoms))
        return bool(wanted & set(atoms_of(self.k.operand()[0].dims)))


class Attempt:
    """One try to see latent attention in a region.

    Attributes:
        frame: Copies of the region's axes.
        products: One term for each product of q and k.
        terms: The same, or those of the pieces that k is put together from: see `terms_of`.
        is_near: So much of the structure is there that a refusal is worth a note in the report.
    """

    def __init__(self, region: Region) -> None:
        self.frame = Frame(region.roles)
        self.products = products_of(region, self.frame)
        self.terms = terms_of(self.products)
        self.is_near = False

    def settled(self, operand: Operand) -> Operand:
        """An operand of the region in the frame's axes."""
        return Operand(operand.value, self.frame.dims(operand.dims))


def products_of(region: Region, frame: Frame) -> list[Term]:
    """The products that are added to the scores; raises Refusal where the head dimension is no number."""
    found = []
    for q, k, depth in [(region.q, region.k, region.roles.depth), *region.second]:
        axis = tuple(frame.axis(depth))
        if not all(atom.size.is_Integer for atom in axis):
            raise Refusal("latent_symbolic", "the head dimension is a symbol")
        of_q, of_k = (Piece.whole(tensor.value, frame.dims(tensor.dims), axis) for tensor in (q, k))
        found.append(Term(of_q, of_k, q.factor))
    return found


def terms_of(products: list[Term]) -> list[Term]:
    """The terms by the pieces of k, where there is one product.

    Two are the terms already; a rotary embedding puts k_pe together from two halves, too.
    """
    if len(products) > 1:
        return products
    (whole,), start, found = products, 0, []
    for piece in pieces_of(whole.k.value, whole.k.dims, whole.k.channels):
        found.append(Term(whole.q.range(start, piece.length), piece, whole.factor))
        start += piece.length
    return found
