"""Gradients, vmap and autocast of the ops of latent attention, as autograd.py, vmap.py and autocast.py do them.

- `mla_prefill` has the backward op `mla_prefill_backward`, and that a double backward through the reference; with
  forward-mode tangents the reference runs instead.
- `mla` is taken apart at the Autograd key into the projections and `mla_prefill` where a gradient is wanted.
- `mla_decode` has no gradient, and says so.
- torch.vmap computes the slices one by one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rocm_attn_compile import _torch_private as private
from rocm_attn_compile.ops import mla_compose, reference
from rocm_attn_compile.ops.mla_dispatch import prefill_form
from rocm_attn_compile.ops.mla_schemas import mla, mla_decode, mla_prefill, mla_prefill_backward
from rocm_attn_compile.ops.schemas import LIBRARY, NAMESPACE
from rocm_attn_compile.ops.vmap import slice_by_slice

_NUM_TENSORS = 8  # of mla_prefill
_NUM_DIFFERENTIABLE = 5  # the first of them
_SETTINGS = {"band_lower": None, "band_upper": None, "empty_rows": "nan", "out_layout": "bhsd", "impl": ""}
_NAMES = ("softmax_scale", *_SETTINGS)
_OPS = {
    "mla": mla,
    "mla_decode": mla_decode,
    "mla_prefill": mla_prefill,
    "mla_prefill_backward": mla_prefill_backward,
}


def _needs_gradient(tensors: tuple) -> bool:
    return torch.is_grad_enabled() and private.any_requires_grad(*tensors)


def _prefill_autograd(_keyset: Any, *tensors: Tensor | None, **settings: Any) -> tuple[Tensor, Tensor]:
    if private.any_tangent(tensors):
        return _composite_prefill(*tensors, **settings)
    if _needs_gradient(tensors):
        every = (*tensors, *([None] * (_NUM_TENSORS - len(tensors))))
        named = {**_SETTINGS, **settings}
        with private.single_level_functions_allowed():
            return _Prefill.apply(*every, *(named[name] for name in _NAMES))
    with private.below_autograd():
        return mla_prefill(*tensors, **settings)


def _prefill_backward_autograd(_keyset: Any, *args: Any) -> tuple[Tensor, ...]:
    tensors = args[: _NUM_TENSORS + 3]
    if private.any_tangent(tensors):
        return _composite_backward(*args)
    if _needs_gradient(tensors):
        with private.single_level_functions_allowed():
            return _PrefillBackward.apply(*args)
    with private.below_autograd():
        return mla_prefill_backward(*args)


def _decode_autograd(_keyset: Any, *tensors: Tensor | None, **settings: Any) -> tuple[Tensor, Tensor]:
    if private.any_tangent(tensors) or _needs_gradient(tensors):
        raise NotImplementedError(
            "rocm_attn::mla_decode has no gradient; use rocm_attn::mla or rocm_attn::mla_prefill, or torch.no_grad()"
        )
    with private.below_autograd():
        return mla_decode(*tensors, **settings)


def _whole_autograd(_keyset: Any, *tensors: Tensor | None, **settings: Any) -> tuple[Tensor, Tensor]:
    if private.any_tangent(tensors) or _needs_gradient(tensors):
        arguments: Any = tensors
        return prefill_form(mla_prefill, *arguments, **settings)
    with private.below_autograd():
        return mla(*tensors, **settings)


def _composite_prefill(*tensors: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    """`mla_prefill` as plain torch operations."""
    out_layout, _ = settings.pop("out_layout", "bhsd"), settings.pop("impl", "")
    out, lse = mla_compose.prefill(reference.forward, *tensors, **settings)
    return (out if out_layout == "bhsd" else out.transpose(1, 2).contiguous().transpose(1, 2)), lse


def _reference_backward(
    *, out: Tensor, lse: Tensor, dropout_seed: None, output_mask: list[bool], **named: Any
) -> tuple:
    return reference.backward(**named)


def _composite_backward(*args: Any) -> tuple[Tensor, ...]:
    """`mla_prefill_backward` as plain torch operations."""
    tensors, (scale, lower, upper, empty_rows, _, output_mask) = args[: _NUM_TENSORS + 3], args[_NUM_TENSORS + 3 :]
    settings = {"softmax_scale": scale, "band_lower": lower, "band_upper": upper, "empty_rows": empty_rows}
    grads = mla_compose.prefill_backward(_reference_backward, *tensors, output_mask=output_mask, **settings)
    return tuple(args[0].new_empty((0,)) if grad is None else grad for grad in grads)


def _gradients(saved: tuple, settings: tuple, wanted: list[bool], grad_out: Tensor) -> tuple[Tensor | None, ...]:
    *numbers, _out_layout, impl = settings
    grads = mla_prefill_backward(grad_out, *saved, *numbers, impl, wanted)
    return tuple(grad if want else None for grad, want in zip(grads, wanted))


class _Prefill(private.SingleLevelFunction):
    """`mla_prefill` at one level of autograd: its tensors, then softmax_scale and `_SETTINGS` in order."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        # Gradients stay enabled for outer levels of torch.func: see autograd.py.
        with private.all_levels_enabled(), private.below_autograd():
            return mla_prefill(*args[:_NUM_TENSORS], **dict(zip(_NAMES, args[_NUM_TENSORS:])))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:_NUM_TENSORS], *output)
        ctx.settings = inputs[_NUM_TENSORS:]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, _grad_lse: Tensor | None) -> tuple:
        rest = (None,) * (_NUM_TENSORS - _NUM_DIFFERENTIABLE + len(_NAMES))
        if grad_out is None:
            return (*((None,) * _NUM_DIFFERENTIABLE), *rest)
        wanted = list(ctx.needs_input_grad[:_NUM_DIFFERENTIABLE])
        return (*_gradients(ctx.saved_tensors, ctx.settings, wanted, grad_out), *rest)


class _PrefillBackward(private.SingleLevelFunction):
    """`mla_prefill_backward` at one level of autograd: double backward."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        with private.all_levels_enabled(), private.below_autograd():
            return mla_prefill_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[: _NUM_TENSORS + 3])
        ctx.settings = inputs[_NUM_TENSORS + 3 :]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        saved = ctx.saved_tensors
        # grad_out and what mla_prefill has gradients of; out and lse are functions of the others.
        places = [i for i in range(1 + _NUM_DIFFERENTIABLE) if saved[i] is not None]

        def function(*differentiable: Tensor) -> tuple[Tensor, ...]:
            args = list(saved)
            for place, tensor in zip(places, differentiable):
                args[place] = tensor
            return _composite_backward(*args, *ctx.settings)

        transform: Any = torch.func.vjp  # its stub has a third result
        _, vjp = transform(function, *(saved[i] for i in places))
        result: list[Tensor | None] = [None] * (len(saved) + len(ctx.settings))
        for place, grad in zip(places, vjp(tuple(grads))):
            result[place] = grad
        return tuple(result)


def _register_fallback() -> None:
    """For a torch without the private names: first-order gradients only, and none under torch.func."""

    def setup_context(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.settings = tuple(keyword_only_inputs[name] for name in _NAMES)
        ctx.mark_non_differentiable(output[1])

    def backward(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple:
        wanted = list(ctx.needs_input_grad[:_NUM_DIFFERENTIABLE])
        grads = _gradients(ctx.saved_tensors, ctx.settings, wanted, grad_out)
        return (*grads, *((None,) * (_NUM_TENSORS - _NUM_DIFFERENTIABLE)))

    torch.library.register_autograd(f"{NAMESPACE}::mla_prefill", backward, setup_context=setup_context, lib=LIBRARY)


if private.SINGLE_LEVEL_AUTOGRAD:
    LIBRARY.impl("mla_prefill", _prefill_autograd, "Autograd", with_keyset=True)
    LIBRARY.impl("mla_prefill_backward", _prefill_backward_autograd, "Autograd", with_keyset=True)
else:
    _register_fallback()
LIBRARY.impl("mla_decode", _decode_autograd, "Autograd", with_keyset=True)
LIBRARY.impl("mla", _whole_autograd, "Autograd", with_keyset=True)


for _name, _op in _OPS.items():
    torch.library.register_vmap(f"{NAMESPACE}::{_name}", partial(slice_by_slice, _op), lib=LIBRARY)


def _autocast(op: Any, count: int, device_type: str, key: str, *tensors: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    """The first `count` tensors go to the autocast dtype, unless an impl says that the casts are in the graph."""
    dtype = torch.get_autocast_dtype(device_type)
    castable = () if settings.get("impl") else (torch.float16, torch.bfloat16, torch.float32)
    cast = (t.to(dtype) if t is not None and t.dtype in castable else t for t in tensors[:count])
    with private.exclude_keys(private.keyset(key)):
        return op(*cast, *tensors[count:], **settings)


for _name, _count in (("mla", 6), ("mla_decode", 4), ("mla_prefill", 5)):
    for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        LIBRARY.impl(_name, partial(_autocast, _OPS[_name], _count, _device, _key), _key)
