"""ALiBi on a GPU: from slopes, against the same as a bias tensor, against none, and against FlexAttention.

    python benchmarks/gpu/alibi.py [--no-flex]

Needs torch, triton and this repository only. Every result is compared with float64 on some rows before it is timed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import check_triton as base
import torch

ROWS = (  # B, H, K, S, D, causal
    (2, 32, 32, 8192, 128, True),
    (8, 16, 16, 2048, 64, True),
    (16, 12, 12, 1024, 64, False),
)
FORMS = ("none", "slopes", "tensor", "keys")
JOBS = [(row, form) for row in ROWS for form in FORMS if row[-1] or form != "keys"]


def arguments(row: tuple, slopes: torch.Tensor, form: str) -> dict[str, Any]:
    """Of our launchers, with ALiBi as "slopes", as a "tensor" over all pairs, of "keys", or not at all."""
    B, H, K, S, D, causal = row
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, heads, S, D, device="cuda", dtype=torch.bfloat16) for heads in (H, K, K))
    found = base.ours(q, k, v, causal, None)
    position = torch.arange(S, device="cuda", dtype=torch.float32)
    if form == "slopes":
        found["alibi_slopes"] = slopes
    elif form == "tensor":
        distance = (position[None, :] - position[:, None]).abs()
        found["attn_bias"] = (-slopes[:, None, None] * distance)[None].bfloat16()
    elif form == "keys":
        found["attn_bias"] = (slopes[:, None, None] * (position - (S - 1)))[None]
    return found


def exact(found: dict[str, Any], slopes: torch.Tensor, rows: slice, causal: bool) -> torch.Tensor:
    """The first head of the first sequence, some of its rows."""
    q, k, v = (found[name][0, 0].double() for name in "qkv")
    position = torch.arange(k.shape[0], device="cuda", dtype=torch.float64)
    distance = position[None, :] - position[rows, None]
    scores = q[rows] @ k.mT * found["softmax_scale"] - slopes[0].double() * distance.abs()
    return (scores.masked_fill(distance > 0, -torch.inf) if causal else scores).softmax(-1) @ v


def measure(row: tuple, with_flex: bool) -> None:
    """One line per form: ms of the forward and of the backward, and how many times the plain one's."""
    B, H, _, S, D, causal = row
    slopes = torch.pow(2.0, -torch.arange(1, H + 1, device="cuda") * (8 / H))
    times: dict[str, tuple[float, float]] = {}
    for form in [form for one, form in JOBS if one == row]:
        found = arguments(row, slopes, form)
        out, lse = base.attention.attention_forward(**found)
        if form != "none":
            rows = slice(S - 100, S)
            want = exact(found, slopes, rows, causal)
            error = ((out[0, 0, rows] - want).norm() / want.norm()).item()
            assert error < (3e-2 if form == "tensor" else 5e-3), f"{row} {form}: {error}"
        grad_out = torch.randn_like(out)
        wanted = [True, True, True, False, False]
        times[form] = (
            base.median_ms(lambda: base.attention.attention_forward(**found)),  # noqa: B023
            base.median_ms(
                lambda: base.attention.attention_backward(grad_out, **found, out=out, lse=lse, output_mask=wanted)  # noqa: B023
            ),
        )
    if with_flex:
        times["flex"] = flex(arguments(row, slopes, "none"), slopes, causal)
    plain = times["none"]
    for form, (forward, backward) in times.items():
        ratios = f"{forward / plain[0]:5.2f} {backward / plain[1]:5.2f}"
        print(
            f"{B} x {H} x {S} x {D}{' causal' if causal else ''}: {form:8} {forward:7.3f} {backward:7.3f} ms {ratios}"
        )


def flex(found: dict[str, Any], slopes: torch.Tensor, causal: bool, timed: bool = True) -> tuple[float, float]:
    """FlexAttention's times, compiled."""
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    config.donated_buffer = False  # the backward is repeated, so its buffers must stay
    q, k, v = (found[name].detach().requires_grad_() for name in "qkv")
    S = q.shape[2]
    keep: Callable = lambda b, h, m, n: n <= m  # noqa: E731
    mask = create_block_mask(keep, None, None, S, S, device="cuda") if causal else None
    add: Callable = lambda s, b, h, m, n: s - slopes[h] * (m - n).abs()  # noqa: E731
    run = torch.compile(flex_attention, dynamic=False)
    out = run(q, k, v, score_mod=add, block_mask=mask)
    grad_out = torch.randn_like(out)
    if not timed:
        torch.autograd.grad(out, (q, k, v), grad_out)
        return 0.0, 0.0
    with torch.no_grad():
        forward = base.median_ms(lambda: run(q, k, v, score_mod=add, block_mask=mask))
    return forward, base.median_ms(lambda: torch.autograd.grad(out, (q, k, v), grad_out, retain_graph=True))


def compile_one(index: int, with_flex: bool) -> None:
    """Compile what one form of one row runs, into the caches on disk."""
    row, form = JOBS[index]
    slopes = torch.ones(row[1], device="cuda")
    found = arguments(row, slopes, form)
    if form == "none" and with_flex:
        flex(found, slopes, row[-1], timed=False)
    out, lse = base.attention.attention_forward(**found)
    base.attention.attention_backward(out, **found, out=out, lse=lse, output_mask=[True, True, True, False, False])


def main() -> None:
    """Measure every row, after all kernels were compiled side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-flex", action="store_true")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile is not None:
        compile_one(options.compile, not options.no_flex)
        return
    command = [sys.executable, "-W", "ignore", *sys.argv, "--compile"]
    running = [subprocess.Popen([*command, str(index)]) for index in range(len(JOBS))]
    assert [process.wait() for process in running] == [0] * len(running)
    print(torch.cuda.get_device_name())
    for row in ROWS:
        measure(row, not options.no_flex)


if __name__ == "__main__":
    main()
