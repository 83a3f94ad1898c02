"""The backward of large heads for Hopper against float64, on sizes that cut its blocks in every way, twice the same.

`make test-gpu`.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import kernel_cases
import kernel_oracle

from rocm_attn_compile.kernels.triton import attention, backward_large_launch, backward_launch, mla_prefill
from rocm_attn_compile.kernels.triton.launch import Tuning

pytestmark = [pytest.mark.gpu, pytest.mark.hopper]

ROPE = 64
TABLES = ["mask_ranges_kernel", "key_ranges_kernel"]
EMPTY = {"backward_dkdv_kernel", "backward_dq_kernel"}


def name_of(case):
    """An id for pytest."""
    return f"{kernel_cases.mask_name(case)}, {case['D']}-{case['E']}" + ("-rope" if case.get("rope") else "")


def planned(case, tensors, scalars, grad_out, out, lse):
    """The launches and what they fill, by input."""
    if not case.get("rope"):
        launches, found = backward_launch.backward_launches(
            grad_out, **tensors, out=out, lse=lse, **scalars, output_mask=[True] * 5, tuning=Tuning(in_flight=True)
        )
        return launches, {"q": [found["dq"]], "k": [found["dk"]], "v": [found["dv"]]}
    q, q_pe = (part.contiguous() for part in tensors["q"].split([case["D"] - ROPE, ROPE], -1))
    k, k_pe = (part.contiguous() for part in tensors["k"].split([case["D"] - ROPE, ROPE], -1))
    launches, found = mla_prefill.prefill_backward_launches(
        grad_out, q, q_pe, k, k_pe[:, 0], tensors["v"], (None,) * 3, out, lse, scalars["softmax_scale"],
        scalars["band_lower"], scalars["band_upper"], scalars["empty_rows"], [True] * 5, Tuning(in_flight=True),
    )  # fmt: skip
    return launches, {"q": [found["dq"], found["dq_pe"]], "k": [found["dk"], found["dk_pe"]], "v": [found["dv"]]}


@pytest.mark.parametrize("case", kernel_cases.large_backward_cases(), ids=name_of)
def test_gradients(case, monkeypatch):
    # Several times a pair of launches, the last of them with fewer heads where that is possible.
    monkeypatch.setattr(backward_large_launch, "MAX_BYTES", 2**21)
    tensors, scalars = kernel_oracle.make_inputs(case, "cuda")
    if case.get("rope"):
        # All heads share the second piece of the keys.
        tensors["k"][..., -ROPE:] = tensors["k"][:, :1, :, -ROPE:].clone()
    out, lse = attention.attention_forward(**tensors, **scalars, out_layout=case.get("out_layout", "bhsd"))
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype).cuda()
    if case["M"] * case["N"] > 2**20:
        monkeypatch.setattr(backward_large_launch, "MAX_BYTES", 2**26)

    has_table = any(tensors[name] is not None for name in ("key_mask", "kv_start", "kv_end", "q_ids"))

    def run():
        launches, pieces = planned(case, tensors, scalars, grad_out, out, lse)
        names = [launch.kernel.__name__ for launch in launches]
        before = names.index("backward_large_kernel")
        # Behind them, what adds the gradients of rows without keys.
        rest = [name for name in names[before:] if "large" not in name]
        pairs = (len(names) - before - len(rest)) // 2
        assert names[:before] == ["backward_rows_kernel"] + TABLES * has_table
        assert names[before:] == ["backward_large_kernel", "backward_large_dq_kernel"] * pairs + rest
        assert set(rest) <= EMPTY and bool(rest) == (scalars["empty_rows"] != "zero")
        for piece in itertools.chain(*pieces.values()):
            piece.fill_(float("nan"))
        for launch in launches:
            launch.run()
        return {name: torch.cat([piece.float() for piece in parts], -1) for name, parts in pieces.items()}

    got = run()
    for _ in range(3):
        assert all(torch.equal(got[name].nan_to_num(7), value.nan_to_num(7)) for name, value in run().items())
    for grad, (error, limit) in kernel_oracle.compare(tensors, scalars, got, grad_out).items():
        assert error <= limit, f"{grad}: {error} > {limit}"


@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(256, 256), (192, 128)])
def test_long_calls_take_it_and_agree_with_the_others(head_dim, v_head_dim):
    """Full size, replayed from a CUDA graph."""
    shapes = (32, head_dim), (8, head_dim), (8, v_head_dim)
    q, k, v = (torch.randn(1, heads, 4096, size, device="cuda", dtype=torch.bfloat16) for heads, size in shapes)
    scalars = {"softmax_scale": 0.07, "logits_soft_cap": None, "band_lower": None, "band_upper": 0, "dropout_p": 0.0}
    masks = dict.fromkeys(kernel_oracle.TENSOR_NAMES)
    out, lse = attention.attention_forward(q, k, v, softmax_scale=0.07, band_upper=0, empty_rows="zero")
    arguments = {"grad_out": torch.randn_like(out), "q": q, "k": k, "v": v, **masks, "out": out, "lse": lse, **scalars}
    arguments.update(empty_rows="zero", output_mask=[True] * 3 + [False] * 2)
    launches, _ = backward_launch.backward_launches(**arguments)
    assert "backward_large_kernel" in [launch.kernel.__name__ for launch in launches]
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
    assert not any("large" in launch.kernel.__name__ for launch in others)
    for launch in others:
        launch.run()
    for one, name in zip(first, ("dq", "dk", "dv")):
        assert (one - found[name]).float().norm() <= 0.01 * found[name].float().norm()
