"""The canonical op `torch.ops.rocm_attn.attention`, that of clamped scores (floored.py), that which gives the weights,
too (returned_weights.py), those of latent attention (mla_schemas.py), that of tables of biases (bias_table.py), and all
that belongs to them: backward, fakes, vmap, autocast.

Importing this registers the ops once, needs torch only, and imports no kernel: see dispatch.py.
"""

from rocm_attn_compile.ops import (
    autocast,
    autograd,
    dispatch,
    dropout,
    floored,
    inline,
    mla_autograd,
    mla_inline,
    returned_weights,
    vmap,
)
from rocm_attn_compile.ops.bias_table import lookup
from rocm_attn_compile.ops.dispatch import Implementation, implementation
from rocm_attn_compile.ops.floored import attention_floored, attention_floored_backward
from rocm_attn_compile.ops.mla_schemas import mla, mla_decode, mla_prefill, mla_prefill_backward
from rocm_attn_compile.ops.returned_weights import attention_with_weights
from rocm_attn_compile.ops.schemas import attention, attention_backward

__all__ = [
    "Implementation",
    "attention",
    "attention_backward",
    "attention_floored",
    "attention_floored_backward",
    "attention_with_weights",
    "implementation",
    "lookup",
    "mla",
    "mla_decode",
    "mla_prefill",
    "mla_prefill_backward",
    "register",
]

_PARTS = (autocast, autograd, dispatch, dropout, floored, inline, mla_autograd, mla_inline, returned_weights, vmap)


def register() -> None:
    """Make sure that the ops are registered. They are, by the import of this module; more calls do nothing."""
    assert all(part is not None for part in _PARTS)
