"""TRITON_ATTN in a compiler's trace: its kernels become calls that Inductor knows, instead of one opaque op.

Inductor then launches the kernels with its own launcher and plans their buffers, which costs the host a few
microseconds where the way through the dispatcher, Python and Triton's launcher costs tens. A call that is long enough
to read through tensor descriptors hides that way, and stays as it is.

The plan of a call depends on sizes and strides only, so it is made here, on tensors without data.

PyTorch reads out of a kernel's intermediate code which tensors it writes. Where it fails it takes all for written, and
what Inductor makes of that was wrong when it happened: such a call is not traced either.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor
from torch.library import wrap_triton

from . import configs
from .backward_launch import backward_launches, sink_gradient
from .forward_launch import forward_launches
from .launch import MIN_TMA_SCORES, PACK_ROWS, Launch, Tuning, device_arch

log = logging.getLogger(__name__)

Writes = Callable[[Any, dict[str, Any]], set[str]]
"""From a kernel and its arguments to the names of those that PyTorch says it writes."""

_LAUNCHER_OPTIONS = ("num_warps", "num_stages")
_PLAIN = Tuning(plain=True)


def takes(q: Tensor, k: Tensor, **_others: Any) -> bool:
    """Whether a call with these arguments is worth it; the rest of the op's arguments does not matter."""
    batch, num_heads, q_len, _ = q.shape
    _, kv_heads, kv_len, _ = k.shape
    is_decode = q_len * (num_heads // kv_heads) <= PACK_ROWS
    is_short = batch * num_heads * q_len * kv_len < MIN_TMA_SCORES
    return is_decode or is_short or not configs.reads_descriptors(device_arch(q.device)[0])


def attention_forward(writes: Writes, **arguments: Any) -> Any:
    """As attention.attention_forward, all arguments by name, on traced tensors of fixed sizes; or NotImplemented."""
    launches, out, lse = forward_launches(**arguments, tuning=_PLAIN)
    return (out, lse) if _trace(launches, arguments, writes) else NotImplemented


def attention_backward(writes: Writes, **arguments: Any) -> Any:
    """As attention.attention_backward, all arguments by name, on traced tensors of fixed sizes; or NotImplemented."""
    launches, tensors = backward_launches(**arguments, tuning=_PLAIN)
    if not _trace(launches, arguments, writes):
        return NotImplemented
    sinks = arguments["sinks"]
    if sinks is not None and arguments["output_mask"][4]:
        dsinks = sink_gradient(sinks, arguments["lse"], tensors["delta"], tensors["correction"])
    else:
        dsinks = arguments["q"].new_empty((0,))
    return tensors["dq"], tensors["dk"], tensors["dv"], tensors["dbias"], dsinks


def _trace(launches: list[Launch], arguments: dict[str, Any], writes: Writes) -> bool:
    """Trace the launches of a call with these arguments; False, and nothing traced, if PyTorch misreads one."""
    given = {id(value) for value in arguments.values() if isinstance(value, Tensor)}
    kernels = [_with_options(launch.kernel, tuple(sorted(launch.options.items()))) for launch in launches]
    if not all(_is_understood(kernel, launch, given, writes) for kernel, launch in zip(kernels, launches)):
        return False
    for kernel, launch in zip(kernels, launches):
        wrap_triton(kernel)[(launch.grid,)](**launch.arguments)
    return True


_understood: dict[Any, bool] = {}


def _is_understood(kernel: Any, launch: Launch, given: set[int], writes: Writes) -> bool:
    """Whether PyTorch knows that the launch writes something, and none of the `given` tensors; remembered."""
    described = tuple((k, v.dtype if isinstance(v, Tensor) else v) for k, v in launch.arguments.items())
    inputs = frozenset(k for k, v in launch.arguments.items() if id(v) in given)
    key = (kernel, described, inputs)
    if key not in _understood:
        written = writes(kernel, launch.arguments)
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
