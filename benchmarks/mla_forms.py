"""Where absorbing stops to pay: both forms of `rocm_attn::mla` for more and more queries, beside what the rule says.

    python benchmarks/mla_forms.py [--heads 16,128] [--batches 1,8] [--lengths 2048,16384] [--queries 1,16,...]

Sizes of DeepSeek V3 (latent 512 + 64, heads 128 + 64 and 128), queries at the end of the keys, causal; half precision
on a GPU. Times are medians in microseconds, the products with w_uk and w_uv included. The last column is what following
the rule costs over the better form. On a CPU it runs tiny sizes, whose times mean little.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import rocm_attn_compile
from rocm_attn_compile import ops
from rocm_attn_compile.ops import mla_dispatch
from rocm_attn_compile.ops.mla_form import prefers_absorbed


def microseconds(function: Callable[[], Any], device: str) -> float:
    if device != "cpu":
        from triton.testing import do_bench

        return do_bench(function, warmup=10, rep=40, return_mode="median") * 1e3
    from torch.utils.benchmark import Timer

    return Timer("f()", globals={"f": function}).blocked_autorange(min_run_time=0.05).median * 1e6


def forms(tensors: tuple, settings: dict[str, Any]) -> tuple[Callable, Callable]:
    """Calls of the absorbed and of the expanded form."""
    expanded = partial(mla_dispatch.prefill_form, ops.mla_prefill, *tensors, **settings)
    return partial(mla_dispatch.absorbed_form, ops.mla_decode, *tensors, **settings), expanded


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--heads", default="16,128" if on_gpu else "2")
    parser.add_argument("--batches", default="1,8" if on_gpu else "1")
    parser.add_argument("--lengths", default="2048,16384" if on_gpu else "256")
    parser.add_argument("--queries", default="1,8,32,64,96,128,160,192,256,384,512,1024" if on_gpu else "1,64,192")
    parser.add_argument("--sizes", default="128,64,512,128", help="P, R, C, E")
    parser.add_argument("--csv", help="also write the figures there")
    options = parser.parse_args()
    P, R, C, E = (int(size) for size in options.sizes.split(","))
    where = torch.cuda.get_device_name() if on_gpu else "CPU"
    about = f"rocm_attn_compile {rocm_attn_compile.__version__}, torch {torch.__version__}, {where}, {options.dtype}"
    print(about)
    print(f"{'batch':>6s}{'heads':>6s}{'kv_len':>8s}{'q_len':>7s}{'absorbed':>11s}{'expanded':>11s}  rule      excess")
    rows = []
    lists = [[int(part) for part in text.split(",")] for text in (options.batches, options.heads, options.lengths)]
    for B, H, N in ((b, h, n) for b in lists[0] for h in lists[1] for n in lists[2]):
        for M in (int(part) for part in options.queries.split(",")):
            if M > N:
                continue
            torch.manual_seed(0)
            sizes = ((B, H, M, P), (B, H, M, R), (B, N, C), (B, N, R), (H, P, C), (H, E, C))
            made = [torch.randn(size, device=options.device, dtype=getattr(torch, options.dtype)) for size in sizes]
            settings = {"softmax_scale": (P + R) ** -0.5, "band_upper": N - M, "out_layout": "bshd"}
            with torch.no_grad():
                absorbed, expanded = (microseconds(call, options.device) for call in forms(tuple(made), settings))
            rule = prefers_absorbed(M, N, H, P, R, C, E, itemsize=made[0].itemsize, band_upper=N - M)
            excess = (absorbed if rule else expanded) / min(absorbed, expanded) - 1
            rows.append((B, H, N, M, absorbed, expanded, rule, excess))
            word = "absorbed" if rule else "expanded"
            print(f"{B:6d}{H:6d}{N:8d}{M:7d}{absorbed:11.1f}{expanded:11.1f}  {word}{excess:8.0%}", flush=True)
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            file.write(f"# {about}\n")
            header = ("batch", "heads", "kv_len", "q_len", "absorbed_us", "expanded_us", "rule_absorbed", "excess")
            csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    main()
