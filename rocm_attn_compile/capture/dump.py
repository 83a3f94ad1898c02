"""A trace as text, for debugging and golden tests."""

from __future__ import annotations

from typing import Any

import torch

from rocm_attn_compile.capture.trace import Trace, Value

_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.bool: "b8",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def dump(trace: Trace) -> str:
    """One line per value: `%3 = aten.mul.Tensor(%1, 0.5) : f32[2, 4]  # scores`.

    After the `#` stands the Dynamo node during which the value was made; `no_grad` marks values made in that mode.
    Nodes that were not executed follow, then the traces of nested regions.
    """
    lines = [_line(value) for value in trace.values]
    lines += [f"not executed: {node.name}: {code}: {text}" for node, code, text in trace.not_executed]
    for attribute, subtrace in trace.subtraces.items():
        lines.append(f"region {attribute}:")
        lines += [f"  {line}" for line in dump(subtrace).splitlines()]
    return "\n".join(lines)


def _line(value: Value) -> str:
    parts = [_words(argument) for argument in value.args]
    parts += [f"{name}={_words(argument)}" for name, argument in value.kwargs.items()]
    index = "" if value.output_index is None else f"[{value.output_index}]"
    op = value.op if isinstance(value.op, str) else str(value.op)
    shape = ", ".join(str(size) for size in value.shape)
    dtype = _SHORT.get(value.dtype, str(value.dtype).removeprefix("torch."))
    node = value.node.name if value.node is not None else "-"
    mode = "" if value.grad_mode else ", no_grad"
    return f"%{value.id} = {op}({', '.join(parts)}){index} : {dtype}[{shape}]  # {node}{mode}"


def _words(argument: Any) -> str:
    if isinstance(argument, Value):
        return f"%{argument.id}"
    if isinstance(argument, (list, tuple)):
        return "[" + ", ".join(_words(item) for item in argument) + "]"
    if isinstance(argument, dict):
        return "{" + ", ".join(f"{name}: {_words(item)}" for name, item in argument.items()) + "}"
    return str(argument)
