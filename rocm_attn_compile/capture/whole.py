"""Attention and dropout calls, recorded whole: below these names every device has its own decomposition.

Of linear layers, which are not run at all, only the factors are recorded.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F

from rocm_attn_compile import _torch_private
from rocm_attn_compile.capture import policy
from rocm_attn_compile.capture.memory import Look, Memory
from rocm_attn_compile.capture.recorder import Recorder
from rocm_attn_compile.symbolic import same_size

SPELLINGS = policy.SDPA | policy.DROPOUT | policy.DROPOUT_IN_PLACE | policy.NATIVE_DROPOUT
"""Call targets that `record` takes."""

_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_SDPA_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}

_LINEAR = frozenset({F.linear, torch.ops.aten.linear.default})


def factors(memory: Memory, target: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """`{"linear": (input, weight, bias or None)}` as Values for a call of `F.linear`, None for another call."""
    if target not in _LINEAR:
        return None
    call = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    return {"linear": memory.as_values((call["input"], call["weight"], call.get("bias")))}


def record(recorder: Recorder, target: Any, args: tuple, kwargs: dict[str, Any], like: torch.Tensor | None) -> Any:
    """Record one call of `SPELLINGS` and return its result.

    Args:
        recorder: The active recorder.
        target: What is called.
        args, kwargs: Fakes and numbers.
        like: A new fake that looks like the result, if the graph tells; else the call is run to see.
    """
    if target in policy.SDPA:
        return _record_sdpa(recorder, target, args, kwargs, like)
    return _record_dropout(recorder, target, args, kwargs, like)


def _record_sdpa(
    recorder: Recorder, target: Any, args: tuple, kwargs: dict[str, Any], like: torch.Tensor | None
) -> Any:
    call = {**_SDPA_DEFAULTS, **dict(zip(_SDPA_ARGUMENTS, args, strict=False)), **kwargs}
    for name in ("query", "key", "value", "attn_mask"):
        if isinstance(call[name], torch.Tensor):
            call[name] = _autocast(call[name])
    if like is None:
        tensors = {name: call[name] for name in ("query", "key", "value")}
        others = {name: call[name] for name in _SDPA_DEFAULTS}
        like = recorder.without_recording(target, *tensors.values(), **others)
    _guard_equal_sizes(call)
    memory = recorder.memory
    values = {name: memory.as_values(call[name]) for name in _SDPA_ARGUMENTS}
    memory.own(like, memory.new_value("sdpa", (), values, Look.of(like)))
    return like


def _guard_equal_sizes(call: dict[str, Any]) -> None:
    """Have Dynamo guard what `F.scaled_dot_product_attention` relies on: keys are as many as values, and the like.

    Nothing in PyTorch does where its fused kernels take the call. The lengths of a cache's keys and values, and of each
    layer's, are then symbols of their own, which are equal in every valid call. Sizes that differ now are left alone.
    """
    query, key, value, mask = (call[name] for name in ("query", "key", "value", "attn_mask"))
    if not all(isinstance(tensor, torch.Tensor) and tensor.ndim >= 2 for tensor in (query, key, value)):
        return
    pairs = [(key.shape[-2], value.shape[-2]), (query.shape[-1], key.shape[-1])]
    if isinstance(mask, torch.Tensor) and mask.ndim >= 2:
        pairs += [(mask.shape[-1], key.shape[-2]), (mask.shape[-2], query.shape[-2])]
        pairs += zip(reversed(mask.shape[:-2]), reversed(query.shape[:-2]), strict=False)
    heads = -3 if call["enable_gqa"] else -2
    pairs += zip(reversed(key.shape[:heads]), reversed(value.shape[:heads]), strict=False)
    pairs += zip(reversed(query.shape[:heads]), reversed(key.shape[:heads]), strict=False)
    for left, right in pairs:
        if isinstance(left, torch.SymInt) and isinstance(right, torch.SymInt) and not same_size(left, right):
            with suppress(ValueError):  # a size that depends on data
                if _torch_private.hint(left) == _torch_private.hint(right):
                    bool(left == right)


def _autocast(tensor: torch.Tensor) -> torch.Tensor:
    """The cast that autocast makes for F.scaled_dot_product_attention, as a recorded call."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensor
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _record_dropout(
    recorder: Recorder, target: Any, args: tuple, kwargs: dict[str, Any], like: torch.Tensor | None
) -> Any:
    call = dict(zip(("input", "p", "training", "inplace"), args, strict=False))
    call.update({"training" if name == "train" else name: value for name, value in kwargs.items()})
    tensor, p = call["input"], call.get("p", 0.5)
    # native_dropout's `train` may be None, which means True.
    training = call.get("training") is not False
    memory = recorder.memory
    returns_mask = target in policy.NATIVE_DROPOUT
    is_identity = not training or (isinstance(p, (int, float)) and p == 0)
    if is_identity and not returns_mask:
        return tensor  # as eager: the very same tensor
    value = memory.new_value("dropout", (memory.value_of(tensor), p, training), {}, Look.of(tensor))
    if call.get("inplace") or target in policy.DROPOUT_IN_PLACE:
        memory.write(memory.state_of(tensor), value)
        return tensor
    if returns_mask:
        out = recorder.without_recording(torch.empty_like, tensor)
        mask = recorder.without_recording(torch.empty_like, tensor, dtype=torch.bool)
        memory.own(out, value)
        memory.leaf("opaque", mask)
        return out, mask
    out = like if like is not None else recorder.without_recording(torch.empty_like, tensor)
    memory.own(out, value)
    return out
