"""Programs whose sizes are symbols: planned at some sizes, right at others, and no guard on any of them.

Run by Triton's interpreter against float64, as test_interpreter.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import kernel_cases as cases_module
import kernel_oracle as oracle_module
import mla_cases
import mla_oracle


def other_sizes(case: dict[str, Any], longer: bool) -> dict[str, Any]:
    """The case with other numbers of sequences, queries and keys; 0 and 1 stay, which PyTorch never makes symbols."""
    change = lambda size, by: size if size < 2 else size + by if longer else max(2, size - by)  # noqa: E731
    page = case.get("page", 1)
    sizes = {"B": change(case["B"], 3), "M": change(case["M"], 11), "N": case["N"] + (5 * page if page > 1 else 0)}
    if page == 1:
        sizes["N"] = sizes["M"] if case["M"] == case["N"] else change(case["N"], 17)
    return {**case, **sizes}


def check(worker: Any, case: dict[str, Any], planned_at: dict[str, Any], bottom_right: bool = False) -> dict[str, int]:
    """Numbers of splits of the kernels, by name."""
    tensors, scalars = oracle_module.make_inputs(case)
    hints, _ = oracle_module.make_inputs(planned_at)
    out, lse, kernels = worker.call(
        "symbolic_forward", hints=hints, **tensors, **scalars, out_layout=case.get("out_layout", "bhsd"),
        tuning=case.get("tuning"), bottom_right=bottom_right,
    )  # fmt: skip
    oracle_dtype = case.get("oracle_dtype", torch.float64)
    errors = oracle_module.compare(tensors, scalars, {"out": out, "lse": lse}, oracle_dtype=oracle_dtype)
    bad = {name: f"{error:.2e} > {limit:.2e}" for name, (error, limit) in errors.items() if not error <= limit}
    assert not bad, f"{case['name']}: {bad}"
    return kernels


def cases(decode: bool = True) -> list[Any]:
    found = cases_module.feature_cases() + cases_module.ranged_cases() + cases_module.random_cases(6)
    if decode:
        found += cases_module.decode_cases() + cases_module.shift_cases()
    found = [case for case in found if case["N"] and case["B"] and case.get("layout") != "expanded"]
    slow = lambda case: [pytest.mark.slow] if cases_module.is_slow(case) else []  # noqa: E731
    return [pytest.param(case, id=case["name"], marks=slow(case)) for case in found]


def as_slow(found: list[Any]) -> list[Any]:
    return [pytest.param(*case.values, id=case.id, marks=pytest.mark.slow) for case in found]


@pytest.mark.parametrize("case", cases())
def test_planned_at_larger_sizes(worker: Any, case: dict[str, Any]) -> None:
    assert "attention_forward_kernel" in check(worker, case, other_sizes(case, longer=True))


@pytest.mark.parametrize("case", [*cases(decode=False)[::2], *as_slow(cases(decode=False)[1::2])])
def test_gradients(worker: Any, case: dict[str, Any]) -> None:
    def given(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        tensors, scalars = oracle_module.make_inputs(case)
        out, lse = worker.call("forward", **tensors, **scalars, out_layout="bhsd", tuning=case.get("tuning"))
        grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        return {**tensors, "out": out, "lse": lse, "grad_out": grad_out}, scalars

    tensors, scalars = given(case)
    hints, _ = given(other_sizes(case, longer=True))
    # Whether parts of a packed tensor are dense is asked by torch.empty_like, in the op's fake kernel, too.
    is_free = case.get("layout") != "packed"
    ranged = case.get("tuning", {}).get("ranged")
    gradients = worker.call("symbolic_backward", ranged=ranged, is_free=is_free, hints=hints, **tensors, **scalars)
    got = {name: grad for name, grad in zip(oracle_module.GRADIENTS, gradients) if tensors[name] is not None}
    grad_out = tensors["grad_out"]
    inputs = {name: tensors[name] for name in (*"qkv", *oracle_module.TENSOR_NAMES)}
    errors = oracle_module.compare(inputs, scalars, got, grad_out, case.get("oracle_dtype", torch.float64))
    bad = {name: f"{error:.2e} > {limit:.2e}" for name, (error, limit) in errors.items() if not error <= limit}
    assert not bad, f"{case['name']}: {bad}"


@pytest.mark.parametrize("case", [pytest.param(c.values[0], id=c.id) for c in cases()[::5]])
def test_planned_at_smaller_sizes(worker: Any, case: dict[str, Any]) -> None:
    assert "attention_forward_kernel" in check(worker, case, other_sizes(case, longer=False))


@pytest.mark.parametrize("planned", [20, 1500], ids=["while short", "while long"])
@pytest.mark.parametrize(("kv_len", "splits"), [(21, 1), (300, 2), (1200, 8)])
def test_a_cache_that_grows_is_split_by_its_length(worker: Any, planned: int, kv_len: int, splits: int) -> None:
    """The interpreter's device has room for eight programs; a share has 128 keys at least."""
    case = cases_module.case("growing", B=1, H=2, K=1, M=1, N=kv_len)
    kernels = check(worker, case, {**case, "N": planned})
    assert kernels == {"attention_forward_kernel": splits, "attention_combine_kernel": splits}


@pytest.mark.parametrize(("batch", "splits"), [(2, 4), (9, 1)])
def test_more_sequences_leave_fewer_splits(worker: Any, batch: int, splits: int) -> None:
    case = cases_module.case("batches", B=batch, H=1, K=1, M=1, N=600)
    kernels = check(worker, case, {**case, "B": 5, "N": 700})
    assert kernels["attention_forward_kernel"] == splits


@pytest.mark.parametrize("sizes", [(21, 37), (37, 21), (30, 30)], ids=str)
def test_a_band_between_symbols(worker: Any, sizes: tuple[int, int]) -> None:
    q_len, kv_len = sizes
    case = cases_module.case("bottom-right", M=q_len, N=kv_len, H=2, band_upper=kv_len - q_len, empty_rows="zero")
    check(worker, case, {**case, "M": 44, "N": 59}, bottom_right=True)


def latent(worker: Any, case: dict[str, Any], planned_at: dict[str, Any]) -> dict[str, int]:
    tensors, scalars = mla_oracle.decode_inputs(case)
    hints, _ = mla_oracle.decode_inputs(planned_at)
    tuning = {"num_splits": case["splits"]} if "splits" in case else None
    out, lse, kernels = worker.call(
        "symbolic_mla_decode", hints=hints, **tensors, **scalars, out_layout=case.get("out_layout", "bhsd"),
        tuning=tuning,
    )  # fmt: skip
    errors = mla_oracle.compare(tensors, scalars, {"out": out, "lse": lse})
    bad = {name: f"{error:.2e} > {limit:.2e}" for name, (error, limit) in errors.items() if not error <= limit}
    assert not bad, f"{case['name']}: {bad}"
    return kernels


@pytest.mark.parametrize("case", [pytest.param(x, id=x["name"]) for x in mla_cases.interpreter_cases()])
def test_latent_decode(worker: Any, case: dict[str, Any]) -> None:
    latent(worker, case, other_sizes(case, longer=True))


@pytest.mark.parametrize("planned", [20, 1500], ids=["while short", "while long"])
@pytest.mark.parametrize(("kv_len", "splits"), [(21, 1), (300, 4), (1200, 4)])
def test_a_latent_cache_that_grows(worker: Any, planned: int, kv_len: int, splits: int) -> None:
    """The interpreter's device has room for eight programs; there are two sequences."""
    case = mla_cases.case("growing", N=kv_len)
    kernels = latent(worker, case, {**case, "N": planned})
    assert kernels == {"mla_decode_kernel": splits, "attention_combine_kernel": splits}


@pytest.mark.parametrize("name", ["prompt", "decode"])
def test_amds_tiles_and_order_of_programs(worker: Any, name: str) -> None:
    """On MI300 programs take all heads in turn, whose number is a symbol if that of sequences is."""
    sizes = {"prompt": {"M": 150, "N": 171, "band_upper": 21}, "decode": {"M": 1, "N": 600}}[name]
    case = cases_module.case(name, B=3, H=4, K=2, D=64, E=64, **sizes, tuning={"arch": "gfx942"})
    kernels = check(worker, case, {**case, "B": 2, "M": case["M"] if name == "decode" else 300, "N": 400})
    assert ("attention_combine_kernel" in kernels) == (name == "decode")
