"""Attention whose weights are read elsewhere, too, against Inductor on the same eager code, in one run.

    python benchmarks/gpu/returned_weights.py [--device cpu] [--only ROW ...] [--tune]

Eager code with `output_attentions`: scores in half precision, softmax in float32, cast, and both results returned. Each
result is compared with float64 on some rows before it is timed. `ratio` is Inductor's time by ours. `floor` is the time
that writing the weights takes at the speed with which this device fills a tensor of that size. `--tune` times launch
configurations of the weights' kernel alone. `--only` takes numbers of rows, also to compile them in processes of their
own beforehand, which fills the caches on disk.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

ROWS = (  # B, H, S, D
    (1, 32, 2048, 128),
    (1, 32, 4096, 128),
    (4, 12, 512, 64),
    (8, 16, 1024, 64),
    (8, 12, 197, 64),
)
CPU_ROWS = ((1, 8, 512, 64), (2, 12, 197, 64), (1, 8, 128, 64))


TILES = (  # rows, keys, warps, stages
    *((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 8, 2), (128, 64, 4, 3), (128, 64, 8, 2)),
    *((128, 128, 8, 1), (128, 128, 8, 2), (64, 256, 8, 2), (32, 128, 4, 2)),
)


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """As Hugging Face writes it."""
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2).contiguous(), weights


def program(causal: bool) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The attention with its mask made inside, as a model makes it once."""

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mask = None
        if causal:
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
            mask = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, torch.finfo(q.dtype).min)
        return eager(q, k, v, mask)

    return function


def check(function: Callable, inputs: list[torch.Tensor], causal: bool) -> float:
    """The largest error of output and weights on some rows of the last head, in units of the largest number there."""
    out, weights = function(*inputs)
    q, k, v = (t[-1, -1].double() for t in inputs)
    S = q.shape[0]
    rows = torch.arange(0, S, max(1, S // 64), device=q.device)
    scores = q[rows] @ k.mT * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.arange(S, device=q.device) > rows[:, None], -torch.inf)
    exact = scores.softmax(-1)
    pairs = ((weights[-1, -1, rows], exact), (out[-1, rows, -1], exact @ v))
    return max(float((got.double() - want).abs().max() / want.abs().max()) for got, want in pairs)


def time_ms(function: Callable[[], Any], device: str) -> float:
    """The median of a call."""
    if device == "cpu":
        from torch.utils.benchmark import Timer

        return 1e3 * Timer("f()", globals={"f": function}).blocked_autorange(min_run_time=1.0).median
    import triton

    return triton.testing.do_bench(function, warmup=20, rep=80, return_mode="median")


def measure(row: tuple[int, ...], causal: bool, device: str) -> str:
    """One line."""
    B, H, S, D = row
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    inputs = [torch.randn(B, H, S, D, device=device, dtype=dtype) for _ in range(3)]
    torch._dynamo.reset()
    function = program(causal)
    times, errors = [], []
    with torch.no_grad():
        for backend in ("inductor", "rocm_attn"):
            compiled = torch.compile(function, backend=backend)
            errors.append(check(compiled, inputs, causal))
            times.append(time_ms(lambda f=compiled: f(*inputs), device))
        blank = torch.empty(B, H, S, S, device=device, dtype=dtype)
        floor = time_ms(blank.zero_, device)
    assert errors[1] <= max(3 * errors[0], 2 * torch.finfo(dtype).eps), errors
    name = f"{B} x {H} x {S} x {D} {'causal' if causal else ''}"
    return (
        f"{name:28} inductor {times[0]:8.3f} ms  ours {times[1]:8.3f} ms  ratio {times[0] / times[1]:5.2f}  "
        f"floor {floor:7.3f} ms  errors {errors[0]:.1e} {errors[1]:.1e}"
    )


def tune(row: tuple[int, ...]) -> None:
    """Times of the weights' kernel alone, the fastest configurations first; all must give the same weights."""
    from rocm_attn_compile.kernels.triton import configs, weights_launch
    from rocm_attn_compile.kernels.triton.launch import Tuning

    B, H, S, D = row
    q, k, v = (torch.randn(B, H, S, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    names = ("attn_bias", "attn_mask", "key_mask", "kv_start", "kv_end", "q_ids", "kv_ids", "sinks", "alibi_slopes")
    tensors = {"q": q, "k": k, "v": v, **dict.fromkeys(names)}
    settings = {
        "softmax_scale": D**-0.5, "logits_soft_cap": None, "band_lower": None, "band_upper": None,
        "empty_rows": "impossible", "out_layout": "bhsd",
    }  # fmt: skip
    shipped, _, want = weights_launch.weights_launches(tensors, settings, "impossible", q.dtype)
    for one in shipped:
        one.run()
    launches = {}
    for tile, tma in itertools.product(TILES, (False, True)):
        tuning = Tuning(config=configs.KernelConfig(*tile), tma=tma)
        found, _, _ = weights_launch.weights_launches(tensors, settings, "impossible", q.dtype, tuning)
        found[-1].arguments.update(lse=shipped[-1].arguments["lse"], weights=torch.empty_like(want))
        launches[(*tile, tma)] = found[-1]

    def compiles(one: Any) -> bool:
        try:
            one.compile()
        except Exception:  # too much shared memory
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        usable = list(pool.map(compiles, launches.values()))
    times = []
    for (tile, one), works in zip(launches.items(), usable):
        if works:
            one.run()
            assert torch.allclose(one.arguments["weights"].float(), want.float(), atol=1e-6, rtol=1e-2), tile
            times.append((time_ms(one.run, "cuda"), tile))
    lines = [f"{ms:.3f}: {m} x {n}, {w} warps, {s} stages{', tma' * t}" for ms, (m, n, w, s, t) in sorted(times)[:8]]
    forward = sum(time_ms(one.run, "cuda") for one in shipped[:-1])
    print(f"{row}, forward {forward:.3f} ms, shipped {time_ms(shipped[-1].run, 'cuda'):.3f} ms", *lines, sep="\n   ")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", type=int, nargs="*", default=[])
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    rows = CPU_ROWS if options.device == "cpu" else ROWS
    rows = tuple(row for number, row in enumerate(rows) if number in (options.only or range(len(rows))))
    if options.tune:
        for number in options.only or (1, 3, 2):
            tune(ROWS[number])
        return
    print(torch.cuda.get_device_name() if options.device == "cuda" else "cpu", torch.__version__)
    for row, causal in itertools.product(rows, (False, True)):
        print(measure(row, causal, options.device), flush=True)


if __name__ == "__main__":
    main()
