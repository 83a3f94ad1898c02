"""Hopper's decode, split and whole, with every kind of mask, against float64, and twice the same.

`make test-gpu`.
"""

from __future__ import annotations

import kernel_oracle
import pytest
import torch

from rocm_attn_compile.kernels.triton.configs import KernelConfig
from rocm_attn_compile.kernels.triton.forward_launch import forward_launches
from rocm_attn_compile.kernels.triton.launch import Tuning

pytestmark = [pytest.mark.gpu, pytest.mark.hopper]

FULL = (True, True, True, True)
SIZES = {"B": 3, "H": 16, "K": 4, "M": 1, "N": 4128, "D": 128, "E": 128, "dtype": torch.bfloat16}
CASES = {
    "plain": {},
    "64, no group": {"H": 4, "D": 64, "E": 64},
    "256": {"D": 256, "E": 256, "H": 8, "K": 1},
    "float16": {"dtype": torch.float16},
    "whole blocks": {"N": 4096},
    "whole blocks, 64": {"N": 2048, "D": 64, "E": 64},
    "short": {"N": 1237},
    "a block": {"N": 128},
    "one key": {"N": 1},
    "several queries": {"M": 4, "band_upper": 4124, "sinks": True},
    "more rows than a tile": {"M": 5, "K": 2},
    "uneven group": {"H": 10, "K": 2, "M": 3, "N": 777, "band_upper": 774, "out_layout": "bshd"},
    "window": {"M": 2, "band_upper": 4126, "band_lower": 3000},
    "limits": {"M": 2, "limits": (True, True), "empty": ("limits",), "empty_rows": "nan"},
    "limits, 64, mean": {"M": 2, "D": 64, "E": 64, "limits": (True, False), "empty": ("limits",), "empty_rows": "mean"},
    "key mask": {"key_mask": True},
    "key mask of nothing": {"key_mask": True, "empty": ("key_mask",), "empty_rows": "zero", "D": 64, "E": 64},
    "bias": {"bias": FULL, "M": 2},
    "mask, soft cap": {"mask": FULL, "soft_cap": 2.0, "M": 2},
    "soft cap, 256": {"soft_cap": 30.0, "D": 256, "E": 256},
    "alibi": {"alibi": "batch"},
    "narrower values": {"E": 64},
    "in two pieces": {"D": 96, "E": 96},
    "narrow": {"D": 40, "E": 24},
    "large scores": {"scale": 3.0},
    "negative scale": {"scale": -0.1},
    "keys as columns": {"layout": "k_transposed"},
}


NOT_PLAIN = ("keys as columns", "in two pieces")
DESCRIPTORS = KernelConfig(16, 64, 4, 3, merged=True)


@pytest.mark.parametrize("config", [None, DESCRIPTORS], ids=["", "descriptors"])
@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("name", CASES)
def test_decode(name, splits, config):
    if config and name in NOT_PLAIN:
        pytest.skip("descriptors are for plain heads")
    case = {**SIZES, **CASES[name]}
    tensors, scalars = kernel_oracle.make_inputs(case, "cuda")
    tuning = Tuning(num_splits=splits, config=config, tma=bool(config))

    def plan():
        launches, out, lse = forward_launches(
            **tensors, **scalars, out_layout=case.get("out_layout", "bhsd"), tuning=tuning
        )
        arguments = launches[0].arguments
        assert (arguments["LATE_QUERIES"], arguments["TMA"]) == (name not in NOT_PLAIN, bool(config))
        return launches, out, lse

    kernel_oracle.check_twice(plan, tensors, scalars)
