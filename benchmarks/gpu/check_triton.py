"""TRITON_ATTN on a real GPU: correctness of every feature against float64, then a short table of speed against peers.

    python benchmarks/gpu/check_triton.py [--small N] [--only TEXT] [--no-perf] [--no-check] [--no-flex]

Needs torch, triton and this repository only. Prints a short table last; writes JSON under $OUT if that is set.
No speed is printed for a wrong result: every timed call is compared with float32 SDPA first.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "kernels"))

import kernel_cases  # noqa: E402
import kernel_oracle  # noqa: E402


def load_kernels() -> tuple[Any, ...]:
    """The modules named here, from the installed package or else from this checkout."""
    names = ("attention", "forward_launch", "backward_launch", "launch")
    try:
        return tuple(importlib.import_module(f"rocm_attn_compile.kernels.triton.{name}") for name in names)
    except ImportError:
        package = types.ModuleType("rocm_attn_kernels")
        package.__path__ = [str(ROOT / "kernels" / "triton")]
        sys.modules["rocm_attn_kernels"] = package
        return tuple(importlib.import_module(f"rocm_attn_kernels.{name}") for name in names)


attention, forward_launch, backward_launch, launch = load_kernels()
FULL = kernel_cases.FULL


def realistic_cases() -> list[dict[str, Any]]:
    """Ragged sizes that use the shipped tiles, in all three dtypes, for every feature and several head sizes."""
    base = {"B": 2, "H": 4, "K": 2, "M": 333, "N": 517, "D": 64, "E": 64}
    half = torch.bfloat16
    cases = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for D, E in ((64, 64), (128, 128), (256, 256), (80, 80), (96, 96), (192, 128), (40, 72), (8, 8)):
            cases.append({**base, "D": D, "E": E, "dtype": dtype, "band_upper": 184})
    features: list[dict[str, Any]] = [
        {"M": 517, "band_lower": -100, "band_upper": 0},
        {"band_lower": -60, "band_upper": 60},
        {"bias": FULL},
        {"bias": (False, True, True, True), "band_upper": 184, "bias_dtype": half},
        {"bias": (True, False, False, True)},
        {"bias": (False, True, True, False), "soft_cap": 2.0},
        {"bias": FULL, "bias_kind": "holes"},
        {"bias": FULL, "N": 520},
        {"bias": (False, True, True, True), "N": 520, "band_upper": 187},
        {"bias": (True, False, True, True), "N": 520, "key_mask": True, "band_upper": 187, "sinks": True},
        {"bias": (False, True, False, True), "N": 520, "band_upper": 187},
        {"bias": FULL, "bias_kind": "finfo_min"},
        {"mask": FULL},
        {"mask": (True, False, True, True), "band_upper": 184},
        {"key_mask": True, "band_upper": 184},
        {"limits": (True, False)},
        {"limits": (False, True), "band_upper": 184},
        {"ids": True, "band_upper": 184},
        {"soft_cap": 3.0, "band_upper": 184},
        {"soft_cap": 50.0, "scale": 5.0, "band_upper": 184, "sinks": True},
        {"soft_cap": 30.0, "scale": 0.5, "limits": (True, True)},
        # Scores that grow by more than the first keys' maximum allows for: computed again.
        {"scale": 8.0, "band_upper": 184},
        {"scale": 8.0, "key_mask": True, "sinks": True, "dropout_p": 0.2},
        {"sinks": True, "band_upper": 184},
        *({"alibi": True, "band_upper": 184, "D": d, "E": d} for d in (64, 96, 128, 256)),
        *({"alibi": True, "band_upper": 184, "D": d, "E": d, "N": 520} for d in (64, 128)),
        {"alibi": "batch", "M": 517, "band_lower": -100, "band_upper": 100, "sinks": True},
        {"alibi": "batch", "bias": FULL, "N": 520, "soft_cap": 3.0},
        {"alibi": True, "key_mask": True, "band_upper": 184},
        {"alibi": True, "limits": (False, True), "scale": 3.0},
        {"alibi": True, "B": 3, "H": 16, "K": 2, "M": 2, "N": 4099, "band_upper": 4097},
        {"dropout_p": 0.2, "band_upper": 184},
        {"layout": "packed", "M": 333, "N": 333, "out_layout": "bshd", "band_upper": 0},
        {"layout": "k_transposed"},
        {"layout": "expanded"},
        {"scale": -0.1},
        {"B": 3, "H": 16, "K": 2, "M": 1, "N": 4099},
        {"B": 3, "H": 16, "K": 2, "M": 5, "N": 4099, "band_upper": 4094, "limits": (True, True)},
        {"B": 1, "H": 8, "K": 8, "M": 16, "N": 9001, "key_mask": True},
        {"B": 1, "H": 32, "K": 1, "M": 2, "N": 2049, "sinks": True, "soft_cap": 5.0, "D": 256, "E": 256},
    ]
    cache = {"B": 3, "H": 16, "K": 2, "M": 1, "N": 4128, "limits": (False, False), "dtype": half}
    for fields in (
        {"page": 16}, {"page": 48, "M": 5}, {"page": 32, "M": 200, "key_mask": True}, {"page": 96, "D": 256, "E": 256},
        {"page": 16, "sinks": True, "D": 64, "E": 64}, {"kv_dtype": torch.float8_e4m3fn},
        {"kv_dtype": torch.float8_e4m3fn, "page": 16, "M": 3, "scale_sign": -1.0},
        {"kv_dtype": torch.float8_e5m2, "page": 32, "M": 200}, {"kv_dtype": torch.float8_e5m2, "D": 256, "E": 256},
        {"kv_dtype": torch.float8_e4m3fn, "D": 80, "E": 96, "page": 16},
        {"kv_dtype": torch.float8_e4m3fn, "M": 300, "soft_cap": 5.0, "D": 64, "E": 64},
    ):  # fmt: skip
        features.append({**cache, **fields})
    for mode in ("nan", "nan_added", "zero", "mean", "mean_added"):
        features += [
            {"mask": FULL, "empty": ("mask_rows",), "empty_rows": mode},
            {"M": 400, "N": 200, "band_upper": -200, "empty_rows": mode},
            {"M": 3, "H": 16, "N": 3000, "limits": (True, False), "empty": ("limits",), "empty_rows": mode},
        ]
    for index, feature in enumerate(features):
        for dtype in (torch.bfloat16, torch.float32, torch.float16)[: 1 if index % 2 else 2]:
            cases.append({**base, "D": 128, "E": 128, "dtype": dtype, **feature})
        if "D" not in feature:
            # Small heads take other tiles; alternate sizes so that each feature meets padding too.
            small = ((64, 64), (24, 8), (40, 24))[index % 3]
            size = {"D": small[0], "E": small[0] if feature.get("layout") == "packed" else small[1]}
            cases.append({**base, **size, "dtype": torch.float16, **feature})
    return cases


def check(case: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Relative error and limit of out, lse, the weights and every gradient of one case, on the GPU."""
    tensors, scalars = kernel_oracle.make_inputs(case, "cuda")
    tuning = dict(case.get("tuning") or {})
    if "config" in tuning:
        tuning["config"] = launch.configs.KernelConfig(*tuning["config"])
    launches, out, lse = forward_launch.forward_launches(
        **tensors,
        **scalars,
        out_layout=case.get("out_layout", "bhsd"),
        tuning=launch.Tuning(**tuning) if tuning else None,
    )
    out.fill_(float("nan"))
    lse.fill_(float("nan"))
    for one in launches:
        one.run()
    # A cache has no gradient; that of Hopper's own forward is computed by the kernels of all the others.
    if case.get("page") or case.get("kv_dtype") or tuning.get("in_flight"):
        return kernel_oracle.compare(tensors, scalars, {"out": out, "lse": lse})
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype).cuda()
    arguments = {"grad_out": grad_out, **tensors, "out": out, "lse": lse, **scalars, "output_mask": [True] * 5}
    backward = one_backward if case.get("one_backward") else attention.attention_backward
    grads = backward(**arguments)
    again = backward(**arguments)
    got = {"out": out, "lse": lse}
    if not scalars["dropout_p"]:
        got["weights"] = weights_of(tensors, scalars)
    for name, grad, repeat in zip(kernel_oracle.GRADIENTS, grads, again):
        if tensors[name] is not None:
            got[name] = grad
            if not torch.equal(grad.nan_to_num(7), repeat.nan_to_num(7)):
                return {f"{name} differs between two runs": (math.inf, 0.0)}
    return kernel_oracle.compare(tensors, scalars, got, grad_out, case.get("oracle_dtype", torch.float64))


def weights_of(tensors: dict[str, Any], scalars: dict[str, Any]) -> torch.Tensor:
    """The softmax weights as a second result."""
    given = {name: tensor for name, tensor in tensors.items() if name != "dropout_seed"}
    names = ("softmax_scale", "logits_soft_cap", "band_lower", "band_upper", "empty_rows")
    settings = {**{name: scalars[name] for name in names}, "out_layout": "bhsd"}
    return attention.attention_with_weights(given, settings, scalars["empty_rows"], tensors["q"].dtype)[1]


def one_backward(**arguments: Any) -> tuple[torch.Tensor, ...]:
    """attention_backward by Hopper's one kernel for all gradients, whatever the size."""
    launches, tensors = backward_launch.backward_launches(**arguments, tuning=launch.Tuning(in_flight=True))
    assert "backward_hopper_kernel" in [one.kernel.__name__ for one in launches]
    for name in ("dq", "dk", "dv"):
        tensors[name].fill_(float("nan"))
    for one in launches:
        one.run()
    dsinks = arguments["q"].new_empty((0,))
    if arguments["sinks"] is not None:
        dsinks = backward_launch.sink_gradient(arguments["sinks"], arguments["lse"], tensors["delta"], None)
    return *(tensors[name] for name in ("dq", "dk", "dv", "dbias")), dsinks


def hopper_cases() -> list[dict[str, Any]]:
    """Those of Hopper's own kernels, on Hopper."""
    is_hopper = torch.cuda.get_device_capability() == (9, 0) and torch.version.hip is None
    return kernel_cases.hopper_forward_cases() + kernel_cases.hopper_backward_cases() if is_hopper else []


def all_cases(small: int) -> list[dict[str, Any]]:
    """The realistic cases, those of decode and of Hopper, and `small` of the interpreter tests' (mixtures first)."""
    rest = kernel_cases.random_cases(24) + kernel_cases.feature_cases()
    cases = realistic_cases() + kernel_cases.decode_cases() + hopper_cases() + rest[:small]
    return [case for case in cases if case["B"] and case["N"]]


def describe(case: dict[str, Any]) -> str:
    """The case in one line."""
    return ", ".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in case.items())


def check_shard(shard: int, shards: int, small: int, only: str) -> dict[str, Any]:
    """Check every `shards`-th case; returns descriptions of failures and, per dtype and result, worst error / limit."""
    failures: list[str] = []
    worst: dict[str, float] = {}
    cases = [(case, describe(case)) for case in all_cases(small)]
    cases = [(case, text) for case, text in cases if only in text][shard::shards]
    for case, text in cases:
        try:
            errors = check(case)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {str(error)[:300]} | {text}")
            continue
        for name, (error, bound) in errors.items():
            key = f"{str(case.get('dtype', torch.float32)).removeprefix('torch.')} {name}"
            worst[key] = max(worst.get(key, 0.0), error / bound if bound else math.inf)
            if not error <= bound:
                failures.append(f"{name}: {error:.2e} > {bound:.2e} | {text}")
    return {"cases": len(cases), "failures": failures, "worst": worst}


def check_all(workers: int, small: int, only: str) -> list[str]:
    """Run the cases in several processes, since nearly all the time goes into compiling; returns failures."""
    start = time.time()
    command = [sys.executable, "-W", "ignore", __file__, "--small", str(small), "--only", only, "--shard"]
    processes = [
        subprocess.Popen([*command, f"{shard}/{workers}"], stdout=subprocess.PIPE, text=True)
        for shard in range(workers)
    ]
    failures: list[str] = []
    worst: dict[str, float] = {}
    count = 0
    for shard, process in enumerate(processes):
        output = process.communicate()[0]
        if process.returncode:
            failures.append(f"shard {shard} died with {process.returncode}")
            continue
        result = json.loads(output.splitlines()[-1])
        count += result["cases"]
        failures += result["failures"]
        for key, ratio in result["worst"].items():
            worst[key] = max(worst.get(key, 0.0), ratio)
    for failure in failures:
        print("FAIL", failure)
    print(f"{count} cases, {len(failures)} failures, {time.time() - start:.0f} s; worst error / limit:")
    print("  " + ", ".join(f"{key} {ratio:.2f}" for key, ratio in sorted(worst.items())), flush=True)
    return failures


def median_ms(function: Callable[[], Any]) -> float:
    """Median time of a call in ms, L2 flushed between calls."""
    import triton

    return triton.testing.do_bench(function, warmup=20, rep=60, return_mode="median")


PREFILL = (  # B, H, K, S, D, E, causal, window
    (8, 32, 8, 2048, 128, 128, True, None),
    (2, 32, 8, 8192, 128, 128, True, None),
    (1, 32, 8, 16384, 128, 128, True, None),
    (2, 32, 32, 8192, 64, 64, True, None),
    (2, 16, 16, 8192, 256, 256, True, None),
    (2, 32, 32, 8192, 128, 128, False, None),
    (4, 16, 16, 1024, 96, 96, True, None),
    (1, 128, 128, 8192, 192, 128, True, None),
    (1, 32, 8, 16384, 128, 128, True, 1024),
)
DECODE = (  # B, H, K, N, D
    (1, 32, 8, 2048, 128),
    (1, 32, 8, 32768, 128),
    (16, 32, 8, 4096, 128),
    (64, 32, 8, 8192, 128),
    (8, 64, 8, 16384, 128),
    (32, 32, 32, 4096, 64),
    (16, 8, 1, 8192, 256),
)


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, window: int | None) -> dict[str, Any]:
    """Arguments of our launchers for a plain problem."""
    return {
        "q": q, "k": k, "v": v, **dict.fromkeys(kernel_oracle.TENSOR_NAMES),
        "softmax_scale": 1.0 / math.sqrt(q.shape[-1]), "logits_soft_cap": None,
        "band_lower": None if window is None else 1 - window, "band_upper": 0 if causal else None,
        "dropout_p": 0.0, "empty_rows": "impossible",
    }  # fmt: skip


def measure_prefill(row: tuple) -> dict[str, Any]:
    """TFLOP/s forward and backward of our kernels and of the peers that take the shape."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    B, H, K, S, D, E, causal, window = row
    q, k, v = (
        torch.randn(B, heads, S, size, device="cuda", dtype=torch.bfloat16) for heads, size in ((H, D), (K, D), (K, E))
    )
    grad_out = torch.randn(B, H, S, E, device="cuda", dtype=torch.bfloat16)
    pairs = S * S / 2 if causal else S * S
    if window:
        pairs = S * window - window * window / 2
    flops = 2 * B * H * pairs * (D + E)
    backward_flops = 2 * B * H * pairs * (3 * D + 2 * E)
    result: dict[str, Any] = {"row": row}

    arguments = ours(q, k, v, causal, window)
    out, lse = attention.attention_forward(**arguments)

    def backward() -> Any:
        return attention.attention_backward(
            grad_out, **arguments, out=out, lse=lse, output_mask=[True, True, True, False, False]
        )

    def record(name: str, function: Callable[[], Any], amount: float) -> None:
        try:
            result[name] = amount / median_ms(function) / 1e9
        except Exception as error:
            result[name] = None
            print(f"  {name} {row}: {type(error).__name__}: {str(error)[:200]}", flush=True)

    record("ours_forward", lambda: attention.attention_forward(**arguments), flops)
    record("ours_backward", backward, backward_flops)

    def compare(name: str, kind: Any) -> None:
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        call = functools.partial(
            torch.nn.functional.scaled_dot_product_attention, *leaves, is_causal=causal, enable_gqa=H != K
        )
        with sdpa_kernel(kind):
            peer = call()
            gradient = functools.partial(torch.autograd.grad, peer, leaves, grad_out, retain_graph=True)
            result["out_difference"] = relative(out, peer)
            for label, mine, theirs in zip("qkv", backward(), gradient()):
                result[f"d{label}_difference"] = relative(mine, theirs)
            record(f"{name}_forward", call, flops)
            record(f"{name}_backward", gradient, backward_flops)

    for name, kind in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        if not window:
            try:
                compare(name, kind)
            except RuntimeError as error:
                print(f"  {name} {row}: {str(error)[:100]}", flush=True)
    return result


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """`|got - want| / |want|`."""
    return ((got - want).float().norm() / want.float().norm()).item()


def measure_flex(row: tuple, result: dict[str, Any]) -> None:
    """FlexAttention, compiled: costs seconds of compile time per shape, hence apart."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, H, K, S, D, E, causal, window = row
    q, k, v = (
        torch.randn(B, heads, S, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads, size in ((H, D), (K, D), (K, E))
    )

    def keep(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i >= j) & (i - j < (window or S))

    mask = create_block_mask(keep, None, None, S, S, device="cuda") if causal else None
    compiled = torch.compile(flex_attention, dynamic=False)
    call = lambda: compiled(q, k, v, block_mask=mask, enable_gqa=H != K)  # noqa: E731
    out = call()
    grad_out = torch.randn_like(out)
    pairs = S * S / 2 if causal else S * S
    if window:
        pairs = S * window - window * window / 2
    result["flex_forward"] = 2 * B * H * pairs * (D + E) / median_ms(call) / 1e9
    backward = lambda: torch.autograd.grad(out, [q, k, v], grad_out, retain_graph=True)  # noqa: E731
    result["flex_backward"] = 2 * B * H * pairs * (3 * D + 2 * E) / median_ms(backward) / 1e9


def measure_decode(row: tuple) -> dict[str, Any]:
    """GB/s of K and V read for one query token."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    B, H, K, N, D = row
    q = torch.randn(B, H, 1, D, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(B, K, N, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    size = 2 * k.numel() * 2
    arguments = ours(q, k, v, False, None)
    mine = functools.partial(attention.attention_forward, **arguments)
    result: dict[str, Any] = {"row": row, "ours": size / median_ms(mine) / 1e6}
    out, _ = mine()
    for name, kind in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        call = functools.partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, enable_gqa=H != K)
        try:
            with sdpa_kernel(kind):
                peer = call()
                result["out_difference"] = relative(out, peer)
                result[name] = size / median_ms(call) / 1e6
        except RuntimeError as error:
            print(f"  {name} {row}: {str(error)[:100]}", flush=True)
    return result


def host_overhead() -> dict[str, float]:
    """Microseconds of host time per call on a tiny problem: ours, and SDPA through ATen."""
    q, k, v = (torch.randn(1, 2, 16, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    arguments = ours(q, k, v, True, None)
    result = {}
    for name, function in (
        ("ours", lambda: attention.attention_forward(**arguments)),
        ("aten", lambda: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)),
    ):
        for _ in range(20):
            function()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(300):
            function()
        result[name] = (time.perf_counter() - start) / 300 * 1e6
        torch.cuda.synchronize()
    return result


def number(value: float | None, width: int = 6) -> str:
    return f"{value:{width}.0f}" if value is not None else " " * (width - 1) + "-"


def main() -> int:
    """Run what was asked for; the exit status is 1 if a correctness case failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", type=int, default=1000, help="how many of the interpreter tests' small cases")
    parser.add_argument("--only", default="", help="only cases whose description contains this text")
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1))
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--no-perf", action="store_true")
    parser.add_argument("--no-flex", action="store_true", help="leave out FlexAttention, which compiles for long")
    options = parser.parse_args()
    if options.shard:
        print(json.dumps(check_shard(*map(int, options.shard.split("/")), options.small, options.only)))
        return 0
    import triton

    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": " ".join(sys.argv),
    }
    report["failures"] = [] if options.no_check else check_all(options.workers, options.small, options.only)
    if not options.no_perf:
        torch.manual_seed(0)
        report["host_us"] = host_overhead()
        report["prefill"], report["decode"] = [], []
        for row in PREFILL:
            result = measure_prefill(row)
            if not options.no_flex:
                try:
                    measure_flex(row, result)
                except Exception as error:
                    print(f"  flex {row}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            report["prefill"].append(result)
        report["decode"] = [measure_decode(row) for row in DECODE]
    if os.environ.get("OUT"):
        (Path(os.environ["OUT"]) / "check_triton.json").write_text(json.dumps(report, indent=1))
    print(report["device"], "torch", report["torch"], "triton", report["triton"])
    if not options.no_perf:
        print("host us per call:", {name: round(value, 1) for name, value in report["host_us"].items()})
        names = ("ours", "flash", "cudnn", "flex")
        print("TFLOP/s fwd/bwd: " + "  ".join(f"{name:>13}" for name in names) + "   difference out dq dk dv")
        for result in report["prefill"]:
            cells = [
                number(result.get(f"{name}_forward")) + "/" + number(result.get(f"{name}_backward")) for name in names
            ]
            differences = " ".join(f"{result.get(f'{x}_difference', math.nan):.0e}" for x in ("out", "dq", "dk", "dv"))
            print(f"{result['row']!s:48}", "  ".join(cells), differences)
        print("decode GB/s:      ours  flash  cudnn")
        for result in report["decode"]:
            cells = [number(result.get(name)) for name in ("ours", "flash", "cudnn")]
            print(f"{result['row']!s:32}", " ".join(cells), f"{result.get('out_difference', math.nan):.0e}")
    print("FAILED" if report["failures"] else "ok", len(report["failures"]), "failures")
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
