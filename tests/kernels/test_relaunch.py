"""Kernels that are launched again without Triton's look at their arguments (relaunch.py)."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend

from rocm_attn_compile.kernels.triton import aot_launches, launch, relaunch
from rocm_attn_compile.kernels.triton.launch import Descriptor


class Compiled(CompiledKernel):
    """Writes down what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, list[Any]]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *values: self.calls.append((grid, list(values)))


class Kernel:
    """Counts how often Triton's own way is taken, and compiles each time."""

    def __init__(self, *names: str) -> None:
        self.params = [SimpleNamespace(name=name) for name in names]
        self.compiled: list[Compiled] = []
        self.given: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        def run(**given: Any) -> Compiled:
            self.given.append(given)
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return run


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(relaunch, "takes", lambda kernel: isinstance(kernel, Kernel))
    for name in ("_forms", "_known"):
        monkeypatch.setattr(relaunch, name, {})


def described(tensor: torch.Tensor) -> Descriptor:
    return Descriptor(tensor, tuple(tensor.shape), tensor.stride(), (16, 64), 128)


def run(kernel: Kernel, grid: int = 3, **arguments: Any) -> None:
    launch.Launch(kernel, grid, arguments, {"num_warps": 4}).run()


def test_same_kinds_go_to_the_compiled_kernel_with_this_calls_arguments() -> None:
    kernel = Kernel("x", "count", "scale", "absent", "boxes", "FLAG")
    storage = torch.zeros(64, 64, dtype=torch.bfloat16)
    given = {"FLAG": True, "x": torch.ones(4), "count": 7, "scale": 0.5, "absent": None, "boxes": described(storage)}
    run(kernel, **given)
    assert len(kernel.given) == 1 and kernel.given[0]["num_warps"] == 4
    first = kernel.given[0]["boxes"]
    assert first.base is storage and first.block_shape == [16, 64]
    others = {"x": torch.zeros(9), "boxes": described(torch.ones(64, 64, dtype=torch.bfloat16))}
    run(kernel, grid=5, **{**given, **others})
    assert len(kernel.given) == 1
    ((grid, values),) = kernel.compiled[0].calls
    assert grid == (5, 1, 1)
    x, count, scale, absent, boxes, flag = values
    assert x is others["x"] and (count, scale, absent, flag) == (7, 0.5, None, True)
    assert boxes.base is others["boxes"].base and (boxes.shape, boxes.strides) == (first.shape, first.strides)
    assert boxes.layout == first.layout
    kept = [descriptor.base for known in relaunch._known.values() for descriptor in known.descriptors]
    assert kept == [None], "tensors would be kept alive"


CHANGES: dict[str, Any] = {
    "another number": {"count": 8},
    "a number of another type": {"FLAG": 1},
    "a fraction for a number": {"count": 7.0},
    "another dtype": {"x": torch.ones(4, dtype=torch.float64)},
    "an address that is not aligned": {"x": torch.ones(5)[1:]},
    "a tensor that was absent": {"absent": torch.ones(4)},
    "another shape of a descriptor": {"boxes": described(torch.zeros(32, 64, dtype=torch.bfloat16))},
    "other strides": {"boxes": described(torch.zeros(64, 128, dtype=torch.bfloat16)[:, :64])},
    "another dtype of a descriptor": {"boxes": described(torch.zeros(64, 64, dtype=torch.float16))},
    "another block": {"boxes": replace(described(torch.zeros(64, 64, dtype=torch.bfloat16)), block_shape=(32, 64))},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_kinds_go_through_triton(change: str) -> None:
    kernel = Kernel("x", "count", "absent", "boxes", "FLAG")
    boxes = described(torch.zeros(64, 64, dtype=torch.bfloat16))
    given: dict[str, Any] = {"x": torch.ones(4), "count": 7, "absent": None, "boxes": boxes, "FLAG": True}
    for arguments in (given, {**given, **CHANGES[change]}):
        for _ in range(2):
            run(kernel, **arguments)
    assert len(kernel.given) == 2
    assert [len(compiled.calls) for compiled in kernel.compiled] == [1, 1]


def test_other_devices_and_options_go_through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel("x", "count", "more")
    arguments = {"x": torch.ones(4), "count": 7, "more": 1}
    run(kernel, **arguments)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    run(kernel, **arguments)
    launch.Launch(kernel, 3, arguments, {"num_warps": 8}).run()
    assert len(kernel.given) == 3
    run(kernel, **arguments)
    assert len(kernel.given) == 3


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaunch, "MOST", 4)
    kernel = Kernel("x", "count", "more")
    for count in range(10):
        run(kernel, x=torch.ones(4), count=count, more=1)
        assert len(relaunch._known) <= 4


def test_triton_asks_tensors_for_no_more() -> None:
    """A kind (relaunch.kind_of) has one answer of Triton's, whatever else the tensors are, on NVIDIA's GPUs."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    big = torch.zeros(2**21, 1, dtype=torch.bfloat16).expand(2**21, 2**11)  # 8 GiB, told by its sizes alone
    tensors = [
        torch.zeros(8, dtype=dtype)[start:]
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64, torch.bool)
        for start in (0, 1, 4)
    ]
    tensors += [torch.zeros(3, 5, 7, dtype=torch.bfloat16).transpose(0, 2), big, torch.zeros(1, dtype=torch.bfloat16)]
    answers: dict[Any, set[Any]] = {}
    for tensor in tensors:
        answers.setdefault(relaunch.kind_of(tensor), set()).add(
            native_specialize_impl(backend, tensor, False, True, True)
        )
    assert all(len(found) == 1 for found in answers.values()), answers
    assert len({next(iter(found)) for found in answers.values()}) == len(answers), "and no two have the same"


def test_every_launch_can_be_launched_so() -> None:
    """All parameters are given, of the types that a form tells apart."""
    masks = {"key_mask": True, "q_ids": True, "kv_ids": True, "empty_rows": "mean"}
    found = aot_launches.launches("sm90", torch.bfloat16, 128, q_len=8192, kv_len=8192, **masks)
    found |= {f"{name}, short": one for name, one in aot_launches.launches("sm90", torch.bfloat16, 128).items()}
    assert len(found) > 8 and sum(launch.is_gluon(one.kernel) for one in found.values()) == 2
    for one in found.values():
        form = relaunch._form(one.kernel, one.arguments)
        assert len(form.in_order(one.arguments)) == len(one.kernel.params) == len(one.arguments)
        hash(form.numbers(one.arguments))
        names = {name for _, name in form.descriptors}
        assert names == {name for name, value in one.arguments.items() if isinstance(value, Descriptor)}


def test_not_on_amd_nor_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    kernels = [one.kernel for one in aot_launches.launches("sm90", torch.bfloat16, 128, backward=False).values()]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not any(map(relaunch.takes, kernels))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert all(map(relaunch.takes, kernels)) and not relaunch.takes(Kernel())
