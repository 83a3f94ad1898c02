"""Latent attention on a GPU: TRITON_MLA's kernels against what PyTorch offers, in one run.

    python benchmarks/mla.py [--parts decode,prefill,forms] [--out FOLDER]

decode   absorbed, one token: ours, SDPA over the expanded latent, two matmuls and a softmax; contiguous and paged
prefill  192/128 causal, forward and backward: ours in pieces, cuDNN, and cuDNN with the concatenation it needs
forms    absorbed against prefill form over q_len, projections included: the crossover for docs/mla.md

Every result is compared with float32 before it gets a time. Times are medians of replays of a CUDA graph over inputs
that together exceed the L2 (so that the host costs nobody anything); SDPA's, which allocates gigabytes, and prefill's
of calls with the L2 flushed. Writes CSVs to FOLDER and prints tables.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))

from tune_mla import LATENT, ROPE, ROWS, graph_us, inputs, reference

from rocm_attn_compile.kernels.triton.mla import mla_decode, mla_prefill, mla_prefill_backward

BF16 = torch.bfloat16
TOLERANCE = 1e-2


def call_us(function: Callable[[], Any]) -> float:
    """Median time of a call in us, L2 flushed between calls."""
    from triton.testing import do_bench

    return do_bench(function, warmup=20, rep=80, return_mode="median") * 1000


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """`|got - want| / |want|`."""
    return ((got.float() - want).norm() / want.norm()).item()


def timed(calls: list[Callable[[], torch.Tensor]], want: torch.Tensor, graph: bool = True) -> float | None:
    """us of a call, None where there is not memory enough.

    Raises:
        RuntimeError: The first call's result is wrong.
    """
    try:
        error = relative(calls[0](), want)
        if not error < TOLERANCE:
            raise RuntimeError(f"wrong result, relative error {error:.1e}")
        return graph_us(calls) if graph else call_us(calls[0])
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def by_matmuls(a: dict[str, Any], whole: torch.Tensor) -> torch.Tensor:
    """Two matmuls and a softmax: batched over sequences, all heads are rows."""
    q = torch.cat((a["q_latent"], a["q_pe"]), 3)[:, :, 0]
    scores = torch.bmm(q, whole.mT) * a["softmax_scale"]
    return torch.bmm(scores.softmax(-1), whole[..., :LATENT]).unsqueeze(2)


def by_sdpa(a: dict[str, Any], whole: torch.Tensor) -> torch.Tensor:
    """SDPA with the latent expanded to all heads, as a view."""
    q = torch.cat((a["q_latent"], a["q_pe"]), 3)
    keys = whole[:, None].expand(-1, q.shape[1], -1, -1)
    return F.scaled_dot_product_attention(q, keys, keys[..., :LATENT], scale=a["softmax_scale"])


def ours(a: dict[str, Any]) -> torch.Tensor:
    """`out_latent` of the kernels as they ship."""
    return mla_decode(**{**a, "band_lower": None, "band_upper": None})[0]


def decode() -> list[dict[str, Any]]:
    """The table of absorbed decode."""
    table = []
    print("B,H,kv_len       ours us   GB/s TFLOP/s | paged us | 2 matmuls us  ratio | SDPA us  ratio")
    for row in ROWS:
        batch, heads, kv_len = row
        size, flops = batch * kv_len * (LATENT + ROPE) * 2, 2 * batch * heads * kv_len * (2 * LATENT + ROPE)
        count = max(1, min(20, math.ceil(2e8 / size)))
        sets = [inputs(*row, 0, BF16, seed) for seed in range(count)]
        want = reference(sets[0])
        wholes = [a["kv_c"].as_strided((batch, kv_len, LATENT + ROPE), a["kv_c"].stride()) for a in sets]
        mine = timed([functools.partial(ours, a) for a in sets], want)
        found: dict[str, Any] = {"batch": batch, "heads": heads, "kv_len": kv_len, "ours_us": mine}
        found["ours_GBps"], found["ours_TFLOPs"] = size / mine / 1e3, flops / mine / 1e6
        found["matmuls_us"] = timed([functools.partial(by_matmuls, a, w) for a, w in zip(sets, wholes)], want)
        found["sdpa_us"] = timed([functools.partial(by_sdpa, sets[0], wholes[0])], want, graph=False)
        del sets, wholes
        for page in (16, 64):
            paged = [inputs(*row, page, BF16, seed) for seed in range(count)]
            found[f"page{page}_us"] = timed([functools.partial(ours, a) for a in paged], reference(paged[0]))
            del paged
        table.append(found)
        peers = [(found[name], found[name] and found[name] / mine) for name in ("matmuls_us", "sdpa_us")]
        text = [f"{us:9.1f} {ratio:6.2f}" if us else "  out of memory " for us, ratio in peers]
        print(
            f"{row!s:16} {mine:8.1f} {found['ours_GBps']:6.0f} {found['ours_TFLOPs']:7.0f} | "
            f"16: {found['page16_us']:.1f} 64: {found['page64_us']:.1f} | {text[0]} | {text[1]}",
            flush=True,
        )
    return table


def copies() -> list[dict[str, Any]]:
    """GB/s of device copies that move as many bytes as the memory-bound rows read, and of a large one."""
    table = []
    for size in (75_497_472, 603_979_776, 8 * 2**30):
        sources = [torch.empty(size // 4, dtype=BF16, device="cuda").normal_() for _ in range(max(1, int(2e8 // size)))]
        target = torch.empty_like(sources[0])
        us = graph_us([functools.partial(target.copy_, source) for source in sources])
        table.append({"bytes": size, "copy_us": us, "GBps": size / us / 1e3})
        print(f"copy that moves {size / 1e6:.0f} MB: {us:.1f} us, {size / us / 1e3:.0f} GB/s", flush=True)
    return table


def prefill() -> list[dict[str, Any]]:
    """DeepSeek's prefill, forward and backward; k_nope and v are views of one projection's result."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    B, H, S, P, R, E = 1, 128, 8192, 128, 64, 128
    generator = torch.Generator("cuda").manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=BF16, generator=generator)

    q_nope, q_pe = random(B, S, H, P + R).transpose(1, 2).split([P, R], 3)
    k_nope, v = random(B, S, H, P + E).transpose(1, 2).split([P, E], 3)
    k_pe, grad_out = random(B, S, R), random(B, H, S, E)
    tensors = q_nope, q_pe.contiguous(), k_nope, k_pe, v
    settings = {"softmax_scale": (P + R) ** -0.5, "band_upper": 0, "empty_rows": "impossible"}
    flops = 2 * B * H * S * S / 2 * (P + R + E)
    backward_flops = 2 * B * H * S * S / 2 * (3 * (P + R) + 2 * E)
    out, lse = mla_prefill(*tensors, **settings)

    leaves = [x.detach().clone().requires_grad_() for x in tensors]

    def joined() -> tuple[torch.Tensor, torch.Tensor]:
        shared = leaves[3].unsqueeze(1).expand(-1, H, -1, -1)
        return torch.cat((leaves[0], leaves[1]), 3), torch.cat((leaves[2], shared), 3)

    def attend(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, leaves[4], is_causal=True, scale=settings["softmax_scale"])

    q, k = (x.detach().requires_grad_() for x in joined())
    peer, whole = attend(q, k), attend(*joined())
    gradients = torch.autograd.grad(whole, leaves, grad_out, retain_graph=True)
    mine = mla_prefill_backward(grad_out, *tensors, None, None, None, out, lse, **settings)
    errors = [relative(out, peer.float()), *(relative(a, b.float()) for a, b in zip(mine, gradients))]
    if not all(error < 2e-2 for error in errors):
        raise RuntimeError(f"prefill differs from cuDNN's: {errors}")
    again = mla_prefill_backward(grad_out, *tensors, None, None, None, out, lse, **settings)
    if not all(torch.equal(a, b) for a, b in zip(mine, again)):
        raise RuntimeError("gradients differ between two runs")
    with torch.no_grad():
        forward = {
            "ours": call_us(lambda: mla_prefill(*tensors, **settings)),
            "cudnn": call_us(lambda: attend(q, k)),
            "cudnn with concatenation": call_us(lambda: attend(*joined())),
        }
    backward = {
        "ours": call_us(
            lambda: mla_prefill_backward(grad_out, *tensors, None, None, None, out, lse, **settings)
        ),
        "cudnn": call_us(lambda: torch.autograd.grad(peer, [q, k, leaves[4]], grad_out, retain_graph=True)),
        "cudnn with concatenation": call_us(lambda: torch.autograd.grad(whole, leaves, grad_out, retain_graph=True)),
    }  # fmt: skip
    table = []
    for direction, times, amount in (("forward", forward, flops), ("backward", backward, backward_flops)):
        for name, us in times.items():
            table.append({"direction": direction, "kernel": name, "us": us, "TFLOPs": amount / us / 1e6})
            print(f"prefill {direction:8} {name:25} {us:9.0f} us {amount / us / 1e6:5.0f} TFLOP/s", flush=True)
    print("largest differences from cuDNN:", " ".join(f"{error:.1e}" for error in errors))
    return table


def forms() -> list[dict[str, Any]]:
    """Both forms of a whole latent attention over q_len, causal, from kv_c to the result per head."""
    C, R, P, E = LATENT, ROPE, 128, 128
    table = []
    print("heads kv_len q_len | absorbed us  prefill form us | ratio")
    for heads, kv_len in ((16, 4096), (128, 4096), (128, 16384)):
        generator = torch.Generator("cuda").manual_seed(2)
        random = functools.partial(torch.randn, device="cuda", dtype=BF16, generator=generator)
        cache = random(1, kv_len, C + R)
        kv_c, k_pe = cache.split([C, R], 2)
        w_uk, w_uv = random(heads, P, C) * C**-0.5, random(heads, E, C) * C**-0.5
        for q_len in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
            q_nope, q_pe = random(1, heads, q_len, P), random(1, heads, q_len, R)
            settings = {
                "softmax_scale": (P + R) ** -0.5, "band_upper": kv_len - q_len, "empty_rows": "impossible"
            }  # fmt: skip

            def absorbed(
                q_nope: torch.Tensor = q_nope, q_pe: torch.Tensor = q_pe, kv_c: torch.Tensor = kv_c,
                k_pe: torch.Tensor = k_pe, w_uk: torch.Tensor = w_uk, w_uv: torch.Tensor = w_uv,
                settings: dict[str, Any] = settings,
            ) -> torch.Tensor:  # fmt: skip
                latent = torch.matmul(q_nope, w_uk)
                return torch.matmul(mla_decode(latent, q_pe, kv_c, k_pe, **settings)[0], w_uv.mT)

            def expanded(
                q_nope: torch.Tensor = q_nope, q_pe: torch.Tensor = q_pe, kv_c: torch.Tensor = kv_c,
                k_pe: torch.Tensor = k_pe, w_uk: torch.Tensor = w_uk, w_uv: torch.Tensor = w_uv,
                settings: dict[str, Any] = settings,
            ) -> torch.Tensor:  # fmt: skip
                both = torch.cat((w_uk, w_uv), 1).flatten(0, 1)
                k_nope, v = F.linear(kv_c, both).unflatten(2, (-1, P + E)).transpose(1, 2).split([P, E], 3)
                return mla_prefill(q_nope, q_pe, k_nope, k_pe, v, **settings)[0]

            difference = relative(absorbed(), expanded().float())
            if not difference < 2e-2:
                raise RuntimeError(f"the forms differ by {difference:.1e} at {heads}, {kv_len}, {q_len}")
            times = [graph_us([function] * 4) for function in (absorbed, expanded)]
            table.append({"heads": heads, "kv_len": kv_len, "q_len": q_len, "absorbed_us": times[0],
                          "prefill_us": times[1]})  # fmt: skip
            print(f"{heads:5} {kv_len:6} {q_len:5} | {times[0]:10.1f} {times[1]:12.1f} | {times[1] / times[0]:.2f}",
                  flush=True)  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", default="copies,decode,prefill,forms")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    device = torch.cuda.get_device_name().lower().replace(" ", "-")
    print(f"{device}, torch {torch.__version__}, bf16")
    known = {"copies": copies, "decode": decode, "prefill": prefill, "forms": forms}
    for part in options.parts.split(","):
        rows = known[part]()
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / f"{device}-mla-{part}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(itertools.chain(*rows))))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
