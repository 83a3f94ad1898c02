"""TRITON_MLA's kernels, run by Triton's interpreter on the CPU, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import mla_cases as cases
import mla_oracle as oracle


def parameters(values: dict[str, Any]) -> list[Any]:
    """One per name; `slow` where it is not among the quick ones."""
    marks = {False: [pytest.mark.slow], True: []}
    return [pytest.param(value, id=name, marks=marks[name in cases.QUICK]) for name, value in values.items()]


def check(name: str, errors: dict[str, tuple[float, float]]) -> None:
    bad = {key: f"{error:.2e} > {limit:.2e}" for key, (error, limit) in errors.items() if not error <= limit}
    assert not bad, f"{name}: {bad}"


@pytest.mark.parametrize("case", parameters({case["name"]: case for case in cases.interpreter_cases()}))
def test_decode(worker: Any, case: dict[str, Any]) -> None:
    tensors, scalars = oracle.decode_inputs(case)
    layout = case.get("out_layout", "bhsd")
    tuning = {"num_splits": case["splits"]} if "splits" in case else None
    out, lse = worker.call("mla_decode", **tensors, **scalars, out_layout=layout, tuning=tuning)
    assert out.shape == tensors["q_latent"].shape
    assert out.dtype == tensors["q_latent"].dtype
    assert (out if layout == "bhsd" else out.transpose(1, 2)).is_contiguous()
    check(case["name"], oracle.compare(tensors, scalars, {"out": out, "lse": lse}))


@pytest.mark.parametrize("name", parameters({name: name for name in cases.PREFILL}))
def test_prefill_and_its_gradients(worker: Any, name: str) -> None:
    case = cases.prefill_case(name, **cases.PREFILL[name])
    tensors, scalars = oracle.prefill_inputs(case)
    out, lse = worker.call("mla_prefill", **tensors, **scalars)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = worker.call("mla_prefill_backward", grad_out=grad_out, **tensors, out=out, lse=lse, **scalars)
    got = {"out": out, "lse": lse, **dict(zip(oracle.PREFILL_GRADIENTS, grads))}
    for leaf, grad in zip(oracle.PREFILL_GRADIENTS, grads):
        assert grad.shape == tensors[leaf].shape
        assert grad.dtype == tensors[leaf].dtype
    check(name, oracle.compare_prefill(tensors, scalars, got, grad_out))


def test_without_rope_it_is_plain_attention(worker: Any) -> None:
    tensors, scalars = oracle.prefill_inputs(cases.prefill_case("no rope", band_upper=16))
    tensors["q_pe"] = tensors["k_pe"] = None
    out, lse = worker.call("mla_prefill", **tensors, **scalars)
    grads = worker.call("mla_prefill_backward", grad_out=out, **tensors, out=out, lse=lse, **scalars)
    assert [grad is None for grad in grads] == [False, True, False, True, False]
    width = (*tensors["q_nope"].shape[:3], 1)
    zeros = {"q_pe": torch.zeros(width), "k_pe": torch.zeros(tensors["k_nope"].shape[0], tensors["k_nope"].shape[2], 1)}
    got = {"out": out, "lse": lse, "q_nope": grads[0], "k_nope": grads[2], "v": grads[4]}
    check("no rope", oracle.compare_prefill({**tensors, **zeros}, scalars, got, out))


def test_unwanted_gradients_are_none(worker: Any) -> None:
    tensors, scalars = oracle.prefill_inputs(cases.prefill_case("mask"))
    out, lse = worker.call("mla_prefill", **tensors, **scalars)
    for mask in ([False, True, False, False, False], [False, False, False, True, False]):
        grads = worker.call(
            "mla_prefill_backward", grad_out=out, **tensors, out=out, lse=lse, **scalars, output_mask=mask
        )
        assert [grad is not None for grad in grads] == mask


REFUSALS = {
    "page of 8": ({"page": 8}, "NotImplementedError: block_size must be a multiple of 16"),
    "mean of pages": ({"page": 16, "empty_rows": "mean"}, "NotImplementedError: empty_rows='mean' has no meaning"),
    "wide latent": ({"C": 513}, "NotImplementedError: kv_lora_rank must be 1 to 512"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(worker: Any, name: str) -> None:
    fields, message = REFUSALS[name]
    tensors, scalars = oracle.decode_inputs(cases.case(name, **fields))
    with pytest.raises(RuntimeError, match=message):
        worker.call("mla_decode", **tensors, **scalars, out_layout="bhsd", tuning=None)


def test_pages_need_lengths_and_one_dtype(worker: Any) -> None:
    tensors, scalars = oracle.decode_inputs(cases.case("pages", page=16))
    with pytest.raises(RuntimeError, match="ValueError: a paged cache needs kv_end"):
        worker.call("mla_decode", **{**tensors, "kv_end": None}, **scalars, out_layout="bhsd", tuning=None)
    wrong = {**tensors, "k_pe": tensors["k_pe"].double()}
    with pytest.raises(RuntimeError, match="NotImplementedError: q_latent, q_pe, kv_c, k_pe must share one dtype"):
        worker.call("mla_decode", **wrong, **scalars, out_layout="bhsd", tuning=None)


def test_no_keys(worker: Any) -> None:
    """A cache of length 0 gives 0, as a sum over nothing."""
    tensors, scalars = oracle.decode_inputs(cases.case("none", N=0))
    out, lse = worker.call("mla_decode", **tensors, **scalars, out_layout="bhsd", tuning=None)
    assert bool((out == 0).all())
    assert bool((lse == -torch.inf).all())
