"""Hopper's own kernels of latent decode against float64, whatever they take by themselves, and twice the same.

`make test-gpu`. `benchmarks/gpu/check_mla.py` has many more cases.
"""

from __future__ import annotations

import math

import mla_cases
import mla_oracle
import pytest
import torch

from rocm_attn_compile.kernels.triton.configs import KernelConfig
from rocm_attn_compile.kernels.triton.launch import Tuning
from rocm_attn_compile.kernels.triton.mla_decode_launch import mla_decode_launches

pytestmark = [pytest.mark.gpu, pytest.mark.hopper]

KERNELS = {"mla_decode_hopper_kernel": KernelConfig(64, 64, 4, 1), "mla_decode_few_kernel": KernelConfig(16, 64, 4, 1)}
COMBINES = {"mla_decode_hopper_kernel": "mla_combine_kernel", "mla_decode_few_kernel": "attention_combine_kernel"}
SIZES = {"B": 3, "H": 128, "N": 1237, "C": 512, "R": 64, "dtype": torch.bfloat16}
CASES = {
    "odd length": {},
    "heads of no whole tile": {"H": 100},
    "tiles of two positions": {"H": 20, "M": 3, "causal": True},
    "lengths 0 and 1": {"lengths": (0, 1, 1237)},
    "lengths 0 and 1, nan": {"lengths": (0, 1, 640), "empty_rows": "nan"},
    "pages of 16": {"page": 16, "limits": "batch"},
    "pages of 64": {"page": 64, "causal": True, "M": 2},
    "key mask": {"key_mask": True},
    "window": {"M": 3, "causal": True, "window": 300},
    "starts and ends of rows": {"M": 3, "limits": "rows"},
    "narrow": {"C": 384, "R": 32, "dtype": torch.float16},
    "no rope": {"R": 0},
    "queries of another order": {"q_layout": "bshd", "out_layout": "bshd", "M": 2},
}


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_decode(name, kernel, splits):
    fields = {**SIZES, **CASES[name]}
    lengths = fields.pop("lengths", None)
    case = mla_cases.case(name, **fields)
    tensors, scalars = mla_oracle.decode_inputs(case, "cuda")
    if lengths:
        tensors["kv_end"] = torch.tensor(lengths, dtype=torch.int32, device="cuda")[:, None]

    def run():
        tuning = Tuning(config=KERNELS[kernel], tma=True, in_flight=True, num_splits=splits)
        launches, out, lse = mla_decode_launches(
            **tensors, **scalars, out_layout=case.get("out_layout", "bhsd"), tuning=tuning
        )
        assert [launch.kernel.__name__ for launch in launches] == [kernel, COMBINES[kernel]][: min(splits, 2)]
        out.fill_(math.nan)
        lse.fill_(math.nan)
        for launch in launches:
            launch.run()
        return {"out": out, "lse": lse}

    got, again = run(), run()
    for name, (error, limit) in mla_oracle.compare(tensors, scalars, got).items():
        assert error <= limit, name
    for name, value in got.items():
        assert torch.equal(value.nan_to_num(7), again[name].nan_to_num(7)), name


@pytest.mark.parametrize("exponent", [-100, 100])
@pytest.mark.parametrize("heads", [16, 128])
def test_shares_of_any_magnitude(heads, exponent):
    """Latents times a power of two give results times it, to the bit: shares are scaled where they are float16."""
    case = mla_cases.case("magnitude", **{**SIZES, "H": heads})
    tensors, scalars = mla_oracle.decode_inputs(case, "cuda")
    tensors["q_pe"] = torch.zeros_like(tensors["q_pe"])

    def run(power):
        scaled = {**tensors, "kv_c": tensors["kv_c"] * 2.0**power}
        given = {**scalars, "softmax_scale": scalars["softmax_scale"] * 2.0**-power}
        launches, out, lse = mla_decode_launches(**scaled, **given, out_layout="bhsd", tuning=Tuning(num_splits=3))
        assert launches[0].kernel.__name__ in KERNELS
        for launch in launches:
            launch.run()
        return out, lse

    out, lse = run(0)
    far, far_lse = run(exponent)
    assert torch.equal(far, out * 2.0**exponent)
    assert torch.equal(far_lse, lse)
