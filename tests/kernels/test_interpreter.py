"""TRITON_ATTN's kernels, run by Triton's interpreter on the CPU, against a float64 oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import kernel_cases as cases_module
import kernel_oracle as oracle_module


def parameters(cases: list[dict[str, Any]]) -> list[Any]:
    """One pytest parameter per case, named after it."""
    marks = {True: [pytest.mark.slow], False: []}
    return [pytest.param(case, id=case["name"], marks=marks[cases_module.is_slow(case)]) for case in cases]


def run_forward(worker: Any, case: dict[str, Any], tensors: dict, scalars: dict) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = worker.call(
        "forward", **tensors, **scalars, out_layout=case.get("out_layout", "bhsd"), tuning=case.get("tuning")
    )
    shape = (case["B"], case["H"], case["M"], case["E"])
    assert out.shape == shape
    assert out.dtype == tensors["q"].dtype
    assert lse.shape == shape[:3]
    assert lse.dtype == torch.float32
    assert (out if case.get("out_layout", "bhsd") == "bhsd" else out.transpose(1, 2)).is_contiguous()
    return out, lse


def check(case: dict, tensors: dict, scalars: dict, got: dict, grad_out: torch.Tensor | None = None) -> None:
    errors = oracle_module.compare(tensors, scalars, got, grad_out, case.get("oracle_dtype", torch.float64))
    bad = {name: f"{error:.2e} > {limit:.2e}" for name, (error, limit) in errors.items() if not error <= limit}
    assert not bad, f"{case['name']}: {bad}"


CASES = cases_module.feature_cases() + cases_module.ranged_cases() + cases_module.random_cases(16)


@pytest.mark.parametrize("case", parameters(CASES))
def test_forward_and_backward(worker: Any, case: dict[str, Any]) -> None:
    tensors, scalars = oracle_module.make_inputs(case)
    out, lse = run_forward(worker, case, tensors, scalars)
    if case["N"] == 0 or case["B"] == 0:
        assert bool((out == 0).all())
        assert bool((lse == -torch.inf).all())
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    if case.get("layout") == "expanded":
        grad_out = grad_out[:, :, :1, :1].expand(out.shape)
    grads = worker.call(
        "backward", grad_out=grad_out, **tensors, out=out, lse=lse, **scalars, output_mask=[True] * 5,
        ranged=case.get("tuning", {}).get("ranged"),
    )  # fmt: skip
    got = {"out": out, "lse": lse}
    for name, grad in zip(oracle_module.GRADIENTS, grads):
        leaf = tensors[name]
        if leaf is None:
            assert grad.shape == (0,)
            continue
        assert grad.shape == leaf.shape
        assert grad.dtype == leaf.dtype
        got[name] = grad
    if case["N"] == 0 or case["B"] == 0:
        assert all(bool((got[name] == 0).all()) for name in ("q", "k", "v"))
        return
    check(case, tensors, scalars, got, grad_out)


@pytest.mark.parametrize("has_gradient", [True, False], ids=["", "no gradient"])
@pytest.mark.parametrize("mode", ["mean", "mean_added", "nan", "nan_added"])
def test_rows_without_keys_are_added_to_what_the_others_give(worker: Any, mode: str, has_gradient: bool) -> None:
    """Where such rows have no gradient, as padding in training, a mean of values has nothing to add."""
    case = cases_module.case(
        f"two-passes-{mode}", B=1, H=2, key_mask="left", M=37, band_upper=0, empty_rows=mode, soft_cap=2.0
    )
    tensors, scalars = oracle_module.make_inputs(case)
    out, lse = run_forward(worker, case, tensors, scalars)
    assert (lse == -torch.inf).any()
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    if not has_gradient:
        grad_out = grad_out * (lse > -torch.inf).unsqueeze(-1)
    *grads, seen = worker.call("backward_in_two", grad_out=grad_out, **tensors, out=out, lse=lse, **scalars)
    assert seen == (has_gradient or "nan" in mode)
    check(case, tensors, scalars, dict(zip("qkv", grads)), grad_out)


@pytest.mark.parametrize("case", parameters(cases_module.decode_cases() + cases_module.shift_cases()))
def test_decode_forward(worker: Any, case: dict[str, Any]) -> None:
    tensors, scalars = oracle_module.make_inputs(case)
    out, lse = run_forward(worker, case, tensors, scalars)
    check(case, tensors, scalars, {"out": out, "lse": lse})


def test_rows_are_empty_where_meant() -> None:
    """The cases named empty do have empty rows beside rows that are not: otherwise they would test nothing."""
    for case in cases_module.feature_cases() + cases_module.decode_cases():
        if "empty-" in case["name"]:
            tensors, scalars = oracle_module.make_inputs(case)
            rows = oracle_module.keep_pairs(tensors, scalars, tuple(case[letter] for letter in "BHMN")).any(-1)
            assert not rows.all(), case["name"]
            assert rows.any(), case["name"]


def test_loud_cases_are_computed_again() -> None:
    """In the cases named loud, some row's maximum is above that of its first keys by more than FIRST_MAX allows for."""
    cases = [case for case in cases_module.shift_cases() if "first-max-loud" in case["name"]]
    assert cases
    for case in cases:
        tensors, scalars = oracle_module.make_inputs(case)
        scores = tensors["q"].double() @ tensors["k"].double().mT * scalars["softmax_scale"]
        keep = oracle_module.keep_pairs(tensors, scalars, tuple(case[letter] for letter in "BHMN"))
        scores = scores.masked_fill(~keep, -torch.inf)
        above = scores.amax(-1) - scores[..., :16].amax(-1)
        assert above.max() > 64 * math.log(2), case["name"]


def test_output_mask_and_dtype_errors(worker: Any) -> None:
    """Unwanted gradients are empty; what the kernels were not built for is refused with the reason."""
    case = cases_module.case("mask", bias=(True, True, True, True), sinks=True)
    tensors, scalars = oracle_module.make_inputs(case)
    out, lse = run_forward(worker, case, tensors, scalars)
    grads = worker.call(
        "backward", ranged=None, grad_out=out, **tensors, out=out, lse=lse, **scalars,
        output_mask=[False, True, False, False, False],
    )  # fmt: skip
    assert [tuple(grad.shape) for grad in grads] == [(0,), tuple(tensors["k"].shape), (0,), (0,), (0,)]
    double = {name: tensors[name].double() for name in "qkv"}
    with pytest.raises(RuntimeError, match="NotImplementedError: q, k, v must share one dtype"):
        run_forward(worker, case, {**tensors, **double}, scalars)
    with pytest.raises(RuntimeError, match="NotImplementedError: head_dim and v_head_dim must be 1 to 256"):
        run_forward(worker, case, {**tensors, "v": torch.zeros(2, 1, 37, 257)}, scalars)
