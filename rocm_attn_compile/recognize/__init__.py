"""Prove which parts of a captured program are attention. Sees no FX graph and no backend."""

from .again import Sites, counts
from .attention import recognize

__all__ = ["Sites", "counts", "recognize"]
