"""TRITON_ATTN in a compiler's trace: its kernels become calls that Inductor knows, instead of one opaque op.

Inductor then launches the kernels with its own launcher and plans their buffers, which costs the host a few
microseconds where the way through the dispatcher, Python and Triton's launcher costs tens. A call that is long enough
to read through tensor descriptors hides that way, and stays as it is.

The plan of a call depends on sizes and strides only, so it is made here, on tensors without data.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
from torch import Tensor
from torch.library import wrap_triton

from . import configs
from .backward_launch import backward_launches, sink_gradient
from .forward_launch import forward_launches
from .launch import MIN_TMA_SCORES, PACK_ROWS, Launch, Tuning, device_arch

_LAUNCHER_OPTIONS = ("num_warps", "num_stages")
_PLAIN = Tuning(plain=True)


def takes(q: Tensor, k: Tensor, **_others: Any) -> bool:
    """Whether a call with these arguments is worth it; the rest of the op's arguments does not matter."""
    batch, num_heads, q_len, _ = q.shape
    _, kv_heads, kv_len, _ = k.shape
    is_decode = q_len * (num_heads // kv_heads) <= PACK_ROWS
    is_short = batch * num_heads * q_len * kv_len < MIN_TMA_SCORES
    return is_decode or is_short or not configs.reads_descriptors(device_arch(q.device)[0])


def attention_forward(**arguments: Any) -> tuple[Tensor, Tensor]:
    """As attention.attention_forward, all arguments by name, on traced tensors of fixed sizes."""
    launches, out, lse = forward_launches(**arguments, tuning=_PLAIN)
    _trace(launches)
    return out, lse


def attention_backward(**arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As attention.attention_backward, all arguments by name, on traced tensors of fixed sizes."""
    launches, tensors = backward_launches(**arguments, tuning=_PLAIN)
    _trace(launches)
    sinks = arguments["sinks"]
    if sinks is not None and arguments["output_mask"][4]:
        dsinks = sink_gradient(sinks, arguments["lse"], tensors["delta"], tensors["correction"])
    else:
        dsinks = arguments["q"].new_empty((0,))
    return tensors["dq"], tensors["dk"], tensors["dv"], tensors["dbias"], dsinks


def _trace(launches: list[Launch]) -> None:
    for launch in launches:
        kernel = _with_options(launch.kernel, tuple(sorted(launch.options.items())))
        wrap_triton(kernel)[(launch.grid,)](**launch.arguments)


@functools.lru_cache(maxsize=1024)
def _with_options(kernel: Any, options: tuple[tuple[str, Any], ...]) -> Any:
    """The kernel with its compile options, in the one form in which Inductor takes them: an autotuner of one choice."""
    named = dict(options)
    launcher = {name: named.pop(name) for name in _LAUNCHER_OPTIONS}
    return triton.autotune([triton.Config(named, **launcher)], key=[])(kernel)
