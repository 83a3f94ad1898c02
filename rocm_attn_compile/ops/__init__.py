"""The canonical op `torch.ops.rocm_attn.attention`, its backward, and everything registered for them.

Importing this registers the ops once, needs torch only, and imports no kernel: see dispatch.py.
"""

from rocm_attn_compile.ops import autocast, autograd, dispatch, dropout, inline, vmap
from rocm_attn_compile.ops.dispatch import Implementation, implementation
from rocm_attn_compile.ops.schemas import attention, attention_backward

__all__ = ["Implementation", "attention", "attention_backward", "implementation", "register"]

_PARTS = (autocast, autograd, dispatch, dropout, inline, vmap)


def register() -> None:
    """Make sure that the ops are registered. They are, by the import of this module; more calls do nothing."""
    assert all(part is not None for part in _PARTS)
