"""Named cases for the kernels of latent attention; the fields are those of mla_oracle.decode_inputs."""

from __future__ import annotations

from typing import Any

import torch

HALF = torch.bfloat16
FEATURES: dict[str, dict[str, Any]] = {
    "one token": {},
    "several tokens, causal": {"M": 4, "causal": True},
    "window": {"M": 3, "causal": True, "window": 30},
    "lengths of their own, causal": {"M": 3, "limits": "rows", "causal": True},
    "starts and ends": {"limits": "batch"},
    "key mask": {"key_mask": True, "M": 2},
    "two buffers, queries of another order": {"joint": False, "q_layout": "bshd", "out_layout": "bshd", "M": 2},
    "no rope": {"R": 0},
    "pages": {"page": 16, "limits": "batch", "M": 2},
    "pages, causal": {"page": 32, "causal": True, "M": 3},
    "pages of one tile": {"page": 64, "key_mask": True},
    "pages of two tiles": {"page": 128, "joint": False},
    "negative scale": {"scale": -0.1},
    "scale zero": {"scale": 0.0},
    "few keys": {"N": 7},
    "one key": {"N": 1},
    **{
        f"empty rows, {mode}": {"M": 4, "empty": True, "empty_rows": mode}
        for mode in ("zero", "nan", "nan_added", "mean", "mean_added")
    },
    "empty rows in pages": {"M": 4, "page": 16, "empty": True, "empty_rows": "nan"},
}

QUICK = (
    "several tokens, causal", "pages, causal", "empty rows, mean", "two buffers, queries of another order",
    "3 splits, starts and ends", "3 splits, columns in two programs", "causal", "too wide for pieces",
)  # fmt: skip
"""What the interpreter runs by default; the simulated grid and the tests on a GPU run the rest too."""


def case(name: str, **fields: Any) -> dict[str, Any]:
    """A case; `causal` becomes a band that lets the last query see all keys, `window` its lower edge."""
    fields = {"B": 2, "H": 3, "M": 1, "N": 70, "C": 32, "R": 16, **fields}
    if fields.pop("causal", False):
        fields["band_upper"] = fields["N"] - fields["M"]
    if window := fields.pop("window", None):
        fields["band_lower"] = fields["N"] - fields["M"] - window
    return {"name": name, **fields}


def interpreter_cases() -> list[dict[str, Any]]:
    """Small sizes that cross the interpreter's 16 x 16 tiles; float32, and bfloat16 once."""
    cases = [case(name, **fields) for name, fields in FEATURES.items()]
    cases += [case(f"3 splits, {name}", **fields, splits=3) for name, fields in list(FEATURES.items())[:9]]
    cases.append(case("3 splits, columns in two programs", B=1, H=1, C=250, splits=3))
    return [*cases, case("widths of no power of two", C=20, R=8, dtype=HALF), case("many rows", H=7, M=9, causal=True)]


def device_cases() -> list[dict[str, Any]]:
    """Sizes that use the shipped tiles on a GPU, in three types."""
    cases = []
    for index, (name, fields) in enumerate(FEATURES.items()):
        sizes = {"B": 3, "H": 16, "N": 1100, "C": 512, "R": 64}
        cases.append(case(name, **{**sizes, "dtype": HALF, **fields}))
        cases.append(case(f"128 heads, {name}", **{**sizes, "H": 128, "dtype": torch.float16, **fields}))
        small = ((384, 32), (128, 64), (256, 0), (96, 24))[index % 4]
        other = {"H": 5, "C": small[0], "R": small[1], "N": 600, "dtype": (HALF, torch.float32)[index % 2]}
        cases.append(case(f"{small}, {name}", **{**sizes, **other, **fields}))
    for heads, tokens in ((1, 1), (1, 16), (16, 16), (20, 3), (128, 2), (64, 33), (100, 1)):
        for page in (0, 48, 64, 128):
            cases.append(
                case(f"{heads} heads, {tokens} tokens, page {page}", B=2, H=heads, M=tokens, N=3000, C=512, R=64,
                     page=page, dtype=HALF, causal=True)
            )  # fmt: skip
    return cases


PREFILL: dict[str, dict[str, Any]] = {
    "causal": {"band_upper": 16},
    "plain": {},
    "window": {"band_upper": 16, "band_lower": -4},
    "row limits": {"limits": (True, True)},
    "key mask": {"key_mask": True, "band_upper": 16},
    "values as wide as both": {"E": 48},
    "widths of no power of two": {"P": 20, "R": 6, "E": 17, "band_upper": 16},
    "too wide for pieces": {"P": 130, "R": 40, "E": 16, "M": 5, "N": 20},
    "one query": {"M": 1, "N": 90},
    **{
        f"empty rows, {mode}": {"limits": (True, False), "empty": ("limits",), "empty_rows": mode}
        for mode in ("zero", "nan", "nan_added", "mean", "mean_added")
    },
}


def prefill_case(name: str, **fields: Any) -> dict[str, Any]:
    """A case of mla_oracle.prefill_inputs with odd sizes that cross the interpreter's tiles."""
    return {"name": name, "B": 2, "H": 3, "M": 21, "N": 37, "P": 32, "R": 16, "E": 24, **fields}


def prefill_device_cases() -> list[dict[str, Any]]:
    """Ragged sizes that use the shipped tiles on a GPU, short and long, in three types."""
    cases = []
    for index, (name, fields) in enumerate(PREFILL.items()):
        fields = {key: value for key, value in fields.items() if key not in "PREMN" or name == "too wide for pieces"}
        if "band_upper" in fields:
            fields["band_upper"] = 184
        base = {"B": 2, "H": 4, "M": 333, "N": 517, "P": 128, "R": 64, "E": 128}
        cases.append(prefill_case(name, **{**base, "dtype": HALF, **fields}))
        long = {"B": 1, "H": 8, "dtype": torch.float16, "M": 601, "N": 785}
        cases.append(prefill_case(f"long, {name}", **{**base, **long, **fields}))
        sizes = ((64, 32, 64), (96, 32, 96), (128, 64, 192), (40, 24, 56))[index % 4]
        other = {"P": sizes[0], "R": sizes[1], "E": sizes[2], "dtype": (torch.float32, HALF)[index % 2]}
        cases.append(prefill_case(f"{sizes}, {name}", **{**base, **other, **fields}))
    return cases
