"""Ranks launch configurations of the latent decode kernel on a GPU; every timed result is checked first.

    python benchmarks/gpu/tune_mla.py [--rows 0,5] [--dtype bfloat16] [--page 64] [--workers 12]

Prints, per row of the table, the fastest candidates: us, GB/s of cache, TFLOP/s. Times are of replays of a CUDA graph
over inputs that together exceed the L2.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from rocm_attn_compile.kernels.triton.configs import KernelConfig
from rocm_attn_compile.kernels.triton.launch import Tuning
from rocm_attn_compile.kernels.triton.mla_decode_launch import mla_decode_launches

LATENT, ROPE = 512, 64
ROWS = ((1, 16, 4096), (1, 128, 4096), (16, 16, 4096), (16, 128, 4096), (128, 16, 4096), (64, 128, 8192))
"""Batch, heads, kv_len."""
C = KernelConfig
CANDIDATES = [("flight", C(64, 64, 4, 1))] + [
    ("tma" if tma else "ptr", C(m, n, warps, stages, merged=True))
    for tma, m, n, warps, stages in (
        (True, 64, 64, 8, 2), (True, 16, 64, 8, 2), (True, 16, 64, 8, 3), (True, 16, 32, 8, 6), (True, 16, 32, 4, 3),
        (False, 16, 32, 4, 3), (False, 16, 64, 8, 3), (False, 64, 64, 8, 2),
        (False, 16, 64, 8, 5), (False, 16, 32, 8, 7), (False, 16, 32, 4, 7), (False, 64, 32, 8, 5),
        (False, 64, 32, 8, 7), (False, 64, 64, 8, 3),
    )
]  # fmt: skip


def inputs(batch: int, heads: int, kv_len: int, page: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """Arguments of mla_decode_launches for one token per sequence; lengths on the device."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype, generator=generator)

    blocks = (batch * kv_len // page, page) if page else (batch, kv_len)
    table = torch.randperm(blocks[0], device="cuda", generator=generator).int().view(batch, -1) if page else None
    cache = random(*blocks, LATENT + ROPE)
    return {
        "q_latent": random(batch, heads, 1, LATENT), "q_pe": random(batch, heads, 1, ROPE),
        "kv_c": cache[..., :LATENT], "k_pe": cache[..., LATENT:], "block_table": table, "key_mask": None,
        "kv_start": None, "kv_end": torch.full((batch, 1), kv_len, dtype=torch.int32, device="cuda"),
        "softmax_scale": 1 / math.sqrt(192), "band_lower": None, "band_upper": None, "empty_rows": "impossible",
        "out_layout": "bhsd",
    }  # fmt: skip


def run(arguments: dict[str, Any], tuning: Tuning | None = None, count: int = 2) -> torch.Tensor:
    """`out_latent`, after the first `count` launches."""
    launches, out, _ = mla_decode_launches(**arguments, tuning=tuning)
    for launch in launches[:count]:
        launch.run()
    return out


def reference(arguments: dict[str, Any]) -> torch.Tensor:
    """The same in float32, one sequence after the other."""
    kv, pe, table = arguments["kv_c"], arguments["k_pe"], arguments["block_table"]
    results = []
    for index in range(arguments["q_latent"].shape[0]):
        keys, rope = (x[table[index].long()].flatten(0, 1) if table is not None else x[index] for x in (kv, pe))
        scores = arguments["q_latent"][index, :, 0].float() @ keys.float().T
        scores += arguments["q_pe"][index, :, 0].float() @ rope.float().T
        results.append((scores * arguments["softmax_scale"]).softmax(-1) @ keys.float())
    return torch.stack(results)[:, :, None]


def graph_us(calls: list[Callable[[], Any]], replays: int = 10, at_least: int = 16) -> float:
    """Median time of one call in us, in a graph of all of them, again and again until these are `at_least` so many.

    To start a graph takes some 6 us, which would otherwise be charged to a few calls.
    """
    calls = calls * math.ceil(at_least / len(calls))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times = []
    for _ in range(replays + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    del kept
    return statistics.median(times[2:])


def tuning_of(kind: str, config: KernelConfig, splits: int) -> Tuning:
    """What makes the launcher take a candidate."""
    return Tuning(config=config, tma=kind != "ptr", in_flight=kind == "flight", num_splits=splits)


def splits_of(row: tuple[int, int, int], config: KernelConfig) -> list[int]:
    """Numbers of splits worth trying."""
    batch, heads, kv_len = row
    tiles = batch * math.ceil(heads / config.block_m)
    fill = max(1, 132 // tiles)
    return sorted({max(1, min(n, kv_len // 64)) for n in (fill, fill // 2, fill * 2, fill // 4, fill // 8)})


def try_one(task: tuple[Any, ...]) -> str:
    """Compile and run one candidate in a process of its own; an error as text."""
    row, (kind, config), page, dtype = task
    try:
        for splits in splits_of(row, config)[-1:]:
            run(inputs(*row[:2], row[2], page, dtype), tuning_of(kind, config, splits))
            torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="0,1,2,3,4,5")
    parser.add_argument("--page", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--workers", type=int, default=12)
    options = parser.parse_args()
    dtype, page = getattr(torch, options.dtype), options.page
    rows = [ROWS[int(index)] for index in options.rows.split(",")]
    start = time.time()
    kinds = [((2, heads, 4096), candidate, page, dtype) for heads in (16, 128) for candidate in CANDIDATES]
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        failed = dict(zip(((k[0][1], k[1]) for k in kinds), pool.map(try_one, kinds)))
    for (heads, candidate), text in failed.items():
        if text:
            print(f"{heads} heads {candidate}: {text}")
    print(f"compiled in {time.time() - start:.0f} s", flush=True)
    for row in rows:
        batch, heads, kv_len = row
        size = batch * kv_len * (LATENT + ROPE) * dtype.itemsize
        sets = [inputs(*row, page, dtype, seed) for seed in range(max(1, min(20, math.ceil(2e8 / size))))]
        wanted = reference(sets[0])
        results = []
        for kind, config in CANDIDATES:
            if failed[heads, (kind, config)] or (kind != "ptr" and page % config.block_n):
                continue
            for splits in splits_of(row, config):
                tuning = tuning_of(kind, config, splits)
                try:
                    got = run(sets[0], tuning)
                    error = ((got - wanted).norm() / wanted.norm()).item()
                    us = graph_us([lambda s=s, t=tuning: run(s, t) for s in sets]) if error < 1e-2 else math.inf
                except Exception as problem:
                    print(f"{row} {kind} {config}: {type(problem).__name__} {str(problem)[:100]}")
                    continue
                results.append((us, splits, kind, config, error))
        flops = 2 * batch * heads * kv_len * (2 * LATENT + ROPE)
        best = sorted(results, key=lambda r: r[0])
        for us, splits, kind, c, error in itertools.chain(best[:6], (r for r in best if r[0] == math.inf)):
            tuning = tuning_of(kind, c, splits)
            main = graph_us([lambda s=s, t=tuning: run(s, t, 1) for s in sets])
            print(
                f"{row} {us:8.1f} us (main {main:.1f}) {size / us / 1e3:6.0f} GB/s {flops / us / 1e6:5.0f} TFLOP/s | "
                f"splits {splits} {kind} {c.block_m}x{c.block_n} {c.num_warps}w {c.num_stages}s err {error:.1e}"
            )
        sys.stdout.flush()
        del sets


if __name__ == "__main__":
    main()
