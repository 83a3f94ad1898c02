"""Gradients of the ops, under eager autograd, torch.func transforms, forward mode and torch.compile alike.

`torch.library.register_autograd` is not used where it can be avoided: it fails under functorch, drops forward-mode
tangents without a word and gives a silently wrong double backward for an opaque backward kernel. Instead:

- a kernel of our own at the Autograd key applies a single-level autograd function whose backward is the op
  `attention_backward`;
- that op has such a function too, whose backward is `torch.func.vjp` of the reference's backward;
- with forward-mode tangents the reference runs instead, which is plain differentiable torch.

lse is not differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rocm_attn_compile import _torch_private as private
from rocm_attn_compile.ops import reference
from rocm_attn_compile.ops.dispatch import run_backward_cpu, run_backward_gpu, run_cpu, run_gpu
from rocm_attn_compile.ops.kv_cache import resolved
from rocm_attn_compile.ops.schemas import (
    LIBRARY,
    NAMESPACE,
    NUM_TENSORS,
    attention,
    attention_backward,
    dropout_keep_mask,
)

_NUM_SAVED = 3 + NUM_TENSORS  # the tensors of the op `attention_backward`: grad_out, those, out and lse
_SEED, _SLOPES = 11, 12
_SETTINGS = {
    "logits_soft_cap": None,
    "band_lower": None,
    "band_upper": None,
    "dropout_p": 0.0,
    "empty_rows": "nan",
    "out_layout": "bhsd",
    "impl": "",
}
_NAMES = ("softmax_scale", *_SETTINGS)
_NUM_OTHERS = len(_NAMES) + 1
# Where nothing but a device is left below autograd (no mode, no torch.func, no subclass), the kernels here are what the
# dispatcher would call next; calling them directly saves 5 to 20 us.
_DIRECT = {private.keyset_bits("CPU"): run_cpu, private.keyset_bits("CUDA"): run_gpu}
_DIRECT_BACKWARD = {private.keyset_bits("CPU"): run_backward_cpu, private.keyset_bits("CUDA"): run_backward_gpu}


def _attention_autograd(keyset: Any, *tensors: Tensor | None, **settings: Any) -> tuple[Tensor, Tensor]:
    """Kernel of `attention` at the Autograd key."""
    # None where a mode, a transform or a subclass has to see the op. Tangents are then looked for in the tensors, which
    # is slow, else at the level that eager code has entered.
    run = _DIRECT.get(private.bits_below_autograd(keyset))
    has_tangents = _has_tangents(run, tensors)
    wants_grad = not has_tangents and torch.is_grad_enabled() and private.any_requires_grad(*tensors)
    if len(tensors) > NUM_TENSORS and (has_tangents or wants_grad):
        # Gradients are those of the plain keys and values, and flow on to the cache and its scales.
        tensors = resolved(tensors, NUM_TENSORS)
    if has_tangents:
        return _composite_forward(*tensors, **settings)
    if wants_grad:
        if private.any_requires_grad(*tensors[_SLOPES:]):
            raise NotImplementedError("alibi_slopes get no gradient: detach them, or give them as an attn_bias")
        every = (*tensors, *([None] * (NUM_TENSORS - len(tensors))))
        named = {**_SETTINGS, **settings}
        flat = (settings["softmax_scale"], *(named[name] for name in _SETTINGS))
        if run is not None:
            return _Attention.apply(*every, *flat, run)
        with private.single_level_functions_allowed():
            return _Attention.apply(*every, *flat, None)
    if run is not None:
        return run(tensors, settings)
    with private.below_autograd():
        return attention(*tensors, **settings)


def _has_tangents(run: Any, tensors: tuple) -> bool:
    """Whether forward mode differentiates a call; `run` as in the kernels here."""
    return private.in_forward_ad() if run is not None else private.any_tangent(tensors)


def _backward_autograd(keyset: Any, *args: Any) -> tuple[Tensor, ...]:
    """Kernel of `attention_backward` at the Autograd key; it has no defaults, so all arguments are here, in order."""
    run = _DIRECT_BACKWARD.get(private.bits_below_autograd(keyset))
    if _has_tangents(run, args[:_NUM_SAVED]):
        return _composite_backward(*args)
    if torch.is_grad_enabled() and private.any_requires_grad(*args[:_NUM_SAVED]):
        with private.single_level_functions_allowed():
            return _AttentionBackward.apply(*args)
    if run is not None:
        return run(*args)
    with private.below_autograd():
        return attention_backward(*args)


def _dropout_keep(q: Tensor, k: Tensor, dropout_seed: Tensor | None, dropout_p: float) -> Tensor | None:
    if dropout_seed is None or dropout_p == 0.0:
        return None
    return dropout_keep_mask(dropout_seed, dropout_p, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))


def _composite_forward(*tensors: Tensor | None, **settings: Any) -> tuple[Tensor, Tensor]:
    """The op as plain torch operations."""
    every: Any = (*tensors, *([None] * (NUM_TENSORS - len(tensors))))
    dropout_seed, slopes = every[_SEED:]
    named: Any = {**_SETTINGS, **settings}
    out_layout, _ = named.pop("out_layout"), named.pop("impl")
    keep = _dropout_keep(every[0], every[1], dropout_seed, named["dropout_p"])
    forward: Any = reference.forward
    out, lse = forward(*every[:_SEED], keep, slopes, **named)
    return (out if out_layout == "bhsd" else out.transpose(1, 2).contiguous().transpose(1, 2)), lse


def _composite_backward(*args: Any) -> tuple[Tensor, ...]:
    """The backward op as plain torch operations."""
    q, k, (dropout_seed, slopes) = args[1], args[2], args[1 + _SEED : 1 + NUM_TENSORS]
    scale, cap, lower, upper, dropout_p, empty_rows, _, output_mask = args[_NUM_SAVED:]
    backward: Any = reference.backward
    grads = backward(
        *args[: 1 + _SEED],
        _dropout_keep(q, k, dropout_seed, dropout_p),
        slopes,
        softmax_scale=scale,
        logits_soft_cap=cap,
        band_lower=lower,
        band_upper=upper,
        dropout_p=dropout_p,
        empty_rows=empty_rows,
    )
    return tuple(grad if wanted and grad is not None else q.new_empty((0,)) for grad, wanted in zip(grads, output_mask))


class _Attention(private.SingleLevelFunction):
    """`attention` at one level of autograd.

    Takes the op's tensors, softmax_scale, `_SETTINGS` in order, and the kernel to call directly, or None.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        settings = dict(zip(_NAMES, args[NUM_TENSORS:-1]))
        if args[-1] is not None:
            return args[-1](args[:NUM_TENSORS], settings)
        # Gradients stay enabled for outer levels of torch.func: without that, grad(grad(f)) is silently wrong.
        with private.all_levels_enabled(), private.below_autograd():
            return attention(*args[:NUM_TENSORS], **settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:NUM_TENSORS], *output)
        ctx.settings = inputs[NUM_TENSORS:-1]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, _grad_lse: Tensor | None) -> tuple:
        if grad_out is None:
            return (None,) * (NUM_TENSORS + _NUM_OTHERS)
        grads = _backward_of(ctx.saved_tensors, ctx.settings, ctx.needs_input_grad, grad_out)
        return (*grads, *([None] * _NUM_OTHERS))


def _backward_of(saved: tuple, settings: tuple, needs_input_grad: tuple, grad_out: Tensor) -> tuple:
    """Gradients of the thirteen tensor arguments through the op `attention_backward`."""
    *tensors, out, lse = saved
    *numbers, _out_layout, impl = settings
    wanted = [needs_input_grad[i] for i in (0, 1, 2, 3, 10)]
    dq, dk, dv, dbias, dsinks = attention_backward(grad_out, *tensors, out, lse, *numbers, impl, wanted)
    grads = [grad if want else None for grad, want in zip((dq, dk, dv, dbias, dsinks), wanted)]
    return (*grads[:4], None, None, None, None, None, None, grads[4], None, None)


class _AttentionBackward(private.SingleLevelFunction):
    """`attention_backward` at one level of autograd: double backward."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        with private.all_levels_enabled(), private.below_autograd():
            return attention_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:_NUM_SAVED])
        ctx.settings = inputs[_NUM_SAVED:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        saved = ctx.saved_tensors
        # out and lse are functions of the others, and the reference computes them anew: they get no gradient.
        places = [i for i in (0, 1, 2, 3, 4, 11) if saved[i] is not None]

        def function(*differentiable: Tensor) -> tuple[Tensor, ...]:
            args = list(saved)
            for place, tensor in zip(places, differentiable):
                args[place] = tensor
            return _composite_backward(*args, *ctx.settings)

        transform: Any = torch.func.vjp  # its stub has a third result
        _, vjp = transform(function, *(saved[i] for i in places))
        result: list[Tensor | None] = [None] * (_NUM_SAVED + len(ctx.settings))
        for place, grad in zip(places, vjp(tuple(grads))):
            result[place] = grad
        return tuple(result)


def _register_fallback() -> None:
    """For a torch without the private names: first-order gradients only, and none under torch.func."""

    def setup_context(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:NUM_TENSORS], *output)
        ctx.num_cache = len(inputs) - NUM_TENSORS
        ctx.reads_cache = any(tensor is not None for tensor in inputs[NUM_TENSORS:])
        ctx.settings = (keyword_only_inputs["softmax_scale"], *(keyword_only_inputs[name] for name in _SETTINGS))
        ctx.mark_non_differentiable(output[1])

    def backward(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple:
        if ctx.reads_cache:
            raise NotImplementedError("no gradient of attention on a KV cache with this torch: gather it before")
        grads = _backward_of(ctx.saved_tensors, ctx.settings, ctx.needs_input_grad, grad_out)
        return (*grads, *([None] * ctx.num_cache))

    torch.library.register_autograd(f"{NAMESPACE}::attention", backward, setup_context=setup_context, lib=LIBRARY)


if private.SINGLE_LEVEL_AUTOGRAD:
    LIBRARY.impl("attention", _attention_autograd, "Autograd", with_keyset=True)
    LIBRARY.impl("attention_backward", _backward_autograd, "Autograd", with_keyset=True)
else:
    _register_fallback()
