"""TRITON_MLA on a real GPU: every feature against float64, every result twice and equal to the bit.

python benchmarks/gpu/check_mla.py [--only TEXT] [--workers 12]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "kernels"))

import mla_cases
import mla_oracle

from rocm_attn_compile.kernels.triton.configs import KernelConfig
from rocm_attn_compile.kernels.triton.launch import Tuning
from rocm_attn_compile.kernels.triton.mla import mla_prefill, mla_prefill_backward
from rocm_attn_compile.kernels.triton.mla_decode_launch import mla_decode_launches
from rocm_attn_compile.kernels.triton.mla_prefill import prefill_launches

HOPPER = {"hopper ": KernelConfig(64, 64, 4, 1), "few ": KernelConfig(16, 64, 4, 1)}
"""Hopper's own kernels, mla_decode_hopper.py and mla_decode_few.py."""


def takes_hopper_kernel(case: dict[str, Any]) -> bool:
    """Whether Hopper's own kernels take a case; each is given only some of them by itself."""
    return (
        256 < case["C"] <= 512
        and case["R"] <= 64
        and case["dtype"] != torch.float32
        and case.get("scale", 1) > 0
        and not case.get("empty_rows", "").startswith("mean")
    )


def tunings(case: dict[str, Any]) -> list[tuple[str, Tuning | None]]:
    """The ways to compute a case, each with a label."""
    found: list[tuple[str, Tuning | None]] = [
        ("", None), ("plain ", Tuning(tma=False)), ("3 splits ", Tuning(num_splits=3)),
    ]  # fmt: skip
    if takes_hopper_kernel(case):
        for label, config in HOPPER.items():
            for splits in (1, 2):
                found.append((label, Tuning(config=config, tma=True, in_flight=True, num_splits=splits)))
    return found


def decode(case: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Error and limit of out and lse, of every tuning."""
    tensors, scalars = mla_oracle.decode_inputs(case, "cuda")
    worst: dict[str, tuple[float, float]] = {}
    for label, tuning in tunings(case):
        results = []
        for _ in range(2):
            launches, out, lse = mla_decode_launches(
                **tensors, **scalars, out_layout=case.get("out_layout", "bhsd"), tuning=tuning
            )
            out.fill_(math.nan)
            lse.fill_(math.nan)
            for launch in launches:
                launch.run()
            results.append((out, lse))
        for first, second in zip(*results):
            if not torch.equal(first.nan_to_num(7), second.nan_to_num(7)):
                worst[label + "differs between two runs"] = (math.inf, 0.0)
        for name, value in mla_oracle.compare(tensors, scalars, dict(zip(("out", "lse"), results[0]))).items():
            worst[label + name] = value
    return worst


def check(task: tuple[str, dict[str, Any]]) -> tuple[dict[str, float], list[str]]:
    """Ratios of error and limit, and failures in words, of one case."""
    kind, case = task
    text = ", ".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in case.items())
    try:
        errors = KINDS[kind](case)
    except Exception as error:
        return {}, [f"{type(error).__name__}: {str(error)[:300]} | {kind} {text}"]
    failures = [f"{n}: {e:.2e} > {limit:.2e} | {kind} {text}" for n, (e, limit) in errors.items() if not e <= limit]
    return {f"{kind} {name}": error / limit if limit else math.inf for name, (error, limit) in errors.items()}, failures


def prefill(case: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Error and limit of out, lse and the gradients; each twice, and equal."""
    tensors, scalars = mla_oracle.prefill_inputs(case, "cuda")
    out, lse = mla_prefill(**tensors, **scalars)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype).cuda()
    grads = [mla_prefill_backward(grad_out, **tensors, out=out, lse=lse, **scalars) for _ in range(2)]
    if not all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(*grads)):
        return {"gradients differ between two runs": (math.inf, 0.0)}
    got = {"out": out, "lse": lse, **dict(zip(mla_oracle.PREFILL_GRADIENTS, grads[0]))}
    worst = mla_oracle.compare_prefill(tensors, scalars, got, grad_out)
    for shift in (0, 1) if case["dtype"] == torch.bfloat16 else (0,):
        if (found := hopper_prefill(tensors, scalars, shift)) is not None:
            errors = mla_oracle.compare_prefill(tensors, scalars, found)
            worst.update({f"hopper, shift {shift}, {name}": error for name, error in errors.items()})
    return worst


def hopper_prefill(tensors: dict[str, Any], scalars: dict[str, Any], shift: int) -> dict[str, torch.Tensor] | None:
    """Out and lse of Hopper's own forward, whatever the size; None if it does not take the call."""
    names = ("q_nope", "q_pe", "k_nope", "k_pe", "v")
    masks = tuple(tensors[name] for name in ("key_mask", "kv_start", "kv_end"))
    config = KernelConfig(128, 128, 4, 2)
    tuning = Tuning(config=config, tma=True, in_flight=True, num_splits=1, shift=shift)
    launches, out, lse = prefill_launches(
        *(tensors[name] for name in names), masks, **scalars, out_layout="bshd", tuning=tuning
    )
    if launches[0].kernel.__name__ != "attention_forward_hopper_kernel":
        return None
    out.fill_(math.nan)
    lse.fill_(math.nan)
    for launch in launches:
        launch.run()
    return {"out": out, "lse": lse}


KINDS: dict[str, Callable[[dict[str, Any]], dict[str, tuple[float, float]]]] = {
    "decode": decode,
    "prefill": prefill,
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--workers", type=int, default=12)
    options = parser.parse_args()
    start = time.time()
    tasks = [("decode", case) for case in mla_cases.device_cases()]
    tasks += [("prefill", case) for case in mla_cases.prefill_device_cases()]
    tasks = [task for task in tasks if options.only in f"{task[0]} {task[1]['name']}"]
    worst: dict[str, float] = {}
    failures: list[str] = []
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        for ratios, failed in pool.map(check, tasks):
            failures += failed
            for name, ratio in ratios.items():
                worst[name] = max(worst.get(name, 0.0), ratio)
    for failure in failures:
        print("FAIL", failure)
    print(f"{len(tasks)} cases, {len(failures)} failures, {time.time() - start:.0f} s; worst error / limit:")
    print("  " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in sorted(worst.items())))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
