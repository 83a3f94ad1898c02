"""Attention whose scores are raised to a number below the largest of them all: `clamp(s - s.max(), min=-50000)`.

    s      = softmax_scale * q k^T                               over all (batch, head, query, key)
    logits = max(s, max of all s + score_floor) + attn_bias      then masks and softmax as in the op `attention`

The largest score is known when all of them are, which a fused kernel avoids. But no score is further from 0 than
`softmax_scale * max|q| * max|k|` (Cauchy and Schwarz), two tensors' norms: where twice that is no more than
`-score_floor`, as it is for all numbers that a model makes on purpose, the op is `attention` itself. Where it is more,
the raised scores are computed in memory and given to `attention` as a bias.

Which of the two a call takes is decided by the values, on the host: on a GPU it waits for the device once a call. While
a CUDA graph is captured nothing can be waited for, and the scores are always computed.

Letters as in schemas.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rocm_attn_compile import _torch_private
from rocm_attn_compile.ops.reference import group_rows
from rocm_attn_compile.ops.schemas import (
    LIBRARY,
    NAMESPACE,
    NUM_TENSORS,
    OPTIONAL_TENSORS,
    _attention_backward_fake,
    _attention_fake,
    as_promised,
    attention,
    attention_backward,
    lse_dtype,
)
from rocm_attn_compile.ops.vmap import slice_by_slice

_OPTIONALS = ", ".join(f"Tensor? {name}=None" for name in OPTIONAL_TENSORS)
_BIAS = 3

LIBRARY.define(
    f"attention_floored(Tensor q, Tensor k, Tensor v, {_OPTIONALS}, *, float softmax_scale, float score_floor, "
    'SymInt? band_lower=None, SymInt? band_upper=None, float dropout_p=0.0, str empty_rows="nan", '
    'str out_layout="bhsd", str impl="") -> (Tensor, Tensor)',
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    f"attention_floored_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, {_OPTIONALS.replace('=None', '')}, "
    "Tensor out, Tensor lse, float softmax_scale, float score_floor, SymInt? band_lower, SymInt? band_upper, "
    "float dropout_p, str empty_rows, str impl, bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def is_floored(q: Tensor, k: Tensor, softmax_scale: float, score_floor: float) -> bool:
    """False if no score can be lower than the largest plus `score_floor`; waits for the device."""
    if q.numel() == 0 or k.numel() == 0:
        return False
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    largest = [t.detach().to(lse_dtype(t.dtype)).square().sum(-1).amax().sqrt() for t in (q, k)]
    spread = 2.01 * abs(softmax_scale) * float(largest[0] * largest[1])
    return not spread <= -score_floor  # not a number: the scores are computed


def _scores(q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
    """`(B, H, M, N)`, in the dtype of lse."""
    wide = lse_dtype(q.dtype)
    s = torch.matmul(group_rows(q.to(wide), k.shape[1]), k.to(wide).mT) * softmax_scale
    return s.view(*q.shape[:3], k.shape[2])


def check_floor(score_floor: float) -> None:
    """Raise ValueError unless it is one."""
    if not score_floor < 0:
        raise ValueError(f"score_floor is {score_floor}; allowed is a number below 0")


def _as_bias(tensors: list, softmax_scale: float, score_floor: float) -> tuple[list, Tensor, Tensor]:
    """The arguments of `attention` with the raised scores as bias and queries of 0; s - max(s), and the bias."""
    q, k = tensors[:2]
    s = _scores(q, k, softmax_scale)
    shifted = s - s.amax()
    bias = shifted.clamp(min=score_floor)
    if tensors[_BIAS] is not None:
        bias = bias + tensors[_BIAS]
    return [torch.zeros_like(q), *tensors[1:_BIAS], bias, *tensors[_BIAS + 1 :]], shifted, bias


def _forward(*tensors: Any, softmax_scale: float, score_floor: float, **settings: Any) -> tuple[Tensor, Tensor]:
    check_floor(score_floor)
    every = [*tensors, *[None] * (NUM_TENSORS - len(tensors))]
    with _torch_private.below_autograd_and_views():
        if not is_floored(every[0], every[1], softmax_scale, score_floor):
            return attention(*every, softmax_scale=softmax_scale, **settings)
        arguments, _, _ = _as_bias(every, softmax_scale, score_floor)
        return attention(*arguments, softmax_scale=softmax_scale, **settings)


def _backward(grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    tensors, (out, lse), rest = list(args[:NUM_TENSORS]), args[NUM_TENSORS : NUM_TENSORS + 2], args[NUM_TENSORS + 2 :]
    scale, floor, lower, upper, dropout_p, empty_rows, impl, wanted = rest
    settings = (scale, None, lower, upper, dropout_p, empty_rows, impl)
    with _torch_private.below_autograd_and_views():
        if not is_floored(tensors[0], tensors[1], scale, floor):
            return attention_backward(grad_out, *tensors, out, lse, *settings, wanted)
        arguments, shifted, bias = _as_bias(tensors, scale, floor)
        every = [False, False, wanted[2], True, wanted[4]]
        _, _, dv, ds, dsinks = attention_backward(grad_out, *arguments, out, lse, *settings, every)
        dq, dk = _through_scores(tensors[0], tensors[1], shifted, ds.to(shifted.dtype), scale, floor)
        dbias = ds.sum_to_size(tensors[_BIAS].shape) if wanted[3] else ds
        dq, dk, dbias = (
            as_promised(grad, tensors[place]) if wanted[place] else grad_out.new_empty((0,))
            for grad, place in ((dq, 0), (dk, 1), (dbias, _BIAS))
        )
        return dq, dk, dv, dbias, dsinks


def _through_scores(
    q: Tensor, k: Tensor, shifted: Tensor, ds: Tensor, softmax_scale: float, score_floor: float
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k from that of `clamp(s - max(s), min=score_floor)`, as autograd has them."""
    ds = torch.where(shifted >= score_floor, ds, 0)
    is_largest = shifted == 0
    ds = ds - is_largest * (ds.sum() / is_largest.sum())  # that of the maximum, in equal parts
    K = k.shape[1]
    ds = group_rows(ds * softmax_scale, K)
    dq = torch.matmul(ds, k.to(ds.dtype)).view(q.shape)
    dk = torch.matmul(ds.mT, group_rows(q.to(ds.dtype), K))
    return dq, dk


def _forward_fake(
    *tensors: Any, softmax_scale: float, score_floor: float, out_layout: str = "bhsd", **settings: Any
) -> tuple[Tensor, Tensor]:
    check_floor(score_floor)
    return _attention_fake(*tensors, softmax_scale=softmax_scale, out_layout=out_layout, **settings)


def _backward_fake(grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    tensors, rest = args[: NUM_TENSORS + 2], args[NUM_TENSORS + 2 :]
    scale, _, *others = rest
    fake: Any = _attention_backward_fake
    return fake(grad_out, *tensors, scale, None, *others)


torch.library.register_fake(f"{NAMESPACE}::attention_floored", _forward_fake, lib=LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::attention_floored_backward", _backward_fake, lib=LIBRARY)

attention_floored = torch.ops.rocm_attn.attention_floored.default
attention_floored_backward = torch.ops.rocm_attn.attention_floored_backward.default

for _key in ("CPU", "CUDA"):
    LIBRARY.impl("attention_floored", _forward, _key)
    LIBRARY.impl("attention_floored_backward", _backward, _key)


def _setup_context(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *[None] * (NUM_TENSORS - len(inputs)), *output)
    ctx.settings = keyword_only_inputs
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    names = ("softmax_scale", "score_floor", "band_lower", "band_upper", "dropout_p", "empty_rows", "impl")
    places = (0, 1, 2, 3, 10)
    given = len(ctx.needs_input_grad)  # without those that were left out
    wanted = [i < given and ctx.needs_input_grad[i] for i in places]
    found = attention_floored_backward(grad_out, *ctx.saved_tensors, *(ctx.settings[name] for name in names), wanted)
    grads: list[Tensor | None] = [None] * NUM_TENSORS
    for place, want, grad in zip(places, wanted, found):
        grads[place] = grad if want else None
    return tuple(grads[:given])


torch.library.register_autograd(
    f"{NAMESPACE}::attention_floored", _gradients, setup_context=_setup_context, lib=LIBRARY
)


# Each slice has a largest score of its own.
torch.library.register_vmap(f"{NAMESPACE}::attention_floored", partial(slice_by_slice, attention_floored), lib=LIBRARY)
