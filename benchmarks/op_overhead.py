"""What one call of `rocm_attn::attention` costs beside ATen's own CPU attention, on tensors too small to matter.

    python benchmarks/op_overhead.py [--json PATH]

Prints microseconds per call, the ratio to ATen, and of what the difference consists. Runs on one thread; takes the
smallest of many short rounds, interleaved, so that other work on the machine disturbs little. This is the op called
from Python; what a call costs in a compiled program, where it is written out, is in cpu_compiled.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import timeit
from collections.abc import Callable

import torch

from rocm_attn_compile.ops import attention, cpu, cpu_backward, dispatch

CALLS_PER_ROUND = 10
ALLOWED_US = 15.0
"""What issue 2 allows between a call in no_grad and the ATen op."""


Groups = dict[str, tuple[Callable, dict[str, Callable]]]


def measure(groups: Groups, rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds per call of each function of each group, in the context of its group."""
    best = {group: dict.fromkeys(functions, float("inf")) for group, (_, functions) in groups.items()}
    for _ in range(rounds):
        for group, (context, functions) in groups.items():
            with context():
                for name, function in functions.items():
                    seconds = timeit.timeit(function, number=CALLS_PER_ROUND) / CALLS_PER_ROUND
                    best[group][name] = min(best[group][name], seconds * 1e6)
    return best


def empty_op() -> Callable:
    """An op with our schema that does nothing but return two tensors: the dispatcher and its conversions alone."""
    library = torch.library.Library("rocm_attn_benchmark", "DEF")
    library.define(str(attention._schema).removeprefix("rocm_attn::"))
    result = (torch.empty(1), torch.empty(1))
    library.impl("attention", lambda *args, **kwargs: result, "CPU")
    op = torch.ops.rocm_attn_benchmark.attention.default
    op._keep = library
    return op


def functions_to_measure() -> Groups:
    """Everything that is timed, by group and name."""
    aten = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    q = torch.randn(1, 1, 2, 8)
    leaf, grad = q.clone().requires_grad_(), torch.randn(1, 1, 2, 8)
    impl = "TRITON_ATTN@0123456789"
    direct = {"softmax_scale": 0.3, "band_upper": 0, "empty_rows": "impossible"}
    settings = {**direct, "impl": impl}
    key_mask = torch.ones(1, 2, dtype=torch.bool)
    out, lse = attention(q, q, q, **settings)
    wanted = [True, True, True, False, False]
    backward = (grad, q, q, q, *[None] * 10, out, lse, 0.3, None, None, 0, 0.0, "impossible", wanted)
    nothing = empty_op()
    return {
        "no_grad": (
            torch.no_grad,
            {
                "one plain op": lambda: q + q,
                "aten": lambda: aten(q, q, q, 0.0, True, scale=0.3),
                "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True),
                "ours": lambda: attention(q, q, q, **settings),
                "key mask": lambda: attention(q, q, q, None, None, key_mask, **settings),
                "empty op": lambda: nothing(q, q, q, **settings),
                "body": lambda: cpu.forward(q, q, q, **direct),
                "backward body": lambda: cpu_backward.backward(*backward),
                "choice": lambda: dispatch.implementation(impl, "cpu"),
                "aten binding": lambda: cpu._fused(q, q, q, 0.0, True, scale=0.3),
            },
        ),
        "inference": (torch.inference_mode, {"ours": lambda: attention(q, q, q, **settings)}),
        "training": (
            torch.enable_grad,
            {
                "aten": lambda: aten(leaf, q, q, 0.0, True, scale=0.3),
                "ours": lambda: attention(leaf, q, q, **settings),
                "aten both": lambda: torch.autograd.grad(aten(leaf, q, q, 0.0, True, scale=0.3)[0], leaf, grad),
                "ours both": lambda: torch.autograd.grad(attention(leaf, q, q, **settings)[0], leaf, grad),
            },
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--json", help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(functions_to_measure(), options.rounds)
    no_grad, inference, training = figures["no_grad"], figures["inference"], figures["training"]

    def row(what: str, ours: float, theirs: float) -> None:
        more, ratio = ours - theirs, ours / theirs
        print(f"{what:28s} aten {theirs:7.1f} us   ours {ours:7.1f} us   +{more:6.1f} us   x{ratio:.2f}")

    print(f"torch {torch.__version__}, {platform.machine()}, one thread; q, k, v (1, 1, 2, 8) float32, causal")
    row("no_grad", no_grad["ours"], no_grad["aten"])
    row("no_grad, key mask", no_grad["key mask"], no_grad["aten"])
    row("inference_mode", inference["ours"], no_grad["aten"])
    row("forward, requires_grad", training["ours"], training["aten"])
    row("forward and backward", training["ours both"], training["aten both"])
    print(f"{'for scale':28s} F.sdpa {no_grad['sdpa']:.1f} us, one plain op {no_grad['one plain op']:.1f} us")

    empty, body, fused, choice = (no_grad[part] for part in ("empty op", "body", "aten binding", "choice"))
    print("\nOf what our no_grad call consists (parts measured alone, so the last is what remains)")
    for what, cost in (
        ("dispatch and arguments", empty),
        ("ATen's kernel", fused),
        ("checks, causal flag, strides", body - fused),
        ("choice of implementation", choice),
        ("autograd kernel and the rest", no_grad["ours"] - empty - body - choice),
    ):
        print(f"  {what:32s} {cost:6.1f} us")
    print(f"  {'not in it: our backward code':32s} {no_grad['backward body']:6.1f} us")

    over = no_grad["ours"] - no_grad["aten"]
    verdict = "within" if over <= ALLOWED_US else "MORE THAN"
    print(f"\nno_grad: {over:.1f} us over ATen, {verdict} the {ALLOWED_US:g} us allowed")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"torch": torch.__version__, "us": figures}, file, indent=1)


if __name__ == "__main__":
    main()
