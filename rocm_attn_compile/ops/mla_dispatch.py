"""Which code runs the ops of latent attention: the device decides, and on GPUs the op's `impl` argument.

Kernel modules are imported on their first use on that device, never before.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from rocm_attn_compile import _torch_private
from rocm_attn_compile.ops import dispatch, mla_compose
from rocm_attn_compile.ops.cpu import with_layout
from rocm_attn_compile.ops.mla_form import prefers_absorbed
from rocm_attn_compile.ops.mla_schemas import check_decode, check_prefill, check_prefill_backward, check_whole
from rocm_attn_compile.ops.schemas import LIBRARY, as_promised

DEFAULT = "TRITON_MLA"
REFERENCE = dispatch.REFERENCE
KERNEL_MODULES = {"TRITON_MLA": "rocm_attn_compile.kernels.triton.mla"}
"""Backend name -> module with `mla_prefill`, `mla_prefill_backward` and `mla_decode`, which take the ops' arguments
without impl: tensors in the schema's order, settings by name."""


class LatentImplementation(NamedTuple):
    """One way to compute the ops; each function takes its op's arguments without `impl`."""

    name: str
    prefill: Callable[..., tuple[Tensor, Tensor]]
    prefill_backward: Callable[..., tuple[Tensor | None, ...]]
    decode: Callable[..., tuple[Tensor, Tensor]]


_found: dict[str, dict[str, LatentImplementation]] = {"cpu": {}, "cuda": {}}


def implementation(impl: str, device_type: str) -> LatentImplementation:
    """The implementation for an op's `impl` argument, as `dispatch.implementation` finds it for attention.

    Raises:
        ValueError: For a backend without a kernel; lists those that have one.
    """
    found = _found[device_type].get(impl)
    if found is None:
        found = _found[device_type][impl] = _find(impl.split("@")[0], device_type)
    return found


def _find(name: str, device_type: str) -> LatentImplementation:
    name = dispatch.known_name(name, DEFAULT, KERNEL_MODULES)
    if name == REFERENCE or device_type == "cpu":
        plain = dispatch.implementation(REFERENCE if name == REFERENCE else "", device_type)
        parts: Any = mla_compose  # mypy cannot see through partial
        return LatentImplementation(
            plain.name,
            partial(parts.prefill, plain.forward),
            partial(parts.prefill_backward, plain.backward),
            partial(parts.decode, plain.forward),
        )
    module = importlib.import_module(KERNEL_MODULES[name])
    return LatentImplementation(name, module.mla_prefill, module.mla_prefill_backward, module.mla_decode)


def _padded(tensors: tuple, count: int) -> tuple:
    return (*tensors, *([None] * (count - len(tensors))))


def _checked(tensors: tuple, empty_rows: str = "nan", out_layout: str = "bhsd", **_settings: Any) -> tuple:
    """The arguments of a check."""
    return (*tensors, empty_rows, out_layout)


def run_prefill(device_type: str, tensors: tuple, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The op `mla_prefill`: its positional and its keyword arguments."""
    every = _padded(tensors, 8)
    impl = settings.pop("impl", "")
    check_prefill(*_checked(every, **settings))
    # Views made below are returned: they must not be tracked as views of a hidden base, or in-place changes would fail.
    with _torch_private.below_autograd_and_views():
        return implementation(impl, device_type).prefill(*every, **settings)


def run_prefill_backward(device_type: str, args: tuple) -> tuple[Tensor, ...]:
    """The op `mla_prefill_backward`; an unwanted gradient is an empty tensor."""
    tensors: Any  # a list, which mypy counts
    grad_out, *tensors, out, lse = args[:11]
    softmax_scale, band_lower, band_upper, empty_rows, impl, output_mask = args[11:]
    check_prefill(*_checked(tensors, empty_rows))
    check_prefill_backward(grad_out, tensors[0], tensors[4], out, lse)
    with _torch_private.below_autograd_and_views():
        grads = implementation(impl, device_type).prefill_backward(
            grad_out,
            *tensors,
            out,
            lse,
            softmax_scale=softmax_scale,
            band_lower=band_lower,
            band_upper=band_upper,
            empty_rows=empty_rows,
            output_mask=output_mask,
        )
        return tuple(
            as_promised(grad, tensor)
            if wanted and grad is not None and tensor is not None
            else grad_out.new_empty((0,))
            for grad, tensor, wanted in zip(grads, tensors, output_mask)
        )


def run_decode(device_type: str, tensors: tuple, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The op `mla_decode`."""
    every = _padded(tensors, 8)
    impl = settings.pop("impl", "")
    check_decode(*_checked(every, **settings))
    with _torch_private.below_autograd_and_views():
        q_latent, q_pe, *caches = every
        caches[:2] = map(_rows_adjacent, caches[:2])
        return implementation(impl, device_type).decode(q_latent, q_pe, *caches, **settings)


def run_whole(device_type: str, tensors: tuple, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The op `mla`: the cheaper of the two forms."""
    every = _padded(tensors, 10)
    impl = settings.pop("impl", "")
    check_whole(*_checked(every, **settings))
    found = implementation(impl, device_type)
    with _torch_private.below_autograd_and_views():
        return cheaper_form(found.prefill, found.decode, every, settings)


def cheaper_form(
    prefill: Callable[..., tuple[Tensor, Tensor]],
    decode: Callable[..., tuple[Tensor, Tensor]],
    tensors: tuple,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The op `mla` by functions like the ops `mla_prefill` and `mla_decode`; its ten tensors, its settings by name."""
    if _is_absorbed(tensors, settings):
        return absorbed_form(decode, *tensors, **settings)
    return prefill_form(prefill, *tensors, **settings)


def absorbed_form(
    decode: Callable[..., tuple[Tensor, Tensor]],
    q_nope: Tensor,
    q_pe: Tensor | None,
    kv_c: Tensor,
    k_pe: Tensor | None,
    w_uk: Tensor,
    w_uv: Tensor,
    *masks: Tensor | None,
    out_layout: str = "bhsd",
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """The op `mla` by `decode`, a function like the op `mla_decode`, between the products with w_uk and w_uv."""
    caches = _rows_adjacent(kv_c), _rows_adjacent(k_pe)
    latent, lse = decode(mla_compose.per_head(q_nope, w_uk), q_pe, *caches, *masks, **settings)
    return with_layout(mla_compose.per_head(latent, w_uv.mT), out_layout), lse


def prefill_form(
    prefill: Callable[..., tuple[Tensor, Tensor]],
    q_nope: Tensor,
    q_pe: Tensor | None,
    kv_c: Tensor,
    k_pe: Tensor | None,
    w_uk: Tensor,
    w_uv: Tensor,
    block_table: Tensor | None = None,
    key_mask: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """The op `mla` by `prefill`, a function like the op `mla_prefill`, of the expanded latent."""
    if block_table is not None:
        kv_c, k_pe = mla_compose.gathered(kv_c, k_pe, block_table, kv_end, settings.get("empty_rows", "nan"))
    k_nope, v = mla_compose.expanded(kv_c, w_uk), mla_compose.expanded(kv_c, w_uv)
    return prefill(q_nope, q_pe, k_nope, k_pe, v, key_mask, kv_start, kv_end, **settings)


def is_absorbed_for_any_cache(tensors: tuple) -> bool:
    """Whether a step of decoding takes the absorbed form from 64 keys up to a million, if only these are a symbol.

    By both ends of that range, below which neither takes long, and without a band: a window makes absorbing cheaper.
    """
    q_nope, q_pe, _, _, w_uk, w_uv = tensors[:6]
    widths = [tensor.shape[-1] for tensor in (q_nope, q_pe, w_uk) if tensor is not None]
    sizes = [*q_nope.shape[1:3], *widths, w_uv.shape[1]]
    if not all(isinstance(size, int) for size in sizes):
        return False
    return all(_is_absorbed(tensors, {}, kv_len) for kv_len in (64, 2**20))


def _is_absorbed(tensors: tuple, settings: dict[str, Any], kv_len: int | None = None) -> bool:
    q_nope, q_pe, kv_c, _, w_uk, w_uv, block_table = tensors[:7]
    _, H, M, P = q_nope.shape
    R = 0 if q_pe is None else q_pe.shape[3]
    N = kv_len or (kv_c.shape[1] if block_table is None else block_table.shape[1] * kv_c.shape[1])
    bands = {name: settings.get(name) for name in ("band_lower", "band_upper")}
    return prefers_absorbed(M, N, H, P, R, w_uk.shape[2], w_uv.shape[1], itemsize=q_nope.itemsize, **bands)


def _rows_adjacent(cache: Tensor | None) -> Tensor | None:
    """The cache, or a copy of it where a row's channels do not lie side by side, which kernels take for granted."""
    return cache if cache is None or cache.stride(-1) == 1 else cache.contiguous()


for _device, _key in (("cpu", "CPU"), ("cuda", "CUDA")):
    LIBRARY.impl("mla_prefill", lambda *t, _device=_device, **s: run_prefill(_device, t, s), _key)
    LIBRARY.impl("mla_prefill_backward", lambda *args, _device=_device: run_prefill_backward(_device, args), _key)
    LIBRARY.impl("mla_decode", lambda *t, _device=_device, **s: run_decode(_device, t, s), _key)
    LIBRARY.impl("mla", lambda *t, _device=_device, **s: run_whole(_device, t, s), _key)
