"""Which implementation runs a call: the device decides, and on GPUs the op's `impl` argument.

Kernel modules are imported on their first use on that device, never before.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from rocm_attn_compile import _torch_private
from rocm_attn_compile.ops import cpu, cpu_backward, reference_impl
from rocm_attn_compile.ops.impl import parse
from rocm_attn_compile.ops.kv_cache import CACHE_TENSORS, resolved
from rocm_attn_compile.ops.schemas import LIBRARY, NUM_TENSORS

DEFAULT = "TRITON_ATTN"
REFERENCE = "REFERENCE"
KERNEL_MODULES = {"TRITON_ATTN": "rocm_attn_compile.kernels.triton.attention"}
"""Backend name -> module with `attention_forward` and `attention_backward`, which take the op's arguments but impl,
`opaque=True`, and as `tuned` what tuning chose."""


class Implementation(NamedTuple):
    """One way to compute the op. `forward` and `backward` take the op's arguments without `impl`."""

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


_found: dict[str, dict[str, Implementation]] = {"cpu": {}, "cuda": {}}


def implementation(impl: str, device_type: str) -> Implementation:
    """The implementation for an op's `impl` argument, see impl.py; "" is the default.

    On the CPU every backend name means ATen's fused attention; only "REFERENCE" differs.

    Args:
        impl: The backend's name selects; what tuning chose goes to its kernels.
        device_type: "cpu", or "cuda" (also for ROCm).

    Raises:
        ValueError: For a backend without a kernel; lists those that have one.
    """
    found = _found[device_type].get(impl)
    if found is None:
        found = _found[device_type][impl] = _find(*parse(impl)[:2], device_type)
    return found


def known_name(name: str, default: str, modules: dict[str, str]) -> str:
    """The backend that `name` means, one of `modules` or REFERENCE; raises ValueError for any other."""
    name = name or default
    if name != REFERENCE and name not in modules:
        allowed = ", ".join([*modules, REFERENCE])
        raise ValueError(f'impl names the backend {name!r}; allowed are {allowed}, or "" for {default}')
    return name


def _find(name: str, tuned: str, device_type: str) -> Implementation:
    name = known_name(name, DEFAULT, KERNEL_MODULES)
    if name == REFERENCE:
        return Implementation(name, reference_impl.forward, reference_impl.backward)
    if device_type == "cpu":
        return Implementation("CPU", cpu.forward, cpu_backward.backward)
    module = importlib.import_module(KERNEL_MODULES[name])
    more = {"tuned": tuned, "opaque": True}
    return Implementation(name, partial(module.attention_forward, **more), partial(module.attention_backward, **more))


def run_cpu(tensors: tuple, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """CPU kernel of the op `attention`; takes its positional and keyword arguments packed, to unpack them just once."""
    impl = settings.pop("impl", "")
    if len(tensors) > NUM_TENSORS:
        with _torch_private.below_autograd_and_views():
            tensors = resolved(tensors, NUM_TENSORS)
    return implementation(impl, "cpu").forward(*tensors, **settings)


def run_gpu(tensors: tuple, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """CUDA and ROCm kernel of the op `attention`."""
    impl = settings.pop("impl", "")
    # A view made by the kernel's host code must not be tracked as one: see cpu.forward.
    with _torch_private.below_autograd_and_views():
        found = implementation(impl, "cuda")
        if found.name == REFERENCE:
            tensors = resolved(tensors, NUM_TENSORS)
        # By name: a kernel's launcher may order its arguments as it likes.
        cache = dict(zip(CACHE_TENSORS, tensors[NUM_TENSORS:]))
        return found.forward(*tensors[:NUM_TENSORS], **cache, **settings)


def run_backward_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """CPU kernel of the op `attention_backward`."""
    *rest, impl, output_mask = args
    return implementation(impl, "cpu").backward(*rest, output_mask)


_TENSORS = ("grad_out", "q", "k", "v", "attn_bias", "attn_mask", "key_mask", "kv_start", "kv_end", "q_ids", "kv_ids")
_BACKWARD_NAMES = (
    *_TENSORS, "sinks", "dropout_seed", "alibi_slopes", "out", "lse", "softmax_scale", "logits_soft_cap", "band_lower",
    "band_upper", "dropout_p", "empty_rows",
)  # fmt: skip


def run_backward_gpu(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """CUDA and ROCm kernel of the op `attention_backward`."""
    *rest, impl, output_mask = args
    with _torch_private.below_autograd_and_views():
        # By name: a kernel's launcher may order its arguments as it likes.
        named = dict(zip(_BACKWARD_NAMES, rest))
        return implementation(impl, "cuda").backward(**named, output_mask=output_mask)


LIBRARY.impl("attention", lambda *tensors, **settings: run_cpu(tensors, settings), "CPU")
LIBRARY.impl("attention", lambda *tensors, **settings: run_gpu(tensors, settings), "CUDA")
LIBRARY.impl("attention_backward", run_backward_cpu, "CPU")
LIBRARY.impl("attention_backward", run_backward_gpu, "CUDA")
