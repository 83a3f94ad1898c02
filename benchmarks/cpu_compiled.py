"""Attention in compiled programs on the CPU: rocm_attn beside Inductor and eager, on shapes of real models.

    python benchmarks/cpu_compiled.py [--threads N] [--only TEXT] [--csv PATH]

Each function is written as models write it, with separate operations, and compiled once by each of the two backends.
Prints processor milliseconds, the smallest of several interleaved runs, for the forward, and for forward and backward;
then the ratio of eager and of Inductor to ours (above 1: ours is faster). "opaque" is ours with
options={"inline": False}, where every attention is one call of our op. No figure is printed for a wrong result.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from rocm_attn_compile import reset_reports
from rocm_attn_compile.report import reports
from rocm_attn_compile.testing import assert_as_accurate_as_eager

# name: (batch, heads, kv heads, q_len, kv_len, head_dim, v_head_dim, mask, soft cap)
SHAPES = {
    "tiny": (1, 1, 1, 4, 4, 8, 8, "causal", None),
    "tiny, key mask": (1, 1, 1, 4, 4, 8, 8, "keys", None),
    "prefill 512 causal": (1, 8, 8, 512, 512, 64, 64, "causal", None),
    "prefill 512 causal GQA": (1, 8, 2, 512, 512, 64, 64, "causal", None),
    "encoder 4 x 128": (4, 8, 8, 128, 128, 64, 64, None, None),
    "encoder 4 x 128, key mask": (4, 8, 8, 128, 128, 64, 64, "keys", None),
    "decode 512": (1, 8, 8, 1, 512, 64, 64, None, None),
    "decode 2048 GQA": (1, 32, 8, 1, 2048, 128, 128, None, None),
    "prefill 256 D 96 E 64": (1, 8, 8, 256, 256, 96, 64, "causal", None),
    "decode 1024 D 192 E 128": (1, 8, 8, 1, 1024, 192, 128, None, None),
    "prefill 256 soft cap": (1, 8, 8, 256, 256, 64, 64, "causal", 30.0),
}


def attention(q, k, v, key_mask, causal: bool, cap):
    """As Hugging Face models write it."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * 0.125
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


def measure(functions: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Smallest processor milliseconds of each, interleaved."""
    calls = {}
    for name, function in functions.items():
        function()
        start = time.process_time()
        function()
        calls[name] = max(1, min(100, int(1e-3 / max(time.process_time() - start, 1e-6))))
    best = dict.fromkeys(functions, math.inf)
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.process_time()
            for _ in range(calls[name]):
                function()
            best[name] = min(best[name], (time.process_time() - start) * 1e3 / calls[name])
    return best


def compare(dtype: torch.dtype, shape: tuple, rounds: int, training: bool) -> dict[str, float]:
    """Milliseconds of each for one shape; checks our results first."""
    B, H, K, M, N, D, E, mask, cap = shape
    torch._dynamo.reset()
    reset_reports()
    torch.manual_seed(0)
    q, k, v = (torch.randn(*s, dtype=dtype) for s in ((B, H, M, D), (B, K, N, D), (B, K, N, E)))
    key_mask = (torch.arange(N) < torch.randint(2, N + 1, (B, 1))) if mask == "keys" else None
    inputs = [t.requires_grad_(training) for t in (q, k, v)]
    grad = torch.randn(B, H, M, E, dtype=dtype)

    def run(function):
        if not training:
            with torch.no_grad():
                return function(*inputs, key_mask, mask == "causal", cap)
        out = function(*inputs, key_mask, mask == "causal", cap)
        return (out, *torch.autograd.grad(out, inputs, grad))

    functions = {
        "eager": attention,
        "inductor": torch.compile(attention, dynamic=False),
        "rocm_attn": torch.compile(attention, backend="rocm_attn", dynamic=False),
        "opaque": torch.compile(attention, backend="rocm_attn", dynamic=False, options={"inline": False}),
    }
    exact_inputs = [t.detach().double().requires_grad_(training) for t in inputs]
    exact = attention(*exact_inputs, key_mask, mask == "causal", cap)
    exact = (exact, *torch.autograd.grad(exact, exact_inputs, grad.double())) if training else exact
    for name in ("rocm_attn", "opaque"):
        assert_as_accurate_as_eager(run(functions[name]), run(attention), exact, factor=8.0)
    assert all(site.replaced for report in reports() for site in report.sites), reports()[-1]
    return measure({name: lambda f=function: run(f) for name, function in functions.items()}, rounds)


def aten_overhead(rounds: int) -> tuple[float, float]:
    """Microseconds of a tiny call in a compiled program: F.scaled_dot_product_attention by Inductor, and ours."""
    q = torch.randn(1, 1, 2, 8)
    theirs = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.125))
    ours = torch.compile(lambda q: attention(q, q, q, None, True, None), backend="rocm_attn")
    with torch.no_grad():
        times = measure({"aten": lambda: theirs(q), "ours": lambda: ours(q)}, rounds)
    return times["aten"] * 1e3, times["ours"] * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", default="", help="only shapes whose name contains this")
    parser.add_argument("--csv", help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} thread(s); processor ms, and ratios to rocm_attn")
    print(f"{'':48s}{'eager':>9s}{'inductor':>10s}{'rocm_attn':>10s}{'opaque':>10s}{'eager/':>9s}{'inductor/':>10s}")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, shape in SHAPES.items():
            for training in (False, True):
                if options.only not in name:
                    continue
                times = compare(dtype, shape, options.rounds, training)
                eager, inductor, ours = times["eager"], times["inductor"], times["rocm_attn"]
                what = "training" if training else "forward"
                print(
                    f"{str(dtype)[6:]:10s}{name:28s}{what:10s}{eager:9.3f}{inductor:10.3f}{ours:10.3f}{times['opaque']:10.3f}"
                    f"{eager / ours:9.2f}{inductor / ours:10.2f}",
                    flush=True,
                )
                rows.append((str(dtype)[6:], name, what, *times.values()))
    aten, ours = aten_overhead(options.rounds * 10)
    print(f"tiny call in a compiled program: F.sdpa under Inductor {aten:.1f} us, ours {ours:.1f} us")
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            csv.writer(file).writerows([("dtype", "shape", "pass", "eager", "inductor", "rocm_attn", "opaque"), *rows])


if __name__ == "__main__":
    main()
