"""Attention whose weights are a result, too: `(softmax(logits) v, softmax(logits))`, without gradients of its own.

    out      `(B, H, M, E)`, as of the op `attention`
    weights  `(B, H, M, N)`, contiguous, float32 (float64 for float64 inputs) or in the dtype of q

One op, not a second one beside `attention`, so that each device has the scores as often as it pays to: on a CPU the
products cost more than the memory, and both results come from one softmax, as in eager code; on a GPU the weights are
computed a second time from q, k and lse, where that saves reading scores and weights from memory. Short calls (see
MIN_SCORES) are computed as on a CPU there, too.

Rows without a key may be something else in the weights than what their sum with v is made of: a model may return NaN,
and zero it only on the way to v. So there are two settings, `empty_rows` and `weights_empty_rows`.

Where a gradient is wanted the op is the composition of `composite`, which plain autograd differentiates.

Letters as in schemas.py.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rocm_attn_compile import _torch_private
from rocm_attn_compile.ops import cpu_unfused, gpu_inline, reference
from rocm_attn_compile.ops.checks import check, check_words
from rocm_attn_compile.ops.cpu import with_layout
from rocm_attn_compile.ops.cpu_mask import with_alibi
from rocm_attn_compile.ops.dispatch import DEFAULT, KERNEL_MODULES, REFERENCE, known_name
from rocm_attn_compile.ops.floored import check_floor, is_floored
from rocm_attn_compile.ops.impl import parse
from rocm_attn_compile.ops.schemas import (
    LIBRARY,
    NAMESPACE,
    OPTIONAL_TENSORS,
    check_inputs,
    empty_out,
    lse_dtype,
)
from rocm_attn_compile.ops.vmap import slice_by_slice

TENSORS = ("q", "k", "v", *(name for name in OPTIONAL_TENSORS if name != "dropout_seed"))
"""The tensor arguments in schema order. No dropout: the weights that are returned have none."""

LIBRARY.define(
    "attention_with_weights(Tensor q, Tensor k, Tensor v, "
    + ", ".join(f"Tensor? {name}=None" for name in TENSORS[3:])
    + ", *, float softmax_scale, float? logits_soft_cap=None, float? score_floor=None, SymInt? band_lower=None, "
    'SymInt? band_upper=None, str empty_rows="nan", str weights_empty_rows="nan", ScalarType? weights_dtype=None, '
    'str out_layout="bhsd", str impl="") -> (Tensor, Tensor)',
    tags=(torch.Tag.pt2_compliant_tag,),
)

MIN_SCORES = 2**26
"""From so many scores on (B * H * M * N) a GPU computes the weights a second time. That took 0.49 to 0.86 of Inductor's
time for eager code with 2^27 and more of them, and 1.2 to 2.6 times as long with 2^23.6 (4 x 12 heads, 512 queries and
keys), which the L2 cache holds. Measured on an H200 by benchmarks/gpu/returned_weights.py, before Inductor launched the
kernels itself. With sizes that are not known before a call, each call decides."""

_SETTINGS = {
    "logits_soft_cap": None, "score_floor": None, "band_lower": None, "band_upper": None, "empty_rows": "nan",
    "weights_empty_rows": "nan", "weights_dtype": None, "out_layout": "bhsd",
}  # fmt: skip


class _Call:
    """The arguments of a call, checked.

    Attributes:
        q, k, v: Of `(B, H, M, D)`, `(B, K, N, D)` and `(B, K, N, E)`.
        bias, slopes, sinks: Or None.
        masks: attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, band_lower, band_upper.
        tensors, settings: As a backend's kernels take them.
    """

    def __init__(self, tensors: tuple, settings: dict[str, Any]) -> None:
        every = dict(zip(TENSORS, (*tensors, *[None] * (len(TENSORS) - len(tensors)))))
        named: Any = {**_SETTINGS, **settings}
        self.tensors = dict(every)
        of_kernels = ("softmax_scale", "logits_soft_cap", "band_lower", "band_upper", "empty_rows", "out_layout")
        self.settings = {name: named[name] for name in of_kernels}
        self.q, self.k, self.v = (every.pop(name) for name in TENSORS[:3])
        self.bias, self.sinks, self.slopes = (every.pop(name) for name in ("attn_bias", "sinks", "alibi_slopes"))
        self.optionals = tuple(every.values())
        self.masks = (*self.optionals, named["band_lower"], named["band_upper"])
        self.scale, self.cap, self.floor = (named[x] for x in ("softmax_scale", "logits_soft_cap", "score_floor"))
        self.empty_rows, self.weights_empty_rows = named["empty_rows"], named["weights_empty_rows"]
        self.out_layout = named["out_layout"]
        self.weights_dtype = named["weights_dtype"] or self.q.dtype
        rest: Any = (*self.optionals, self.sinks, None, self.slopes, 0.0, self.empty_rows, self.out_layout)
        check_inputs(self.q, self.k, self.v, self.bias, *rest)
        check_words(self.weights_empty_rows, self.out_layout)
        if self.weights_dtype not in (self.q.dtype, lse_dtype(self.q.dtype)):
            raise ValueError(
                f"weights_dtype is {self.weights_dtype} beside q of {self.q.dtype}; allowed are "
                f"{self.q.dtype} and {lse_dtype(self.q.dtype)}"
            )
        if self.floor is not None:
            check_floor(self.floor)
            check(self.cap is None, lambda: "score_floor and logits_soft_cap do not go together")

    @property
    def shape(self) -> tuple:
        """Of the weights."""
        return (*self.q.shape[:3], self.k.shape[2])

    @property
    def is_short(self) -> bool:
        """Whether separate operations are faster on a GPU."""
        return math.prod(self.shape) < MIN_SCORES

    def is_raised(self) -> bool:
        """Whether the floor may raise a score, which no kernel does. Looks at values."""
        return self.floor is not None and is_floored(self.q, self.k, self.scale, self.floor)


def composite(call: _Call) -> tuple[Tensor, Tensor]:
    """The specification: plain torch operations, differentiable any number of times."""
    q, k, v = call.q, call.k, call.v
    s = reference.scores(q, k, call.scale, call.cap)
    if call.floor is not None and s.numel() != 0:
        s = s - s.amax()
        s = s.clamp(min=call.floor)
    s = reference.logits(s, call.bias, call.slopes)
    if k.shape[2] == 0:
        return q.new_zeros((*q.shape[:3], v.shape[3])), q.new_zeros(call.shape, dtype=call.weights_dtype)
    keep = reference.keep_mask(q.shape[2], k.shape[2], q.device, *call.masks)
    p = reference.weights(s, keep, call.sinks, call.empty_rows).p
    returned = p
    if call.weights_empty_rows != call.empty_rows:
        returned = reference.weights(s, keep, call.sinks, call.weights_empty_rows).p
    out = reference.ungroup_rows(reference.group_rows(p, v.shape[1]) @ v.to(p.dtype), q.shape[1]).to(q.dtype)
    if call.out_layout != "bhsd":
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out, returned.to(call.weights_dtype)


def _own(call: _Call, out: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the strides that the fake kernel promises, in memory of their own."""
    out = empty_out(call.q, call.v, call.out_layout).copy_(out)
    return out, call.q.new_empty(call.shape, dtype=call.weights_dtype).copy_(weights)


def unfused(call: _Call) -> tuple[Tensor, Tensor]:
    """On any device, at the cost of eager code: one softmax for both results."""
    if call.q.numel() == 0 or call.k.numel() == 0 or call.v.numel() == 0:
        return _own(call, *composite(call))
    if call.is_raised():
        return _own(call, *composite(call))
    bias = with_alibi(call.bias, call.slopes, call.q.shape[2], call.k.shape[2])
    modes = (call.empty_rows, call.weights_empty_rows)
    out, weights = cpu_unfused.forward_with_weights(
        call.q, call.k, call.v, bias, call.masks, call.sinks, call.scale, call.cap, *modes, call.weights_dtype
    )
    return with_layout(out, call.out_layout), weights


def traced(name: str, _tuned: str, arguments: dict[str, Any]) -> Callable[[], Any] | None:
    """What is traced instead of a call with these arguments, all given; None if the call must stay opaque."""
    if arguments["score_floor"] is not None:  # what it does depends on the scores
        return None
    tensors = tuple(arguments.pop(name) for name in TENSORS)
    call = _Call(tensors, arguments)
    if call.q.device.type == "cpu" or call.is_short:
        return partial(unfused, call)
    return gpu_inline.with_weights(name, call)


def _kernels(call: _Call, name: str) -> tuple[Tensor, Tensor]:
    """On a GPU: the forward of backend `name`, and its kernel for the weights."""
    if call.is_short:
        return unfused(call)
    if call.is_raised():
        return _own(call, *composite(call))
    module = importlib.import_module(KERNEL_MODULES[name])
    return module.attention_with_weights(
        call.tensors, call.settings, call.weights_empty_rows, call.weights_dtype, opaque=True
    )


def _run(is_gpu: bool, tensors: tuple, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    name = known_name(parse(settings.pop("impl", "")).backend, DEFAULT, KERNEL_MODULES)
    with _torch_private.below_autograd_and_views():
        call = _Call(tensors, settings)
        if name == REFERENCE:
            return _own(call, *composite(call))
        return _kernels(call, name) if is_gpu else unfused(call)


def _fake(*tensors: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    settings.pop("impl", None)
    call = _Call(tensors, settings)
    return empty_out(call.q, call.v, call.out_layout), call.q.new_empty(call.shape, dtype=call.weights_dtype)


torch.library.register_fake(f"{NAMESPACE}::attention_with_weights", _fake, lib=LIBRARY)
LIBRARY.impl("attention_with_weights", lambda *tensors, **settings: _run(False, tensors, settings), "CPU")
LIBRARY.impl("attention_with_weights", lambda *tensors, **settings: _run(True, tensors, settings), "CUDA")

attention_with_weights = torch.ops.rocm_attn.attention_with_weights.default


def _autograd(*tensors: Tensor | None, **settings: Any) -> tuple[Tensor, Tensor]:
    """Kernel at the Autograd key."""
    wants_grad = torch.is_grad_enabled() and _torch_private.any_requires_grad(*tensors)
    if wants_grad or _torch_private.any_tangent(tensors):
        settings.pop("impl", None)
        return composite(_Call(tensors, settings))
    with _torch_private.below_autograd():
        return attention_with_weights(*tensors, **settings)


LIBRARY.impl("attention_with_weights", _autograd, "Autograd")


torch.library.register_vmap(
    f"{NAMESPACE}::attention_with_weights", partial(slice_by_slice, attention_with_weights), lib=LIBRARY
)
