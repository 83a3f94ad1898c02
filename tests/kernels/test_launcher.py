"""Launching past Triton: two calls that we take for one kind are one kind for Triton, too; others are compiled."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from rocm_attn_compile.kernels.triton import aot_launches, launch, launcher
from rocm_attn_compile.kernels.triton.launch import Descriptor, base_of, descriptor

TARGETS = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}
INTEGERS = (1, 2, 16, 17, 48, 2**31 - 1, 2**31, 2**33, -1, -16)


def a_tensor(dtype: torch.dtype, offset: int = 0, nbytes: int = 1024) -> torch.Tensor:
    whole = torch.empty(nbytes // dtype.itemsize, dtype=dtype)
    assert whole.data_ptr() % 16 == 0
    return whole[offset:]


def launches_of(arch: str) -> list[launch.Launch]:
    found = aot_launches.launches(arch, torch.bfloat16, 64, q_len=1, kv_len=512, num_splits=2, backward=False)
    return list(found.values())


def on_the_cpu(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: a_tensor(v.dtype) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}


def variants(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Arguments with one of them changed."""
    found = [arguments, dict(arguments)]
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            others = [a_tensor(value.dtype), a_tensor(value.dtype, 1), a_tensor(torch.float64), None]
        elif type(value) is int:
            others = list(INTEGERS)
        elif type(value) is bool:
            others = [not value]
        elif isinstance(value, float):
            others = [value + 1, 1.0]
        else:
            others = [1.5, 7] if value is None else []
        found += [{**arguments, name: other} for other in others]
    return found


@pytest.mark.parametrize("kind", TARGETS)
def test_what_is_one_kind_is_one_for_triton(kind, monkeypatch):
    monkeypatch.setattr(launcher, "_IS_HIP", kind == "hip")
    backend = make_backend(TARGETS[kind])
    for one in launches_of("gfx942" if kind == "hip" else "sm90"):
        binder = create_function_from_signature(one.kernel.signature, one.kernel.params, backend)
        ours: dict[tuple, list] = {}
        cases = variants(on_the_cpu(one.arguments))
        for arguments in cases:
            _, key = launcher.call_of(one.kernel, arguments, one.options, launch._kind)
            ours.setdefault(key, []).append(str(binder(**arguments, **one.options)[1]))
        assert all(len(set(theirs)) == 1 for theirs in ours.values())
        assert len(ours) < 0.7 * len(cases)  # and not every call is a kind of its own


def test_descriptors_of_one_kind_are_one_for_triton():
    def described(dtype: torch.dtype, rows: int, columns: int, swizzle: int, length: int) -> Descriptor:
        tensor = torch.empty(1, 2, length, 256, dtype=dtype)
        plain = descriptor(tensor, rows, columns)
        return Descriptor(plain.base, plain.shape, plain.strides, plain.block_shape, swizzle)

    backend = make_backend(TARGETS["cuda"])
    dtypes = (torch.float16, torch.bfloat16)
    choices = itertools.product(dtypes, (64, 128), (64, 256), (0, 64, 128, launch.NO_SWIZZLE), (128, 256))
    kinds: dict[tuple, set[str]] = {}
    for choice in choices:
        one = described(*choice)
        theirs = str(triton.runtime.jit.native_specialize_impl(backend, launch._encode(one), False, True, True))
        kinds.setdefault(launch._kind(one), set()).add(theirs)
    assert all(len(theirs) == 1 for theirs in kinds.values())
    assert len(kinds) == 32 and len(set.union(*kinds.values())) > 16


class _Kernel:
    """Stands in for a JITFunction: says what was compiled, and with which arguments it is launched."""

    def __init__(self, kernel: Any) -> None:
        self.params, self.compiled, self.launched = kernel.params, 0, []

    def __getitem__(self, grid):
        def call(**arguments):
            self.compiled += 1
            self.launched.append((grid, arguments))
            return {(grid[0], 1, 1): lambda *values: self.launched.append((grid, values))}

        return call


def test_a_kernel_is_looked_up_once_for_each_kind(monkeypatch):
    one = launches_of("sm90")[-1]
    monkeypatch.setattr(launcher.triton, "JITFunction", _Kernel)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kernel, arguments = _Kernel(one.kernel), on_the_cpu(one.arguments)

    def run(**changes: Any) -> None:
        launcher.run(kernel, 7, {**arguments, **changes}, one.options, launch._kind, launch._encode)

    run()
    run()
    assert kernel.compiled == 1 and len(kernel.launched) == 2
    grid, values = kernel.launched[1]
    assert grid == (7,) and len(values) == len(kernel.params)
    for parameter, value in zip(kernel.params, values):
        assert value is arguments.get(parameter.name, parameter.default if parameter.has_default else None)
    run(out=a_tensor(torch.bfloat16, 1))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    run()
    assert kernel.compiled == 3


def test_an_unknown_triton_goes_its_own_way(monkeypatch):
    one = launches_of("sm90")[-1]
    monkeypatch.setattr(launcher.triton, "JITFunction", _Kernel)
    monkeypatch.setattr(launcher.triton, "__version__", "9.0.0")
    kernel = _Kernel(one.kernel)
    for _ in range(2):
        launcher.run(kernel, 7, on_the_cpu(one.arguments), one.options, launch._kind, launch._encode)
    assert kernel.compiled == 2
    assert all(base_of(value) is value for _, arguments in kernel.launched for value in arguments.values())
