"""The backends: seven declarations in one ordered tuple, the documented rules, and the choice for a site.

Order: the documented priority for general attention, then MLA. Tables and reports follow it.
"""

from . import aiter_fa, aiter_mla, aiter_unified, flex, rocm_attn, triton_attn, triton_mla
from .base import AttentionBackend

BACKENDS: tuple[AttentionBackend, ...] = (
    aiter_unified.BACKEND,
    aiter_fa.BACKEND,
    rocm_attn.BACKEND,
    triton_attn.BACKEND,
    flex.BACKEND,
    aiter_mla.BACKEND,
    triton_mla.BACKEND,
)

EXTRA_BACKENDS: tuple[AttentionBackend, ...] = (aiter_mla.TRITON_PREFILL,)
"""Names the rules accept when they are given explicitly, which nothing chooses by itself."""

_BY_NAME = {backend.name: backend for backend in BACKENDS + EXTRA_BACKENDS}


def by_name(name: str) -> AttentionBackend:
    """The declaration of that exact name."""
    return _BY_NAME[name]
