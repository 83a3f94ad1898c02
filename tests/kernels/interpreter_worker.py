"""Runs the launchers under Triton's interpreter, in a process of its own.

TRITON_INTERPRET must be set before triton is first imported, and then holds for the whole process; the pytest process
needs the compiler (test_aot.py). So the tests talk to this worker: requests and replies are written by torch.save,
length-prefixed.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import subprocess
import sys
import traceback
from typing import Any

import torch


class InterpreterWorker:
    """The parent's side: start, call, close."""

    def __init__(self) -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def call(self, function: str, **arguments: Any) -> Any:
        """Run a function of this file, such as `forward`, in the worker.

        Raises:
            RuntimeError: With the worker's traceback.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        write_message(self.process.stdin, (function, arguments))
        failed, reply = read_message(self.process.stdout)
        if failed:
            raise RuntimeError(reply)
        return reply

    def close(self) -> None:
        """End the worker."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def write_message(stream: Any, value: Any) -> None:
    """Send one value."""
    # Not pickle, which cannot restore tensors of float8.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    data = buffer.getvalue()
    stream.write(struct.pack("<q", len(data)) + data)
    stream.flush()


def read_message(stream: Any) -> Any:
    """Receive one value; EOFError when the other side has closed."""
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError
    return torch.load(io.BytesIO(stream.read(struct.unpack("<q", header)[0])), weights_only=False)


def add_bfloat16_dot() -> None:
    """Triton's interpreter keeps bfloat16 as uint16 and multiplies those numbers in tl.dot; widen them first."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (
                interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) for x in (a, b)
            )
        return original(self, a, b, d, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def forward(tuning: dict[str, Any] | None, **arguments: Any) -> Any:
    """`(out, lse)`; `tuning` as keyword arguments of launch.Tuning. Outputs are filled with NaN before the launch."""
    from rocm_attn_compile.kernels.triton.forward_launch import forward_launches
    from rocm_attn_compile.kernels.triton.launch import Tuning

    launches, out, lse = forward_launches(**arguments, tuning=Tuning(**_overrides(tuning)) if tuning else None)
    if launches:
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
    for launch in launches:
        launch.run()
    return out, lse


def _overrides(tuning: dict[str, Any] | None) -> dict[str, Any]:
    """Keyword arguments of launch.Tuning, of which the configuration came as a tuple."""
    from rocm_attn_compile.kernels.triton.configs import KernelConfig

    tuning = tuning or {}
    return {**tuning, "config": KernelConfig(*tuning["config"])} if "config" in tuning else tuning


def symbolic_forward(
    hints: dict[str, Any], tuning: dict[str, Any] | None, bottom_right: bool = False, **arguments: Any
) -> Any:
    """As `forward`, planned at the sizes of `hints`, other tensors of the same names, with symbols. See Symbols.

    Also the number of splits of each kernel by name. `bottom_right`: the band's upper edge is the difference of the
    lengths.
    """
    from symbolic_launches import Symbols

    from rocm_attn_compile.kernels.triton.forward_launch import forward_launches

    tensors = {name: arguments.pop(name) for name in hints}
    symbols = Symbols(hints, tensors)
    if bottom_right:
        arguments["band_upper"] = symbols.fakes["k"].shape[2] - symbols.fakes["q"].shape[2]
    out, lse = symbols.run(forward_launches, _overrides(tuning), **arguments)
    return out, lse, {x.kernel.__name__: x.arguments.get("num_splits") for x in symbols.launches}


def symbolic_backward(hints: dict[str, Any], ranged: bool | None, is_free: bool, **arguments: Any) -> Any:
    """The five gradients, planned as in `symbolic_forward`; unwanted ones have no elements."""
    from symbolic_launches import Symbols

    from rocm_attn_compile.kernels.triton.backward_launch import backward_launches, sink_gradient

    symbols = Symbols(hints, {name: arguments.pop(name) for name in hints})

    def plan(**given: Any) -> Any:
        launches, tensors = backward_launches(**given)
        return launches, *(tensors[name] for name in ("dq", "dk", "dv", "dbias", "delta", "correction"))

    *gradients, delta, correction = symbols.run(plan, {"ranged": ranged}, is_free, **arguments, output_mask=[True] * 5)
    sinks = symbols.value(symbols.fakes["sinks"])
    if sinks is None:
        return *gradients, delta.new_empty((0,))
    return *gradients, sink_gradient(sinks, symbols.value(symbols.fakes["lse"]), delta, correction)


def weights(weights_dtype: torch.dtype, tuning: dict[str, Any] | None, **arguments: Any) -> Any:
    """`(out, weights)` of all tensors and scalars by name; both are filled with NaN before the launch."""
    from rocm_attn_compile.kernels.triton.configs import KernelConfig
    from rocm_attn_compile.kernels.triton.launch import Tuning
    from rocm_attn_compile.kernels.triton.weights_launch import weights_launches

    names = ("softmax_scale", "logits_soft_cap", "band_lower", "band_upper", "empty_rows", "out_layout")
    settings = {name: arguments.pop(name) for name in names}
    found = Tuning(config=KernelConfig(*tuning["config"])) if tuning else None
    launches, out, weights = weights_launches(arguments, settings, settings["empty_rows"], weights_dtype, found)
    for tensor in (out, weights) if launches else ():
        tensor.fill_(float("nan"))
    for launch in launches:
        launch.run()
    return out, weights


def backward(ranged: bool | None, **arguments: Any) -> Any:
    """The five gradients; `ranged` as in launch.Tuning."""
    from rocm_attn_compile.kernels.triton import mask_ranges_launch
    from rocm_attn_compile.kernels.triton.attention import attention_backward

    least = mask_ranges_launch.MIN_SCORES
    mask_ranges_launch.MIN_SCORES = 0 if ranged else least
    try:
        return attention_backward(**arguments)
    finally:
        mask_ranges_launch.MIN_SCORES = least


def backward_in_two(**arguments: Any) -> Any:
    """dq, dk, dv as behind Hopper's own kernels: rows without keys are added to what the others have given.

    Also whether any head has rows to add.
    """
    from rocm_attn_compile.kernels.triton.backward_launch import backward_launches

    launches, tensors = backward_launches(**arguments, output_mask=[True, True, True, False, False])
    launches[0].run()
    for launch in launches[1:]:
        mode, launch.arguments["EMPTY_ROWS"] = launch.arguments["EMPTY_ROWS"], 0
        launch.run()
        launch.arguments.update(EMPTY_ROWS=mode, ONLY_EMPTY=True, RANGED=False, ranges=None)
        launch.run()
    return *(tensors[name] for name in ("dq", "dk", "dv")), bool(launches[0].arguments["any_empty"].any())


def mask_ranges(block_m: int, block_n: int, by_key: bool, numbers_at_once: int, **arguments: Any) -> Any:
    """The ranges, `(B, blocks, 4)`; q_len, kv_len, the band and the masks as mask_ranges_kernel's.

    Unless `by_key` also those that key_ranges_kernel makes of them.
    """
    from rocm_attn_compile.kernels.triton import mask_ranges_launch

    mask_ranges_launch.NUMBERS_AT_ONCE = numbers_at_once
    letters = {"key_mask": "key_n", "kv_start": "start_m", "kv_end": "end_m", "q_ids": "qid_m", "kv_ids": "kid_n"}
    for name, letter in letters.items():
        mask = arguments[name]
        strides = (None, None) if mask is None else mask.stride()
        arguments.update(zip((f"stride_{letter[:-1]}b", f"stride_{letter}"), strides))
    for flag, name in {"START": "kv_start", "END": "kv_end", "KEY_MASK": "key_mask", "IDS": "q_ids",
                       "LOWER": "band_lower", "UPPER": "band_upper"}.items():  # fmt: skip
        arguments[f"HAS_{flag}"] = arguments[name] is not None
    batch = next(arguments[name].shape[0] for name in letters if arguments[name] is not None)
    launch = mask_ranges_launch.ranges_launch({**arguments, "batch_size": batch}, block_m, block_n, by_key)
    launch.arguments["ranges"].fill_(-77)
    launch.run()
    ranges = launch.arguments["ranges"].view(batch, -1, 4)
    if by_key:
        return ranges
    launch = mask_ranges_launch.key_ranges_launch(launch)
    launch.arguments["key_ranges"].fill_(-77)
    launch.run()
    return ranges, launch.arguments["key_ranges"].view(batch, -1, 4)


def autotune(
    store: dict[str, Any], times: dict[str, float], corrupt: str, failing: str, wants_grad: bool, **arguments: Any
) -> Any:
    """`(outcomes as dicts, store, timed configurations)` of tuning a call with a timer that reads from `times`.

    A configuration not named there takes 100 us. The one in `corrupt` gives a wrong result, the one in `failing` none.
    """
    from rocm_attn_compile.kernels.triton import autotune as module
    from rocm_attn_compile.kernels.triton import tuned
    from rocm_attn_compile.kernels.triton.launch import Launch

    def name_of(launch: Launch) -> str:
        assert launch.config is not None
        return f"{launch.direction}={tuned.encode_one(launch.config, launch.arguments['TMA'])}"

    timed: list[str] = []

    class Timer:
        def compile(self, launches: Any) -> None:
            pass

        def microseconds(self, launches: Any) -> float:
            timed.append(name_of(launches[0]))
            return times.get(timed[-1], 100.0)

    run = Launch.run

    def faulty(launch: Launch) -> None:
        if launch.direction and name_of(launch) == failing:
            raise RuntimeError("out of resource: shared memory")
        run(launch)
        if launch.direction and name_of(launch) == corrupt:
            launch.arguments["out" if "out" in launch.arguments else "grad_q"].mul_(1.05)

    Launch.run = faulty  # type: ignore[method-assign]
    try:
        outcomes = module.tune([arguments], [wants_grad] * 3 + [False] * 2, store, Timer())
    finally:
        Launch.run = run  # type: ignore[method-assign]
    text = module.text_of(outcomes)
    rows = [{"direction": o.direction, "stored": o.stored, "text": str(o), **o.to_dict()} for o in outcomes]
    return rows, store, timed, text


def mla_decode(tuning: dict[str, Any] | None, **arguments: Any) -> Any:
    """`(out, lse)` of latent attention, absorbed; as `forward`."""
    from rocm_attn_compile.kernels.triton.launch import Tuning
    from rocm_attn_compile.kernels.triton.mla_decode_launch import mla_decode_launches

    launches, out, lse = mla_decode_launches(**arguments, tuning=Tuning(**tuning) if tuning else None)
    if launches:
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
    for launch in launches:
        launch.run()
    return out, lse


def symbolic_mla_decode(hints: dict[str, Any], tuning: dict[str, Any] | None, **arguments: Any) -> Any:
    """As `mla_decode`, planned as in `symbolic_forward`; also the number of splits of each kernel by name."""
    from symbolic_launches import Symbols

    from rocm_attn_compile.kernels.triton.mla_decode_launch import mla_decode_launches

    symbols = Symbols(hints, {name: arguments.pop(name) for name in hints})
    out, lse = symbols.run(mla_decode_launches, tuning or {}, **arguments)
    return out, lse, {x.kernel.__name__: x.arguments["num_splits"] for x in symbols.launches}


def mla_prefill(**arguments: Any) -> Any:
    """`(out, lse)`."""
    from rocm_attn_compile.kernels.triton import mla

    return mla.mla_prefill(**arguments)


def mla_prefill_backward(**arguments: Any) -> Any:
    """The five gradients."""
    from rocm_attn_compile.kernels.triton import mla

    return mla.mla_prefill_backward(**arguments)


def serve() -> None:
    """Answer requests until stdin is closed."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = io.TextIOWrapper(open(os.devnull, "wb"))  # noqa: SIM115 - nothing may disturb the replies
    add_bfloat16_dot()
    with contextlib.suppress(EOFError):
        while True:
            function, arguments = read_message(source)
            try:
                reply = False, globals()[function](**arguments)
            except BaseException:
                reply = True, traceback.format_exc()
            write_message(sink, reply)


if __name__ == "__main__":
    serve()
