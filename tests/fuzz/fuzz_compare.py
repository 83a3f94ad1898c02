"""What may differ from eager, and what may not."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from fuzz_case import Case, Ran

from rocm_attn_compile.testing import accuracy


def compare(
    case: Case, actual: Ran, eager: Ran, exact: Ran, allows_nan: bool, again: Callable[[int], Ran] | None = None
) -> None:
    """Raise AssertionError where a compiled program differs from eager by more than rounding.

    Args:
        case: The program.
        actual, eager, exact: Compiled, in eager, and in eager in float64.
        allows_nan: A row of the masks may be NaN.
        again: Eager with everything rounded once more, at random by a seed; asked for where a result in float32 is
            less exact than eager's.
    """
    assert actual.aliases == eager.aliases, f"aliases {actual.aliases}, not {eager.aliases}"
    _excuse_nan(case, actual, eager, allows_nan)
    if case.writes_exactly:
        for i, (got, want) in enumerate(zip(actual.inputs, eager.inputs)):
            if isinstance(want, torch.Tensor):
                bits = [x.contiguous().view(-1).view(torch.uint8) for x in (got, want)]
                assert torch.equal(*bits), f"input {i}: what was written differs"
    if case.dtype == torch.float64:
        _close(case, actual, eager)
    else:
        _as_accurate(case, actual, eager, exact, again)


def _excuse_nan(case: Case, actual: Ran, eager: Ran, allows_nan: bool) -> None:
    """What docs/recognition.md excepts of rows without a key becomes what eager has."""
    twice = "two attentions" in case.changes
    if twice and "nan_to_num" in case.source:
        # To the second, the NaN of the first is none of its masks: docs/recognition.md, "Rows without a key".
        actual.results = [
            a if w is None or not _is_float(a) else torch.where(a.isnan(), w, a)
            for a, w in zip(actual.results, eager.results)
        ]
    if allows_nan and any(_is_float(t) and t.isnan().any() for t in eager.results):
        # A row of -inf is NaN. Where its gradient's NaN goes is not always the same: eager's masked_fill stops some of
        # it, and eager's maximum carries it into other rows. See `recognize/masks.py`.
        for i, (got, want) in enumerate(zip(actual.gradients, eager.gradients)):
            if got is not None and want is not None:
                actual.gradients[i] = torch.where(got.isnan() | want.isnan(), want, got)


def _close(case: Case, actual: Ran, eager: Ran) -> None:
    # With islands in float32, that is how far two right results may be from each other.
    narrow = "float32" in case.source or ".float()" in case.source
    # Scores beside a fill such as -1e4 lose three digits more, beside -1e9 eight of float64's sixteen.
    if narrow:
        rtol, atol = (5e-3, 5e-3) if re.search(r"-1e4|-1e9|\d{5}", case.source) else (1e-4, 1e-4)
    else:
        rtol, atol = (1e-6, 1e-6) if "-1e9" in case.source else (1e-7, 1e-9)
    for i, (got, want) in enumerate(zip(actual.all(), eager.all(), strict=True)):
        if want is None or got is None:
            # The op gives zeros where eager's graph has no path (a bias of one number has no gradient).
            other = got if want is None else want
            assert other is None or not other.any(), f"result {i}: one is None"
        elif not isinstance(want, torch.Tensor) or not want.is_floating_point():
            assert _equal(got, want), f"result {i} differs"
        else:
            torch.testing.assert_close(
                *_wide(got, want), rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, i=i: f"result {i}: {m}"
            )


def _as_accurate(case: Case, actual: Ran, eager: Ran, exact: Ran, again: Callable[[int], Ran] | None) -> None:
    # What cancels to nothing is rounding noise of numbers as large as the program has.
    sizes = [float(t.double().abs().nan_to_num(0, 0).max()) for t in exact.all() if _is_tensor(t) and t.numel()]
    largest = max([1.0, *sizes])
    floor = 16 * torch.finfo(case.dtype).eps * largest
    # The gradient of the scores is p * (dp - delta), two products which cancel where a weight is nearly one. Eager sums
    # delta from the same dp, so that it cancels to the bit; a fused backward has it from grad_out and out.
    gradient_floor = floor * largest if case.dtype == torch.float32 else floor
    results = len(eager.results)
    for i, (got, want, wide) in enumerate(zip(actual.all(), eager.all(), exact.all(), strict=True)):
        if want is None or got is None or wide is None:
            other = got if want is None else want
            assert other is None or not other.any(), f"result {i}: one is None"
            continue
        if not _is_tensor(want) or not want.is_floating_point():
            assert _equal(got, want), f"result {i} differs"
            continue
        got, want, wide = _wide(got, want, wide)
        # Eager's exponentials overflow in half precision where the maximum is not subtracted.
        overflown = wide.isfinite() & ~want.isfinite()
        got, want = torch.where(overflown, wide.to(got), got), torch.where(overflown, wide.to(want), want)
        measured = accuracy(got, want, wide.double(), factor=6.0)
        is_gradient = results <= i < results + len(eager.gradients)
        noise = gradient_floor if is_gradient else floor
        if measured.ok or measured.max_error <= noise:
            continue
        # Scores beside a bias of -1e4 keep three digits: which three depends on the order in which biases are added.
        if case.dtype == torch.float32 and again is not None:
            drawn = [_wide(again(seed).all()[i])[0].double() for seed in range(4)]
            change = max(float((other - want.double()).abs().nan_to_num(0).max()) for other in drawn)
            if measured.max_error <= 6.0 * change:
                continue
        raise AssertionError(f"result {i}: {measured}")


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _equal(got: object, want: object) -> bool:
    return torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want


def _wide(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """float8 knows no comparison."""
    return tuple(t.float() if t.dtype.itemsize == 1 else t for t in tensors)
