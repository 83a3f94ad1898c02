"""What one attention costs on the host inside a compiled graph, against SDPA and eager in the same graph.

    python benchmarks/gpu/call_overhead.py

Small sizes, so that the host is the bottleneck: microseconds per layer, from the difference of a deep and a shallow
program.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

import rocm_attn_compile  # noqa: F401  (registers nothing; its version goes into the printout)

SHAPES = {"decode": (1, 32, 8, 1, 4096, 128), "short prefill": (1, 32, 8, 128, 128, 128)}


def program(layers: int, causal: bool):
    def run(q, k, v):
        for _ in range(layers):
            q = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True) + q
        return q

    return run


def microseconds(function, *arguments, repeat: int = 200) -> float:
    for _ in range(20):
        function(*arguments)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        function(*arguments)
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return host / repeat * 1e6


def main() -> None:
    print(torch.__version__, torch.cuda.get_device_name())
    for name, (b, h, hk, m, n, d) in SHAPES.items():
        q = torch.randn(b, h, m, d, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(b, hk, n, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for backend in ("inductor", "rocm_attn"):
            cost = []
            for layers in (1, 9):
                torch._dynamo.reset()
                with torch.no_grad():
                    compiled = torch.compile(program(layers, m > 1), backend=backend)
                    cost.append(microseconds(compiled, q, k, v))
            print(
                f"{name:15} {backend:10} {cost[0]:8.1f} us for 1, {(cost[1] - cost[0]) / 8:7.1f} us per further layer"
            )
    profile(q, k, v)


def profile(q, k, v) -> None:
    """Where the host time of our op goes."""
    import cProfile
    import pstats

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(program(8, True), backend="rocm_attn")
        for _ in range(20):
            compiled(q, k, v)
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(200):
            compiled(q, k, v)
        profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(18)


if __name__ == "__main__":
    main()
