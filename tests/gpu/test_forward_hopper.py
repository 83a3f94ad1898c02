"""The forward kernel for Hopper against float64: more tiles than multiprocessors, ragged ends, and twice the same.

`make test-gpu`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import kernel_cases
import kernel_oracle

from rocm_attn_compile.kernels.triton import configs, forward_launch
from rocm_attn_compile.kernels.triton.empty_rows import MOST_SHARES, PROGRAMS
from rocm_attn_compile.kernels.triton.launch import Tuning

pytestmark = [pytest.mark.gpu, pytest.mark.hopper]

KERNEL = "attention_forward_hopper_kernel"


def ran(arguments: dict[str, Any]) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Names of the kernels, and what they leave in outputs that were NaN before."""
    launches, out, lse = forward_launch.forward_launches(**arguments)
    out.fill_(float("nan"))
    for launch in launches:
        launch.run()
    return [launch.kernel.__name__ for launch in launches], out, lse


# Every fourth: benchmarks/gpu/check_triton.py has all.
@pytest.mark.parametrize("case", kernel_cases.hopper_forward_cases()[::4], ids=kernel_cases.mask_name)
def test_forward(case: dict[str, Any]) -> None:
    tensors, scalars = kernel_oracle.make_inputs(case, "cuda")
    tuning = Tuning(**{**case["tuning"], "config": configs.KernelConfig(*case["tuning"]["config"])})
    given = {**tensors, **scalars, "out_layout": case.get("out_layout", "bhsd"), "tuning": tuning}
    names, out, lse = ran(given)
    assert KERNEL in names
    again = ran(given)[1]
    assert torch.equal(out.nan_to_num(7), again.nan_to_num(7))
    for result, (error, limit) in kernel_oracle.compare(tensors, scalars, {"out": out, "lse": lse}).items():
        assert error <= limit, f"{result}: {error} > {limit}"


LEFT = {"B": 3, "M": 1300, "N": 1300, "D": 128, "E": 128, "key_mask": "left", "band_upper": 0, "dtype": torch.bfloat16}


@pytest.mark.parametrize("in_flight", [True, False])
@pytest.mark.parametrize("mode", ["mean", "mean_added"])
@pytest.mark.parametrize("heads", [(8, 2), (4, 4)])
def test_prompts_padded_on_the_left(mode: str, heads: tuple[int, int], in_flight: bool) -> None:
    """Rows of padding give the mean of all values, written behind either forward kernel."""
    case = {"name": "", **LEFT, "H": heads[0], "K": heads[1], "empty_rows": mode}
    assert PROGRAMS // (case["B"] * case["K"]) > MOST_SHARES // 2, "several programs a head"
    tensors, scalars = kernel_oracle.make_inputs(case, "cuda")
    given = {**tensors, **scalars, "out_layout": "bhsd", "tuning": Tuning(in_flight=in_flight, ranged=True)}
    names, out, lse = ran(given)
    main = KERNEL if in_flight else "attention_forward_kernel"
    assert names == ["mask_ranges_kernel", main, "values_sum_kernel", "empty_rows_kernel"]
    assert torch.isneginf(lse).any()
    for result, (error, limit) in kernel_oracle.compare(tensors, scalars, {"out": out, "lse": lse}).items():
        assert error <= limit, f"{result}: {error} > {limit}"
