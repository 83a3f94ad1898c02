"""Which kernels, features, types, head sizes and architectures are executed as AMD machine code: the grid, as data.

A row is a case of kernel_cases.py with sizes that cross the shipped tiles, the architectures it runs on, and those of
them that are in the CI cut; the rest is `slow`. A kernel or launch configuration that ships and that no row reaches
fails test_simulated_coverage.py: add a row. Rows of the cut combine features, since compiling dominates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

ARCHS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
CDNA, RDNA = ARCHS[:3], ARCHS[3:]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FULL = (True, True, True, True)


@dataclass(frozen=True)
class Row:
    """One case on some architectures.

    Attributes:
        name: Of the case.
        fields: Of the case; see kernel_oracle.make_inputs. The defaults are SIZES.
        backward: Whether the gradients are computed as well.
        ranged: Whether padding and ids are read beforehand, as in long calls.
        weights: The weights are computed as a second result, instead of gradients.
        archs: Where it runs.
        ci: Where it is part of the CI cut.
    """

    name: str
    fields: dict[str, Any]
    backward: bool = True
    archs: tuple[str, ...] = ARCHS
    ci: tuple[str, ...] = ()
    ranged: bool = False
    weights: bool = False

    def case(self) -> dict[str, Any]:
        """The case, complete."""
        return {"name": self.name, **SIZES, **self.fields}


# Ragged against every tile that ships (128 x 64 at most), more than one tile each way, two heads that share keys.
SIZES: dict[str, Any] = {"B": 1, "H": 2, "K": 1, "M": 141, "N": 150, "D": 64, "E": 64, "dtype": FP16}
DECODE: dict[str, Any] = {"B": 1, "H": 8, "K": 2, "M": 1, "N": 600}

CACHE: dict[str, Any] = {"B": 2, "N": 608, "limits": (False, False)}
FP8, FNUZ, E5M2 = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2

CUT = (
    Row(
        "main: bf16, 128, causal window, grouped heads",
        {"dtype": BF16, "D": 128, "E": 128, "H": 4, "K": 2, "band_upper": 9, "band_lower": -60},
        ci=ARCHS,
    ),
    Row(
        "80: bias and its gradient, soft cap, ALiBi, mask with empty rows",
        {"D": 80, "E": 80, "bias": FULL, "soft_cap": 2.0, "mask": FULL, "empty": ("mask_rows",),
         "empty_rows": "mean_added", "layout": "packed", "N": 141, "K": 2, "out_layout": "bshd", "alibi": True},
        ci=ARCHS,
    ),
    Row(
        "fp32, 64 and 48: ids, row limits, key mask, dropout",
        {"dtype": FP32, "E": 48, "ids": True, "limits": (True, True), "key_mask": True, "dropout_p": 0.3,
         "empty_rows": "zero", "M": 45, "N": 70},
        ci=ARCHS,
    ),
    Row(
        "decode: bf16, 128, packed heads, split keys, sinks, ALiBi",
        {**DECODE, "dtype": BF16, "D": 128, "E": 128, "M": 3, "band_upper": 590, "sinks": True, "soft_cap": 3.0,
         "alibi": True},
        backward=False,
        ci=ARCHS,
    ),
    Row(
        "192 and 128: transposed keys, causal, broadcast bias, sinks",
        {"D": 192, "E": 128, "layout": "k_transposed", "band_upper": 9, "bias": (True, False, False, True),
         "sinks": True, "M": 77, "N": 90},
        ci=("gfx942", "gfx1100"),
    ),
    Row(
        "bf16, 64: a maximum of the first keys that does not hold, sinks",
        {"dtype": BF16, "band_upper": 9, "scale": 10.0, "sinks": True},
        backward=False,
        ci=("gfx942",),
    ),
    Row(
        "bf16, 64: ALiBi",
        {"dtype": BF16, "band_upper": 9, "alibi": "batch", "B": 2, "M": 77, "N": 90},
        ci=("gfx942", "gfx1100"),
    ),
    Row(
        "bf16, 128: soft cap by a polynomial, where scores come near the cap",
        {"dtype": BF16, "D": 128, "E": 128, "soft_cap": 30.0, "scale": 1.0, "limits": (True, True)},
        ci=("gfx950",),
    ),
    Row(
        "bf16, 64: soft cap by a polynomial",
        {"dtype": BF16, "soft_cap": 30.0, "band_upper": 9, "sinks": True, "M": 77, "N": 90},
        ci=("gfx942", "gfx1100"),
        backward=False,
    ),
    Row(
        "bf16, 96 in two pieces: soft cap by a polynomial",
        {"dtype": BF16, "D": 96, "E": 96, "soft_cap": 30.0, "band_upper": 9, "M": 77, "N": 90},
        ci=("gfx942", "gfx950"),
        backward=False,
    ),
    Row(
        "bf16, 64: no maximum under a soft cap",
        {"dtype": BF16, "soft_cap": 20.0, "scale": 1.0, "limits": (True, True)},
        ci=("gfx942",),
        backward=False,
    ),
    Row(
        "decode: bias, mask, ids, empty rows give NaN",
        {**DECODE, "M": 6, "D": 96, "E": 64, "mask": FULL, "empty": ("mask_rows",), "ids": True,
         "bias": (True, False, True, True), "empty_rows": "nan_added"},
        backward=False,
        ci=("gfx950", "gfx1201"),
    ),
    Row(
        "decode: one query of 71 heads in several tiles",
        {**DECODE, "dtype": BF16, "H": 71, "K": 1, "limits": (True, False), "N": 300},
        backward=False,
        ci=("gfx942",),
    ),
    Row(
        "decode: bf16, 128, pages of 16, causal, sinks",
        {**DECODE, **CACHE, "dtype": BF16, "D": 128, "E": 128, "M": 3, "page": 16, "band_upper": 590, "sinks": True},
        backward=False,
        ci=("gfx942", "gfx1201"),
    ),
    Row(
        "decode: float8, pages of 64, empty rows give the mean",
        {**DECODE, **CACHE, "dtype": BF16, "N": 640, "page": 64, "kv_dtype": FP8, "empty": ("limits",),
         "empty_rows": "mean", "limits": (True, False), "M": 6},
        backward=False,
        ci=("gfx942", "gfx950"),
    ),
)  # fmt: skip

# Every class of launch configuration: head size x type, prefill with backward and bias gradient, and decode.
CONFIGURATIONS = tuple(
    row
    for dtype, name in ((BF16, "bf16"), (FP16, "fp16"), (FP32, "fp32"))
    for d, e in ((16, 16), (64, 64), (80, 80), (96, 64), (128, 128), (192, 128), (256, 256))
    for row in (
        Row(f"configuration {name} {d} {e}", {"dtype": dtype, "D": d, "E": e, "bias": FULL, "band_upper": 9}),
        Row(f"configuration decode {name} {d} {e}", {**DECODE, "dtype": dtype, "D": d, "E": e}, backward=False),
    )
)

# Each feature alone, in half precision, over the shipped tiles.
_FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"band_upper": 0},
    "causal bottom-right": {"band_upper": 9},
    "more queries than keys": {"M": 150, "N": 81, "band_upper": 0},
    "window": {"band_lower": -40, "band_upper": 0},
    "two-sided window": {"band_lower": -30, "band_upper": 35},
    "nothing left": {"band_upper": -(2**40), "empty_rows": "zero"},
    "row limits": {"limits": (True, False)},
    "broadcast limits, causal": {"limits": (False, True), "band_upper": 9},
    "key mask": {"key_mask": True, "band_upper": 9},
    "ids": {"ids": True, "empty_rows": "zero"},
    "mask": {"mask": FULL},
    "broadcast mask": {"mask": (False, False, True, True), "band_upper": 9},
    "bias": {"bias": FULL},
    "broadcast bias": {"bias": (False, True, True, True), "band_upper": 9},
    "row bias": {"bias": (True, False, False, True)},
    "bias with holes": {"bias": FULL, "bias_kind": "holes"},
    "bias of finfo.min": {"bias": FULL, "bias_kind": "finfo_min", "dtype": FP32, "M": 45, "N": 70},
    "half-precision bias": {"bias": FULL, "bias_dtype": FP16},
    "soft cap": {"soft_cap": 2.0, "band_upper": 9},
    "soft cap and bias": {"soft_cap": 1.5, "bias": FULL},
    "alibi": {"alibi": True, "band_upper": 9},
    "alibi, both directions": {"alibi": "batch", "B": 2, "H": 4, "K": 2, "D": 128, "E": 128},
    "alibi, bias, window": {"alibi": True, "bias": FULL, "band_upper": 9, "band_lower": -40},
    "alibi, soft cap": {"alibi": True, "soft_cap": 2.0, "limits": (True, True)},
    "alibi, far keys, fp32": {"alibi": True, "key_mask": True, "band_upper": 9, "dtype": FP32, "M": 45, "N": 70},
    "sinks": {"sinks": True, "band_upper": 9},
    "sinks, empty rows": {"sinks": True, "mask": FULL, "empty": ("mask_rows",), "empty_rows": "nan"},
    "dropout": {"dropout_p": 0.3},
    "dropout, long seed": {"dropout_p": 0.6, "dropout_seed": 2**45 + 7, "bias": FULL, "band_upper": 3},
    "grouped heads": {"H": 6, "K": 2, "band_upper": 9},
    "one head of keys": {"H": 3, "K": 1},
    "packed projections": {"layout": "packed", "N": 141, "K": 2, "band_upper": 0, "out_layout": "bshd"},
    "transposed keys": {"layout": "k_transposed", "band_upper": 9},
    "expanded keys": {"layout": "expanded", "H": 4, "K": 2, "B": 2},
    "negative scale": {"scale": -0.3},
    "one query": {"M": 1},
    "one key": {"N": 1},
    "exact tiles": {"M": 128, "N": 128},
    **{
        f"empty rows, {mode}": {"mask": FULL, "empty": ("mask_rows",), "empty_rows": mode}
        for mode in ("nan", "nan_added", "zero", "mean", "mean_added")
    },
    "empty rows, mean, dropout": {"mask": FULL, "empty": ("mask_rows",), "empty_rows": "mean", "dropout_p": 0.4},
}
FEATURES = tuple(Row(f"feature {name}", fields) for name, fields in _FEATURES.items()) + tuple(
    Row(f"feature decode {name}", {**DECODE, "M": 5, **fields}, backward=False)
    for name, fields in _FEATURES.items()
    if not {"M", "N", "H", "layout", "dtype"} & set(fields)
)
RANGED = (
    Row("ranges: key mask, 128, bf16", {"dtype": BF16, "D": 128, "E": 128, "key_mask": True, "band_upper": 9},
        ci=("gfx942",), ranged=True),
    Row("ranges: ids, empty rows give a mean", {"ids": True, "empty": ("ids",), "empty_rows": "mean_added", "N": 250},
        ci=ARCHS, ranged=True),
    Row("ranges: key mask, ids, limits", {"key_mask": True, "ids": True, "limits": (True, True), "empty_rows": "zero"},
        ranged=True),
)  # fmt: skip
# The weights as a second result.
RETURNED = (
    Row("weights: 64, causal, grouped heads, padding, rows without a key give a mean",
        {"H": 4, "K": 2, "M": 77, "band_upper": 9, "key_mask": True, "empty": ("key_mask",), "empty_rows": "mean"},
        ci=ARCHS, weights=True),
    Row("weights: bf16, 128, bias of finfo.min, sinks",
        {"dtype": BF16, "D": 128, "E": 128, "M": 77, "bias": FULL, "bias_kind": "finfo_min", "sinks": True},
        ci=("gfx942", "gfx1201"), weights=True),
    *(Row(f"weights: configuration {name} {d}", {"dtype": dtype, "D": d, "E": 16, "band_lower": -40}, weights=True)
      for dtype, name in ((BF16, "bf16"), (FP16, "fp16"), (FP32, "fp32")) for d in (16, 64, 96, 128, 256)),
    *(Row(f"weights: {name}", fields, weights=True)
      for name, fields in _FEATURES.items() if not fields.get("dropout_p")),
)  # fmt: skip
# What touches the weights that forward.py cuts to bfloat16, and their sums.
CUT_WEIGHTS = tuple(
    Row(f"bf16 {name}", {**_FEATURES[name], "dtype": BF16}, backward=False, archs=("gfx90a", "gfx942", "gfx1100"))
    for name in ("bias with holes", "soft cap and bias", "alibi, bias, window", "sinks, empty rows", "dropout",
                 "negative scale", "one key", "empty rows, mean, dropout")
)  # fmt: skip

# A KV cache in pages, of each relation to the tiles, and in float8, of each head size and on each architecture.
_CACHES: dict[str, dict[str, Any]] = {
    **{
        f"pages of {page}, {d}": {"page": page, "N": 960, "D": d, "E": d}
        for page in (16, 32, 96)
        for d in (64, 128, 256)
    },
    "pages of 16, fp32": {"page": 16, "dtype": FP32, "D": 128, "E": 128},
    "pages of 16, 80 and 96": {"page": 16, "D": 80, "E": 96, "bias": FULL, "soft_cap": 2.0},
    "pages of 16, int64 table, key mask, window": {"page": 16, "table_dtype": torch.int64, "key_mask": True,
                                                   "band_lower": 100},
    "pages of 16, prefill": {"page": 16, "M": 141, "band_upper": 460, "D": 128, "E": 128, "dtype": BF16},
    "pages of 128, prefill": {"page": 128, "N": 640, "M": 141, "sinks": True},
    "pages of 16, prefill, 256": {"page": 16, "M": 141, "D": 256, "E": 256},
    "pages of 16, empty rows give NaN": {"page": 16, "M": 6, "limits": (True, False), "empty": ("limits",),
                                         "empty_rows": "nan"},
    **{f"{name}, {d}": {"kv_dtype": kind, "D": d, "E": d, "dtype": dtype}
       for kind, name in ((FP8, "float8"), (E5M2, "e5m2")) for d, dtype in ((64, FP16), (128, BF16), (256, BF16))},
    **{f"float8, prefill, {d}": {"kv_dtype": FP8, "M": 141, "D": d, "E": d, "dtype": BF16} for d in (64, 128, 256)},
    "float8, pages of 16, negative scale": {"kv_dtype": FP8, "page": 16, "scale_sign": -1.0, "dtype": BF16, "D": 128,
                                            "E": 128},
    "float8, pages of 16, 256": {"kv_dtype": FP8, "page": 16, "dtype": BF16, "D": 256, "E": 256},
}  # fmt: skip
CACHES = (
    *(Row(f"cache {name}", {**DECODE, **CACHE, **fields}, backward=False) for name, fields in _CACHES.items()),
    *(
        Row(
            f"cache e4m3fnuz, {d}",
            {**DECODE, **CACHE, "kv_dtype": FNUZ, "D": d, "E": d},
            backward=False,
            archs=("gfx942",),
        )
        for d in (64, 128, 256)
    ),
)

GRID = CUT + CONFIGURATIONS + FEATURES + RANGED + RETURNED + CUT_WEIGHTS + CACHES
