"""Launches a kernel that was launched before with arguments of the same kinds, in a part of Triton's time.

Triton's launcher asks every argument for its type and alignment, makes a text of the answers, and looks that up; with
60 arguments that takes the host 100 us and more. Inductor has a launcher of its own, but not for kernels in Gluon, so
that calls that run these are opaque. Here numbers are looked up as they are, and tensors by dtype and alignment, which
is all that Triton's answers depend on for NVIDIA's GPUs. For AMD's they depend on a tensor's bytes, too, and there is
nothing in Gluon: launches go Triton's own way. The compiled kernel is called as `compiled[grid](...)`, which Triton
offers to those who keep what `kernel.warmup` returns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import JITFunction
from triton.compiler import CompiledKernel

MOST = 4096
"""Calls that are remembered; then all are forgotten."""


def takes(kernel: Any) -> bool:
    """Whether `launch` may launch it: for an NVIDIA GPU, and not interpreted."""
    return torch.version.cuda is not None and isinstance(kernel, JITFunction)


class _Form(NamedTuple):
    """Of arguments with certain names and types: in the kernel's order, the numbers, and where the others are."""

    number: int
    in_order: Callable[[dict[str, Any]], tuple]
    numbers: Callable[[dict[str, Any]], tuple]
    tensors: tuple[str, ...]
    descriptors: tuple[tuple[int, str], ...]


class _Known(NamedTuple):
    """A compiled kernel, and its descriptors without a tensor."""

    compiled: CompiledKernel
    descriptors: tuple[Any, ...]


_form_numbers = itertools.count()
_forms: dict[tuple, _Form] = {}
_known: dict[tuple, _Known] = {}


def launch(kernel: Any, grid: int, arguments: dict[str, Any], options: dict[str, int], encode: Callable) -> None:
    """`kernel[(grid,)](**arguments, **options)` on the current stream of the current device.

    Args:
        kernel: One that it `takes`.
        arguments: All of the kernel's; tensors, numbers, None, and `launch.Descriptor`s.
        encode: From such a descriptor to Triton's.
    """
    kinds = (kernel, *arguments, *map(type, arguments.values()))
    form = _forms.get(kinds)
    if form is None:
        form = _forms[kinds] = _form(kernel, arguments)
    described = [arguments[name] for _, name in form.descriptors]
    key = (
        form.number,
        torch.cuda.current_device(),
        form.numbers(arguments),
        tuple([kind_of(arguments[name]) for name in form.tensors]),
        tuple([(x.shape, x.strides, x.block_shape, x.swizzle, kind_of(x.base)) for x in described]),
        tuple(options.items()),
    )
    known = _known.get(key)
    if known is None:
        encoded = {name: encode(x) for (_, name), x in zip(form.descriptors, described)}
        compiled = kernel[(grid,)](**{**arguments, **encoded}, **options)
        if isinstance(compiled, CompiledKernel):
            _remember(key, _Known(compiled, tuple([_with_tensor(x, None) for x in encoded.values()])))
        return
    values = list(form.in_order(arguments))
    for (place, _), x, descriptor in zip(form.descriptors, described, known.descriptors):
        values[place] = _with_tensor(descriptor, x.base)
    known.compiled[(grid, 1, 1)](*values)


def kind_of(tensor: Tensor) -> tuple[torch.dtype, bool]:
    """What a compiled kernel depends on of a tensor."""
    return tensor.dtype, tensor.data_ptr() % 16 == 0


def _form(kernel: Any, arguments: dict[str, Any]) -> _Form:
    names = [parameter.name for parameter in kernel.params]
    tensors = tuple(name for name, value in arguments.items() if isinstance(value, Tensor))
    descriptors = tuple((place, name) for place, name in enumerate(names) if hasattr(arguments[name], "swizzle"))
    others = {*tensors, *(name for _, name in descriptors)}
    numbers = itemgetter(*(name for name in names if name not in others))
    # Not len(_forms): backward runs in a thread of its own, and two forms must not have the same number.
    return _Form(next(_form_numbers), itemgetter(*names), numbers, tensors, descriptors)


def _remember(key: tuple, known: _Known) -> None:
    if len(_known) >= MOST:
        _known.clear()
    _known[key] = known


def _with_tensor(descriptor: Any, tensor: Tensor | None) -> Any:
    # As copy.copy, which takes five times as long.
    twin = object.__new__(type(descriptor))
    twin.__dict__.update(descriptor.__dict__, base=tensor)
    return twin
