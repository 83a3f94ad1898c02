"""The main job on this machine: compile a Llama with `backend="rocm_attn"`, check it, generate with it, time it.

The model is Hugging Face's code with eager attention and random weights; nothing is downloaded. It is run four times:
in float64 (exact, for comparison), eagerly, compiled by us, and compiled by Inductor alone. Each run reads a prompt
into a static KV cache and then generates greedily, one token at a time.

Exit status 0 means: every attention was replaced, the compiled model is as accurate as eager, and it says the same.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory on a CPU, is talkative

import torch
from demo_support import seconds, table, working
from torch import Tensor

import rocm_attn_compile
from rocm_attn_compile.testing import Float64Everywhere, accuracy, cache_for, peak_memory, to_float64

try:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache
except ImportError:
    sys.exit("The demo needs transformers: pip install 'rocm-attn-compile[transformers]', or run make demo.")


@dataclass
class Result:
    """What the model says: logits of the prompt `(1, length, vocab)`, of each generated token `(tokens, vocab)`, and
    the tokens."""

    prompt_logits: Tensor
    token_logits: Tensor
    tokens: list[int]


@dataclass
class Cost:
    """Time and peak memory (beyond weights and cache) of reading the prompt and of generating one token."""

    prompt_seconds: float = math.inf
    prompt_bytes: int = 0
    token_seconds: float = math.inf
    token_bytes: int = 0


def options() -> argparse.Namespace:
    """The command line; sizes that are not given suit the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (= ROCm)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of weights and activations")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--hidden", type=int, help="width of the model; heads have 64 (CPU) or 128 channels")
    parser.add_argument("--seq", type=int, help="length of the prompt")
    parser.add_argument("--tokens", type=int, default=16, help="how many to generate")
    parser.add_argument("--backend", default="rocm_attn", help="what to demonstrate")
    parser.add_argument("--no-inductor", action="store_true", help="leave out the comparison with Inductor alone")
    parser.add_argument("--report", action="store_true", help="also why not each other backend")
    parser.add_argument("--quick", action="store_true", help="a tiny model, under a minute on a laptop")
    args = parser.parse_args()

    on_cpu = args.device == "cpu"
    big_gpu = not on_cpu and torch.cuda.get_device_properties(0).total_memory > 60e9
    small = {"layers": 2, "hidden": 128, "seq": 96, "dtype": "float32"}
    sizes = {
        "cpu": {"layers": 4, "hidden": 512, "seq": 512, "dtype": "float32"},
        "gpu": {"layers": 4, "hidden": 2048, "seq": 2048, "dtype": "bfloat16"},
        "big gpu": {"layers": 8, "hidden": 4096, "seq": 4096, "dtype": "bfloat16"},
    }
    chosen = small if args.quick else sizes["cpu" if on_cpu else "big gpu" if big_gpu else "gpu"]
    for name, value in chosen.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def make_model(args: argparse.Namespace) -> torch.nn.Module:
    """A Llama with grouped-query attention (4 query heads per key/value head) and random weights."""
    heads = max(4, args.hidden // (64 if args.device == "cpu" else 128))
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        vocab_size=2048,
        max_position_embeddings=args.seq + args.tokens,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    with torch.device(args.device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()


class Job:
    """Reading a prompt and generating from it, for one way of running the model."""

    def __init__(self, model: Any, config: Any, prompt: Tensor, num_tokens: int, dtype: torch.dtype) -> None:
        self.model, self.prompt, self.num_tokens = model, prompt, num_tokens
        self.length, self.device = prompt.shape[1], prompt.device
        # Allocated now and emptied before each use: compiled code may rely on a static cache staying where it is.
        self.cache = StaticCache(config=config, max_cache_len=self.length + num_tokens)
        head_dim = config.hidden_size // config.num_attention_heads
        self.cache.early_initialization(1, config.num_key_value_heads, head_dim, dtype, self.device)
        self.into_cache = {**cache_for(LlamaForCausalLM, self.cache), "use_cache": True}

    def read_prompt(self) -> Tensor:
        """Logits `(1, length, vocab)`; the cache then holds the prompt's keys and values."""
        self.cache.reset()
        positions = torch.arange(self.length, device=self.device)[None]
        return self.model(self.prompt, position_ids=positions, **self.into_cache).logits

    def read_token(self, position: int, token: int = 0) -> Tensor:
        """Logits `(vocab,)` after one more token; `position` counts from the start of the prompt."""
        token_ids = torch.tensor([[token]], device=self.device)
        positions = torch.tensor([[position]], device=self.device)
        output = self.model(token_ids, position_ids=positions, **self.into_cache)
        return output.logits[0, -1]

    def run(self, forced_tokens: list[int] | None = None) -> Result:
        """Read the prompt and generate greedily; `forced_tokens` go into the model instead of its own choice."""
        prompt_logits = self.read_prompt()
        logits = [prompt_logits[0, -1].clone()]
        tokens = [int(logits[0].argmax())]
        for i in range(self.num_tokens - 1):
            token = forced_tokens[i] if forced_tokens else tokens[-1]
            logits.append(self.read_token(self.length + i, token).clone())
            tokens.append(int(logits[-1].argmax()))
        return Result(prompt_logits, torch.stack(logits), tokens)


def measure(jobs: dict[str, Job], rounds: int = 7) -> dict[str, Cost]:
    """Time and memory of each, taking turns, so that what else the machine does hits all alike; the fastest counts."""
    costs = {name: Cost() for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            cost, device = costs[name], job.device.type
            cost.prompt_seconds = min(cost.prompt_seconds, seconds(job.read_prompt, device))
            for position in range(job.length, job.length + job.num_tokens):
                cost.token_seconds = min(cost.token_seconds, seconds(partial(job.read_token, position), device))
    for name, job in jobs.items():
        device = job.device.type
        costs[name].prompt_bytes = peak_memory(job.read_prompt, device)
        costs[name].token_bytes = peak_memory(partial(job.read_token, job.length), device)
    return costs


def same_tokens(result: Result, eager: Result, exact: Result) -> tuple[bool, str]:
    """Whether the generated tokens agree with eager's, or differ only where eager's rounding decides between two."""
    for i, (ours, theirs) in enumerate(zip(result.tokens, eager.tokens)):
        if ours != theirs:
            gap = abs(float(exact.token_logits[i][theirs] - exact.token_logits[i][ours]))
            rounding = float((eager.token_logits[i].double() - exact.token_logits[i]).abs().max())
            tie = gap <= 2 * rounding
            text = f"from token {i + 1} on they differ: exact logits {gap:.2g} apart, eager's error {rounding:.2g}"
            return tie, text + (" (a tie)" if tie else "")
    return True, f"all {len(eager.tokens)} tokens are eager's"


def check(name: str, result: Result, eager: Result, exact: Result) -> bool:
    """Print how exact one run is, beside eager, and whether it says the same."""
    together = [i for i in range(len(eager.tokens)) if result.tokens[:i] == eager.tokens[:i]]  # same text so far
    prompt = accuracy(result.prompt_logits, eager.prompt_logits, exact.prompt_logits)
    tokens = accuracy(result.token_logits[together], eager.token_logits[together], exact.token_logits[together])
    same, text = same_tokens(result, eager, exact)
    print(f"{name}, against float64:")
    for what, measured in (("prompt", prompt), ("generation", tokens)):
        errors = f"rms error {measured.rms_error:.2e}, eager's {measured.eager_rms_error:.2e}; largest error "
        errors += f"{measured.max_error:.2e}, eager's {measured.eager_max_error:.2e}; values up to {measured.scale:.2g}"
        print(f"  {what + ' logits':18} {'ok' if measured.ok else 'WRONG':5}  {errors}")
    print(f"  {'greedy tokens':18} {'ok' if same else 'WRONG':5}  {text}")
    return prompt.ok and tokens.ok and same


@torch.no_grad()
def main() -> int:
    """Run everything; the exit status."""
    args = options()
    print(machine(args.device))
    with working("building the model"):
        model = make_model(args)
        config = model.config
        prompt = torch.randint(0, config.vocab_size, (1, args.seq), device=args.device)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"Llama, {millions:.0f} M parameters in {args.dtype}: {args.layers} layers, "
        f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads of "
        f"{config.hidden_size // config.num_attention_heads}; prompt of {args.seq}, {args.tokens} new tokens"
    )

    def job(function: Any, dtype: torch.dtype = model.dtype) -> Job:
        return Job(function, config, prompt, args.tokens, dtype)

    jobs = {"eager": job(model)}
    with working("eager"):
        eager = jobs["eager"].run()
    with working("float64"), Float64Everywhere():
        exact = job(to_float64(model), torch.float64).run(eager.tokens)

    ok = True
    for backend in [args.backend] + ["inductor"] * (not args.no_inductor):
        jobs[backend] = job(torch.compile(model, backend=backend, fullgraph=True, dynamic=False))
        with working(f"{backend}: compiling and generating"):
            result = jobs[backend].run()
        if backend == "rocm_attn":
            ok = all_replaced(args.report) and ok
        right = check(backend, result, eager, exact)
        ok = ok and (right or backend != args.backend)

    with working("measuring"):
        costs = measure(jobs)
    print(costs_table(costs))
    print("OK" if ok else "FAILED, see above")
    return 0 if ok else 1


def machine(device: str) -> str:
    """One line on what this runs on."""
    name = (
        torch.cuda.get_device_name()
        if device != "cpu"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    return f"rocm_attn_compile {rocm_attn_compile.__version__}, torch {torch.__version__}, {name}"


def all_replaced(full: bool) -> bool:
    """Print the reports of what was compiled; whether every attention in it was replaced.

    Without `full`, the lines that say why each other backend was not chosen are left out.
    """
    reports = rocm_attn_compile.reports()
    for report in reports:
        print("\n".join(line for line in str(report).splitlines() if full or not line.startswith("    not ")))
    sites = [site for report in reports for site in report.sites]
    replaced = sum(site.replaced for site in sites)
    print(f"{replaced} of {len(sites)} attention sites in {len(reports)} graphs replaced")
    return replaced == len(sites) > 0


def costs_table(costs: dict[str, Cost]) -> str:
    """Times and memory of each way, with the ratio to eager."""
    base = costs["eager"]

    def row(name: str, cost: Cost) -> list[str]:
        return [
            name,
            f"{cost.prompt_seconds * 1e3:.1f} ms",
            f"{base.prompt_seconds / cost.prompt_seconds:.2f} x",
            f"{cost.prompt_bytes / 1e6:.0f} MB",
            f"{cost.token_seconds * 1e3:.2f} ms",
            f"{base.token_seconds / cost.token_seconds:.2f} x",
            f"{cost.token_bytes / 1e6:.1f} MB",
        ]

    header = ["", "prompt", "speed", "peak memory", "per token", "speed", "peak memory"]
    return table(header, [row(name, cost) for name, cost in costs.items()])


if __name__ == "__main__":
    sys.exit(main())
