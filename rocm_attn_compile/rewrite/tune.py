"""`mode="max-autotune"`: measure a call's kernels on the device while it is compiled, and write the choice into the op.

The call runs on random tensors of the real shapes and strides, with masks that keep everything. What is measured is
stored on disk, so that the next compilation, in this or another process, measures nothing.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _torch_private
from ..backends.fingerprint import sources_digest
from ..ops.impl import parse, with_tuning
from ..ops.schemas import OPTIONAL_TENSORS
from .builder import GraphBuilder

log = logging.getLogger(__name__)

TUNERS = {"TRITON_ATTN": "rocm_attn_compile.kernels.triton.autotune"}
"""Backend name -> module with `tune`, `text_of` and `store_of`."""

DECODE_QUERIES = 16
"""Up to this many queries a call is bound by reading K and V, and must not find them in a cache."""
MAX_COPIES = 16


class Tuned(NamedTuple):
    """An `impl` argument, and what is to be said of it."""

    impl: str
    sentences: list[str]


class Tuner:
    """Tunes the calls of one graph. Equal calls, such as those of a model's layers, are measured once.

    Args:
        device: Compiles and measures instead of the GPU, also for calls on the CPU; for tests.
    """

    def __init__(self, device: Any = None) -> None:
        self._device = device
        self._known: dict[Any, Tuned] = {}

    def __call__(self, builder: GraphBuilder, impl: str, arguments: Mapping[str, Any], wants_grad: bool) -> Tuned:
        """Choose for one call of `attention`, whose arguments are given by name, without `impl`."""
        backend = parse(impl).backend
        if builder.device.type != "cuda" and self._device is None:
            return Tuned(impl, ["max-autotune: no GPU, nothing tuned"])
        if backend not in TUNERS:
            return Tuned(impl, [f"max-autotune: {backend} has nothing to tune"])
        try:
            look = {name: _numbers_of(builder.example(value)) for name, value in arguments.items()}
            key = (impl, wants_grad, tuple(look.items()))
            if key not in self._known:
                self._known[key] = self._measure(importlib.import_module(TUNERS[backend]), impl, look, wants_grad)
            return self._known[key]
        except Exception as error:  # out of memory, a size that depends on data: the shipped choice is always there
            log.warning("not tuned", exc_info=True)
            return Tuned(impl, [f"max-autotune: nothing tuned, {type(error).__name__}: {error}"])

    def _measure(self, tuner: Any, impl: str, look: Mapping[str, Any], wants_grad: bool) -> Tuned:
        device = look["q"].device
        with _torch_private.without_dispatch_modes(), torch.autocast(device.type, enabled=False), torch.no_grad():
            if device.type == "cuda":
                with torch.cuda.device(device):
                    return self._choose(tuner, impl, look, wants_grad)
            return self._choose(tuner, impl, look, wants_grad)

    def _choose(self, tuner: Any, impl: str, look: Mapping[str, Any], wants_grad: bool) -> Tuned:
        if self._device is None and torch.cuda.is_current_stream_capturing():
            return Tuned(impl, ["max-autotune: nothing tuned while a CUDA graph is captured"])
        store = tuner.store_of(look["q"].device, sources_digest())
        mask = [wants_grad] * 3 + [False] * 2
        outcomes = tuner.tune(_problems(look), mask, store, self._device or tuner.gpu())
        sentences = [f"max-autotune, {'found stored' if o.stored else 'measured'}: {o}" for o in outcomes]
        for sentence in sentences:
            log.info("%s", sentence)
        sentences.append(f"max-autotune keeps what it finds in {store.path}")
        return Tuned(with_tuning(impl, tuner.text_of(outcomes)) if outcomes else impl, sentences)


class _Look(NamedTuple):
    """A tensor to be made."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _numbers_of(example: Any) -> Any:
    """What is known of an argument, with the numbers that symbols stand for in this call."""
    if isinstance(example, Tensor):
        shape, stride = (tuple(map(_torch_private.hint, numbers)) for numbers in (example.shape, example.stride()))
        return _Look(shape, stride, example.dtype, example.device)
    return _torch_private.hint(example)


def _problems(look: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The call's arguments, as often as it takes to read K and V from memory."""
    generator = torch.Generator(look["q"].device).manual_seed(0)
    kv_len = look["k"].shape[2]
    first = {
        name: _tensor(name, value, kv_len, generator) if isinstance(value, _Look) else value
        for name, value in {**dict.fromkeys(OPTIONAL_TENSORS), **look}.items()
    }
    problems = [first]
    if look["q"].shape[2] <= DECODE_QUERIES and look["q"].device.type == "cuda":
        cache = torch.cuda.get_device_properties(look["q"].device).L2_cache_size
        size = sum(first[name].untyped_storage().nbytes() for name in "kv")
        for _ in range(min(MAX_COPIES - 1, 3 * cache // max(size, 1))):
            problems.append({**first, **{name: _tensor(name, look[name], kv_len, generator) for name in "kv"}})
    return problems


def _tensor(name: str, look: _Look, kv_len: int, generator: torch.Generator) -> Tensor:
    """Random numbers; masks keep everything."""
    # A dimension that is not in memory is expanded afterwards: nothing can be written to it.
    dense = [1 if step == 0 else size for size, step in zip(look.shape, look.stride)]
    tensor = torch.empty_strided(dense, look.stride, dtype=look.dtype, device=look.device)
    if look.dtype.is_floating_point:
        tensor.copy_(torch.randn(dense, generator=generator, device=look.device, dtype=torch.float32))
    else:
        tensor.fill_({"attn_mask": 1, "key_mask": 1, "kv_end": kv_len}.get(name, 0))
    return tensor.expand(look.shape)
