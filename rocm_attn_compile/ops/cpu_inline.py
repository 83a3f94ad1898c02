"""When the op on CPU tensors can be written out in a trace: `ops/cpu.py` without its looks at values.

The code that is traced is that of cpu.py and cpu_backward.py itself; there, what only spares work for some values is
skipped for traced tensors. Here is decided whether that code comes out right without those looks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from rocm_attn_compile import _torch_private
from rocm_attn_compile.ops import cpu, cpu_backward
from rocm_attn_compile.ops.schemas import EMPTY_ROWS, OPTIONAL_TENSORS


def forward(arguments: dict[str, Any]) -> Callable[[], Any] | None:
    """The forward to trace with the op's arguments by name, or None if the call must stay opaque."""
    if not _can_be_traced(arguments):
        return None
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    is_decode = q.shape[2] == 1
    skips_blocks = arguments["band_upper"] == 0 and not is_decode
    is_fused = cpu.takes_fused(q, k, v, arguments["logits_soft_cap"], arguments["dropout_p"], skips_blocks)
    if _has_groups(q, k) and (is_fused or is_decode):
        return None
    return partial(cpu.forward, **arguments)


def backward(arguments: dict[str, Any]) -> Callable[[], Any] | None:
    """The same for the backward. Its fused kernel reads lse, and whether that is exact depends on values:

    * a bias of finfo.min leaves an lse that has lost log N;
    * an empty row whose fill was added has gradients that only the unfused code computes.
    """
    if not _can_be_traced(arguments):
        return None
    q, k, v, attn_bias = (arguments[name] for name in ("q", "k", "v", "attn_bias"))
    wants_dbias = attn_bias is not None and arguments["output_mask"][3]
    if not wants_dbias and cpu.takes_fused(q, k, v, arguments["logits_soft_cap"], arguments["dropout_p"], False):
        fill_was_added = arguments["empty_rows"] == "mean_added" and arguments["sinks"] is None
        if attn_bias is not None or fill_was_added or _has_groups(q, k):
            return None
    return partial(cpu_backward.backward, **arguments)


def _has_groups(q: Tensor, k: Tensor) -> bool:
    """Heads share k and v, by a stride of 0: Inductor would write them out for the fused kernel, or a decode step."""
    return q.shape[1] != k.shape[1]


def _can_be_traced(arguments: dict[str, Any]) -> bool:
    """Every size is a number and none is 0; what is wrong with the arguments is left to the op to say.

    Nor inside a checkpointed region: ATen's kernel counts as random, since it has an argument for dropout, and what is
    random is not computed again there.
    """
    tensors: list[Tensor] = [t for name in ("q", "k", "v", *OPTIONAL_TENSORS) if (t := arguments[name]) is not None]
    numbers = [arguments["band_lower"], arguments["band_upper"], *(size for t in tensors for size in t.shape)]
    numbers += [stride for t in tensors for stride in t.stride()]
    return (
        all(number is None or isinstance(number, int) for number in numbers)
        and all(t.numel() != 0 for t in tensors)
        and arguments["empty_rows"] in EMPTY_ROWS
        and not _torch_private.is_recomputed()
    )
