"""A DeepSeek-V3-shaped model: prefill, and decoding from a latent cache, beside Inductor, in one run.

    python benchmarks/mla_models.py [--jobs prefill,prompt,decode] [--batches 1,16,64] [--length 8192] [--graphs]

Layers of the real head sizes (latent 512 + 64, heads 128 + 64 and 128) with random weights and dense MLPs. "prefill"
reads two prompts of `--prompt` tokens, "prompt" does so into a static cache of that length; "decode" makes one token
for each of a batch from a static cache of `--length` tokens, all but one of which are filled. The ways are named by
what computes the attention and who compiles: "eager" and "sdpa" are the model's own attention, "latent" is the model
after `use_latent_cache`. transformers caches latents, too, and expands them all at every step.

Times are medians in milliseconds. `error` is the root mean square of the logits' error over that of the model's own
sdpa attention run by eager PyTorch, both against the model in float32 (in float64 for float32; on the first rows of a
batch); a way is marked WRONG above 3. `temporary` is what one call allocates on a GPU beside weights and cache. With
--graphs Inductor replays CUDA graphs, as `generate()` asks it to.
"""

from __future__ import annotations

import argparse
import copy
import csv
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, StaticCache

import rocm_attn_compile
from rocm_attn_compile.integrations.transformers import use_latent_cache
from rocm_attn_compile.testing import Float64Everywhere, cache_for, to_float64

CHECKED_ROWS = 4
CACHED = [("sdpa", "inductor"), ("sdpa", "rocm_attn"), ("latent", "inductor"), ("latent", "rocm_attn")]
# Without a cache transformers' mask may be one of packed sequences, to which the latent cache leaves it.
PREFILL = [("eager", "inductor"), ("sdpa", "inductor"), ("eager", "rocm_attn"), ("sdpa", "rocm_attn")]


def config(options: argparse.Namespace) -> DeepseekV3Config:
    heads = options.heads
    return DeepseekV3Config(
        hidden_size=options.hidden, intermediate_size=4 * options.hidden, num_hidden_layers=options.layers,
        num_attention_heads=heads, num_key_value_heads=heads, q_lora_rank=options.hidden * 3 // 4, kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=options.layers,
        vocab_size=8192, max_position_embeddings=max(options.length, options.prompt),
    )  # fmt: skip


def variant(model: Any, attention: str) -> Any:
    """The model with its weights shared and an attention of its own."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    changed = copy.deepcopy(model, shared)
    if attention == "latent":
        return use_latent_cache(changed)
    changed.set_attn_implementation(attention)
    return changed


def filled(model: Any, batch: int, length: int) -> StaticCache:
    """A static cache of `length` tokens of noise, the same for every model of a dtype."""
    cache = StaticCache(config=model.config, max_cache_len=length)
    with torch.no_grad():
        model(torch.zeros(batch, 1, dtype=torch.long, device=model.device), **cache_for(model, cache), use_cache=True)
    generator = torch.Generator(model.device).manual_seed(3)
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            tensor.normal_(generator=generator)
    return cache


def rows_of(cache: StaticCache, like: StaticCache, rows: int) -> StaticCache:
    for layer, source in zip(cache.layers, like.layers):
        layer.keys.copy_(source.keys[:rows])
        layer.values.copy_(source.values[:rows])
    return cache


def call(model: nn.Module, function: Any, tokens: Tensor, cache: StaticCache | None) -> Callable[[], Tensor]:
    """One run of the model, or of `function` compiled of it: the logits of the last token."""
    given = {"use_cache": False} if cache is None else {**cache_for(model, cache), "use_cache": True}

    def run() -> Tensor:
        with torch.no_grad():
            for layer in [] if cache is None else cache.layers:
                layer.cumulative_length.fill_(layer.max_cache_len - tokens.shape[1])
            return function(tokens, **given, logits_to_keep=1).logits

    return run


def milliseconds(function: Callable[[], Any], device: str) -> float:
    if device != "cpu":
        from triton.testing import do_bench

        return do_bench(function, warmup=50, rep=200, return_mode="median")
    from torch.utils.benchmark import Timer

    return Timer("f()", globals={"f": function}).blocked_autorange(min_run_time=0.5).median * 1e3


def temporary(function: Callable[[], Any], device: str) -> float:
    """Gigabytes that a call allocates; NaN on a CPU."""
    if device == "cpu":
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def measure(model: nn.Module, exact_model: nn.Module, job: str, batch: int, options: argparse.Namespace) -> list[tuple]:
    """A row for each way: names, milliseconds, error, temporary gigabytes, gigabytes of the cache."""
    torch.manual_seed(1)
    device, length = options.device, options.length if job == "decode" else options.prompt
    tokens = torch.randint(0, 8192, (batch, 1 if job == "decode" else options.prompt), device=device)
    cache = None if job == "prefill" else filled(variant(model, "latent"), batch, length)
    bytes_of_cache = 0 if cache is None else sum(x.nbytes for y in cache.layers for x in (y.keys, y.values))
    checked = min(batch, CHECKED_ROWS)

    def first_rows(own: Any) -> Tensor:
        part = None if cache is None else rows_of(filled(own, checked, length), cache, checked)
        return call(own, own, tokens[:checked], part)().double()

    eager = first_rows(variant(model, "sdpa"))
    with Float64Everywhere() if exact_model.dtype == torch.float64 else nullcontext():
        exact = first_rows(exact_model)
    allowed = rms(eager - exact)
    rows = []
    for attention, backend in PREFILL if cache is None else CACHED:
        if options.ways and f"{attention}+{backend}" not in options.ways.split(","):
            continue
        torch._dynamo.reset()
        own = variant(model, attention)
        mode = "reduce-overhead" if options.graphs else None
        run = call(own, torch.compile(own, backend=backend, dynamic=False, mode=mode), tokens, cache)
        try:
            run()
            error = rms(run()[:checked].double() - exact) / max(allowed, 1e-30)
            figures = (milliseconds(run, device), error, temporary(run, device), bytes_of_cache / 1e9)
            rows.append((job, batch, attention, backend, *figures))
        except (torch.OutOfMemoryError, NotImplementedError) as failure:
            print(f"{job} {batch} {attention} {backend}: {str(failure).splitlines()[0][:100]}", flush=True)
        if device != "cpu":
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--layers", type=int, default=4 if on_gpu else 1)
    parser.add_argument("--hidden", type=int, default=2048 if on_gpu else 256)
    parser.add_argument("--heads", type=int, default=32 if on_gpu else 4)
    parser.add_argument("--prompt", type=int, default=4096 if on_gpu else 128)
    parser.add_argument("--length", type=int, default=8192 if on_gpu else 256)
    parser.add_argument("--batches", default="1,16,64" if on_gpu else "1,3")
    parser.add_argument("--jobs", default="prefill,prompt,decode")
    parser.add_argument("--ways", help='only these, as "sdpa+inductor,latent+rocm_attn"')
    parser.add_argument("--graphs", action="store_true", help="replay CUDA graphs")
    parser.add_argument("--csv", help="also write the figures there")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    where = torch.cuda.get_device_name() if on_gpu else "CPU"
    about = (f"rocm_attn_compile {rocm_attn_compile.__version__}, torch {torch.__version__}, {where}, {options.dtype}, "
             f"{options.layers} layers, hidden {options.hidden}, {options.heads} heads, prompt {options.prompt}, cache "
             f"{options.length}{', CUDA graphs' if options.graphs else ''}")  # fmt: skip
    print(about)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config(options), attn_implementation="sdpa", dtype=dtype).eval()
    exact_model = to_float64(model) if dtype == torch.float32 else copy.deepcopy(model).float()
    print(f"{'job':8s}{'batch':>6s}  {'attention':10s}{'compiler':10s}"
          f"{'ms':>9s}{'error':>7s}{'temporary GB':>14s}{'cache GB':>10s}")  # fmt: skip
    rows: list[tuple] = []
    for job in options.jobs.split(","):
        for batch in [int(size) for size in options.batches.split(",")] if job == "decode" else [2]:
            for row in measure(model, exact_model, job, batch, options):
                rows.append(row)
                _, _, attention, backend, *figures = row
                text = "{:9.3f}{:7.2f}{:14.3f}{:10.3f}".format(*figures)
                wrong = "" if figures[1] <= 3.0 else "  WRONG"
                print(f"{job:8s}{batch:6d}  {attention:10s}{backend:10s}{text}{wrong}", flush=True)
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            file.write(f"# {about}\n")
            header = ("job", "batch", "attention", "compiler", "ms", "error", "temporary_gb", "cache_gb")
            csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    main()
