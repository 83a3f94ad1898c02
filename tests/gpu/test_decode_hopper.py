"""Hopper's own decode kernel of float8 caches against float64, and twice the same.

`make test-gpu`.
"""

from __future__ import annotations

import kernel_oracle
import pytest
import torch

from rocm_attn_compile.kernels.triton.forward_launch import forward_launches
from rocm_attn_compile.kernels.triton.launch import Tuning

pytestmark = [pytest.mark.gpu, pytest.mark.hopper]

SIZES = {"B": 3, "H": 16, "K": 2, "M": 1, "N": 4128, "D": 128, "E": 128, "dtype": torch.bfloat16}
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CASES = {
    "plain": {},
    "64": {"D": 64, "E": 64},
    "float16 queries": {"dtype": torch.float16},
    "float16 queries, 64": {"dtype": torch.float16, "D": 64, "E": 64},
    "e5m2": {"kv_dtype": E5M2, "M": 2},
    "e5m2, 64": {"kv_dtype": E5M2, "D": 64, "E": 64},
    "pages of 16, negative scale": {"page": 16, "scale_sign": -1.0, "M": 2, "limits": (False, False)},
    "pages of 48": {"page": 48, "limits": (False, False)},
    "pages of 256, 64": {"page": 256, "D": 64, "E": 64, "N": 4096, "limits": (True, True)},
    "table of int64": {"page": 32, "table_dtype": torch.int64, "limits": (False, False)},
    "starts and ends of rows, none": {"M": 2, "limits": (True, False), "empty": ("limits",), "empty_rows": "nan"},
    "the same, zero": {"M": 2, "limits": (True, True), "empty": ("limits",), "empty_rows": "zero"},
    "sinks": {"sinks": True, "M": 2},
    "window": {"M": 2, "band_upper": 4126, "band_lower": 3000},
    "odd length, no group": {"H": 2, "N": 1237},
    "one key": {"N": 1},
    "group of 5": {"H": 10, "M": 3, "N": 777, "band_upper": 774, "out_layout": "bshd"},
    "large scores": {"scale": 3.0},
}


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_decode(name, splits):
    case = {**SIZES, "kv_dtype": E4M3, **CASES[name]}
    tensors, scalars = kernel_oracle.make_inputs(case, "cuda")
    tuning = Tuning(num_splits=splits, in_flight=True)

    def plan():
        launches, out, lse = forward_launches(
            **tensors, **scalars, out_layout=case.get("out_layout", "bhsd"), tuning=tuning
        )
        assert launches[0].kernel.__name__ == "decode_hopper_kernel" and len(launches) == min(splits, 2)
        return launches, out, lse

    kernel_oracle.check_twice(plan, tensors, scalars)


def test_garbage_behind_the_valid_keys():
    """Neither keys that no row sees, nor entries of the table behind the last page in use, are looked at."""
    case = {**SIZES, "kv_dtype": E4M3, "page": 16, "limits": (False, False)}
    tensors, scalars = kernel_oracle.make_inputs(case, "cuda")
    tensors["kv_end"] = torch.tensor([[0], [1], [1000]], dtype=torch.int32, device="cuda")
    clean = {**tensors, "block_table": tensors["block_table"].clone()}
    tensors["block_table"][0] = 2**30
    tensors["block_table"][1, 1:] = 2**30
    tensors["block_table"][2, 63:] = -(2**30)
    for splits in (1, 3):
        tuning = Tuning(num_splits=splits, in_flight=True)
        launches, out, lse = forward_launches(**tensors, **scalars, out_layout="bhsd", tuning=tuning)
        for one in launches:
            one.run()
        for error, limit in kernel_oracle.compare(clean, scalars, {"out": out, "lse": lse}).values():
            assert error <= limit
