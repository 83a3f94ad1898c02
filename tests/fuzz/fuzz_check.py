"""Run a generated program in eager and through the pipeline, and say what differs."""

from __future__ import annotations

import random
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch._dynamo
import torch.nn.functional as F
from fuzz_attention import attention

import rocm_attn_compile
from rocm_attn_compile.pipeline import compile_graph
from rocm_attn_compile.testing import Float64Everywhere, accuracy, count_attention_calls

PROMISED_REFUSALS = frozenset(
    [
        "mixed_fills",  # masks with different fills, and a row that may be empty
        "bias_beside_finite_fill",
        "cast_after_shift",  # a fill that becomes -inf, but for rows of nothing but fills
        "cast_after_bias",  # float64 scores that a softmax takes in float32
        "scale_up_and_down",  # a bias that may overflow on the way
        "masked_rows_grad",
        "unshifted_softmax",
        "logsumexp_of_fills",
        "single_key",
        "depth_axis",  # a contraction over one element is no contraction
        "finite_fill",
        "bias_before_cap",
        "scale_tensor",
        "scale_after_mask",  # a sign that cancels, after the mask
        "scale_after_cast",
        "sink_axis",  # heads in another order than (kv head, group)
        "shift_before_sinks",
        "floor_of_bias",  # raised to the lowest number, and a row that may be empty
        "floor_of_fills",
        "floor_grad",
        "after_floor",
    ]
)
"""Codes with which a program without a change may be left alone."""


@dataclass
class Outcome:
    """What became of one program.

    Attributes:
        kind: "invalid" (eager refuses it), "replaced", "refused" (with reason), "missed" (refused without reason),
            "wrong", "crash" or "torch" (so is torch.compile without us),
            "in place" (an error from autograd: a tensor that the backward needs was overwritten; eager had a copy).
        text: Details for people.
        codes: Of the reasons in the reports.
    """

    kind: str
    text: str = ""
    codes: set[str] = field(default_factory=set)


@dataclass
class Case:
    """A program with its inputs and settings; `listing` is a script that shows it again."""

    source: str
    inputs: list[tuple[str, str]]
    changes: list[str]
    dtype: torch.dtype
    grads: list[bool]
    dynamic: bool | None
    lowering: str
    has_ones: bool

    @classmethod
    def draw(cls, rng: random.Random) -> Case:
        program, result = attention(rng)
        if rng.random() < 0.4:  # most have an edit that changes the meaning, and are refused
            for _ in range(9):
                if program.changes:
                    program, result = attention(rng)
        dtype = rng.choice([torch.float64] * 5 + [torch.float32] * 3 + [torch.bfloat16, torch.float16])
        trains = rng.random() < 0.5
        grads = [trains and e.startswith("rand(") and e.endswith(")") and rng.random() < 0.8 for _, e in program.inputs]
        dynamic = rng.choice([None, None, None, True])
        # Without functionalisation, a write after the op is a write to what autograd saved.
        lowering = "aot_eager" if "_(" in program.source(result) or rng.random() < 0.1 else "eager"
        has_ones = 1 in program.sizes.values()  # a product over one element is a multiplication
        return cls(program.source(result), program.inputs, program.changes, dtype, grads, dynamic, lowering, has_ones)

    def listing(self) -> str:
        lines = ["import numpy as np", "import torch", "import torch.nn.functional as F", "", "", self.source, ""]
        lines.append(f"DTYPE = {self.dtype}  # dynamic={self.dynamic}, changes: {', '.join(self.changes) or 'none'}")
        lines += ["numbers = np.random.RandomState(0)"]
        lines += ["rand = lambda *shape: torch.as_tensor(numbers.standard_normal(shape)).to(DTYPE)", "inputs = ["]
        for (name, expression), grad in zip(self.inputs, self.grads):
            lines.append(f"    {expression}{'.requires_grad_()' if grad else ''},  # {name}")
        return "\n".join([*lines, "]"])

    def make_inputs(self, dtype: torch.dtype) -> list[torch.Tensor]:
        numbers = np.random.RandomState(0)  # not torch's: Float64Everywhere would change them

        def rand(*shape: int) -> torch.Tensor:
            return torch.from_numpy(np.asarray(numbers.standard_normal(shape))).to(self.dtype).to(dtype)

        names = {"torch": torch, "rand": rand}
        made = [eval(expression, names) for _, expression in self.inputs]
        return [t.requires_grad_() if grad else t for t, grad in zip(made, self.grads)]

    def function(self) -> Any:
        names: dict[str, Any] = {"torch": torch, "F": F}
        exec(compile(self.source, "<fuzz>", "exec"), names)
        return names["program"]

    def run(self, function: Any, dtype: torch.dtype) -> list:
        """Results, gradients and what is in the inputs afterwards."""
        inputs = self.make_inputs(dtype)
        leaves = [t for t in inputs if t.requires_grad]  # before a write makes a cache require grad, too
        results = function(*[t.clone() if t.requires_grad else t for t in inputs])
        gradients: tuple = (None,) * len(leaves)
        outputs = [r for r in results if isinstance(r, torch.Tensor) and r.requires_grad]
        if leaves and outputs:
            numbers = np.random.RandomState(1)
            weights = [torch.from_numpy(np.asarray(numbers.standard_normal(r.shape))) for r in outputs]
            total = sum((r * w.to(torch.bfloat16).to(r.dtype)).sum() for r, w in zip(outputs, weights))
            gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        return [t.detach() if isinstance(t, torch.Tensor) else t for t in (*results, *gradients, *inputs)]


def check(case: Case) -> Outcome:
    """Compile the program and compare everything it does with eager."""
    function = case.function()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            eager = case.run(function, case.dtype)
            if case.dtype == torch.float64:
                exact = eager
            else:
                with Float64Everywhere():
                    exact = case.run(function, torch.float64)
    except (RuntimeError, IndexError, ValueError) as error:
        return Outcome("invalid", str(error))
    outcome = _compiled(case, function, eager, exact)
    if outcome.kind == "crash" and "modified by an inplace operation" in outcome.text:
        # Eager multiplied with a copy; what we multiply is the tensor itself, overwritten before the backward.
        return Outcome("in place", outcome.text)
    if outcome.kind in ("wrong", "crash") and case.lowering != "eager":
        plain = _compiled(case, function, eager, exact, disable=True)
        if plain.kind in ("wrong", "crash"):
            return Outcome("torch", outcome.text)  # so is torch.compile without us
    return outcome


def _compiled(case: Case, function: Any, eager: list, exact: list, **options: Any) -> Outcome:
    torch._dynamo.reset()
    rocm_attn_compile.reset_reports()
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(graph_module)
        return compile_graph(graph_module, example_inputs, lowering=case.lowering, options=options)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = torch.compile(function, backend=backend, dynamic=case.dynamic)
            actual = case.run(compiled, case.dtype)
    except Exception as error:
        return Outcome("crash", repr(error)[:1500])
    reports = rocm_attn_compile.reports()
    entries = [entry for report in reports for entry in (*report.sites, *report.look_alikes)]
    codes = {reason.code for entry in entries for reason in entry.reasons}
    calls = sum(map(count_attention_calls, graphs))
    text = "\n".join(map(str, reports))
    if "internal_error" in codes or any("internal_error" in note for report in reports for note in report.notes):
        return Outcome("crash", text, codes)
    if calls or options:  # else the very same graph ran
        try:
            modes = {site.data["mask"]["empty_rows"] for report in reports for site in report.sites if site.replaced}
            _compare(case, actual, eager, exact, allows_nan=bool(modes & {"nan", "nan_added"}))
        except AssertionError as error:
            return Outcome("wrong", f"{error}\n{text}", codes)
        return Outcome("replaced", "", codes)
    undecided = bool(case.dynamic) and bool(codes & {"axis_split", "axis_mismatch", "axis_view", "axis_expand"})
    if case.changes or codes & PROMISED_REFUSALS or case.has_ones or undecided:
        return Outcome("refused", "", codes)
    return Outcome("missed", text, codes)


def _compare(case: Case, actual: list, eager: list, exact: list, allows_nan: bool) -> None:
    # A row of -inf is NaN. Where its gradient's NaN goes is not always the same: eager's masked_fill stops some of it,
    # and eager's maximum carries it into other rows. See `recognize/masks.py`.
    results = len(actual) - len(case.inputs) - sum(case.grads)
    if allows_nan and "two attentions" in case.changes:
        # ATen's CPU kernel gives 0 for a query of NaN and fewer keys than a vector register has places.
        actual = [a if w is None else torch.where(w.isnan(), w, a) for a, w in zip(actual[:results], eager)] + actual[
            results:
        ]
    if "two attentions" in case.changes and "nan_to_num" in case.source:
        # To the second, the NaN of the first is none of its masks: docs/recognition.md, "Rows without a key".
        actual = [
            a if w is None or not a.is_floating_point() else torch.where(a.isnan(), w, a)
            for a, w in zip(actual[:results], eager)
        ] + actual[results:]
    if allows_nan and any(t is not None and t.is_floating_point() and t.isnan().any() for t in eager[:results]):
        for i in range(results, len(actual) - len(case.inputs)):
            got, want = actual[i], eager[i]
            if got is not None and want is not None:
                actual[i] = torch.where(got.isnan() | want.isnan(), want, got)
    if case.dtype == torch.float64:
        # With islands in float32, that is how far two right results may be from each other.
        narrow = "float32" in case.source or ".float()" in case.source
        # Scores beside a fill such as -1e4 lose three digits more, beside -1e9 eight of float64's sixteen.
        if narrow:
            rtol, atol = (5e-3, 5e-3) if re.search(r"-1e4|-1e9|\d{5}", case.source) else (1e-4, 1e-4)
        else:
            rtol, atol = (1e-6, 1e-6) if "-1e9" in case.source else (1e-7, 1e-9)
        for i, (got, want) in enumerate(zip(actual, eager, strict=True)):
            if want is None or got is None:
                # The op gives zeros where eager's graph has no path (a bias of one number has no gradient).
                other = got if want is None else want
                assert other is None or not other.any(), f"result {i}: one is None"
                continue
            torch.testing.assert_close(
                got, want, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, i=i: f"result {i}: {m}"
            )
        return
    # What cancels to nothing is rounding noise of numbers as large as the program has.
    largest = max(
        [1.0, *(float(t.double().abs().nan_to_num(0, 0).max()) for t in exact if t is not None and t.numel())]
    )
    floor = 16 * torch.finfo(case.dtype).eps * largest
    # The gradient of the scores is p * (dp - delta), two products which cancel where a weight is nearly one. Eager sums
    # delta from the same dp, so that it cancels to the bit; a fused backward has it from grad_out and out.
    gradient_floor = floor * largest if case.dtype == torch.float32 else floor
    results = len(actual) - len(case.inputs) - sum(case.grads)
    for i, (got, want, wide) in enumerate(zip(actual, eager, exact, strict=True)):
        if want is None or got is None or wide is None:
            other = got if want is None else want
            assert other is None or not other.any(), f"result {i}: one is None"
            continue
        if not want.is_floating_point():
            assert torch.equal(got, want), f"result {i} differs"
            continue
        # Eager's exponentials overflow in half precision where the maximum is not subtracted.
        overflown = wide.isfinite() & ~want.isfinite()
        got, want = torch.where(overflown, wide.to(got), got), torch.where(overflown, wide.to(want), want)
        measured = accuracy(got, want, wide.double(), factor=6.0)
        is_gradient = results <= i < results + sum(case.grads)
        noise = gradient_floor if is_gradient else floor
        assert measured.ok or measured.max_error <= noise, f"result {i}: {measured}"
