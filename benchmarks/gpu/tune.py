"""Try launch configurations of our kernels on the shapes of the benchmark table; prints a ranking per shape.

    python benchmarks/gpu/tune.py [--only forward,backward_kv,backward_k,backward_v,backward_q,decode] [--shape TEXT]

What wins goes into kernels/triton/configs.py by hand, after benchmarks/gpu/check_triton.py has passed with it. Nearly
all of the time is compilation, so that is done first, in several processes.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import check_triton as base
import torch

PACKAGE = base.launch.__name__.rsplit(".", 1)[0]
KERNELS = {
    "forward": "attention_forward_kernel",
    "decode": "attention_forward_kernel",
    "backward_kv": "backward_dkdv_kernel",
    "backward_k": "backward_dkdv_kernel",
    "backward_v": "backward_dkdv_kernel",
    "backward_q": "backward_dq_kernel",
}
# head_dim: (block_m, block_n, num_warps, num_stages, merged, tma)
CANDIDATES: dict[str, dict[int, list[tuple]]] = {
    "forward": {
        64: [(64, 128, 4, 2, 0, 1), (64, 128, 4, 2, 1, 1), (128, 128, 4, 3, 0, 1), (128, 64, 4, 3, 0, 0)],
        96: [
            (64, 64, 4, 2, 0, 1), (64, 64, 4, 2, 1, 1), (128, 64, 4, 2, 0, 1), (128, 64, 4, 2, 1, 1),
            (64, 64, 4, 3, 1, 1), (128, 128, 8, 2, 1, 1), (64, 64, 4, 3, 0, 0),
        ],
        128: [
            (128, 64, 4, 2, 0, 1), (128, 64, 4, 2, 1, 1), (128, 128, 8, 3, 0, 1), (128, 128, 8, 3, 1, 1),
            (128, 64, 8, 3, 0, 0), (128, 128, 8, 2, 0, 0), (64, 64, 4, 3, 0, 0), (128, 64, 8, 3, 1, 0),
        ],
        192: [(128, 128, 8, 2, 0, 1), (128, 128, 8, 2, 1, 1), (128, 64, 8, 3, 1, 1), (128, 64, 8, 2, 0, 0)],
        256: [(128, 64, 8, 2, 0, 1), (128, 64, 8, 2, 1, 1), (128, 64, 8, 2, 0, 0)],
    },
    "backward_kv": {
        64: [
            (64, 64, 4, 3, 0, 1), (64, 64, 4, 3, 1, 1), (64, 64, 4, 2, 0, 1), (128, 64, 4, 2, 0, 1),
            (32, 128, 4, 3, 0, 1), (64, 64, 4, 4, 0, 1),
        ],
        96: [
            (64, 64, 4, 2, 0, 1), (64, 64, 4, 2, 1, 1), (64, 64, 4, 3, 0, 1), (64, 128, 8, 2, 0, 1),
            (32, 64, 4, 3, 0, 1),
        ],
        128: [
            (64, 64, 4, 2, 0, 1), (64, 64, 4, 2, 1, 1), (64, 128, 8, 2, 0, 1), (64, 128, 8, 3, 0, 1),
            (32, 64, 4, 3, 0, 1),
        ],
        192: [
            (32, 64, 4, 2, 0, 1), (32, 64, 4, 2, 1, 1), (32, 64, 4, 3, 1, 1), (32, 128, 8, 2, 0, 1),
            (32, 128, 8, 3, 0, 1), (64, 128, 8, 2, 0, 1), (32, 128, 8, 3, 1, 1),
        ],
        256: [(64, 64, 8, 1, 0, 1), (64, 64, 8, 2, 0, 1), (64, 64, 8, 1, 1, 1), (64, 64, 8, 2, 1, 1)],
    },
    "backward_k": {
        64: [], 96: [], 128: [],
        192: [(64, 128, 8, 2, 0, 1), (64, 128, 8, 2, 1, 1), (64, 64, 4, 2, 0, 1), (32, 128, 8, 3, 0, 1)],
        256: [
            (64, 128, 8, 1, 0, 1), (64, 128, 8, 1, 1, 1), (32, 128, 8, 2, 0, 1), (32, 128, 8, 2, 1, 1),
            (64, 64, 4, 1, 0, 1), (32, 64, 4, 1, 1, 1),
        ],
    },
    "backward_v": {
        64: [], 96: [], 128: [],
        192: [(64, 128, 8, 2, 0, 1), (64, 128, 8, 2, 1, 1), (64, 64, 4, 2, 0, 1), (128, 128, 8, 2, 1, 1)],
        256: [
            (64, 128, 8, 2, 0, 1), (64, 128, 8, 2, 1, 1), (32, 128, 8, 3, 0, 1), (64, 128, 8, 1, 1, 1),
            (64, 64, 4, 1, 0, 1),
        ],
    },
    "backward_q": {
        64: [
            (128, 64, 4, 3, 0, 1), (128, 64, 4, 3, 1, 1), (64, 128, 4, 3, 1, 1), (64, 128, 4, 3, 0, 1),
            (128, 64, 4, 2, 0, 1), (128, 64, 4, 2, 0, 0),
        ],
        96: [(128, 64, 8, 3, 0, 1), (128, 64, 8, 3, 1, 1), (64, 64, 4, 2, 1, 1), (64, 64, 4, 3, 1, 1)],
        128: [
            (128, 64, 8, 3, 0, 1), (128, 64, 8, 3, 1, 1), (64, 64, 4, 2, 0, 1), (64, 64, 4, 2, 1, 1),
            (128, 128, 8, 2, 1, 1), (128, 64, 8, 2, 0, 0),
        ],
        192: [
            (128, 64, 8, 2, 0, 1), (128, 64, 8, 2, 1, 1), (128, 64, 8, 1, 1, 1), (64, 64, 4, 2, 1, 1),
            (64, 64, 4, 1, 1, 1), (128, 128, 8, 1, 1, 1),
        ],
        256: [
            (128, 64, 8, 1, 0, 1), (128, 64, 8, 1, 1, 1), (64, 32, 4, 1, 1, 1), (128, 32, 8, 2, 1, 1),
            (64, 64, 4, 1, 1, 1), (64, 64, 8, 2, 0, 0),
        ],
    },
    "decode": {
        64: [(16, 64, 2, 4, 0, 0), (16, 128, 2, 2, 0, 0), (16, 64, 4, 4, 0, 0)],
        128: [(16, 64, 4, 4, 0, 0), (16, 64, 2, 4, 0, 0), (16, 128, 4, 2, 0, 0)],
        256: [(16, 32, 4, 4, 0, 0), (16, 64, 4, 3, 0, 0), (16, 32, 2, 4, 0, 0)],
    },
}  # fmt: skip


WARM_MS = 20.0


def graph_ms(calls: list[Callable[[], Any]], repeat: int = 5, stream: torch.cuda.Stream | None = None) -> float:
    """Median time of one call in ms when all are captured into one CUDA graph: the host costs nothing.

    Backward passes must be captured on the stream on which their forward ran; pass that one.
    """
    stream = stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()

    def replay_ms() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    replay_ms()
    # A device that has just been idle runs slowly for a while, and who is timed first would pay for it.
    for _ in range(min(100, int(WARM_MS / replay_ms()) + 1)):
        graph.replay()
    return sorted(replay_ms() for _ in range(repeat))[repeat // 2] / len(calls)


def tuning(direction: str, candidate: tuple, splits: int | None = None) -> Any:
    """launch.Tuning of one candidate."""
    m, n, warps, stages, merged, tma = candidate
    separate = direction in ("backward_k", "backward_v")
    config = sys.modules[f"{PACKAGE}.configs"].KernelConfig(m, n, warps, stages, merged=bool(merged))
    return base.launch.Tuning(config=config, tma=bool(tma), num_splits=splits, separate=separate)


def inputs(row: tuple, copies: int = 1) -> list[dict[str, Any]]:
    """Arguments of one problem, `copies` times with other data."""
    B, H, K, M, N, D, E, causal, window = row
    made = []
    for _ in range(copies):
        q, k, v = (
            torch.randn(B, heads, length, size, device="cuda", dtype=torch.bfloat16)
            for heads, length, size in ((H, M, D), (K, N, D), (K, N, E))
        )
        made.append(base.ours(q, k, v, causal, window))
    return made


def launches(direction: str, arguments: dict[str, Any], state: dict[str, Any], how: Any) -> list[Any]:
    """The launches to time, and what they write: forward and combine, or one backward kernel."""
    if direction in ("forward", "decode"):
        found, state["out"], _ = base.forward_launch.forward_launches(**arguments, out_layout="bhsd", tuning=how)
        return found
    wanted = [direction == "backward_q", *[direction != "backward_q"] * 2, False, False]
    backward = sys.modules[f"{PACKAGE}.backward_launch"]
    found, tensors = backward.backward_launches(
        state["grad_out"], **arguments, out=state["out"], lse=state["lse"], output_mask=wanted, tuning=how
    )
    found[0].run()
    state["grads"] = {
        "backward_q": [tensors["dq"]], "backward_kv": [tensors["dk"], tensors["dv"]],
        "backward_k": [tensors["dk"]], "backward_v": [tensors["dv"]],
    }[direction]  # fmt: skip
    if direction == "backward_v":
        return found[2:3]
    return [one for one in found if one.kernel.__name__ == KERNELS[direction]][:1]


def forward_state(arguments: dict[str, Any]) -> dict[str, Any]:
    """out, lse and a gradient, from the shipped forward."""
    out, lse = base.attention.attention_forward(**arguments)
    return {"out": out, "lse": lse, "grad_out": torch.randn_like(out)}


def compile_one(job: tuple) -> tuple[tuple, str | None]:
    """Compile one candidate on a short problem (lengths are not specialised on); the cache is on disk."""
    direction, row, candidate, splits = job
    B, H, K, M, N, D, E, causal, window = row
    short = (1, H, K, min(M, 256), 512, D, E, causal, window)
    try:
        (arguments,) = inputs(short)
        state = forward_state(arguments) if direction.startswith("backward") else {}
        for one in launches(direction, arguments, state, tuning(direction, candidate, splits)):
            one.run()
        torch.cuda.synchronize()
    except Exception as error:
        return job, f"{type(error).__name__}: {str(error)[-160:]}"
    return job, None


SQUARE = [(B, H, K, S, S, D, E, causal, window) for B, H, K, S, D, E, causal, window in base.PREFILL]
ROWS = dict.fromkeys(KERNELS, SQUARE)
ROWS["decode"] = [(B, H, K, 1, N, D, D, False, None) for B, H, K, N, D in base.DECODE]


def peer_gradients(arguments: dict[str, Any], grad_out: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output and gradients of SDPA, for comparison; only for rows without a window."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    leaves = [arguments[name].detach().requires_grad_() for name in "qkv"]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(
            *leaves, is_causal=arguments["band_upper"] == 0, enable_gqa=True
        )
        return out, list(torch.autograd.grad(out, leaves, grad_out))


def main() -> None:
    """Compile all candidates, then time them shape by shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="forward,backward_kv,backward_q,decode")
    parser.add_argument("--shape", default="", help="only rows whose text contains this")
    options = parser.parse_args()
    plan = []
    for direction in options.only.split(","):
        for row in ROWS[direction]:
            if options.shape in str(row):
                for candidate in CANDIDATES[direction][row[5]]:
                    for splits in (None,) if direction != "decode" else (1, 2):
                        plan.append((direction, row, candidate, splits))
    start = time.time()
    with ProcessPoolExecutor(14, mp_context=multiprocessing.get_context("spawn")) as pool:
        failed = {job: error for job, error in pool.map(compile_one, plan) if error}
    for job, error in failed.items():
        print("cannot", job, error)
    print(f"{torch.cuda.get_device_name()}: {len(plan)} compiled in {time.time() - start:.0f} s", flush=True)
    report: list[Any] = []
    for direction in options.only.split(","):
        for row in ROWS[direction]:
            if options.shape not in str(row):
                continue
            ranking = time_row(direction, row, failed)
            report.append((direction, row, ranking))
            print(direction, row, *(f"\n    {speed:7.0f} {note} {c}" for speed, c, note in ranking[:9]), flush=True)
    if os.environ.get("OUT"):
        (Path(os.environ["OUT"]) / "tune.json").write_text(json.dumps(report, indent=1))


def time_row(direction: str, row: tuple, failed: dict) -> list[tuple[float, Any, str]]:
    """(TFLOP/s or GB/s, candidate, remark) of every candidate, best first. TFLOP/s of the kernel's own products."""
    B, H, K, M, N, D, E, causal, window = row
    pairs = M * N / 2 if causal else M * N
    if window:
        pairs = M * window - window * window / 2
    products = {
        "forward": D + E, "backward_kv": 2 * D + 2 * E, "backward_q": 2 * D + E, "backward_k": 2 * D + E,
        "backward_v": D + E, "decode": 0,
    }[direction]  # fmt: skip
    amount = 2 * B * H * pairs * products / 1e9 if products else 2 * B * K * N * (D + E) / 1e6
    copies = max(2, min(48, int(1.2e9 / (2 * B * K * N * (D + E))))) if direction == "decode" else 1
    problems = inputs(row, copies)
    state = forward_state(problems[0])
    want = [state["out"]]
    if not window:
        out, grads = peer_gradients(problems[0], state["grad_out"])
        want = {"forward": [out], "decode": [out], "backward_kv": grads[1:], "backward_q": grads[:1],
                "backward_k": grads[1:2], "backward_v": grads[2:]}[direction]  # fmt: skip
    ranking = []
    for candidate in CANDIDATES[direction][D]:
        tiles = B * K
        waves = {max(1, programs // tiles) for programs in (132, 264, 396)}
        choices = sorted({1, 2} | waves) if direction == "decode" else [None]
        for splits in choices:
            if any(job[0] == direction and job[2] == candidate and job[1][5] == D for job in failed):
                continue
            try:
                plans = [launches(direction, one, state, tuning(direction, candidate, splits)) for one in problems]
                calls = [functools.partial(lambda p: [one.run() for one in p], p) for p in plans]
                calls[-1]()
                if copies > 1:
                    calls[0]()
                    state["out"] = plans[0][0].arguments["out"]
                got = state.get("grads", [state["out"]])
                error = max(base.relative(a, b) for a, b in zip(got, want)) if not window else 0.0
                # Short kernels several times, so that starting the graph weighs little.
                speed = amount / graph_ms(calls * (8 if copies == 1 and amount < 500 else 1))
            except Exception as problem:
                print("cannot", direction, row, candidate, str(problem)[-120:])
                continue
            note = "" if error < 1e-2 else f"WRONG {error:.1e}"
            ranking.append((speed, (candidate, splits) if splits else candidate, note))
    return sorted(ranking, key=lambda item: -item[0])


if __name__ == "__main__":
    main()
