"""torch.vmap over the ops: the mapped dimension is folded into the batch, or into the heads where sinks differ.

Folding into the batch costs nothing but a copy of what was not mapped. It cannot express sinks that differ along the
mapped dimension, nor their gradients one by one: then it is folded into the heads, and what has no head dimension
(key_mask, kv_start, kv_end, ids) is turned into an attn_mask. Dropout draws by position, so with dropout each slice
is computed alone, and gives what it would give without vmap.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rocm_attn_compile.ops.reference import keep_mask
from rocm_attn_compile.ops.schemas import (
    LIBRARY,
    NAMESPACE,
    NUM_TENSORS,
    attention,
    attention_backward,
    dropout_keep_mask,
)

_Q, _K, _V, _BIAS, _MASK, _KEY_MASK, _SINKS, _SEED, _SLOPES = 0, 1, 2, 3, 4, 5, 10, 11, 12
_WITHOUT_HEADS = range(_KEY_MASK, _SINKS)  # key_mask, kv_start, kv_end, q_ids, kv_ids


def slice_by_slice(op: Any, info: Any, in_dims: tuple, *args: Any, **settings: Any) -> tuple[tuple, tuple]:
    """The slices one by one; what the op does not return for an argument is an empty tensor in each of them."""
    calls = [
        op(*(arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims)), **settings)
        for i in range(info.batch_size)
    ]
    results = tuple(torch.stack(result) for result in zip(*calls))
    return results, (0,) * len(results)


class _Fold:
    """The tensors of a call, mapped dimension in front, folded one way or the other.

    Attributes:
        size: Of the mapped dimension.
        into_heads: Fold into the heads, else into the batch.
    """

    def __init__(self, size: int, tensors: list[Tensor | None], mapped: list[bool], into_heads: bool) -> None:
        self.size, self.tensors, self.mapped, self.into_heads = size, tensors, mapped, into_heads
        q, k = _given(tensors[_Q]), _given(tensors[_K])
        self.batch, self.heads, self.q_len = q.shape[-4:-1]
        self.kv_len = k.shape[-2]

    def full(self, tensor: Tensor, is_mapped: bool) -> Tensor:
        """Fold a tensor whose batch and head dims are whole."""
        if not is_mapped:
            tensor = tensor.expand(self.size, *tensor.shape)
        return tensor.movedim(0, 1).flatten(1, 2) if self.into_heads else tensor.flatten(0, 1)

    def broadcasting(self, tensor: Tensor, is_mapped: bool, keep_apart: bool = False) -> Tensor:
        """Fold a tensor whose batch and head dims may be 1. What is not mapped stays small unless `keep_apart`."""
        if not is_mapped:
            if tensor.shape[1 if self.into_heads else 0] == 1 and not keep_apart:
                return tensor
            tensor = tensor.expand(self.size, *tensor.shape)
        place, whole = (2, self.heads) if self.into_heads else (1, self.batch)
        if tensor.shape[place] != whole:
            tensor = tensor.expand(*tensor.shape[:place], whole, *tensor.shape[place + 1 :])
        return self.full(tensor, True)

    def slopes(self, tensor: Tensor, is_mapped: bool) -> Tensor:
        """Fold ALiBi's slopes, `(H,)` or `(B, H)` without the mapped dimension."""
        if not is_mapped:
            if tensor.dim() == 1 and not self.into_heads:
                return tensor
            tensor = tensor.expand(self.size, *tensor.shape)
        if tensor.dim() == 2:
            if self.into_heads:
                return tensor.flatten()
            tensor = tensor[:, None].expand(-1, self.batch, -1)
        return self.full(tensor, True)

    def fold(self, wants_dbias: bool = False) -> list[Tensor | None]:
        """The tensors for one call that does the work of all."""
        tensors, mapped = list(self.tensors), list(self.mapped)
        if self.into_heads and any(mapped[i] for i in _WITHOUT_HEADS):
            tensors[_MASK], mapped[_MASK] = self._dense_mask(), True
            for i in _WITHOUT_HEADS:
                tensors[i] = None
        for i, tensor in enumerate(tensors):
            if tensor is None or i == _SEED:
                continue
            if i in (_Q, _K, _V):
                tensors[i] = self.full(tensor, mapped[i])
            elif i == _SINKS:
                if self.into_heads:
                    tensors[i] = (tensor if mapped[i] else tensor.expand(self.size, -1)).flatten()
            elif i == _SLOPES:
                tensors[i] = self.slopes(tensor, mapped[i])
            elif i in (_BIAS, _MASK) or not self.into_heads:
                tensors[i] = self.broadcasting(tensor, mapped[i], keep_apart=wants_dbias and i == _BIAS)
        return tensors

    def _dense_mask(self) -> Tensor:
        """attn_mask and the masks without heads as one bool mask `(size, B|1, H|1, M|1, N|1)`."""
        device = _given(self.tensors[_Q]).device
        slices = []
        for index in range(self.size):
            masks: Any = self.slice(index)[_MASK:_SINKS]
            slices.append(_given(keep_mask(self.q_len, self.kv_len, device, *masks)))
        return torch.stack(slices)

    def slice(self, index: int) -> list[Tensor | None]:
        """The tensors as call number `index` would get them without vmap."""
        return [t[index] if t is not None and m else t for t, m in zip(self.tensors, self.mapped)]

    def unfold(self, tensor: Tensor) -> Tensor:
        """A folded result with the mapped dimension in front again."""
        if self.into_heads:
            return tensor.unflatten(1, (self.size, tensor.shape[1] // self.size)).movedim(1, 0)
        return tensor.unflatten(0, (self.size, tensor.shape[0] // self.size))


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _in_front(tensors: Any, in_dims: Any) -> tuple[list[Tensor | None], list[bool]]:
    """Tensors with their mapped dimension moved to the front, and which of them have one."""
    moved = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims)]
    return moved, [d is not None for d in in_dims]


def _attention_vmap(info: Any, in_dims: tuple, *args: Tensor | None, **settings: Any) -> tuple[tuple, tuple]:
    if any(tensor is not None for tensor in args[NUM_TENSORS:]):
        raise NotImplementedError("vmap over attention that reads a KV cache: gather it, or dequantise it, before")
    args, in_dims = args[:NUM_TENSORS], in_dims[:NUM_TENSORS]
    missing = NUM_TENSORS - len(args)
    tensors, mapped = _in_front((*args, *([None] * missing)), (*in_dims, *([None] * missing)))
    fold = _Fold(info.batch_size, tensors, mapped, into_heads=mapped[_SINKS])
    if settings.get("dropout_p", 0.0) > 0.0:
        calls = [attention(*fold.slice(index), **settings) for index in range(info.batch_size)]
        return tuple(torch.stack(results) for results in zip(*calls)), (0, 0)
    out, lse = attention(*fold.fold(), **settings)
    return (fold.unfold(out), fold.unfold(lse)), (0, 0)


def _attention_backward_vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple, tuple]:
    moved, mapped = _in_front(args[: NUM_TENSORS + 3], in_dims[: NUM_TENSORS + 3])
    grad_out, *tensors, out, lse = moved
    settings, output_mask = args[NUM_TENSORS + 3 :], args[-1]
    wants_dbias = output_mask[3] and tensors[_BIAS] is not None
    wants_dsinks = output_mask[4] and tensors[_SINKS] is not None
    fold = _Fold(info.batch_size, tensors, mapped[1 : 1 + NUM_TENSORS], into_heads=mapped[1 + _SINKS] or wants_dsinks)
    dropout_p = settings[4]
    if dropout_p > 0.0:
        calls = []
        for index in range(info.batch_size):
            grad_i, out_i, lse_i = (
                _given(t)[index] if mapped[place] else t for place, t in ((0, grad_out), (-2, out), (-1, lse))
            )
            calls.append(attention_backward(grad_i, *fold.slice(index), out_i, lse_i, *settings))
        return tuple(torch.stack(results) for results in zip(*calls)), (0,) * 5

    grad_out, out, lse = (fold.full(_given(t), mapped[place]) for place, t in ((0, grad_out), (-2, out), (-1, lse)))
    dq, dk, dv, dbias, dsinks = attention_backward(grad_out, *fold.fold(wants_dbias), out, lse, *settings)
    results: list[Tensor] = []
    out_dims: list[int | None] = []
    for grad, wanted in zip((dq, dk, dv), output_mask):
        results.append(fold.unfold(grad) if wanted else grad)
        out_dims.append(0 if wanted else None)
    if wants_dbias:
        bias = _given(tensors[_BIAS])
        shape = bias.shape if mapped[1 + _BIAS] else (info.batch_size, *bias.shape)
        # Dims of size 1 were expanded to fold: their gradient is the sum.
        dbias = fold.unfold(dbias).to(torch.promote_types(dbias.dtype, torch.float32)).sum_to_size(shape).to(bias.dtype)
    if wants_dsinks:
        dsinks = dsinks.unflatten(0, (info.batch_size, fold.heads))
    results += [dbias, dsinks]
    out_dims += [0 if wants_dbias else None, 0 if wants_dsinks else None]
    return tuple(results), tuple(out_dims)


def _dropout_keep_mask_vmap(
    info: Any, in_dims: tuple, dropout_seed: Tensor, dropout_p: float, size: list[int]
) -> tuple[Tensor, int]:
    # Called only if the seed is mapped.
    seeds = dropout_seed.movedim(in_dims[0], 0)
    return torch.stack([dropout_keep_mask(seed, dropout_p, size) for seed in seeds]), 0


torch.library.register_vmap(f"{NAMESPACE}::attention", _attention_vmap, lib=LIBRARY)
torch.library.register_vmap(f"{NAMESPACE}::attention_backward", _attention_backward_vmap, lib=LIBRARY)
torch.library.register_vmap(f"{NAMESPACE}::dropout_keep_mask", _dropout_keep_mask_vmap, lib=LIBRARY)
