"""What a compiler sees of the ops of latent attention: their parts.

As inline.py does it for attention: where the op's `impl` asks for it, the form of `mla` is chosen while AOTAutograd
traces the graph, if it does not depend on sizes that are symbols, and Inductor schedules its products; and on a GPU it
launches the kernels of the other ops. Otherwise each is one opaque call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.fx.experimental.symbolic_shapes import statically_known_true

from rocm_attn_compile import _torch_private
from rocm_attn_compile.ops import gpu_inline
from rocm_attn_compile.ops.impl import parse
from rocm_attn_compile.ops.mla_dispatch import DEFAULT, absorbed_form, cheaper_form, is_absorbed_for_any_cache
from rocm_attn_compile.ops.mla_schemas import mla, mla_decode, mla_prefill, mla_prefill_backward
from rocm_attn_compile.ops.schemas import LIBRARY, are_never_empty, is_static, named_arguments, tensors_of

_NUM_TENSORS = 10


def _whole(args: tuple, kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """What to trace instead of a call of `mla`, or None."""
    arguments = named_arguments(mla, args, kwargs)
    if not parse(arguments["impl"]).inline:
        return None
    values = list(arguments.values())
    tensors, settings = tuple(values[:_NUM_TENSORS]), dict(list(arguments.items())[_NUM_TENSORS:])
    if is_static(arguments):
        return partial(cheaper_form, mla_prefill, mla_decode, tensors, settings)
    if is_absorbed_for_any_cache(tensors):
        return partial(absorbed_form, mla_decode, *tensors, **settings)
    return None


def _kernels(op: Any, args: tuple, kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """The same of the other ops: launches of their kernels on a GPU."""
    arguments = named_arguments(op, args, kwargs)
    impl = parse(arguments.pop("impl"))
    tensors = tensors_of(arguments)
    if not impl.inline or tensors[0].device.type != "cuda":
        return None
    caches = [arguments.get(name) for name in ("kv_c", "k_pe")]
    has_rows = all(cache is None or statically_known_true(cache.stride(-1) == 1) for cache in caches)
    if not has_rows or not are_never_empty(tensors):
        return None
    return gpu_inline.latent(impl.backend or DEFAULT, op._schema.name.partition("::")[2], arguments)


_torch_private.register_trace_rule(LIBRARY, mla, _whole)
for _op in (mla_decode, mla_prefill, mla_prefill_backward):
    _torch_private.register_trace_rule(LIBRARY, _op, partial(_kernels, _op))
