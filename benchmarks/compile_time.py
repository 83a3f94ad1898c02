"""What our passes cost when a model is compiled: seconds per stage, growth with the layers, share of Inductor's time.

    python benchmarks/compile_time.py                              # passes and Inductor, 12 and 24 layers
    python benchmarks/compile_time.py --layers 12 24 48 96 --passes-only
    python benchmarks/compile_time.py --family llama --train
    python benchmarks/compile_time.py --recognition --layers 12 24 48 96      # equal layers once, and each in full

Each model is compiled in a fresh process with empty caches. "passes" is everything that torch.compile would not do
without us; "inductor" is what it does afterwards, with the rewritten graph; "in full" is how many of the sites were not
found equal to another one. Ratios of one run can be compared; seconds depend on the machine.

With --recognition that stage alone is repeated on what was captured: seconds of the processor, the least of five.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--family", choices=["gpt", "llama"], default="gpt", help="llama needs transformers")
    parser.add_argument("--train", action="store_true", help="compile the backward too")
    parser.add_argument("--dynamic", action="store_true", help="with dynamic=True")
    parser.add_argument("--passes-only", action="store_true", help="do not run Inductor")
    parser.add_argument("--recognition", action="store_true", help="compare equal layers once with each in full")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        measured = measure if not args.recognition else measure_recognition
        print(json.dumps(measured(args.family, args.one, args.train, args.dynamic, args.passes_only)))
        return
    rows = []
    if args.recognition:
        print("layers  sites  in full    once  per layer    each  per layer  once/each")
    else:
        print("layers  capture  recognize  rewrite  passes  per layer  inductor  share  sites  in full")
    for layers in args.layers:
        rows.append(in_new_process(layers))
        row = rows[-1]
        if args.recognition:
            print(f"{layers:6}  {row['sites']:5}  {row['in_full']:7}", end="")
            print(*(f"  {row[how]:6.3f}  {row[how] / layers:9.5f}" for how in ("once", "each")), sep="", end="")
            print(f"  {row['once'] / row['each']:9.2f}", flush=True)
            continue
        inductor = (
            f"{row['inductor']:8.2f}  {row['passes'] / row['inductor']:5.1%}" if row["inductor"] else f"{'-':>15}"
        )
        stages = "  ".join(f"{row[name]:{len(name)}.3f}" for name in ("capture", "recognize", "rewrite"))
        passes = row["passes"]
        print(f"{layers:6}  {stages}  {passes:6.2f}  {passes / layers:9.4f}  {inductor}  {row['sites']:5}", end="")
        print(f"  {row['in_full']:7}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


def in_new_process(layers: int) -> dict:
    """`measure` in a fresh process with caches of its own."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", __file__, "--one", str(layers), *sys.argv[1:]]
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(family: str, layers: int, train: bool, dynamic: bool, passes_only: bool) -> dict:
    """Compile one model; seconds."""
    import torch

    import rocm_attn_compile
    from rocm_attn_compile.pipeline import compile_graph

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, inputs = _gpt(layers) if family == "gpt" else _llama(layers)
    spent = 0.0

    def backend(graph_module, example_inputs):
        nonlocal spent
        start = time.perf_counter()
        compiled = compile_graph(graph_module, example_inputs, lowering="eager" if passes_only else "inductor")
        spent += time.perf_counter() - start
        return compiled

    compiled = torch.compile(model, backend=backend, dynamic=dynamic or None)
    with torch.set_grad_enabled(train):
        start = time.perf_counter()
        out = compiled(**inputs)
        out = out if isinstance(out, torch.Tensor) else out.logits
        if train:
            out.sum().backward()  # the backward is compiled when it first runs
        total = time.perf_counter() - start
    reports = rocm_attn_compile.reports()
    stages = {name: sum(r.timings.get(name, 0.0) for r in reports) for name in ("capture", "recognize", "rewrite")}
    passes = sum(stages.values())
    return {
        "family": family,
        "layers": layers,
        "train": train,
        "dynamic": dynamic,
        **stages,
        "passes": passes,
        "inductor": 0.0 if passes_only else spent - passes,
        "total": total,
        "sites": sum(site.replaced for r in reports for site in r.sites),
        "in_full": sum(r.recognized.get("in_full", 0) for r in reports),
        "torch": torch.__version__,
    }


def measure_recognition(family: str, layers: int, train: bool, dynamic: bool, passes_only: bool) -> dict:
    """Recognise one model again and again, with equal layers once and with each in full; seconds of the processor."""
    from rocm_attn_compile import pipeline

    least = {"once": float("inf"), "each": float("inf")}
    real = pipeline._recognize_all

    def measured(traces):
        found = real(traces)  # sizes that have to be numbers are numbers now
        for _ in range(5):
            for how in least:
                sites = pipeline.Sites() if how == "once" else None
                start = time.process_time()
                for trace in traces:
                    pipeline.recognize(trace, sites)
                least[how] = min(least[how], time.process_time() - start)
        return found

    pipeline._recognize_all = measured
    return {**measure(family, layers, train, dynamic, passes_only=True), **least}


def _gpt(layers: int):
    """A GPT as nanoGPT writes it, attention by hand with a causal buffer made in the forward."""
    import torch
    from torch import nn

    width, heads, length = 64, 4, 32

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            batch, length, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).split(width, dim=2)
            q, k, v = (t.view(batch, length, heads, width // heads).transpose(1, 2) for t in (q, k, v))
            scores = (q @ k.transpose(-2, -1)) * (width // heads) ** -0.5
            mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            x = x + self.proj((weights @ v).transpose(1, 2).reshape(batch, length, width))
            return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = nn.Embedding(100, width), nn.ModuleList(Block() for _ in range(layers))

        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            return x

    return GPT(), {"ids": torch.randint(0, 100, (2, length))}


def _llama(layers: int):
    """transformers' Llama with eager attention and a padding mask."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
        use_cache=False,
    )
    ids = torch.randint(0, 100, (2, 32))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return LlamaForCausalLM(config), {"input_ids": ids, "attention_mask": mask}


if __name__ == "__main__":
    main()
