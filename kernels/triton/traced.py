"""TRITON_ATTN in a compiler's trace: its kernels become calls that Inductor knows, instead of one opaque op.

Inductor then launches the kernels with its own launcher and plans their buffers, which costs the host a few
microseconds where the way through the dispatcher, Python and Triton's launcher costs tens, and hundreds where tensor
descriptors are made.

The plan of a call depends on sizes and strides only, so it is made here, on tensors without data. Batch size, lengths
and strides may be symbols (sizes.py); grids and kernels' arguments are computed from them at each call then.

PyTorch reads out of a kernel's intermediate code which tensors it writes. Where it fails it takes all for written, and
what Inductor makes of that was wrong when it happened: such a call is not traced either.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

from . import backward_hopper_launch, configs, forward_hopper_launch
from . import tuned as tuned_text
from .backward_launch import backward_launches, sink_gradient
from .forward_launch import forward_launches
from .launch import Descriptor, Launch, Tuning, base_of, device_arch, is_gluon
from .sizes import Hint, has_symbols, is_number
from .weights_launch import weights_launches

log = logging.getLogger(__name__)


class Tracer(Protocol):
    """What is asked of PyTorch. `blocks` are the block shapes of the tensors that are read through descriptors."""

    def triton_writes(self, kernel: Any, arguments: dict[str, Any], blocks: dict[str, tuple[int, ...]]) -> set[str]:
        """Names of the arguments that PyTorch says a call writes."""

    def record_triton(
        self, kernel: Any, grid: Any, arguments: dict[str, Any], blocks: dict[str, tuple[int, ...]]
    ) -> None:
        """Record a call in the graph that is traced."""

    def hint(self, number: Any) -> int:
        """The value of a symbol in the call that is compiled; ValueError where it has none."""

    def uses_cuda_graphs(self) -> bool:
        """Whether what is traced will be captured in CUDA graphs."""


_LAUNCHER_OPTIONS = ("num_warps", "num_stages")


class StaysOpaque(Exception):
    """Why a call cannot be written out, or had better not."""


def written_out(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which gives NotImplemented, and says why in the log, where it raises StaysOpaque."""

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except StaysOpaque as why:
            log.info("%s stays one opaque call: %s", function.__name__, why)
            return NotImplemented

    return traced


@written_out
def attention_forward(tracer: Tracer, tuned: str, **arguments: Any) -> Any:
    """As attention.attention_forward, all arguments by name, on traced tensors; or NotImplemented."""
    hint = hint_of(arguments, tracer, _fixed(**arguments))
    leave_to_hopper(hint, forward_hopper_launch.FASTER, **arguments)
    tuning = _tuning(tuned, hint, tracer.uses_cuda_graphs())
    launches, out, lse = forward_launches(**arguments, tuning=tuning)
    trace(launches, arguments, tracer)
    return out, lse


@written_out
def attention_with_weights(
    tracer: Tracer, tensors: dict[str, Any], settings: dict[str, Any], weights_empty_rows: str, weights_dtype: Any
) -> Any:
    """As attention.attention_with_weights, on traced tensors of fixed sizes; or NotImplemented."""
    launches, out, weights = weights_launches(tensors, settings, weights_empty_rows, weights_dtype, _tuning(""))
    trace(launches, tensors, tracer)
    return out, weights


@written_out
def attention_backward(tracer: Tracer, tuned: str, **arguments: Any) -> Any:
    """As attention.attention_backward, all arguments by name, on traced tensors; or NotImplemented."""
    hint = hint_of(arguments, tracer, _fixed(**arguments))
    leave_to_hopper(hint, backward_hopper_launch.FASTER, **arguments)
    launches, tensors = backward_launches(**arguments, tuning=_tuning(tuned, hint))
    trace(launches, arguments, tracer)
    sinks = arguments["sinks"]
    if sinks is not None and arguments["output_mask"][4]:
        dsinks = sink_gradient(sinks, arguments["lse"], tensors["delta"], tensors["correction"])
    else:
        dsinks = arguments["q"].new_empty((0,))
    return tensors["dq"], tensors["dk"], tensors["dv"], tensors["dbias"], dsinks


@functools.lru_cache(maxsize=1024)
def _tuning(text: str, hint: Hint = int, replayed: bool = False) -> Tuning:
    return Tuning(traced=True, replayed=replayed, chosen=tuned_text.decode(text), hint=hint)


def _fixed(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor | None = None, **_: Any) -> tuple[Any, ...]:
    """Sizes of an attention by which its kernels are compiled."""
    return (q.shape[1], q.shape[3], k.shape[1], v.shape[3], 0 if block_table is None else k.shape[2])


def leave_to_hopper(
    hint: Hint, faster: dict[forward_hopper_launch.Blocks, int], q: Tensor, k: Tensor, v: Tensor, rope: int = 0,
    **_: Any,
) -> None:  # fmt: skip
    """Raise where a call has symbols and is long, so that Hopper's own kernels may take it, decided at each call.

    One that is shorter while it is compiled is written out, for longer ones, too.

    Args:
        faster: From how many products on they do, by blocks; blocks without an entry they do not take.
        rope: Width of the second piece of latent attention's queries and keys.
    """
    arch, itemsize = device_arch(q.device)[0], q.element_size()
    if not has_symbols(hint) or not configs.has_hopper_kernels(arch):
        return
    (batch, num_heads, q_len, head_dim), v_head_dim = q.shape, v.shape[3]
    if rope:
        blocks = configs.rope_blocks(arch, itemsize, head_dim, rope, v_head_dim)
    else:
        blocks = configs.head_blocks(arch, itemsize, head_dim, v_head_dim)
    sizes = hint(batch), num_heads, hint(q_len), hint(k.shape[2]), head_dim + rope + v_head_dim
    products = forward_hopper_launch.products(*sizes)
    if products >= faster.get(blocks, math.inf):
        raise StaysOpaque(
            f"with {products} products in the call at hand kernels in Gluon may take it; lengths are symbols"
        )


def hint_of(arguments: dict[str, Any], tracer: Tracer, fixed: tuple[Any, ...]) -> Hint:
    """`Tuning.hint` for a call with these arguments.

    Raises:
        StaysOpaque: A plan would need numbers that are not there: one of `fixed` is a symbol, or a symbol has no value
            before data are read.
    """
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    numbers = [number for tensor in tensors for number in (*tensor.shape, *tensor.stride(), tensor.storage_offset())]
    numbers += [value for value in arguments.values() if isinstance(value, torch.SymInt)]
    if is_number(*numbers):
        return int
    if not is_number(*fixed):
        raise StaysOpaque(f"kernels are compiled by numbers of heads and widths, and one of {fixed} is a symbol")
    try:
        for number in numbers:
            tracer.hint(number)
    except ValueError as error:
        raise StaysOpaque(str(error)) from error
    return tracer.hint


def trace(launches: list[Launch], arguments: dict[str, Any], tracer: Tracer) -> None:
    """Trace the launches of a call with these arguments.

    Raises:
        StaysOpaque: That cannot be right; nothing is traced.
    """
    if any(is_gluon(launch.kernel) for launch in launches):
        raise StaysOpaque("Inductor cannot launch a kernel in Gluon, which is faster")
    for launch in launches:
        for name, value in launch.arguments.items():
            if not _is_plain(value):
                raise StaysOpaque(f"Inductor makes tensor descriptors of a tensor's own strides only, not as {name}'s")
    if any(launch.arguments.get("FLOAT8_ASM") for launch in launches):
        raise StaysOpaque("of the assembly that converts float8 PyTorch says that it may write anything")
    given = {id(value) for value in arguments.values() if isinstance(value, Tensor)}
    kernels = [_with_options(launch.kernel, tuple(sorted(launch.options.items()))) for launch in launches]
    for kernel, launch in zip(kernels, launches):
        if not _is_understood(kernel, launch, given, tracer):
            raise StaysOpaque(f"PyTorch misreads what {launch.kernel.__name__} writes")
    for kernel, launch in zip(kernels, launches):
        tensors = {k: base_of(v) for k, v in launch.arguments.items()}
        tracer.record_triton(kernel, launch.grid, tensors, _blocks(launch))


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
    bases = {k: tracer.hint(v) if isinstance(v, torch.SymInt) else v for k, v in bases.items()}
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
