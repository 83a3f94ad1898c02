"""Launch a kernel that has been compiled before without Triton's own way to it.

`kernel[grid](...)` looks at each argument anew to find the compiled kernel: 50 to 80 us of the host for the forty
arguments of ours, of which the launch itself takes 10. Here the compiled kernel is remembered for each kind of call.
What tells two kinds apart is at least what Triton tells apart: tests/kernels/test_launcher.py asks Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton

KNOWN = ("3.6.", "3.7.")
"""Versions of Triton whose kinds are known; others go their own way."""

_IS_HIP = torch.version.hip is not None
_MAX_INT32 = 2**31 - 1

_compiled: dict[tuple, Any] = {}


def run(
    kernel: Any,
    grid: int,
    arguments: Mapping[str, Any],
    options: Mapping[str, Any],
    kind_of: Callable[[Any], Any],
    encode: Callable[[Any], Any],
) -> None:
    """`kernel[(grid,)](**arguments, **options)` on the current stream of the current device.

    Args:
        kernel: A `triton.jit` function; that of the interpreter is called as it is.
        arguments: By name.
        options: Of the compiler.
        kind_of: For an argument that is no tensor and no number: all that a compiled kernel may depend on.
        encode: From an argument to what Triton takes.
    """
    if not isinstance(kernel, triton.JITFunction) or not triton.__version__.startswith(KNOWN):
        kernel[(grid,)](**{name: encode(value) for name, value in arguments.items()}, **options)
        return
    values, key = call_of(kernel, arguments, options, kind_of)
    key = (torch.cuda.current_device(), *key)
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[(grid,)](**{name: encode(value) for name, value in arguments.items()}, **options)
    else:
        compiled[(grid, 1, 1)](*map(encode, values))


def call_of(
    kernel: Any, arguments: Mapping[str, Any], options: Mapping[str, Any], kind_of: Callable[[Any], Any]
) -> tuple[list, tuple]:
    """The values of the kernel's parameters in order, and the kind of the call."""
    parameters = _parameters.get(id(kernel)) or _parameters_of(kernel)
    values = [arguments.get(name, default) for name, _, default in parameters]
    kinds = tuple(
        value if is_constant else _kind(value, kind_of) for value, (_, is_constant, _) in zip(values, parameters)
    )
    # Types, since True and 1 are equal. Kernels live as long as the program; to hash one takes long.
    return values, (id(kernel), tuple(options.items()), tuple(map(type, values)), kinds)


_parameters: dict[int, list[tuple[str, bool, Any]]] = {}


def _parameters_of(kernel: Any) -> list[tuple[str, bool, Any]]:
    """Name, whether it is a constant of the compiler, and default of each; remembered."""
    found = [(p.name, p.is_constexpr, p.default if p.has_default else None) for p in kernel.params]
    _parameters[id(kernel)] = found
    return found


def _kind(value: Any, kind_of: Callable[[Any], Any]) -> Any:
    """What a compiled kernel may depend on, of an argument of the given type."""
    if isinstance(value, torch.Tensor):
        is_short = _IS_HIP and value.untyped_storage().nbytes() <= _MAX_INT32
        return value.dtype, value.data_ptr() % 16 == 0, is_short
    if type(value) is int:
        return value == 1, value % 16 == 0, -_MAX_INT32 <= value <= _MAX_INT32
    if value is None or type(value) in (bool, float):
        return None
    return kind_of(value)
