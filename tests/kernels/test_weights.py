"""The kernel that writes the softmax weights, run by Triton's interpreter on the CPU, against a float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import kernel_cases as cases_module
import kernel_oracle as oracle_module

NAMES = [
    "plain", "one-query", "one-key", "causal-top-left", "causal-bottom-right", "causal-more-queries",
    "window", "window-two-sided", "band-drops-all", "negative-scale", "gqa", "head-24-40", "head-96-64",
    "bf16", "fp16-bias", "bias-bhmn", "bias-b1m1", "bias-holes", "bias-finfo-min", "bias-finfo-min-sinks",
    "bias-minus-1e9", "mask-mn", "mask-bn", "key-mask", "limits-wide-causal", "ids", "soft-cap",
    "soft-cap-bias", "sinks", "sinks-empty", "alibi-causal-gqa", "alibi-bias-sinks-soft-cap",
    "alibi-far-keys", "packed-qkv", "k-transposed", "expanded-kv", "no-keys", "no-batch", "empty-mask-nan",
    "empty-mask-mean", "empty-band-mean_added", "empty-limits-nan_added", "empty-key-mask-mean",
    "empty-ids-mean-added",
]  # fmt: skip

CASES = [case for case in cases_module.feature_cases() if case["name"] in NAMES]


def run(worker: Any, case: dict[str, Any], weights_dtype: torch.dtype | None = None, tuning: Any = None) -> None:
    tensors, scalars = oracle_module.make_inputs(case)
    dtype = weights_dtype or tensors["q"].dtype
    without = {name: value for name, value in {**tensors, **scalars}.items() if "dropout" not in name}
    layout = case.get("out_layout", "bhsd")
    out, weights = worker.call("weights", **without, out_layout=layout, weights_dtype=dtype, tuning=tuning)
    assert weights.dtype == dtype
    assert weights.shape == (*tensors["q"].shape[:3], tensors["k"].shape[2])
    assert weights.is_contiguous()
    if case["N"] == 0 or case["B"] == 0:
        assert bool((out == 0).all())
        return
    got = {"out": out, "weights": weights}
    errors = oracle_module.compare(tensors, scalars, got, None, case.get("oracle_dtype", torch.float64))
    bad = {name: f"{error:.2e} > {limit:.2e}" for name, (error, limit) in errors.items() if not error <= limit}
    assert not bad, f"{case['name']}: {bad}"


def test_the_cases_are_there() -> None:
    assert sorted(case["name"] for case in CASES) == sorted(NAMES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_output_and_weights(worker: Any, case: dict[str, Any]) -> None:
    run(worker, case)


@pytest.mark.parametrize("config", [(32, 16, 1, 1), (16, 64, 1, 1)])
def test_other_tiles(worker: Any, config: tuple[int, ...]) -> None:
    run(worker, cases_module.case("tiles", M=37, N=150, band_lower=-60, band_upper=20), tuning={"config": config})


def test_keys_are_shared_out(worker: Any) -> None:
    """Few rows and many keys: several programs a row."""
    run(worker, cases_module.case("shared", B=1, M=3, N=600, H=2, band_upper=400, key_mask=True))


def test_weights_in_float32_beside_half_precision(worker: Any) -> None:
    run(worker, cases_module.case("wide", dtype=torch.bfloat16, band_upper=12), weights_dtype=torch.float32)
