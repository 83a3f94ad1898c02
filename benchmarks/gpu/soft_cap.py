"""What a soft cap costs Hopper's long prefill at head size 128: calls without one, with 30 and with 50, in turn.

    python benchmarks/gpu/soft_cap.py

Issue 5 asks for less than 10 %. CUDA graphs over two sets of inputs, medians of 15 rounds in which all take turns. A
part of every result is compared with float64 first.
"""

from __future__ import annotations

import statistics

import torch

from rocm_attn_compile.kernels.triton.attention import attention_forward
from rocm_attn_compile.testing import assert_as_accurate_as_eager

SHAPES = {  # batch, heads, kv heads, length, causal
    "8192, causal": (1, 32, 8, 8192, True),
    "8192": (1, 32, 8, 8192, False),
    "8 x 2048, causal": (8, 32, 8, 2048, True),
    "16384, causal": (1, 32, 8, 16384, True),
}
CAPS = (None, 30.0, 50.0)
HEAD_DIM = 128
ROUNDS = 15


def inputs(batch: int, heads: int, kv_heads: int, length: int) -> list[torch.Tensor]:
    sizes = [(batch, count, length, HEAD_DIM) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in sizes]


def ours(tensors: list[torch.Tensor], cap: float | None, causal: bool) -> torch.Tensor:
    scale = HEAD_DIM**-0.5
    band = 0 if causal else None
    return attention_forward(*tensors, softmax_scale=scale, logits_soft_cap=cap, band_upper=band, empty_rows="zero")[0]


def eager(tensors: list[torch.Tensor], cap: float | None, causal: bool, head: int, rows: slice) -> torch.Tensor:
    """Some rows of one query head, as a model computes them."""
    q, k, v = tensors[0][:, head, rows], *(x[:, head // (tensors[0].shape[1] // x.shape[1])] for x in tensors[1:])
    scores = q @ k.mT * HEAD_DIM**-0.5
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if causal:
        first = torch.arange(tensors[0].shape[2], device="cuda")
        scores = scores.masked_fill(first[None, :] > first[rows, None], float("-inf"))
    return scores.softmax(-1) @ v


def check(tensors: list[torch.Tensor], cap: float | None, causal: bool) -> None:
    out = ours(tensors, cap, causal)
    wide = [x.double() for x in tensors]
    for rows in (slice(0, 300), slice(-300, None)):
        got, want = out[:, 3, rows], eager(wide, cap, causal, 3, rows)
        assert_as_accurate_as_eager((got,), (eager(tensors, cap, causal, 3, rows),), (want,), factor=4.0)


def graph_of(copies: list[list[torch.Tensor]], cap: float | None, causal: bool) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for tensors in copies:
            ours(tensors, cap, causal)
    return graph


def milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def main() -> None:
    print(torch.__version__, torch.cuda.get_device_name())
    for name, (*sizes, causal) in SHAPES.items():
        copies = [inputs(*sizes) for _ in range(2)] * 2
        for cap in CAPS:
            check(copies[0], cap, causal)
        graphs = {cap: graph_of(copies, cap, causal) for cap in CAPS}
        times: dict[float | None, list[float]] = {cap: [] for cap in CAPS}
        for _ in range(ROUNDS):
            for cap, graph in graphs.items():
                times[cap].append(milliseconds(graph) / len(copies))
        found = {cap: statistics.median(values) for cap, values in times.items()}
        ratios = ", ".join(f"cap {cap:.0f}: {found[cap] / found[None]:.3f}" for cap in CAPS if cap)
        print(f"{name:18s} without {1000 * found[None]:7.1f} us; times that, {ratios}", flush=True)


if __name__ == "__main__":
    main()
