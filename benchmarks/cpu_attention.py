"""The op on the CPU beside eager softmax attention and F.scaled_dot_product_attention, on shapes of real models.

    python benchmarks/cpu_attention.py [--threads N]

Prints processor milliseconds (smallest of several interleaved runs) for the forward, and for forward and backward.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from rocm_attn_compile.ops import attention

# name: (batch, heads, kv heads, q_len, kv_len, head_dim, v_head_dim, causal, soft cap)
SHAPES = {
    "prefill 512 causal": (1, 8, 8, 512, 512, 64, 64, True, None),
    "prefill 512 causal GQA": (1, 8, 2, 512, 512, 64, 64, True, None),
    "encoder 4 x 128": (4, 8, 8, 128, 128, 64, 64, False, None),
    "decode 512": (1, 8, 8, 1, 512, 64, 64, False, None),
    "decode 2048 GQA": (1, 32, 8, 1, 2048, 128, 128, False, None),
    "prefill 256 D 96 E 64": (1, 8, 8, 256, 256, 96, 64, True, None),
    "decode 1024 D 192 E 128": (1, 8, 8, 1, 1024, 192, 128, False, None),
    "prefill 256 soft cap": (1, 8, 8, 256, 256, 64, 64, True, 30.0),
}


def eager(q, k, v, mask, cap):
    """As Hugging Face models write it."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * 0.125
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


def measure(functions: dict[str, Callable], rounds: int) -> dict[str, float]:
    best = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.process_time()
            function()
            best[name] = min(best[name], (time.process_time() - start) * 1e3)
    return best


def compare(dtype: torch.dtype, shape: tuple, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Times of the forward, and of forward and backward, for one shape."""
    B, H, K, M, N, D, E, causal, cap = shape
    q, k, v, grad = (torch.randn(s, dtype=dtype) for s in ((B, H, M, D), (B, K, N, D), (B, K, N, E), (B, H, M, E)))
    mask = torch.ones(M, N, dtype=torch.bool).tril() if causal else None

    def sdpa():
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.125, enable_gqa=H != K)

    def ours():
        settings = {"logits_soft_cap": cap, "band_upper": 0 if causal else None, "empty_rows": "impossible"}
        return attention(q, k, v, softmax_scale=0.125, **settings)[0]

    calls: dict[str, Callable] = {"eager": lambda: eager(q, k, v, mask, cap), "ours": ours}
    if cap is None:
        calls["sdpa"] = sdpa
    with torch.no_grad():
        forward = measure(calls, rounds)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    training = {n: (lambda call=call: torch.autograd.grad(call(), (q, k, v), grad)) for n, call in calls.items()}
    return forward, measure(training, max(rounds // 2, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    def row(times: dict[str, float]) -> str:
        return " / ".join(f"{times[n]:8.3f}" if n in times else "       -" for n in ("eager", "sdpa", "ours"))

    print(f"torch {torch.__version__}, {options.threads} thread(s); processor ms: eager / F.sdpa / ours")
    for dtype in (torch.float32, torch.bfloat16):
        for name, shape in SHAPES.items():
            forward, both = compare(dtype, shape, options.rounds)
            print(f"{str(dtype)[6:]:9s} {name:26s} forward {row(forward)}   with backward {row(both)}")


if __name__ == "__main__":
    main()
