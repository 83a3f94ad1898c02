"""Hopper's own decode kernel of paged caches against float64, and twice the same.

`make test-gpu`.
"""

from __future__ import annotations

import kernel_oracle
import pytest
import torch

from rocm_attn_compile.kernels.triton.forward_launch import forward_launches
from rocm_attn_compile.kernels.triton.launch import Tuning

pytestmark = [pytest.mark.gpu, pytest.mark.hopper]

SIZES = {"B": 3, "H": 32, "K": 8, "M": 1, "N": 4128, "D": 128, "E": 128, "dtype": torch.bfloat16, "page": 16}
SIZES["limits"] = (False, False)
# Key/value heads that a program takes at once, and the rest of the case.
CASES = {
    "four heads": (4, {}),
    "heads apart": (4, {"apart": True}),
    "float16": (4, {"dtype": torch.float16}),
    "two heads": (2, {"H": 16, "K": 2}),
    "one head": (1, {"H": 8, "K": 1}),
    "three heads, no group": (1, {"H": 3, "K": 3}),
    "eight heads of 64": (8, {"H": 8, "D": 64, "E": 64}),
    "one head of 64": (1, {"H": 12, "K": 3, "D": 64, "E": 64, "page": 32}),
    "256": (2, {"H": 8, "K": 2, "D": 256, "E": 256}),
    "pages of 48": (4, {"page": 48}),
    "pages of 48, one head": (1, {"page": 48, "H": 16, "K": 1}),
    "pages of 256, 64": (8, {"page": 256, "N": 4096, "H": 16, "D": 64, "E": 64, "limits": (True, True)}),
    "table of int64": (4, {"page": 32, "table_dtype": torch.int64}),
    "starts and ends of rows, none": (2, {"M": 2, "limits": (True, False), "empty": ("limits",), "empty_rows": "nan"}),
    "the same, zero": (2, {"M": 2, "limits": (True, True), "empty": ("limits",), "empty_rows": "zero"}),
    "sinks": (2, {"M": 2, "sinks": True}),
    "sinks, four heads": (4, {"sinks": True}),
    "window": (2, {"M": 2, "band_upper": 4126, "band_lower": 3000}),
    "window, four heads": (4, {"band_upper": 4127, "band_lower": 3001}),
    "32 rows": (1, {"M": 8, "band_upper": 4120}),
    "64 rows": (1, {"M": 16, "band_upper": 4112}),
    "64 rows of 64": (1, {"M": 16, "D": 64, "E": 64, "page": 32}),
    "32 rows of 256": (1, {"M": 8, "H": 8, "K": 2, "D": 256, "E": 256}),
    "group of 5": (1, {"H": 10, "K": 2, "M": 3, "N": 784, "band_upper": 781, "out_layout": "bshd"}),
    "out_layout": (4, {"out_layout": "bshd"}),
    "one page": (4, {"N": 16}),
    "large scores": (4, {"scale": 3.0}),
}


def inputs(case):
    tensors, scalars = kernel_oracle.make_inputs(case, "cuda")
    if case.get("apart"):
        tensors.update(k=tensors["k"].contiguous(), v=tensors["v"].contiguous())
    return tensors, scalars


def planned(tensors, scalars, splits, heads, out_layout="bhsd"):
    tuning = Tuning(num_splits=splits, in_flight=True)
    launches, out, lse = forward_launches(**tensors, **scalars, out_layout=out_layout, tuning=tuning)
    assert launches[0].kernel.__name__ == "decode_hopper_pages_kernel" and len(launches) == min(splits, 2)
    assert launches[0].arguments["HEADS"] == heads
    return launches, out, lse


def run(launches, out, lse):
    for one in launches:
        one.run()
    return out, lse


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_decode(name, splits):
    heads, features = CASES[name]
    case = {**SIZES, **features}
    tensors, scalars = inputs(case)
    out_layout = case.get("out_layout", "bhsd")
    kernel_oracle.check_twice(lambda: planned(tensors, scalars, splits, heads, out_layout), tensors, scalars)


def test_more_tiles_than_programs():
    """Each program takes several, of different lengths, some without a key."""
    case = {**SIZES, "B": 700, "H": 8, "K": 2, "N": 304, "limits": (False, False)}
    tensors, scalars = inputs(case)
    tensors["kv_end"][::3] = torch.arange(234, device="cuda")[:, None]
    kernel_oracle.check_twice(lambda: planned(tensors, scalars, 1, 2), tensors, scalars)


@pytest.mark.parametrize("splits", [1, 3])
def test_garbage_behind_the_valid_keys(splits):
    """Neither keys that no row sees, nor entries of the table behind the last page in use, are looked at."""
    tensors, scalars = inputs(SIZES)
    tensors["kv_end"] = torch.tensor([[0], [1], [1000]], dtype=torch.int32, device="cuda")
    clean = {**tensors, "block_table": tensors["block_table"].clone()}
    tensors["block_table"][0] = 2**30
    tensors["block_table"][1, 1:] = 2**31 - 1
    tensors["block_table"][2, 63:] = -(2**30)
    out, lse = run(*planned(tensors, scalars, splits, 4))
    for error, limit in kernel_oracle.compare(clean, scalars, {"out": out, "lse": lse}).values():
        assert error <= limit


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_heads_of_a_tile_keep_to_themselves(bad):
    """What is not finite in one head's keys and values does not reach another's result."""
    tensors, scalars = inputs(SIZES)
    out, lse = run(*planned(tensors, scalars, 1, 4))
    tensors["k"][:, 1, 3] = tensors["v"][:, 2, 5] = bad
    found, found_lse = run(*planned(tensors, scalars, 1, 4))
    others = [head for head in range(32) if head // 4 not in (1, 2)]
    assert torch.equal(found[:, others], out[:, others]) and torch.equal(found_lse[:, others], lse[:, others])
    assert not found[:, 8:12].isfinite().all()
    assert torch.equal(found_lse[:, 8:12], lse[:, 8:12])
