"""The soft cap by a polynomial (cap_series.py): its constants, which calls begin with it, and tiles computed again."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from fit_soft_cap import fit
from gcnsim.triton_launch import simulated_device

from rocm_attn_compile.kernels.triton import cap_series
from rocm_attn_compile.kernels.triton.aot_launches import launches
from rocm_attn_compile.kernels.triton.attention import attention_forward
from rocm_attn_compile.kernels.triton.common import CAP_SERIES, NO_MAX, RUNNING_MAX

COEFFICIENTS = [value.value for value in (cap_series.FIRST, cap_series.THIRD, cap_series.FIFTH)]
CAP = 50.0


def series(y: Any) -> Any:
    """The polynomial, of an array or tensor."""
    first, third, fifth = COEFFICIENTS
    return y * (first + y**2 * (third + y**2 * fifth))


def test_constants_are_those_of_the_fit() -> None:
    coefficients, error = fit()
    assert np.allclose(coefficients, COEFFICIENTS, atol=1e-9, rtol=0)
    assert error < 2.0**-11, "as NVIDIA's tanh.approx.f32"


def test_sums_tell_what_the_polynomial_cannot_do() -> None:
    """From END on it is above TOP, up to where float32 overflows; up to END it is the tanh."""
    beyond = np.concatenate([np.linspace(cap_series.END.value, 10, 100_001), np.geomspace(10, 1e7, 1001)])
    assert series(beyond).min() > cap_series.TOP.value
    within = np.linspace(1e-6, cap_series.END.value, 100_001)
    assert np.abs(series(within) / np.tanh(within) - 1).max() < 2.0**-11


def factored(softmax_scale: float, cap: float, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, ...]:
    """cap_series.factored_series in float64."""
    names = SimpleNamespace(exp2=torch.exp2, log2=torch.log2, bfloat16=torch.bfloat16, float32=torch.float64)
    monkeypatch.setattr(cap_series, "tl", names)
    for name in ("FIRST", "THIRD", "FIFTH", "END"):
        value = getattr(cap_series, name)
        monkeypatch.setattr(cap_series, name, getattr(value, "value", value))
    inner, scale_log2 = softmax_scale / cap, cap * math.log2(math.e)
    return cap_series.factored_series.fn(*(torch.tensor(x, dtype=torch.float64) for x in (scale_log2, inner)))


@pytest.mark.parametrize("cap", [25.0, 30.0, 42.5, 50.0])
def test_factors_are_bfloat16_and_the_polynomial_as_good(cap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors of all fractions; the relative error up to END, and beyond it the bound that sums rely on."""
    scales = [2.0**-18, 128**-0.5, 1.0, *(0.05 * 2 ** (step / 40) for step in range(40))]
    changed = 0.0
    for softmax_scale in scales:
        factor, p, q = factored(softmax_scale, cap, monkeypatch)
        assert factor == factor.bfloat16()
        scale_log2, ratio = cap * math.log2(math.e), float(factor) / (softmax_scale / cap)
        within = np.linspace(1e-6, cap_series.END, 10_001)
        beyond = np.concatenate([np.linspace(cap_series.END, 10, 10_001), np.geomspace(10, 1e5, 101)])
        found, above = (x * ((x * x + float(p)) ** 2 + float(q)) / scale_log2 for x in (within * ratio, beyond * ratio))
        assert np.abs(found / np.tanh(within) - 1).max() < 2.0**-11
        assert above.min() > cap_series.TOP.value
        changed = max(changed, abs(float(ratio**5 / scale_log2) / cap_series.FIFTH - 1))
    assert 0.01 < changed < 0.02, "the fifth power's coefficient is what rounding the factor changes"


def shift(arch: str = "gfx942", dtype: torch.dtype = torch.bfloat16, head_dim: int = 128, **features: Any) -> int:
    """SHIFT of the forward kernel of a prefill."""
    more = {"q_len": 1024, "kv_len": 1024, "backward": False, "soft_cap": CAP, **features}
    (found,) = launches(arch, dtype, head_dim, **more).values()
    return int(found.arguments["SHIFT"])


def test_calls_that_begin_with_it() -> None:
    for arch in ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"):
        assert shift(arch) == CAP_SERIES.value
    assert shift(soft_cap=30.0, kv_len=2**17) == CAP_SERIES.value
    # Little room between ordinary sums and those of scores near the cap; rows that may be empty; no registers.
    others: list[dict[str, Any]] = [
        {"soft_cap": 10.0}, {"soft_cap": 20.0}, {"key_mask": True}, {"q_ids": True, "kv_ids": True}, {"head_dim": 256},
        {"arch": "sm90"},
    ]  # fmt: skip
    for features in others:
        assert shift(**features) == NO_MAX.value, features
    # Weights that float16, or any format, does not hold.
    for features in ({"dtype": torch.float16}, {"soft_cap": 80.0}, {"attn_bias": True}):
        assert shift(**features) == RUNNING_MAX.value, features
    assert not cap_series.series_fits(-0.1, CAP, 1024)
    assert not cap_series.series_fits(1e-9, CAP, 1024), "the fifth power would underflow"


@pytest.mark.parametrize("case", ["within", "two scores beyond", "all scores far below"])
def test_tile_is_computed_again(case: str) -> None:
    """Scores as far as 1.6 times the cap, where the polynomial alone gives another result, if one that looks sound."""
    generator = torch.Generator().manual_seed(0)
    q = torch.zeros(1, 1, 130, 64)
    q[..., 0] = 8.0
    k = torch.zeros(1, 1, 150, 64)
    k[..., 0] = torch.rand((150,), generator=generator) * 2
    if case == "two scores beyond":
        k[..., 70:72, 0] = torch.tensor([1.5, 1.6]) * CAP / 8
    if case == "all scores far below":
        k[..., 0] = -CAP / 8 * (1.3 + 0.3 * torch.rand((150,), generator=generator))
    v = torch.randn((1, 1, 150, 64), generator=generator)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    with simulated_device("gfx942") as device:
        out, lse = attention_forward(q, k, v, softmax_scale=1.0, logits_soft_cap=CAP, empty_rows="zero")
    assert device.findings() == []
    assert device.runs[0].launch.arguments["SHIFT"] == CAP_SERIES.value
    y = (q.double() @ k.double().mT) / CAP

    def attend(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return scores.softmax(-1) @ v.double(), scores.logsumexp(-1)

    want, want_lse = attend(CAP * torch.tanh(y))
    torch.testing.assert_close(lse.double(), want_lse, atol=6e-3, rtol=0)
    torch.testing.assert_close(out.double(), want, atol=1e-2, rtol=1e-2)
    alone, _ = attend(CAP * series(y))
    assert ((alone - want).abs().max() > 0.1) == (case != "within"), "else it would not show"
