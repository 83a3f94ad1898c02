"""Whole Hugging Face models: rocm_attn beside Inductor and eager, in one run.

    python benchmarks/models.py [--models llama-3-8b,...] [--attention eager,sdpa] [--jobs prefill,...] [--warm 12]

Layers of real shapes with random weights, a few of each model: what one layer gains, the model gains. Jobs: "prefill"
reads a prompt, "padded" two prompts of unequal length, "decode" makes one token from a static cache that is three
quarters full, "training" is a forward and backward. Times are medians of `triton.testing.do_bench` on a GPU, of
`torch.utils.benchmark` on a CPU; ratios above 1 mean that ours is faster. "On the device" is what the GPU works for a
call, the sum of its kernels' times: where the time is much longer, the host bounds it. Each result is compared with the
model in float32 (a float32 model with float64), and the error must be within a small factor of eager's in the model's
dtype; a wrong one gets no ratio.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    StaticCache,
    T5Config,
)

import rocm_attn_compile
from rocm_attn_compile.testing import Float64Everywhere, accuracy, cache_for, to_float64


@dataclass(frozen=True)
class Model:
    """A model's configuration by number of layers, and the sizes of its jobs.

    Attributes:
        config: From the number of layers.
        prompt: Tokens of the prompt; "training" takes half of them.
        jobs: What it is measured in.
    """

    config: Callable[[int], Any]
    prompt: int = 4096
    jobs: tuple[str, ...] = ("prefill", "padded", "decode", "training")


def _llama(layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=8192, max_position_embeddings=8192,
    )  # fmt: skip


def _mistral(layers: int) -> MistralConfig:
    return MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=8192, max_position_embeddings=8192, sliding_window=1024,
    )  # fmt: skip


def _gemma2(layers: int) -> Gemma2Config:
    return Gemma2Config(
        hidden_size=3584, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=8, head_dim=256, vocab_size=8192, max_position_embeddings=8192, sliding_window=1024,
    )  # fmt: skip


def _gpt2(layers: int) -> GPT2Config:
    return GPT2Config(n_embd=1600, n_head=25, n_layer=layers, n_positions=4096, vocab_size=8192)


def _t5(layers: int) -> T5Config:
    return T5Config(
        d_model=1024, d_kv=64, d_ff=2816, num_layers=layers, num_heads=16, vocab_size=8192,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip


def _deepseek(layers: int) -> DeepseekV3Config:
    return DeepseekV3Config(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=32, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, first_k_dense_replace=layers, vocab_size=8192, max_position_embeddings=8192,
    )  # fmt: skip


MODELS = {
    "llama-3-8b": Model(_llama),
    "mistral-7b, window 1024": Model(_mistral),
    "gemma-2-9b": Model(_gemma2),
    "gpt2-xl": Model(_gpt2, jobs=("prefill", "padded", "training")),
    "t5-large": Model(_t5, prompt=2048, jobs=("prefill", "padded", "training")),
    "deepseek-v3, 32 heads": Model(_deepseek),
}


def build(model: Model, layers: int, attention: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
    config = model.config(layers)
    config._attn_implementation = attention
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device(device):
        return auto.from_config(config, dtype=dtype).eval()


def inputs(module: torch.nn.Module, job: str, prompt: int, device: str) -> dict[str, Any]:
    """Arguments of the model's forward for one job."""
    config = module.config
    batch, length = (2, prompt) if job == "padded" else (1, prompt // 2 if job == "training" else prompt)
    torch.manual_seed(1)
    tokens = torch.randint(0, config.vocab_size, (batch, length), device=device)
    if job == "decode":
        positions = torch.tensor([[prompt * 3 // 4]], device=device)
        return {"input_ids": tokens[:, :1], "position_ids": positions, "use_cache": True}
    arguments: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
    if job == "padded":
        keep = torch.ones(batch, length, dtype=torch.long, device=device)
        keep[1, : length // 4] = 0
        arguments["attention_mask"] = keep
    if config.is_encoder_decoder:
        arguments["decoder_input_ids"] = tokens
    return arguments


def filled_cache(module: torch.nn.Module, prompt: int) -> StaticCache:
    """A static cache for `prompt` tokens, three quarters of which the model has read."""
    cache = StaticCache(config=module.config, max_cache_len=prompt)
    torch.manual_seed(2)
    tokens = torch.randint(0, module.config.vocab_size, (1, prompt * 3 // 4), device=module.device)
    with torch.no_grad():
        module(tokens, **cache_for(module, cache), use_cache=True, logits_to_keep=1)
    return cache


def caller(module: Any, function: Callable, job: str, arguments: dict[str, Any], cache: Any) -> Callable[[], Tensor]:
    """One run of the job: its logits, or the gradient of the embedding."""
    if job == "training":
        weight = module.get_input_embeddings().weight

        def train() -> Tensor:
            loss = function(**arguments).logits.float().square().mean()
            return torch.autograd.grad(loss, [weight, *[p for p in module.parameters() if p is not weight]])[0]

        return train

    # A sliding cache counts its tokens in a Python number, for every value of which dynamic=False would compile again.
    counted = [layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "cumulative_length_int")]
    counts = [layer.cumulative_length_int for layer in counted]

    given = {} if cache is None else cache_for(module, cache)

    def infer() -> Tensor:
        for layer, count in zip(counted, counts):
            layer.cumulative_length_int = count
        with torch.no_grad():
            return function(**arguments, **given).logits

    return infer


def milliseconds(function: Callable[[], Any], device: str) -> float:
    """Median time of a call."""
    if device != "cpu":
        from triton.testing import do_bench

        return do_bench(function, warmup=50, rep=200, return_mode="median")
    from torch.utils.benchmark import Timer

    return Timer("f()", globals={"f": function}).blocked_autorange(min_run_time=0.5).median * 1e3


def device_milliseconds(function: Callable[[], Any], device: str, calls: int = 5) -> float:
    """What the GPU works for a call: the sum of the times of its kernels and copies. NaN on a CPU."""
    if device == "cpu":
        return math.nan
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / calls / 1e3


def compare(name: str, attention: str, job: str, options: argparse.Namespace, timed: bool = True) -> dict:
    """Times of one job each way, and what of ours was checked; or only compiles both ways, into the caches on disk."""
    model, layers, device, dtype = MODELS[name], options.layers, options.device, getattr(torch, options.dtype)
    prompt = options.prompt or (model.prompt if device != "cpu" else 256)
    module = build(model, layers, attention, device, dtype)
    arguments = inputs(module, job, prompt, device)
    cache = partial(filled_cache, module, prompt) if job == "decode" else lambda: None

    def results(function: Any, owner: Any = module, make_cache: Callable = cache) -> tuple[Callable, Tensor]:
        call = caller(owner, function, job, arguments, make_cache())
        return call, call().clone()

    # For each way a cache of its own with the same contents: a decode step writes into it.
    calls: dict[str, Callable] = {}
    rocm_attn_compile.reset_reports()
    torch._dynamo.reset()
    calls["rocm_attn"], ours = results(torch.compile(module, backend="rocm_attn", mode=options.mode, dynamic=False))
    sites = [site for report in rocm_attn_compile.reports() for site in report.sites]
    calls["inductor"], theirs = results(torch.compile(module, mode=options.mode, dynamic=False))
    if not timed:
        return {}
    calls["eager"], eager = results(module)

    in_float64 = dtype == torch.float32
    exact_module = to_float64(module) if in_float64 else build(model, layers, attention, device, dtype).float()
    exact_cache = partial(filled_cache, exact_module, prompt) if job == "decode" else lambda: None
    with Float64Everywhere() if in_float64 else nullcontext():
        _, exact = results(exact_module, exact_module, exact_cache)
    exact = exact.cpu().double()
    measured = accuracy(ours.cpu(), eager.cpu(), exact)
    theirs_measured = accuracy(theirs.cpu(), eager.cpu(), exact)
    times = {name: milliseconds(call, device) for name, call in calls.items()}
    return {
        **times,
        "device": {name: device_milliseconds(calls[name], device) for name in ("inductor", "rocm_attn")},
        "replaced": f"{sum(site.replaced for site in sites)}/{len(sites)}",
        "ok": measured.ok,
        "inductor ok": theirs_measured.ok,
        "rms error": measured.rms_error / max(measured.eager_rms_error, 1e-30),
    }


def cases(options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Model, attention and job of each row."""
    parts = [part for part in options.models.split(",") if part]
    names = [name for name in MODELS if not parts or any(part in name for part in parts)]
    jobs = options.jobs.split(",")
    return [(n, a, job) for n in names for a in options.attention.split(",") for job in jobs if job in MODELS[n].jobs]


def warm(case: tuple[str, str, str], options: argparse.Namespace) -> None:
    """Compiles a case into the caches on disk, for a later process. What fails here fails there, and is told."""
    with suppress(Exception):
        compare(*case, options, timed=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--prompt", type=int, help="instead of the model's own; small on a CPU")
    parser.add_argument("--models", default="", help="parts of names, separated by commas; all if empty")
    parser.add_argument("--attention", default="eager,sdpa")
    parser.add_argument("--jobs", default="prefill,padded,decode,training")
    parser.add_argument("--mode", default="default", help="of torch.compile; 'reduce-overhead' is CUDA graphs")
    parser.add_argument("--warm", type=int, default=0, help="first compile everything, in so many processes")
    parser.add_argument("--compile-only", action="store_true", help="with --warm: stop after that")
    parser.add_argument("--csv", help="also write the figures there")
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if on_gpu else "CPU"
    torch.backends.cuda.matmul.allow_tf32 = False
    if options.warm:
        with ProcessPoolExecutor(options.warm, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
            list(pool.map(partial(warm, options=options), cases(options)))
    if options.compile_only:
        return
    how = f"torch {torch.__version__}, {where}, {options.dtype}, {options.layers} layers, mode {options.mode}"
    print(f"rocm_attn_compile {rocm_attn_compile.__version__}, {how}")
    print(f"{'ms per run':44s}{'eager':>9s}{'inductor':>10s}{'rocm_attn':>10s}"
          f"{'eager/':>9s}{'inductor/':>10s}  on the device: both; sites, rms error over eager's")  # fmt: skip
    rows = []
    for case in cases(options):
        label = "{:25s}{:7s}{:10s}".format(*case)
        try:
            found = compare(*case, options)
        except (torch.OutOfMemoryError, ValueError) as error:
            print(f"{label}  {str(error).splitlines()[0][:90]}", flush=True)
            continue
        eager, inductor, ours = (found[way] for way in ("eager", "inductor", "rocm_attn"))
        ratios = (eager / ours, inductor / ours) if found["ok"] else (math.nan, math.nan)
        device = found["device"]
        note = f"{device['inductor']:.2f}, {device['rocm_attn']:.2f}; {found['replaced']}, {found['rms error']:.2f}" + (
            "" if found["ok"] else "  WRONG"
        )
        note += "" if found["inductor ok"] else "  (inductor less accurate than allowed)"
        print(
            f"{label:44s}{eager:9.2f}{inductor:10.2f}{ours:10.2f}{ratios[0]:9.2f}{ratios[1]:10.2f}  {note}",
            flush=True,
        )
        rows.append((*case, eager, inductor, ours, *device.values(), found["replaced"], found["ok"]))
        if options.csv:  # after each row, so that an interrupted run keeps what it has
            with open(options.csv, "w", newline="") as file:
                file.write(f"# {how}\n")
                header = ("model", "attention", "job", "eager_ms", "inductor_ms", "rocm_attn_ms")
                header += ("inductor_device_ms", "rocm_attn_device_ms", "replaced", "ok")
                csv.writer(file).writerows([header, *rows])
        torch._dynamo.reset()
        if on_gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
