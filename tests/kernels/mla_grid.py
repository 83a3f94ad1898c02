"""The part of the simulated grid (simulated_grid.py) that belongs to latent attention.

A row's fields are those of mla_cases.case, or for prefill of mla_cases.prefill_case. A kernel or launch configuration
that no row reaches fails test_simulated_coverage.py.
"""

from __future__ import annotations

from typing import Any

import mla_cases
from simulated_grid import ARCHS, BF16, FP16, FP32, Row

# Two sequences of odd lengths, more than one split, the widths of DeepSeek's models.
SIZES: dict[str, Any] = {"B": 2, "H": 16, "N": 75, "C": 512, "R": 64, "dtype": BF16}


def _row(name: str, fields: dict[str, Any], ci: tuple[str, ...] = (), archs: tuple[str, ...] = ARCHS) -> Row:
    case = mla_cases.case(name, **{**SIZES, **fields})
    return Row(name, case, backward=False, archs=archs, ci=ci)


# In the cut each architecture runs 16 heads over pages, and the tall tile; features are combined.
DECODE = (
    _row("16 heads, pages, lengths of their own, empty rows give NaN",
         {"page": 16, "M": 1, "limits": "batch", "empty_rows": "nan"}, ci=ARCHS),
    _row("20 heads, 3 tokens, causal, key mask, two buffers",
         {"H": 20, "M": 3, "causal": True, "key_mask": True, "joint": False, "B": 1}, ci=("gfx942", "gfx950")),
    _row("1 head, columns of the sum in four programs", {"H": 1, "B": 1, "N": 150, "limits": "batch"}, ci=("gfx942",)),
    _row("32 heads", {"H": 32, "B": 1}),
    _row("128 heads", {"H": 128, "B": 1}),
    *(_row(f"{heads} heads, {name}", {"H": heads, "dtype": dtype, "B": 1})
      for heads in (16, 40) for dtype, name in ((FP16, "fp16"), (FP32, "fp32"))),
    *(_row(f"widths {latent} and {rope}", {"C": latent, "R": rope, "M": 2, "limits": "rows"})
      for latent, rope in ((384, 32), (256, 64), (96, 24), (128, 0))),
    *(_row(f"feature {name}", {"C": 128, "R": 64, **fields}) for name, fields in mla_cases.FEATURES.items()),
)  # fmt: skip


def _prefill(name: str, fields: dict[str, Any], ci: tuple[str, ...] = ()) -> Row:
    sizes = {"B": 1, "H": 2, "M": 77, "N": 90, "P": 128, "R": 64, "E": 128, "dtype": BF16}
    return Row(name, mla_cases.prefill_case(name, **{**sizes, **fields}), ci=ci)


PREFILL = (
    _prefill("192 and 128, causal", {"band_upper": 13}, ci=("gfx942", "gfx950")),
    _prefill("fp16, 96 and 64, row limits, key mask", {"dtype": FP16, "P": 64, "R": 32, "E": 64, "key_mask": True,
             "limits": (True, True)}),
    _prefill("fp32", {"dtype": FP32, "M": 45, "N": 50, "band_upper": 5}),
    _prefill("narrow", {"P": 16, "R": 16, "E": 16, "band_upper": 13}),
    _prefill("256 values", {"E": 256, "band_upper": 13}),
    _prefill("one query", {"M": 1, "N": 300}),
)  # fmt: skip

GRID = DECODE + PREFILL
