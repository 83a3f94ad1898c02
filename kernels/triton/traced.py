"""TRITON_ATTN in a compiler's trace: its kernels become calls that Inductor knows, instead of one opaque op.

Inductor then launches the kernels with its own launcher and plans their buffers, which costs the host a few
microseconds where the way through the dispatcher, Python and Triton's launcher costs tens, and hundreds where tensor
descriptors are made.

The plan of a call depends on sizes and strides only, so it is made here, on tensors without data.

PyTorch reads out of a kernel's intermediate code which tensors it writes. Where it fails it takes all for written, and
what Inductor makes of that was wrong when it happened: such a call is not traced either.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Protocol

import triton
from torch import Tensor

from . import tuned as tuned_text
from .backward_launch import backward_launches, sink_gradient
from .forward_launch import forward_launches
from .launch import Descriptor, Launch, Tuning, base_of
from .weights_launch import weights_launches

log = logging.getLogger(__name__)


class Tracer(Protocol):
    """What is asked of PyTorch. `blocks` are the block shapes of the tensors that are read through descriptors."""

    def triton_writes(self, kernel: Any, arguments: dict[str, Any], blocks: dict[str, tuple[int, ...]]) -> set[str]:
        """Names of the arguments that PyTorch says a call writes."""

    def record_triton(
        self, kernel: Any, grid: int, arguments: dict[str, Any], blocks: dict[str, tuple[int, ...]]
    ) -> None:
        """Record a call in the graph that is traced."""

    def uses_cuda_graphs(self) -> bool:
        """Whether what is traced will be captured in CUDA graphs."""


_LAUNCHER_OPTIONS = ("num_warps", "num_stages")


def attention_forward(tracer: Tracer, tuned: str, **arguments: Any) -> Any:
    """As attention.attention_forward, all arguments by name, on traced tensors of fixed sizes; or NotImplemented."""
    launches, out, lse = forward_launches(**arguments, tuning=_tuning(tuned))
    return (out, lse) if trace(launches, arguments, tracer) else NotImplemented


def attention_with_weights(
    tracer: Tracer, tensors: dict[str, Any], settings: dict[str, Any], weights_empty_rows: str, weights_dtype: Any
) -> Any:
    """As attention.attention_with_weights, on traced tensors of fixed sizes; or NotImplemented."""
    launches, out, weights = weights_launches(tensors, settings, weights_empty_rows, weights_dtype, _tuning(""))
    return (out, weights) if trace(launches, tensors, tracer) else NotImplemented


def attention_backward(tracer: Tracer, tuned: str, **arguments: Any) -> Any:
    """As attention.attention_backward, all arguments by name, on traced tensors of fixed sizes; or NotImplemented."""
    launches, tensors = backward_launches(**arguments, tuning=_tuning(tuned))
    if not trace(launches, arguments, tracer):
        return NotImplemented
    sinks = arguments["sinks"]
    if sinks is not None and arguments["output_mask"][4]:
        dsinks = sink_gradient(sinks, arguments["lse"], tensors["delta"], tensors["correction"])
    else:
        dsinks = arguments["q"].new_empty((0,))
    return tensors["dq"], tensors["dk"], tensors["dv"], tensors["dbias"], dsinks


@functools.lru_cache(maxsize=1024)
def _tuning(text: str) -> Tuning:
    return Tuning(traced=True, chosen=tuned_text.decode(text))


def trace(launches: list[Launch], arguments: dict[str, Any], tracer: Tracer) -> bool:
    """Trace the launches of a call with these arguments; False, and nothing traced, where that cannot be right."""
    if not all(_is_plain(value) for launch in launches for value in launch.arguments.values()):
        return False
    # Inductor cannot launch a kernel in Gluon.
    if any(launch.kernel.is_gluon() for launch in launches if hasattr(launch.kernel, "is_gluon")):
        return False
    # Of float8.py's assembly PyTorch would say that it may write anything.
    if any(launch.arguments.get("FLOAT8_ASM") for launch in launches):
        return False
    given = {id(value) for value in arguments.values() if isinstance(value, Tensor)}
    kernels = [_with_options(launch.kernel, tuple(sorted(launch.options.items()))) for launch in launches]
    if not all(_is_understood(kernel, launch, given, tracer) for kernel, launch in zip(kernels, launches)):
        return False
    for kernel, launch in zip(kernels, launches):
        tensors = {k: base_of(v) for k, v in launch.arguments.items()}
        tracer.record_triton(kernel, launch.grid, tensors, _blocks(launch))
    return True


def _blocks(launch: Launch) -> dict[str, tuple[int, ...]]:
    return {k: v.block_shape for k, v in launch.arguments.items() if isinstance(v, Descriptor)}


def _is_plain(value: Any) -> bool:
    """False for a descriptor of a kernel in Gluon, which Inductor cannot launch, or unlike its tensor.

    `as_strided` could give it a tensor with the same sizes and strides. But where the tensor becomes an input of a
    compiled program and starts inside its storage, Inductor counts the offset twice.
    """
    if not isinstance(value, Descriptor):
        return True
    return not value.swizzle and (tuple(value.base.shape), value.base.stride()) == (value.shape, value.strides)


_understood: dict[Any, bool] = {}


def _is_understood(kernel: Any, launch: Launch, given: set[int], tracer: Tracer) -> bool:
    """Whether PyTorch knows that the launch writes something, and none of the `given` tensors; remembered."""
    blocks = _blocks(launch)
    bases = {k: base_of(v) for k, v in launch.arguments.items()}
    described = tuple((k, v.dtype if isinstance(v, Tensor) else v, blocks.get(k)) for k, v in bases.items())
    inputs = frozenset(k for k, v in bases.items() if id(v) in given)
    key = (kernel, described, inputs)
    if key not in _understood:
        written = tracer.triton_writes(kernel, bases, blocks)
        _understood[key] = bool(written) and not written & inputs
        if not _understood[key]:
            log.warning("%s is not inlined: PyTorch says that it writes %s", launch.kernel.__name__, sorted(written))
    return _understood[key]


@functools.lru_cache(maxsize=1024)
def _with_options(kernel: Any, options: tuple[tuple[str, Any], ...]) -> Any:
    """The kernel with its compile options, in the one form in which Inductor takes them: an autotuner of one choice."""
    named = dict(options)
    launcher = {name: named.pop(name) for name in _LAUNCHER_OPTIONS}
    return triton.autotune([triton.Config(named, **launcher)], key=[])(kernel)
