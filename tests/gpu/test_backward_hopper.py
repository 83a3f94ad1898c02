"""The one backward kernel for Hopper against float64, on sizes that cut its blocks in every way, and twice the same.

`make test-gpu`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import kernel_cases
import kernel_oracle

from rocm_attn_compile.kernels.triton import attention, backward_launch
from rocm_attn_compile.kernels.triton.launch import Tuning

pytestmark = [pytest.mark.gpu, pytest.mark.hopper]

KERNELS = ["backward_rows_kernel", "backward_hopper_kernel", "backward_finish_kernel"]
TABLES = ["mask_ranges_kernel", "key_ranges_kernel"]


def names(launches):
    return [launch.kernel.__name__ for launch in launches]


@pytest.mark.parametrize("case", kernel_cases.hopper_backward_cases(), ids=kernel_cases.mask_name)
def test_gradients(case):
    tensors, scalars = kernel_oracle.make_inputs(case, "cuda")
    out, lse = attention.attention_forward(**tensors, **scalars, out_layout=case.get("out_layout", "bhsd"))
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype).cuda()
    arguments = {"grad_out": grad_out, **tensors, "out": out, "lse": lse, **scalars, "output_mask": [True] * 5}
    expected = list(KERNELS)
    if any(tensors[name] is not None for name in ("key_mask", "kv_start", "kv_end", "q_ids")):
        expected[1:1] = TABLES
    if scalars["empty_rows"] != "zero":
        expected += ["backward_dkdv_kernel"] + ["backward_dq_kernel"] * scalars["empty_rows"].endswith("added")

    def run():
        launches, found = backward_launch.backward_launches(**arguments, tuning=Tuning(in_flight=True))
        assert names(launches) == expected
        for name in ("dq", "dk", "dv"):
            found[name].fill_(float("nan"))
        for launch in launches:
            launch.run()
        return {"q": found["dq"], "k": found["dk"], "v": found["dv"]}

    got = run()
    for _ in range(3):
        assert all(torch.equal(got[name].nan_to_num(7), value.nan_to_num(7)) for name, value in run().items())
    for grad, (error, limit) in kernel_oracle.compare(tensors, scalars, got, grad_out).items():
        assert error <= limit, f"{grad}: {error} > {limit}"


def test_long_calls_take_it_and_agree_with_the_others():
    """Full size, several programs of a head at once, replayed from a CUDA graph."""
    q, k, v = (torch.randn(1, heads, 4096, 128, device="cuda", dtype=torch.bfloat16) for heads in (32, 8, 8))
    scalars = {"softmax_scale": 0.09, "logits_soft_cap": None, "band_lower": None, "band_upper": 0, "dropout_p": 0.0}
    masks = dict.fromkeys(kernel_oracle.TENSOR_NAMES)
    out, lse = attention.attention_forward(q, k, v, softmax_scale=0.09, band_upper=0, empty_rows="zero")
    arguments = {"grad_out": torch.randn_like(out), "q": q, "k": k, "v": v, **masks, "out": out, "lse": lse, **scalars}
    arguments.update(empty_rows="zero", output_mask=[True] * 3 + [False] * 2)
    assert names(backward_launch.backward_launches(**arguments)[0]) == KERNELS
    first = attention.attention_backward(**arguments)[:3]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = attention.attention_backward(**arguments)[:3]
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    others, found = backward_launch.backward_launches(**arguments, tuning=Tuning(tma=False))
    assert not set(names(others)) & set(KERNELS[1:])
    for launch in others:
        launch.run()
    for one, name in zip(first, ("dq", "dk", "dv")):
        assert (one - found[name]).float().norm() <= 0.01 * found[name].float().norm()
