"""What a compiler sees of the op: its parts, where they can be written down before any value is known.

AOTAutograd traces the rewritten graph. Where the op's `impl` asks for it, the op is not recorded as one opaque call but
as what it does on that device: on the CPU ATen's fused attention and the few operations around it, which Inductor then
schedules, fuses and calls by itself. That saves the way through Python, which costs more than a small attention.

What depends on values, on sizes that are not numbers, or on code that has to see its tensors, stays an opaque call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rocm_attn_compile import _torch_private
from rocm_attn_compile.ops import cpu_inline
from rocm_attn_compile.ops.schemas import LIBRARY, attention, attention_backward, named_arguments

MARK = "+inline"
"""What an `impl` argument ends with if the op is to be written out while a graph is traced."""

Rule = Callable[[dict[str, Any]], Callable[[], Any] | None]


def _body(find: dict[str, Rule], op: Any, args: tuple, kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """What to trace instead of a call of the op, or None."""
    named = named_arguments(op, args, kwargs)
    impl = named.pop("impl")
    if not impl.endswith(MARK) or impl.startswith("REFERENCE"):
        return None
    rule = find.get(named["q"].device.type)
    return None if rule is None else rule(named)


def _register(op: Any, find: dict[str, Rule]) -> None:
    _torch_private.register_trace_rule(LIBRARY, op, lambda args, kwargs: _body(find, op, args, kwargs))


_register(attention, {"cpu": cpu_inline.forward})
_register(attention_backward, {"cpu": cpu_inline.backward})
