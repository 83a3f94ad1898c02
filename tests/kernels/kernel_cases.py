"""Named cases for the kernel tests: every feature alone, the awkward combinations, and seeded random mixtures."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch

FULL = (True, True, True, True)
WIDE_TILE = (16, 64, 1, 1)  # of configs.KernelConfig: several pages in a tile
ONE_LOOP = (16, 16, 1, 1, 0, 0, True)  # the same: Hopper's decode

# What the default run leaves out: variations whose code paths another case already takes.
SLOW = (
    [
        f"bias-{x}"
        for x in ("bhm1", "bh1n", "bh11", "b1mn", "b1m1", "b111", "1hm1", "1h1n", "11mn", "11m1", "11m", "1111")
    ]
    + ["head-8-8", "head-80-80", "head-96-64", "head-192-128", "fp16", "exact-tiles", "one-key", "window-left-only"]
    + [f"empty-{kind}-{mode}" for kind in ("band", "limits") for mode in ("nan", "nan_added", "zero", "mean_added")]
    + [f"empty-key-mask-{mode}" for mode in ("nan_added", "zero", "mean_added")]
    + [f"random-{index}" for index in range(6, 100)]
    + ["empty-mask-zero", "causal-bottom-right-more-queries", "bias-float64", "soft-cap-bias", "sinks-bias"]
)


def is_slow(case: dict[str, Any]) -> bool:
    """Whether the interpreter tests leave the case to `pytest -m slow`."""
    return case["name"] in SLOW or case["name"].endswith(("pack1-split3", "pack4-split7", "tma-split1"))


def case(name: str, **fields: Any) -> dict[str, Any]:
    """A small case with odd sizes that cross the interpreter's 16 x 16 tiles; `fields` override."""
    return {"name": name, "B": 2, "H": 1, "K": 1, "M": 21, "N": 37, "D": 16, "E": 16, **fields}


def feature_cases() -> list[dict[str, Any]]:
    """Every feature alone or with what it interacts with."""
    cases = [
        case("plain", H=4, K=2),
        case("one-query", M=1),
        case("one-key", N=1),
        case("single", M=1, N=1, B=1),
        case("exact-tiles", M=32, N=48),
        case("causal-top-left", M=37, band_upper=0),
        case("causal-bottom-right", M=21, N=37, band_upper=16),
        case("causal-more-queries", M=50, N=20, band_upper=0),
        case("causal-bottom-right-more-queries", M=40, N=20, band_upper=-20),
        case("window", M=60, N=60, band_lower=-6, band_upper=0),
        case("window-two-sided", M=50, N=70, band_lower=-20, band_upper=25),
        case("window-left-only", M=40, N=55, band_lower=3),
        case("band-beyond-int32", band_lower=-(2**40), band_upper=2**40),
        case("band-drops-all", band_upper=-(2**40)),
        case("negative-scale", scale=-0.3),
        case("zero-scale", scale=0.0, band_upper=4),
        case("gqa", H=6, K=2, B=1, band_upper=10),
        case("mqa", H=3, K=1),
        *(
            case(f"head-{d}-{e}", D=d, E=e, B=1)
            for d, e in ((8, 8), (24, 40), (80, 80), (96, 64), (192, 128), (20, 256))
        ),
        case("bf16", dtype=torch.bfloat16, band_upper=12),
        case("fp16", dtype=torch.float16, band_upper=12),
        case("fp16-bias", dtype=torch.float16, bias=FULL, bias_dtype=torch.float16),
        *(
            case("bias-" + "".join("bhmn"[i] if f else "1" for i, f in enumerate(full)), bias=full, H=2)
            for full in itertools.product((True, False), repeat=4)
        ),
        case("bias-causal", bias=(False, True, True, True), band_upper=16),
        case("bias-holes", bias=FULL, bias_kind="holes"),
        case("bias-finfo-min", bias=FULL, bias_kind="finfo_min"),
        case("bias-finfo-min-sinks", bias=FULL, bias_kind="finfo_min", sinks=True),
        case("bias-minus-1e9", bias=(True, False, True, True), bias_kind="minus_1e9", oracle_dtype=torch.float32),
        case("bias-float64", bias=(True, False, True, True), bias_dtype=torch.float64),
        case("mask-full", mask=FULL, H=2),
        case("mask-mn", mask=(False, False, True, True), band_upper=16),
        case("mask-bn", mask=(True, False, False, True)),
        case("key-mask", key_mask=True, band_upper=16),
        case("limits-rows", limits=(True, False)),
        case("limits-broadcast", limits=(False, True), H=2),
        case("limits-wide-causal", limits=(True, True), band_upper=16),
        case("ids", ids=True, empty_rows="zero"),
        case("soft-cap", soft_cap=2.0, band_upper=16),
        case("soft-cap-bias", soft_cap=1.5, bias=FULL),
        case("sinks", sinks=True, H=3, band_upper=4),
        case("sinks-empty", sinks=True, mask=FULL, empty=("mask_rows",), empty_rows="nan"),
        case("sinks-bias", sinks=True, bias=FULL, soft_cap=3.0),
        case("alibi", H=3, alibi=True),
        case("alibi-causal-gqa", H=6, K=2, band_upper=16, alibi="batch"),
        case("alibi-more-queries", M=40, N=20, H=2, alibi=True, band_upper=0),
        case("alibi-bias-sinks-soft-cap", H=2, alibi="batch", bias=FULL, sinks=True, soft_cap=2.0),
        case("alibi-bias-finfo-min", H=2, alibi=True, bias=FULL, bias_kind="finfo_min"),
        case("alibi-far-keys", M=40, N=200, band_upper=10, alibi=True, scale=-0.4, dtype=torch.float16),
        case("alibi-empty-mean-added", H=2, alibi=True, mask=FULL, empty=("mask_rows",), empty_rows="mean_added"),
        case("dropout", dropout_p=0.3, H=2),
        case("dropout-long-seed", dropout_p=0.6, dropout_seed=2**45 + 7, bias=FULL, band_upper=3),
        case("packed-qkv", layout="packed", M=37, H=2, band_upper=0, out_layout="bshd"),
        case("k-transposed", layout="k_transposed", band_upper=16),
        case("expanded-kv", layout="expanded", H=4, K=2, B=1),
        case("no-keys", N=0),
        case("no-batch", B=0),
    ]
    for mode in ("nan", "nan_added", "zero", "mean", "mean_added"):
        cases += [
            case(f"empty-mask-{mode}", mask=FULL, empty=("mask_rows",), empty_rows=mode, H=2),
            case(f"empty-band-{mode}", M=40, N=20, band_upper=-20, empty_rows=mode),
            case(f"empty-limits-{mode}", limits=(True, False), empty=("limits",), empty_rows=mode),
            case(f"empty-key-mask-{mode}", key_mask=True, empty=("key_mask",), empty_rows=mode, band_upper=16),
        ]
    cases += [
        case("empty-mean-dropout", mask=FULL, empty=("mask_rows",), empty_rows="mean", dropout_p=0.4),
        case("empty-mean-added-bias-dropout", mask=FULL, empty=("mask_rows",), empty_rows="mean_added", dropout_p=0.4,
             bias=(True, False, True, True), soft_cap=2.0),
        case("empty-ids-mean-added", ids=True, empty=("ids",), empty_rows="mean_added",
             bias=(False, True, True, False)),
        case("empty-ids-nan-bias", ids=True, empty=("ids",), empty_rows="nan", bias=(False, True, True, False)),
        case("empty-mask-nan-added-bias", mask=FULL, empty=("mask_rows",), empty_rows="nan_added",
             bias=(True, False, True, True), soft_cap=2.0),
    ]  # fmt: skip
    return cases


def ranged_cases() -> list[dict[str, Any]]:
    """Padding and ids of which a table of ranges is made first: with whole blocks, cut blocks and blocks of nothing."""
    base = {"M": 90, "N": 75, "tuning": {"ranged": True}}
    return [
        case("ranged-key-mask", **base, key_mask=True, band_upper=-8),
        case("ranged-padding", **base, key_mask="padding", band_upper=-8, empty_rows="mean"),
        case("ranged-ids", **base, ids=True, H=2, empty_rows="zero"),
        case("ranged-everything", **base, key_mask=True, ids=True, limits=(True, True), bias=FULL, mask=FULL,
             band_lower=-60, dropout_p=0.2, empty_rows="zero"),
        case("ranged-first-max", **{**base, "tuning": {"ranged": True, "shift": 1}}, key_mask=True, scale=3.0),
        *(
            case(f"ranged-empty-{mode}", **base, key_mask=True, empty=("key_mask",), empty_rows=mode, band_upper=9)
            for mode in ("nan", "nan_added", "zero", "mean", "mean_added")
        ),
        case("ranged-limits-mean", **base, limits=(True, True), empty=("limits",), empty_rows="mean_added", H=4),
        case("ranged-ids-mean", **base, ids=True, empty=("ids",), empty_rows="mean", out_layout="bshd", E=20),
    ]  # fmt: skip


def hopper_backward_cases() -> list[dict[str, Any]]:
    """What backward_hopper.py's kernel takes, on a GPU: sizes that cut its blocks in every way."""
    base = {"B": 2, "H": 4, "K": 2, "D": 128, "E": 128, "dtype": torch.bfloat16, "empty_rows": "zero"}
    features: list[dict[str, Any]] = [
        {"M": 512, "N": 512, "band_upper": 0},
        {"M": 332, "N": 517, "band_upper": 185},
        {"M": 300, "N": 301},
        {"M": 300, "N": 1},
        {"M": 4, "N": 300},
        {"M": 700, "N": 700, "band_lower": -200, "band_upper": 0},
        {"M": 700, "N": 700, "band_lower": -3, "band_upper": 3},
        {"M": 700, "N": 300, "band_upper": -400},
        {"M": 700, "N": 300, "band_lower": -100},
        {"M": 300, "N": 700, "band_upper": 0},
        {"M": 300, "N": 300, "band_lower": 200, "band_upper": 0},
        {"M": 512, "N": 640, "K": 4},
        {"M": 200, "N": 400, "H": 8, "K": 1, "band_upper": 200},
        {"M": 332, "N": 517, "D": 104, "E": 112, "dtype": torch.float16, "band_upper": 185},
        {"M": 332, "N": 332, "sinks": True, "band_upper": 0},
        {"M": 332, "N": 332, "layout": "packed", "out_layout": "bshd", "band_upper": 0},
        {"B": 1, "H": 2, "K": 1, "M": 4100, "N": 4100, "band_upper": 0},
        {"M": 332, "N": 517, "soft_cap": 3.0, "band_upper": 185},
        {"M": 700, "N": 500, "soft_cap": 50.0, "scale": 5.0, "band_lower": -200, "band_upper": 0, "sinks": True},
        {"B": 1, "H": 8, "K": 1, "M": 2100, "N": 2100, "band_lower": -300, "band_upper": 0},
        {"B": 1, "H": 6, "K": 2, "M": 1500, "N": 1200, "band_lower": -250, "band_upper": 130},
    ]
    features += tables_of_ranges_cases()
    narrow: list[dict[str, Any]] = [
        {"M": 512, "N": 512, "band_upper": 0},
        {"M": 332, "N": 517, "band_upper": 185},
        {"M": 300, "N": 1},
        {"M": 4, "N": 300},
        {"M": 700, "N": 300, "band_upper": -400},
        {"B": 1, "H": 8, "K": 1, "M": 2100, "N": 2100, "band_lower": -300, "band_upper": 0},
        {"M": 332, "N": 517, "D": 40, "E": 56, "dtype": torch.float16, "band_upper": 185},
        {"M": 332, "N": 332, "layout": "packed", "out_layout": "bshd", "band_upper": 0, "sinks": True},
        {"B": 1, "H": 2, "K": 1, "M": 4100, "N": 4100, "band_upper": 0},
        {"M": 700, "N": 500, "soft_cap": 50.0, "scale": 5.0, "band_lower": -200, "band_upper": 0},
        {"M": 1000, "N": 1100, "key_mask": "padding"},
        {"M": 332, "N": 517, "limits": (True, True), "band_upper": 185},
        {"M": 1000, "N": 1000, "documents": 150, "band_upper": 0},
        {"M": 700, "N": 900, "ids": "in turn", "key_mask": "padding", "documents": 500, "soft_cap": 3.0, "sinks": True},
        {"M": 700, "N": 700, "key_mask": "left", "band_upper": 0, "empty_rows": "mean"},
    ]
    features += [{"D": 64, "E": 64, **feature} for feature in narrow]
    return [{**base, **feature, "one_backward": True} for feature in features]


def mask_name(case: dict[str, Any]) -> str:
    """A test's id: the sizes, and which masks stand in tensors."""
    names = ("key_mask", "limits", "documents", "ids", "empty_rows")
    masks = [f"{name} {case[name]}" for name in names if case.get(name) and case[name] != "zero"]
    sizes = f"{case['M']}-{case['N']}" + f", {case['D']}" * (case.get("D", 128) <= 64)
    return ", ".join([sizes, *masks])


def tables_of_ranges_cases() -> list[dict[str, Any]]:
    """Masks that stand in tensors: padding, limits of rows and ids, with holes, and with rows that keep nothing."""
    return [
        {"M": 700, "N": 700, "key_mask": "left", "band_upper": 0},
        {"M": 1000, "N": 1100, "key_mask": "padding"},
        {"M": 332, "N": 517, "key_mask": "padding", "band_upper": 185, "D": 104, "E": 112, "dtype": torch.float16},
        {"M": 700, "N": 900, "key_mask": "hole", "band_upper": 200, "sinks": True},
        {"M": 700, "N": 900, "key_mask": True, "soft_cap": 3.0},
        {"M": 700, "N": 700, "key_mask": True, "empty": ("key_mask",), "band_lower": -200, "band_upper": 0},
        {"B": 1, "M": 4100, "N": 4100, "key_mask": "left", "band_upper": 0},
        {"M": 700, "N": 900, "limits": (True, False)},
        {"M": 332, "N": 517, "limits": (True, True), "band_upper": 185},
        {"M": 700, "N": 700, "limits": (False, True), "band_lower": -200, "band_upper": 0, "soft_cap": 3.0},
        {"M": 500, "N": 700, "limits": (True, False), "empty": ("limits",), "dtype": torch.float16},
        {"M": 1000, "N": 1000, "documents": 150, "band_upper": 0},
        {"M": 1000, "N": 1100, "documents": 300, "H": 8, "K": 2},
        {"M": 700, "N": 900, "ids": True},
        {"M": 1000, "N": 1000, "ids": True, "empty": ("ids",), "band_upper": 0},
        {"M": 1000, "N": 900, "ids": "in turn", "band_upper": 0},
        {"M": 700, "N": 900, "ids": "in turn", "key_mask": "padding", "documents": 500, "soft_cap": 3.0, "sinks": True},
        {"B": 1, "M": 4100, "N": 4100, "ids": True, "key_mask": "hole", "band_upper": 0},
        {"M": 700, "N": 700, "key_mask": "left", "band_upper": 0, "empty_rows": "mean"},
        {"M": 700, "N": 500, "key_mask": "padding", "band_upper": 0, "empty_rows": "mean_added", "soft_cap": 3.0},
        {"M": 332, "N": 332, "key_mask": "left", "band_upper": 0, "empty_rows": "nan"},
        {"M": 700, "N": 300, "band_upper": -400, "empty_rows": "nan_added", "H": 8, "dtype": torch.float16},
        {"M": 700, "N": 700, "empty_rows": "mean_added", "band_upper": 0},
    ]


def large_backward_cases() -> list[dict[str, Any]]:
    """The same for backward_large.py's, of 192 or 256 numbers a head; rope: the last 64 in tensors of their own."""
    base = {"B": 2, "H": 4, "K": 2, "D": 256, "E": 256, "dtype": torch.bfloat16, "empty_rows": "zero"}
    latent = {"D": 192, "E": 128, "K": 4}
    features: list[dict[str, Any]] = [
        {"M": 512, "N": 512, "band_upper": 0},
        {"M": 332, "N": 517, "band_upper": 185},
        {"M": 300, "N": 301},
        {"M": 300, "N": 1},
        {"M": 4, "N": 300},
        {"M": 700, "N": 700, "band_lower": -200, "band_upper": 0},
        {"M": 700, "N": 700, "band_lower": -3, "band_upper": 3},
        {"M": 700, "N": 300, "band_upper": -400},
        {"M": 700, "N": 300, "band_lower": -100},
        {"M": 300, "N": 700, "band_upper": 0},
        {"M": 300, "N": 300, "band_lower": 200, "band_upper": 0},
        {"M": 200, "N": 400, "H": 8, "K": 1, "band_upper": 200},
        {"M": 332, "N": 517, "D": 232, "E": 240, "dtype": torch.float16, "band_upper": 185},
        {"M": 332, "N": 332, "sinks": True, "band_upper": 0},
        {"M": 332, "N": 332, "layout": "packed", "out_layout": "bshd", "band_upper": 0},
        {"B": 1, "H": 2, "K": 1, "M": 4100, "N": 4100, "band_upper": 0},
        {"M": 332, "N": 517, "soft_cap": 3.0, "band_upper": 185},
        {"M": 700, "N": 500, "soft_cap": 50.0, "scale": 5.0, "band_lower": -200, "band_upper": 0, "sinks": True},
        {"M": 512, "N": 512, "band_upper": 0, "D": 192, "E": 128},
        {"M": 332, "N": 517, "D": 176, "E": 112, "dtype": torch.float16, "band_lower": -150, "band_upper": 185},
        {**latent, "M": 512, "N": 512, "band_upper": 0, "rope": True},
        {**latent, "M": 332, "N": 517, "band_upper": 185, "dtype": torch.float16, "rope": True},
        {**latent, "M": 700, "N": 700, "band_lower": -200, "band_upper": 0, "rope": True},
        {**latent, "M": 2052, "N": 1300, "rope": True},
        {"M": 700, "N": 300, "band_upper": -400, "empty_rows": "mean"},
        {**latent, "M": 700, "N": 300, "band_upper": -400, "empty_rows": "mean_added"},
        {**latent, "M": 700, "N": 300, "band_upper": -400, "empty_rows": "mean_added", "rope": True},
    ]
    features += [
        feature if index % 3 == 0 or "H" in feature else {**feature, **latent}
        for index, feature in enumerate(tables_of_ranges_cases())
        if "D" not in feature
    ]
    return [{**base, **feature} for feature in features]


def random_cases(count: int) -> list[dict[str, Any]]:
    """Seeded mixtures of everything."""
    rng = random.Random(2024)

    def maybe(value: Any, probability: float = 0.35) -> Any:
        return value if rng.random() < probability else None

    cases = []
    for index in range(count):
        K = rng.choice((1, 2))
        mode = rng.choice(("zero", "mean", "mean_added"))
        mask = maybe(tuple(rng.random() < 0.6 for _ in range(3)) + (True,))
        limits = maybe((rng.random() < 0.7, rng.random() < 0.5))
        M, N = rng.randint(1, 50), rng.randint(1, 60)
        cases.append(
            case(
                f"random-{index}",
                seed=index,
                B=rng.choice((1, 2)),
                K=K,
                H=K * rng.choice((1, 2, 3)),
                M=M,
                N=N,
                D=rng.choice((8, 16, 24, 40)),
                E=rng.choice((8, 16, 24, 40)),
                dtype=rng.choice((torch.float32, torch.float16)),
                layout=rng.choice(("bhsd", "k_transposed", "expanded")),
                bias=maybe(tuple(rng.random() < 0.6 for _ in range(4))),
                mask=mask,
                limits=limits,
                empty=tuple(
                    kind for kind, there in (("mask_rows", mask and mask[2]), ("limits", limits and limits[0])) if there
                ),
                key_mask=maybe(True),
                ids=maybe(True, 0.2),
                band_lower=maybe(rng.randint(-N, M // 2)),
                band_upper=maybe(rng.randint(-M // 2, N)),
                soft_cap=maybe(2.5),
                sinks=maybe(True, 0.2),
                dropout_p=maybe(0.25, 0.2) or 0.0,
                alibi=maybe("batch", 0.3),
                empty_rows=mode,
                out_layout=rng.choice(("bhsd", "bshd")),
            )
        )
    return cases


def shift_cases() -> list[dict[str, Any]]:
    """Forward only: a maximum of the first keys that holds, one that does not (a large scale), and none at all."""
    first, none = {"shift": 1}, {"shift": 2}
    series = {"dtype": torch.bfloat16, "tuning": {"shift": 3}}
    return [
        case("first-max", H=4, K=2, tuning=first),
        case("first-max-causal", M=50, N=50, band_upper=0, tuning=first),
        case("first-max-window", M=60, N=60, band_lower=-6, band_upper=0, tuning=first),
        case("first-max-masks", mask=FULL, key_mask=True, limits=(True, False), ids=True, sinks=True, tuning=first),
        case("first-max-loud", scale=40.0, N=90, tuning=first),
        case("first-max-loud-causal", scale=40.0, M=70, N=70, band_upper=0, dropout_p=0.3, tuning=first),
        case("first-max-split", scale=40.0, N=90, H=2, sinks=True, tuning={"pack": 1, "num_splits": 3, **first}),
        case("first-max-bf16", dtype=torch.bfloat16, band_upper=12),
        case("first-max-alibi", M=50, N=90, H=4, K=2, alibi=True, band_upper=40, sinks=True, tuning=first),
        # Rows whose nearest keys are masked: the first maximum does not hold.
        case("first-max-alibi-far", M=90, N=90, H=2, alibi=True, limits=(False, False), scale=5.0, tuning=first),
        *(
            case(f"first-max-empty-{mode}", mask=FULL, empty=("mask_rows",), empty_rows=mode, tuning=first)
            for mode in ("nan", "mean")
        ),
        case("no-max", soft_cap=2.0, band_upper=16, tuning=none),
        case("no-max-loud", soft_cap=50.0, scale=40.0, N=90, limits=(True, True), sinks=True, tuning=none),
        case("no-max-empty", soft_cap=30.0, mask=FULL, empty=("mask_rows",), empty_rows="mean_added", tuning=none),
        case("no-max-bf16", soft_cap=30.0, dtype=torch.bfloat16, scale=20.0, band_upper=16),
        case("cap-series", soft_cap=30.0, band_upper=16, limits=(True, True), sinks=True, **series),
        case("cap-series-pieces", soft_cap=30.0, D=48, E=48, band_upper=16, **series),
        case("cap-series-loud", soft_cap=50.0, scale=20.0, N=90, limits=(True, True), **series),
        case("cap-series-split", soft_cap=30.0, N=90, H=2, dtype=torch.bfloat16,
             tuning={"pack": 1, "num_splits": 3, "shift": 3}),
        case("cap-series-empty", soft_cap=30.0, mask=FULL, empty=("mask_rows",), empty_rows="nan", **series),
    ]  # fmt: skip


def cache_cases() -> list[dict[str, Any]]:
    """Forward only: keys in pages, smaller and larger than the interpreter's tile of 16 keys, and in float8."""
    shared = {"B": 2, "H": 8, "K": 2, "M": 1, "N": 96, "limits": (False, False), "D": 24, "E": 16}
    fp8 = {"kv_dtype": torch.float8_e4m3fn, "dtype": torch.float16}
    split, whole = {"num_splits": 3}, {"num_splits": 1}
    return [
        case("pages-16", **shared, page=16, tuning=split),
        case("pages-48-causal", **{**shared, "M": 5}, page=48, tuning=split, band_upper=90, sinks=True),
        case("pages-32-int64", **{**shared, "M": 3}, page=32, table_dtype=torch.int64, tuning=whole, soft_cap=3.0),
        case("pages-16-prefill", **{**shared, "M": 45}, page=16, key_mask=True, bias=FULL),
        case("pages-16-wide-tile", **shared, page=16, tuning={"config": WIDE_TILE, "num_splits": 2}),
        case("pages-16-wide-tile-rows", **{**shared, "limits": (True, True), "M": 6}, page=16, empty=("limits",),
             tuning={"config": WIDE_TILE, "num_splits": 1}, empty_rows="mean"),
        case("pages-32-odd-tile", **{**shared, "N": 192}, page=96, tuning={"config": WIDE_TILE, "num_splits": 2}),
        *(
            case(f"pages-empty-{mode}-{splits}", **{**shared, "M": 6, "limits": (True, False)}, page=16,
                 empty=("limits",), empty_rows=mode, tuning={"num_splits": splits}, **fields)
            for mode, splits, fields in (("nan", 3, {}), ("mean", 1, fp8), ("mean_added", 3, fp8))
        ),
        case("float8", **shared, **fp8, tuning=split),
        case("float8-negative-scale", **{**shared, "M": 4}, **fp8, scale_sign=-1.0, tuning=whole, soft_cap=2.0),
        case("float8-e5m2-pages", **shared, page=16, kv_dtype=torch.float8_e5m2, dtype=torch.bfloat16, sinks=True,
             tuning=split),
        case("float8-prefill", **{**shared, "M": 45}, **fp8, mask=FULL, empty=("mask_rows",), empty_rows="mean"),
    ]  # fmt: skip


HOPPER = {"config": (128, 128, 4, 2), "tma": True, "in_flight": True, "num_splits": 1}
"""Of launch.Tuning: Hopper's own forward kernel, also where it would not be chosen."""


def hopper_forward_cases() -> list[dict[str, Any]]:
    """What forward_hopper.py's kernel takes, on a GPU: more tiles than multiprocessors, and ragged ends."""
    base = {"B": 2, "H": 40, "K": 8, "M": 517, "N": 700, "D": 128, "E": 128, "tuning": HOPPER}
    sizes = ((64, 64), (128, 128), (192, 128), (256, 256))
    features: list[dict[str, Any]] = [
        {"band_upper": 183},
        {},
        {"M": 700, "band_lower": -100, "band_upper": 0},
        {"band_lower": -60, "band_upper": 60, "sinks": True},
        {"limits": (False, False), "band_upper": 183},
        {"limits": (True, True), "sinks": True},
        {"limits": (True, False), "empty": ("limits",), "empty_rows": "nan"},
        {"limits": (False, True), "empty": ("limits",), "empty_rows": "zero"},
        {"limits": (True, True), "empty": ("limits",), "sinks": True, "scale": 1.0},
        {"M": 700, "N": 400, "band_upper": -300, "empty_rows": "zero"},
        {"M": 700, "N": 400, "band_upper": -300, "empty_rows": "nan_added", "H": 8},
        {"band_upper": 183, "scale": 8.0},
        {"scale": 8.0, "sinks": True},
        {"M": 1200, "N": 1, "H": 8},
        {"M": 130, "N": 129, "band_upper": 0, "H": 8},
        {"layout": "packed", "M": 700, "band_upper": 0, "out_layout": "bshd"},
    ]
    ranged = {**HOPPER, "ranged": True}
    features += [
        {"tuning": ranged, **fields}
        for fields in (
            {"key_mask": True, "band_upper": 183},
            {"key_mask": "padding", "band_upper": 183, "empty_rows": "mean_added"},
            {"key_mask": "padding", "sinks": True, "scale": 8.0},
            {"ids": True, "empty_rows": "zero"},
            {"ids": True, "empty": ("ids",), "empty_rows": "mean", "band_upper": 183, "out_layout": "bshd"},
            {"key_mask": "padding", "ids": True, "limits": (True, True), "empty_rows": "nan", "soft_cap": 30.0},
        )
    ]
    caps: list[dict[str, Any]] = [
        {"soft_cap": 3.0, "band_upper": 183, "limits": (False, True), "empty": ("limits",), "empty_rows": "nan"},
        {"soft_cap": 50.0, "scale": 5.0, "band_upper": 183, "sinks": True},
        {"soft_cap": 80.0, "scale": 1.0, "limits": (True, True)},
    ]
    cases = []
    for index, (feature, (D, E)) in enumerate(itertools.product(features, sizes)):
        dtype = torch.float16 if index % 3 == 2 else torch.bfloat16
        if D == E or feature.get("layout") != "packed":
            cases.append({**base, "dtype": dtype, **feature, "D": D, "E": E})
            if dtype == torch.bfloat16:
                cases.append({**cases[-1], "tuning": {**cases[-1]["tuning"], "shift": 1}})
    for shift in (0, 1):
        cases.append({**base, "dtype": torch.bfloat16, "D": 120, "E": 104, "tuning": {**HOPPER, "shift": shift}})
    series: list[dict[str, Any]] = [
        {"soft_cap": 50.0, "band_upper": 183, "tuning": {**HOPPER, "shift": 3}},
        {"soft_cap": 30.0, "limits": (True, True), "empty": ("limits",), "empty_rows": "nan",
         "tuning": {**HOPPER, "shift": 3}},
        {"soft_cap": 50.0, "scale": 5.0, "sinks": True, "tuning": {**HOPPER, "shift": 3}},
    ]  # fmt: skip
    for cap, (D, E) in itertools.product(caps + series, sizes):
        cases.append({**base, "dtype": torch.bfloat16, **cap, "D": D, "E": E})
    return cases


def decode_cases() -> list[dict[str, Any]]:
    """Forward only: query heads packed into one tile and the keys split between programs."""
    cases = []
    ways = [(f"pack{pack}-split{splits}", {"pack": pack, "num_splits": splits})
            for pack, splits in ((1, 3), (2, 1), (4, 3), (4, 7))]  # fmt: skip
    ways.append(("one-loop-split3", {"num_splits": 3, "config": ONE_LOOP}))
    ways += [(f"tma-split{splits}", {"num_splits": splits, "config": ONE_LOOP, "tma": True}) for splits in (1, 3)]
    for tag, tuning in ways:
        shared = {"B": 1, "H": 8, "K": 2, "N": 90, "tuning": tuning}
        cases += [
            case(f"decode-{tag}", M=1, **shared),
            case(f"decode-causal-{tag}", M=5, band_upper=85, **shared),
            case(f"decode-window-{tag}", M=3, band_upper=87, band_lower=60, **shared),
            case(f"decode-static-cache-{tag}", M=2, limits=(True, True), **shared),
            case(f"decode-bias-sinks-{tag}", M=4, bias=FULL, sinks=True, soft_cap=3.0, **shared),
            case(f"decode-finfo-min-{tag}", M=4, bias=FULL, bias_kind="finfo_min", **shared),
            case(f"decode-alibi-{tag}", M=3, alibi="batch", sinks=True, band_upper=85, **shared),
            case(f"decode-mask-ids-{tag}", M=4, mask=FULL, ids=True, key_mask=True, empty_rows="zero", **shared),
        ]
        for mode in ("nan", "nan_added", "zero", "mean", "mean_added"):
            cases.append(
                case(f"decode-empty-{mode}-{tag}", M=6, mask=FULL, empty=("mask_rows",), empty_rows=mode, **shared)
            )
    cases += cache_cases()
    many = {"B": 2, "H": 71, "K": 1, "M": 1, "N": 90}
    cases.append(case("decode-many-heads", **many, limits=(True, False), sinks=True))
    cases.append(case("decode-many-heads-split", **many, dtype=torch.bfloat16, tuning={"num_splits": 3}))
    cases.append(case("decode-pack-dropout", H=8, K=2, M=3, dropout_p=0.4, tuning={"pack": 4}))
    return cases
