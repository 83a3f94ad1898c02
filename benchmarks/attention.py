"""Attention of named real shapes on a GPU: our Triton kernels against SDPA, FlexAttention and eager in one run.

    python benchmarks/attention.py [--only TEXT] [--no-flex] [--no-backward] [--tuned] [--out FOLDER]

Every timed result is first compared with a float32 computation of one key/value head's group, chunked over the queries;
a wrong result gets no time. Times are medians of replays of a CUDA graph, so that the host costs nobody anything
(benchmarks/gpu/call_overhead.py measures that); a peer's backward is what autograd launches. Decode reads a different
cache in each call. Writes a CSV and prints a table: our speed, and each peer's time over ours.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib
import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))

import check_triton as base
from tune import graph_ms

SEEDS = itertools.count()


@dataclass(frozen=True)
class Case:
    """One attention: sizes as in the issue's tables (B batch, H/K heads, M/N lengths, D/E head sizes) and its mask.

    Attributes:
        valid: Keys that hold data, from a device tensor (kv_end), None for all.
        documents: Length of packed documents, None for one.
        by_ids: Whether the documents stand in ids of queries and keys, else in each row's first key.
        padded: Keys that a padding mask leaves, None for all.
        left: Keys of padding before them, as of a batch in training: their own rows keep none, give the mean as in
            eager, and get no gradient from the loss.
        bias: Whether a (1, H, M, N) bias is added, as in T5.
        page: Block size of a paged cache, whose blocks lie in random order; None is a contiguous one.
        float8: Whether the cache holds float8_e4m3fn with a scale per head.
    """

    name: str
    B: int
    H: int
    K: int
    M: int
    N: int
    D: int
    E: int
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    valid: int | None = None
    documents: int | None = None
    by_ids: bool = False
    padded: int | None = None
    left: int = 0
    bias: bool = False
    page: int | None = None
    float8: bool = False
    flex: bool = False
    plain: str = ""

    @property
    def decode(self) -> bool:
        """Whether the case is bound by reading the cache."""
        return self.M <= 16

    @property
    def pairs(self) -> float:
        """Query-key pairs per head that the mask keeps."""
        M, N = self.M - self.left, (self.valid or self.padded or self.N) - self.left
        if self.window:
            return M * self.window - self.window**2 / 2
        if self.documents:
            return M * self.documents / (2 if self.causal else 1)
        return M * N / 2 if self.causal and not self.decode else M * N


def prefill(name: str, *sizes: int, **more: Any) -> Case:
    """A case with M = N from (B, H, K, S, D) or (B, H, K, S, D, E)."""
    B, H, K, S, D, *E = sizes
    return Case(name, B, H, K, S, S, D, *(E or [D]), **more)


def decoding(name: str, *sizes: int, **more: Any) -> Case:
    """A case with one query from (B, H, K, N, D)."""
    B, H, K, N, D = sizes
    return Case(name, B, H, K, 1, N, D, D, causal=False, **more)


CASES = [
    prefill("table 1", 8, 32, 8, 2048, 128, flex=True),
    prefill("table 2", 2, 32, 8, 8192, 128, flex=True),
    prefill("table 3", 1, 32, 8, 16384, 128, flex=True),
    prefill("table 4", 2, 32, 32, 8192, 64, flex=True),
    prefill("table 5", 2, 16, 16, 8192, 256, flex=True),
    prefill("table 6, not causal", 2, 32, 32, 8192, 128, causal=False, flex=True),
    prefill("table 7", 4, 16, 16, 1024, 96, flex=True),
    prefill("table 8, MLA prefill", 1, 128, 128, 8192, 192, 128, flex=True),
    prefill("table 9, window 1024", 1, 32, 8, 16384, 128, window=1024, flex=True),
    decoding("decode 1", 1, 32, 8, 2048, 128),
    decoding("decode 2", 1, 32, 8, 32768, 128),
    decoding("decode 3", 16, 32, 8, 4096, 128),
    decoding("decode 4", 64, 32, 8, 8192, 128),
    decoding("decode 5", 8, 64, 8, 16384, 128),
    decoding("decode 6", 32, 32, 32, 4096, 64),
    decoding("decode 7", 16, 8, 1, 8192, 256),
    *(
        decoding(f"decode {row}, {words}", *sizes, **how, plain=f"decode {row}")
        for row, sizes in (
            (1, (1, 32, 8, 2048, 128)),
            (2, (1, 32, 8, 32768, 128)),
            (3, (16, 32, 8, 4096, 128)),
            (4, (64, 32, 8, 8192, 128)),
            (5, (8, 64, 8, 16384, 128)),
            (6, (32, 32, 32, 4096, 64)),
            (7, (16, 8, 1, 8192, 256)),
        )
        for words, how in (
            ("pages of 16", {"page": 16}),
            ("pages of 64", {"page": 64}),
            ("float8", {"float8": True}),
            ("float8, pages of 16", {"page": 16, "float8": True}),
        )
    ),
    prefill("Llama 3 8B prefill 4k", 1, 32, 8, 4096, 128),
    prefill("Llama 3 70B prefill 8k", 1, 64, 8, 8192, 128),
    decoding("Llama 3 8B decode, batch 16", 16, 32, 8, 8192, 128),
    decoding("Llama 3 70B decode, batch 32", 32, 64, 8, 8192, 128),
    prefill("Qwen2.5 7B prefill 8k", 1, 28, 4, 8192, 128),
    decoding("Qwen2.5 7B decode, batch 16", 16, 28, 4, 8192, 128),
    prefill("Gemma 2 9B global layer 8k", 1, 16, 8, 8192, 256, soft_cap=50.0),
    prefill("Gemma 2 9B local layer 8k", 1, 16, 8, 8192, 256, soft_cap=50.0, window=4096),
    prefill("GPT-2 1k, batch 8", 8, 12, 12, 1024, 64),
    prefill("ViT-L/14 336, batch 32", 32, 16, 16, 577, 64, causal=False),
    prefill("T5 large encoder 512, batch 16", 16, 16, 16, 512, 64, causal=False, bias=True),
    prefill("DeepSeek V3 prefill 4k", 1, 128, 128, 4096, 192, 128),
    prefill("structure: full", 1, 32, 8, 8192, 128, causal=False),
    prefill("structure: causal", 1, 32, 8, 8192, 128, plain="structure: full"),
    prefill("structure: window 1024", 1, 32, 8, 8192, 128, window=1024, plain="structure: causal"),
    prefill("structure: 8 documents", 1, 32, 8, 8192, 128, documents=1024, plain="structure: causal"),
    prefill(
        "structure: 8 documents by ids", 1, 32, 8, 8192, 128, documents=1024, by_ids=True, plain="structure: causal"
    ),
    prefill("structure: a quarter padding", 1, 32, 8, 8192, 128, causal=False, padded=6144, plain="structure: full"),
    prefill("structure: a quarter padding, left, causal", 8, 32, 8, 2048, 128, left=512, plain="table 1"),
    prefill("structure: soft cap", 1, 32, 8, 8192, 128, soft_cap=30.0, plain="structure: causal"),
    prefill("structure: sinks", 1, 32, 8, 8192, 128, sinks=True, plain="structure: causal"),
    prefill("structure: bias", 2, 16, 16, 2048, 128, causal=False, bias=True),
    prefill("131072 tokens", 1, 8, 2, 131072, 128),
    decoding("structure: cache of 8192", 16, 32, 8, 8192, 128),
    decoding("structure: 1000 of 8192 valid", 16, 32, 8, 8192, 128, valid=1000, plain="structure: cache of 8192"),
    decoding("structure: cache of 1000", 16, 32, 8, 1000, 128, plain="structure: cache of 8192"),
]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal numbers; from a generator of our own, since a failed graph capture spoils the default one."""
    return torch.randn(shape, device="cuda", dtype=dtype, generator=torch.Generator("cuda").manual_seed(next(SEEDS)))


def make_inputs(case: Case) -> dict[str, Any]:
    """Arguments of attention_forward with fresh random data, bf16."""
    shapes = ((case.H, case.M, case.D), (case.K, case.N, case.D), (case.K, case.N, case.E))
    q, k, v = (random(case.B, *shape) for shape in shapes)
    arguments = base.ours(q, k, v, case.causal and not case.decode, case.window)
    arguments["logits_soft_cap"] = case.soft_cap
    if case.sinks:
        arguments["sinks"] = random(case.H, dtype=torch.float32)
    if case.valid:
        arguments["kv_end"] = torch.full((case.B, case.M), case.valid, device="cuda", dtype=torch.int32)
    if case.documents:
        # As recognised from a mask of packed documents: the start of each row's document, besides the causal bound.
        at = torch.arange(case.M, device="cuda", dtype=torch.int32) // case.documents * case.documents
        names = ("q_ids", "kv_ids") if case.by_ids else ("kv_start",)
        arguments.update(dict.fromkeys(names, at.expand(case.B, -1).contiguous()))
    if case.padded or case.left:
        at = torch.arange(case.N, device="cuda")
        kept = (at >= case.left) & (at < (case.padded or case.N))
        arguments["key_mask"] = kept.expand(case.B, -1).contiguous()
    if case.left:
        arguments["empty_rows"] = "mean"
    if case.bias:
        arguments["attn_bias"] = random(1, case.H, case.M, case.N)
    if case.float8:
        arguments.update({name: arguments[name].to(torch.float8_e4m3fn) for name in "kv"})
        arguments.update(
            k_scale=torch.full((case.K,), 0.5, device="cuda"), v_scale=torch.full((1,), 2.0, device="cuda")
        )
    if case.page:
        blocks = case.B * case.N // case.page
        arguments["block_table"] = torch.randperm(blocks, device="cuda", dtype=torch.int32).view(case.B, -1)
        arguments["kv_end"] = torch.full((case.B, 1), case.N, device="cuda", dtype=torch.int32)
        for name in "kv":  # the same numbers in another order: tokens of a block, heads side by side
            width = arguments[name].shape[3]
            arguments[name] = arguments[name].reshape(blocks, case.page, case.K, width).transpose(1, 2)
    return arguments


def rows_of_first(a: dict[str, Any], name: str) -> torch.Tensor:
    """Keys or values of the first key/value head of the first batch entry, `(N, D)` float32."""
    cache, table, scale = a[name], a.get("block_table"), a.get(f"{name}_scale")
    rows = cache[0, 0] if table is None else cache.float()[table[0].long(), 0].flatten(0, 1)
    return rows.float() if scale is None else rows.float() * scale[0]


def keep_mask(case: Case, rows: torch.Tensor) -> torch.Tensor | None:
    """`(rows, N)` bool, True where attended; None for everything."""
    i, j = rows[:, None], torch.arange(case.N, device=rows.device)[None, :]
    keep = torch.ones(len(rows), case.N, dtype=torch.bool, device=rows.device)
    if case.causal and not case.decode:
        keep &= j <= i
    if case.window:
        keep &= i - j < case.window
    if case.documents:
        keep &= i // case.documents == j // case.documents
    if case.valid or case.padded:
        keep &= j < (case.valid or case.padded)
    if case.left:
        keep &= j >= case.left
    return keep


def reference(case: Case, a: dict[str, Any], grad_out: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """out (and dq, dk, dv with `grad_out`) of the first key/value head's group of the first batch entry, in float32."""
    group = case.H // case.K
    q, k, v = a["q"][0, :group].float(), rows_of_first(a, "k"), rows_of_first(a, "v")
    found: dict[str, torch.Tensor] = {"out": torch.empty(group, case.M, case.E, device="cuda")}
    if grad_out is not None:
        found["q"] = torch.empty_like(q)
        found["k"], found["v"] = torch.zeros_like(k), torch.zeros_like(v)
    for head in range(group):
        for first in range(0, case.M, 2048):
            rows = torch.arange(first, min(first + 2048, case.M), device="cuda")
            raw = q[head, rows] @ k.T * a["softmax_scale"]
            s = case.soft_cap * torch.tanh(raw / case.soft_cap) if case.soft_cap else raw
            if case.bias:
                s = s + a["attn_bias"][0, head, rows].float()
            s = s.masked_fill(~keep_mask(case, rows), -math.inf)
            # Not -inf, for rows that keep nothing.
            top = s.amax(-1, keepdim=True).clamp(min=-1e30)
            p = torch.exp(s - top)
            total = p.sum(-1, keepdim=True)
            if case.sinks:
                total = total + torch.exp(a["sinks"][head] - top)
            p = p / total.clamp(min=1e-30)
            out = p @ v
            found["out"][head, rows] = out
            if grad_out is not None:
                g = grad_out[0, head, rows].float()
                ds = p * (g @ v.T - (g * out).sum(-1, keepdim=True))
                if case.soft_cap:
                    ds = ds * (1 - torch.tanh(raw / case.soft_cap) ** 2)
                ds = ds * a["softmax_scale"]
                found["q"][head, rows] = ds @ k
                found["k"] += ds.T @ q[head, rows]
                found["v"] += p.T @ g
    return found


def worst_error(case: Case, want: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> float:
    """Largest relative error of the results given, on the reference's slice."""
    group = case.H // case.K
    rows = slice(case.left, None)  # those before keep nothing
    want = {**want, "out": want["out"][:, rows]}
    slices = {"out": (0, slice(group), rows), "q": (0, slice(group)), "k": (0, 0), "v": (0, 0)}
    return max(base.relative(tensor[slices[name]], want[name]) for name, tensor in got.items())


Pass = tuple[Callable[[], Any], Callable[[torch.Tensor], Callable[[], Any]] | None]


def ours(case: Case, a: dict[str, Any], tuned: str = "") -> Pass:
    """Our launchers: forward, and a function from grad_out to the backward."""
    forward = functools.partial(base.attention.attention_forward, **a, tuned=tuned)

    def backward(grad_out: torch.Tensor) -> Callable[[], Any]:
        out, lse = forward()
        # The peers' masks and biases take no gradient, so ours neither.
        mask = [True, True, True, False, False]
        return functools.partial(
            base.attention.attention_backward, grad_out, **a, out=out, lse=lse, output_mask=mask, tuned=tuned
        )  # fmt: skip

    return lambda: forward()[0], backward


TUNED: dict[str, str] = {}
"""Case -> what tuning chose."""


def tuned(case: Case, a: dict[str, Any]) -> Pass:
    """Ours with what `mode="max-autotune"` chooses, measured once a case."""
    if case.name not in TUNED:
        tuner = importlib.import_module(base.attention.__name__.replace("attention", "autotune"))
        problems = [{**one, "out_layout": "bhsd"} for one in (a, *(make_inputs(case) for _ in range(7 * case.decode)))]
        start = time.time()
        outcomes = tuner.tune(problems, [not case.decode] * 3 + [False] * 2, {}, tuner.gpu())
        print(f"{case.name}: tuned in {time.time() - start:.0f} s", *outcomes, sep="\n    ", flush=True)
        TUNED[case.name] = tuner.text_of(outcomes)
    return ours(case, a, TUNED[case.name])


def through_autograd(call: Callable[..., torch.Tensor], a: dict[str, Any]) -> Pass:
    """A peer that differentiates through autograd."""
    leaves = [a[name].detach().requires_grad_() for name in "qkv"]

    def backward(grad_out: torch.Tensor) -> Callable[[], Any]:
        out = call(*leaves)
        return lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

    return lambda: call(*(a[name] for name in "qkv")), backward


def sdpa(case: Case, a: dict[str, Any], kind: Any, mask: torch.Tensor | None) -> Pass:
    """scaled_dot_product_attention, held to one backend."""
    from torch.nn.attention import sdpa_kernel

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        causal = case.causal and not case.decode and mask is None
        with sdpa_kernel(kind):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=case.H != case.K, scale=a["softmax_scale"]
            )

    return through_autograd(call, a)


def eager(case: Case, a: dict[str, Any]) -> Pass:
    """matmul, softmax, matmul, in the dtype of the inputs, as Hugging Face models spell it."""
    mask = keep_mask(case, torch.arange(case.M, device="cuda"))

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = case.H // case.K
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        s = q @ k.transpose(-1, -2) * a["softmax_scale"]
        if case.soft_cap:
            s = case.soft_cap * torch.tanh(s / case.soft_cap)
        if case.bias:
            s = s + a["attn_bias"]
        s = s.masked_fill(~mask, torch.finfo(s.dtype).min)
        return torch.softmax(s, -1, dtype=torch.float32).to(q.dtype) @ v

    return through_autograd(call, a)


def flex(case: Case, a: dict[str, Any]) -> Pass:
    """FlexAttention, compiled, with a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def keep(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i >= j) & (i - j < (case.window or case.N))

    block_mask = create_block_mask(keep, None, None, case.M, case.N, device="cuda") if case.causal else None
    compiled = torch.compile(flex_attention, dynamic=False)
    return through_autograd(
        functools.partial(compiled, block_mask=block_mask, scale=a["softmax_scale"], enable_gqa=case.H != case.K), a
    )


def peers(case: Case, a: dict[str, Any], with_flex: bool, with_tuned: bool = False) -> dict[str, Callable[[], Pass]]:
    """What can compute the case, by name."""
    from torch.nn.attention import SDPBackend

    found: dict[str, Callable[[], Pass]] = {"ours": lambda: ours(case, a)}
    if case.page or case.float8:
        return found
    if with_tuned:
        found["tuned"] = lambda: tuned(case, a)
    if not (case.soft_cap or case.sinks or case.valid or case.documents):
        mask = a["attn_bias"].expand(case.B, -1, -1, -1) if case.bias else None
        if case.window or case.padded or case.left:
            mask = keep_mask(case, torch.arange(case.M, device="cuda"))
        for name, kind in (
            ("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        ):  # fmt: skip
            if mask is None or name != "flash":
                found[name] = functools.partial(sdpa, case, a, kind, mask)
    if with_flex and case.flex:
        found["flex"] = lambda: flex(case, a)
    if case.B * case.H * case.M * case.N <= 2**31 and not case.sinks:
        found["eager"] = lambda: eager(case, a)
    return found


def median_ms(call: Callable[[], Any]) -> float:
    """Median time of a call in ms, launched by the host, L2 flushed between calls."""
    import triton

    return triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median")


def measure(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the CSV for one case."""
    a = make_inputs(case)
    grad_out = random(case.B, case.H, case.M, case.E)
    grad_out[:, :, : case.left] = 0
    wants_backward = not case.decode and not options.no_backward
    want = reference(case, a, grad_out if wants_backward else None)
    cache_bytes = (1 if case.float8 else 2) * case.B * case.K * (case.valid or case.N) * (case.D + case.E)
    copies = max(2, min(48, int(1.2e9 / cache_bytes))) if case.decode else 1
    others = [make_inputs(case) for _ in range(copies - 1)]
    flops = 2 * case.B * case.H * case.pairs
    rows = []
    for name, make in peers(case, a, not options.no_flex, options.tuned).items():
        shared = {"case": case.name, "peer": name}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                forward, backward = make()
            with torch.no_grad():
                error = worst_error(case, want, {"out": forward()})
                calls = [forward] + [peers(case, other, False, True)[name]()[0] for other in others]
                calls = calls * (1 if copies > 1 else max(1, min(16, int(2e11 / (flops * case.D)))))
                ms = graph_ms(calls) if error < 2e-2 else math.nan
            speeds = {"tflops": flops * (case.D + case.E) / ms / 1e9, "gb_per_s": cache_bytes / ms / 1e6}
            rows.append({**shared, "pass": "forward", "ms": ms, "error": error, **speeds})
            small = name != "eager" or case.B * case.H * case.M * case.N <= 2**29
            if wants_backward and small and not (name == "efficient" and case.window):
                with torch.cuda.stream(stream):
                    run = backward(grad_out)
                    error = worst_error(case, want, dict(zip("qkv", run())))
                torch.cuda.synchronize()
                run_often = [run] * max(1, min(8, int(2e11 / (flops * case.D))))
                ms = math.nan
                if error < 2e-2:
                    try:
                        ms = graph_ms(run_often, stream=stream)
                    except RuntimeError as problem:
                        print(f"  {case.name}, {name}: not captured ({str(problem).splitlines()[0][:60]})", flush=True)
                        ms = median_ms(run)
                rows.append({**shared, "pass": "backward", "ms": ms, "error": error,
                             "tflops": flops * (3 * case.D + 2 * case.E) / ms / 1e9, "gb_per_s": math.nan})  # fmt: skip
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as problem:
            print(f"  {case.name}, {name}: {str(problem).splitlines()[0][:110]}", flush=True)
        torch.cuda.empty_cache()
    return rows


def show(case: Case, rows: list[dict[str, Any]], earlier: dict[str, float]) -> None:
    """One line per pass: our speed, and how many times faster than each peer; nothing for a wrong result."""
    for direction in ("forward", "backward"):
        mine = next((row for row in rows if row["peer"] == "ours" and row["pass"] == direction), None)
        if mine is None or math.isnan(mine["ms"]):
            if mine:
                print(f"{case.name:34} {direction:8} WRONG, error {mine['error']:.1e}")
            continue
        speed = f"{mine['gb_per_s']:6.0f} GB/s" if case.decode else f"{mine['tflops']:5.0f} TFLOP/s"
        ratios = [
            f"{row['peer']} {row['ms'] / mine['ms']:.2f}x" if not math.isnan(row["ms"]) else f"{row['peer']} wrong"
            for row in rows
            if row["pass"] == direction and row["peer"] != "ours"
        ]
        key = f"{case.plain} {direction}"
        note = f"; {mine['ms'] / earlier[key]:.2f} of the time of '{case.plain}'" if key in earlier else ""
        earlier[f"{case.name} {direction}"] = mine["ms"]
        print(f"{case.name:34} {direction:8} {mine['ms']:8.3f} ms {speed:13}", ", ".join(ratios) + note, flush=True)


def copy_ceiling() -> float:
    """GB/s of a large device-to-device copy, reads and writes counted."""
    source = torch.empty(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.numel() * 2 / median_ms(lambda: target.copy_(source)) / 1e6


def main() -> None:
    """Measure what was asked for and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains one of these texts: 'table|decode'")
    parser.add_argument("--no-flex", action="store_true", help="leave out FlexAttention, which compiles for long")
    parser.add_argument("--tuned", action="store_true", help="also with what mode='max-autotune' chooses")
    parser.add_argument("--no-backward", action="store_true")
    parser.add_argument("--out", default=str(Path(__file__).with_name("results")))
    options = parser.parse_args()
    import triton

    warnings.filterwarnings("ignore")  # SDPA explains at length why a backend cannot take a shape
    device = torch.cuda.get_device_name()
    versions = {"device": device, "torch": torch.__version__, "triton": triton.__version__,
                "cudnn": torch.backends.cudnn.version(), "date": time.strftime("%Y-%m-%d")}  # fmt: skip
    copy = copy_ceiling()
    print(f"{versions}, copy {copy:.0f} GB/s", flush=True)
    results: list[dict[str, Any]] = []
    earlier: dict[str, float] = {}
    path = Path(options.out) / f"{device.lower().replace(' ', '-')}-attention.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        if not any(part in case.name for part in options.only.split("|")):
            continue
        torch._dynamo.reset()
        rows = measure(case, options)
        show(case, rows, earlier)
        sizes = {name: getattr(case, name) for name in ("B", "H", "K", "M", "N", "D", "E")}
        results += [{**sizes, **row, "copy_gb_per_s": round(copy), **versions} for row in rows]
        with path.open("w", newline="") as file:
            names = ["case", "pass", "peer", "ms", "tflops", "gb_per_s", "error", *sizes, "copy_gb_per_s", *versions]
            writer = csv.DictWriter(file, fieldnames=names)
            writer.writeheader()
            writer.writerows(
                {k: f"{x:.4g}" if isinstance(x, float) else x for k, x in result.items()} for result in results
            )
    print("written", path.name)


if __name__ == "__main__":
    main()
