"""What one attention costs on the host inside a compiled graph: ours, written out or opaque, beside ATen's in the same.

    python benchmarks/gpu/call_overhead.py [--profile] [--json PATH]

Small sizes, so that the host is the bottleneck. Microseconds per attention, from the difference of a program of nine
and one of one; "written out" is ours by default, "opaque" with options={"inline": False}, "aten flash" is
F.scaled_dot_product_attention under Inductor, held to FlashAttention. Issue 5 allows ours 10 us more than that.
Results are compared with float64 first. With CUDA graphs nothing of this should be left: the last column. Rows of
symbols are of programs that were compiled for any length.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rocm_attn_compile.testing import assert_as_accurate_as_eager

# name: (batch, heads, kv heads, q_len, kv_len, head_dim, training)
SHAPES = {
    "decode": (1, 32, 8, 1, 512, 128, False),
    "decode, split keys": (1, 32, 8, 1, 2048, 128, False),
    "short prefill": (1, 16, 16, 128, 128, 128, False),
    "short training": (1, 16, 16, 128, 128, 64, True),
}
WAYS = {
    "aten flash": {"backend": "inductor"},
    "opaque": {"backend": "rocm_attn", "options": {"inline": False}},
    "written out": {"backend": "rocm_attn"},
}


def program(layers: int, causal: bool) -> Callable:
    def run(q, k, v):
        for _ in range(layers):
            q = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True) + q
        return q

    return run


def microseconds(function: Callable, repeat: int = 100, rounds: int = 5) -> float:
    """Host time of a call, the smallest mean of several rounds; the device never has to be waited for."""
    best = float("inf")
    for _ in range(10):
        function()
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeat):
            function()
        best = min(best, (time.perf_counter() - start) / repeat * 1e6)
        torch.cuda.synchronize()
    return best


def runner(way: dict, layers: int, shape: tuple, symbols: bool, graphs: bool = False) -> Callable:
    """A call of the program, compiled with `symbols` for any lengths, checked against float64."""
    B, H, K, M, N, D, training = shape
    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = ((B, H, M, D), (B, K, N, D), (B, K, N, D))
    inputs = [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=training) for s in sizes]
    for tensor in inputs if symbols else ():
        if tensor.shape[2] > 1:
            torch._dynamo.mark_dynamic(tensor, 2)
    function = program(layers, M > 1)
    if graphs:
        way = {**way, "options": {**way.get("options", {}), "triton.cudagraphs": True}}
    compiled = torch.compile(function, fullgraph=True, dynamic=None if symbols else False, **way)
    grad = torch.randn(B, H, M, D, device="cuda", dtype=torch.bfloat16)

    def call(function=compiled, inputs=inputs, grad=grad):
        if training:
            return torch.autograd.grad(function(*inputs), inputs, grad)
        with torch.no_grad():
            return (function(*inputs),)

    def checked(mode_of: list[SDPBackend]):
        with sdpa_kernel(mode_of):
            return call(function, [t.detach().double().requires_grad_(training) for t in inputs], grad.double())

    got = tuple(t.clone() for t in call())
    exact_inputs = [t.detach().double().requires_grad_(training) for t in inputs]
    with sdpa_kernel([SDPBackend.MATH]):
        exact = call(function, exact_inputs, grad.double())
    assert_as_accurate_as_eager(got, call(function), exact, factor=4.0)
    return call


def per_attention(way: dict, shape: tuple, symbols: bool, graphs: bool = False) -> float:
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        one, nine = (microseconds(runner(way, layers, shape, symbols, graphs)) for layers in (1, 9))
    return (nine - one) / 8


def profile() -> None:
    """Where the host time of the opaque op goes."""
    import cProfile
    import pstats

    call = runner(WAYS["opaque"], 8, SHAPES["decode, split keys"], False)
    for _ in range(20):
        call()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(200):
        call()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    print(torch.__version__, torch.cuda.get_device_name())
    print(f"{'us per attention on the host':30s}" + "".join(f"{way:>14s}" for way in WAYS) + f"{'CUDA graphs':>14s}")
    figures = {}
    for (name, shape), symbols in itertools.product(SHAPES.items(), (False, True)):
        found = {way: per_attention(how, shape, symbols) for way, how in WAYS.items()}
        has_graphs = not shape[-1] and not symbols
        found["CUDA graphs"] = per_attention(WAYS["written out"], shape, symbols, True) if has_graphs else float("nan")
        name += ", symbols" if symbols else ""
        figures[name] = found
        print(f"{name:30s}" + "".join(f"{value:14.1f}" for value in found.values()), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {"torch": torch.__version__, "device": torch.cuda.get_device_name(), "us": figures}, file, indent=1
            )
    if options.profile:
        profile()


if __name__ == "__main__":
    main()
