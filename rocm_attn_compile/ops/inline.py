"""What a compiler sees of the op: its parts, where they can be written down before any value is known.

AOTAutograd traces the rewritten graph. Where the op's `impl` asks for it, the op is not recorded as one opaque call but
as what it does on that device: on the CPU ATen's fused attention and the few operations around it, which Inductor then
schedules, fuses and calls by itself. That saves the way through Python, which costs more than a small attention.

What depends on values, on sizes that are not numbers, or on code that has to see its tensors, stays an opaque call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rocm_attn_compile import _torch_private
from rocm_attn_compile.ops import cpu_inline, gpu_inline, returned_weights
from rocm_attn_compile.ops.checks import EMPTY_ROWS
from rocm_attn_compile.ops.dispatch import DEFAULT, REFERENCE
from rocm_attn_compile.ops.impl import parse
from rocm_attn_compile.ops.kv_cache import CACHE_TENSORS
from rocm_attn_compile.ops.schemas import (
    LIBRARY,
    OPTIONAL_TENSORS,
    attention,
    attention_backward,
    named_arguments,
)

Rule = Callable[[str, str, dict[str, Any]], Callable[[], Any] | None]
"""From the backend's name, what tuning chose and the op's arguments by name to what is traced, or None."""


def _body(rules: dict[str, Rule], op: Any, args: tuple, kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """What to trace instead of a call of the op, or None."""
    arguments = named_arguments(op, args, kwargs)
    impl = parse(arguments.pop("impl"))
    name = impl.backend or DEFAULT
    rule = rules.get(arguments["q"].device.type)
    if rule is None or not impl.inline or name == REFERENCE or not _is_static(arguments):
        return None
    return rule(name, impl.tuned, arguments)


def _is_static(arguments: dict[str, Any]) -> bool:
    """Every size is a number and none is 0; what is wrong with the arguments is left to the op to say."""
    names = ("q", "k", "v", *OPTIONAL_TENSORS, *CACHE_TENSORS)
    tensors: list[Tensor] = [t for name in names if (t := arguments.get(name)) is not None]
    numbers = [arguments["band_lower"], arguments["band_upper"]]
    numbers += [number for t in tensors for number in (*t.shape, *t.stride())]
    return (
        all(number is None or isinstance(number, int) for number in numbers)
        and all(t.numel() != 0 for t in tensors)
        and arguments["empty_rows"] in EMPTY_ROWS
    )


def _register(op: Any, rules: dict[str, Rule]) -> None:
    _torch_private.register_trace_rule(LIBRARY, op, lambda args, kwargs: _body(rules, op, args, kwargs))


_register(attention, {"cpu": cpu_inline.forward, "cuda": gpu_inline.forward})
_register(returned_weights.attention_with_weights, dict.fromkeys(("cpu", "cuda"), returned_weights.traced))
_register(attention_backward, {"cpu": cpu_inline.backward, "cuda": gpu_inline.backward})
