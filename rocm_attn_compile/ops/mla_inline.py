"""What a compiler sees of the op `mla`: its products with the weights and the op of the cheaper form.

As inline.py does it for attention: where the op's `impl` asks for it and every size is a number, the form is chosen
while AOTAutograd traces the graph, and Inductor schedules the products. Otherwise it is one opaque call, which chooses
when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from rocm_attn_compile import _torch_private
from rocm_attn_compile.ops.impl import MARK
from rocm_attn_compile.ops.mla_dispatch import cheaper_form
from rocm_attn_compile.ops.mla_schemas import mla, mla_decode, mla_prefill
from rocm_attn_compile.ops.schemas import LIBRARY, named_arguments

_NUM_TENSORS = 10


def _body(args: tuple, kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """What to trace instead of a call of `mla`, or None."""
    arguments = named_arguments(mla, args, kwargs)
    if not arguments["impl"].endswith(MARK):
        return None
    values = list(arguments.values())
    tensors, settings = tuple(values[:_NUM_TENSORS]), dict(list(arguments.items())[_NUM_TENSORS:])
    numbers = [settings["band_lower"], settings["band_upper"]]
    numbers += [number for t in tensors if isinstance(t, Tensor) for number in (*t.shape, *t.stride())]
    if not all(number is None or isinstance(number, int) for number in numbers):
        return None
    return partial(cheaper_form, mla_prefill, mla_decode, tensors, settings)


_torch_private.register_trace_rule(LIBRARY, mla, _body)
