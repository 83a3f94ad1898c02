"""What a compiler sees of the op: its parts, where they can be written down before any value is known.

AOTAutograd traces the rewritten graph. Where the op's `impl` asks for it, the op is not recorded as one opaque call but
as what it does on that device: on the CPU ATen's fused attention and the few operations around it, which Inductor then
schedules, fuses and calls by itself. That saves the way through Python, which costs more than a small attention.

What depends on values, or on code that has to see its tensors, stays an opaque call; on the CPU also what depends on
sizes that are not numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rocm_attn_compile import _torch_private
from rocm_attn_compile.ops import cpu_inline, gpu_inline, returned_weights
from rocm_attn_compile.ops.checks import EMPTY_ROWS
from rocm_attn_compile.ops.dispatch import DEFAULT, REFERENCE
from rocm_attn_compile.ops.impl import parse
from rocm_attn_compile.ops.schemas import (
    LIBRARY,
    are_never_empty,
    attention,
    attention_backward,
    is_static,
    named_arguments,
    tensors_of,
)

Rule = Callable[[str, str, dict[str, Any]], Callable[[], Any] | None]
"""From the backend's name, what tuning chose and the op's arguments by name to what is traced, or None."""


def _body(rules: dict[str, Rule], op: Any, args: tuple, kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """What to trace instead of a call of the op, or None."""
    arguments = named_arguments(op, args, kwargs)
    impl = parse(arguments.pop("impl"))
    name = impl.backend or DEFAULT
    rule = rules.get(arguments["q"].device.type)
    if rule is None or not impl.inline or name == REFERENCE:
        return None
    # What is wrong with the arguments is left to the op to say.
    if arguments["empty_rows"] not in EMPTY_ROWS or not are_never_empty(tensors_of(arguments)):
        return None
    return rule(name, impl.tuned, arguments)


def _register(op: Any, rules: dict[str, Rule]) -> None:
    _torch_private.register_trace_rule(LIBRARY, op, lambda args, kwargs: _body(rules, op, args, kwargs))


def _of_numbers(rule: Rule) -> Rule:
    """The rule, for calls in which every size is a number."""
    return lambda name, tuned, arguments: rule(name, tuned, arguments) if is_static(arguments) else None


_register(attention, {"cpu": _of_numbers(cpu_inline.forward), "cuda": gpu_inline.forward})
_register(returned_weights.attention_with_weights, dict.fromkeys(("cpu", "cuda"), _of_numbers(returned_weights.traced)))
_register(attention_backward, {"cpu": _of_numbers(cpu_inline.backward), "cuda": gpu_inline.backward})
