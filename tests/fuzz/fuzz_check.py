"""Run a generated program in eager and through the pipeline, and say what differs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import sympy
import torch
import torch._dynamo
from fuzz_case import Case, Ran
from fuzz_compare import compare
from torch.nn.attention import SDPBackend, sdpa_kernel

import rocm_attn_compile
from rocm_attn_compile import pipeline
from rocm_attn_compile._torch_private import current_shape_env
from rocm_attn_compile.pipeline import compile_graph
from rocm_attn_compile.rewrite import builder
from rocm_attn_compile.testing import Float64Everywhere, RoundedAgain

PROMISED_REFUSALS = frozenset(
    [
        "mixed_fills",  # masks with different fills, and a row that may be empty
        "bias_beside_finite_fill",
        "cast_after_shift",  # a fill that becomes -inf, but for rows of nothing but fills
        "cast_after_bias",  # float64 scores that a softmax takes in float32
        "bias_after_cast",  # or that a mask is added to in float32
        "scale_up_and_down",  # a bias that may overflow on the way
        "masked_rows_grad",
        "nan_in_bias",  # 1e9 in float16 times 0, behind a nan_to_num
        "unshifted_softmax",
        "logsumexp_of_fills",
        "single_key",
        "depth_axis",  # a contraction over one element is no contraction
        "finite_fill",
        "bias_before_cap",
        "bias_subtracted",
        "scale_tensor",
        "scale_after_mask",  # a sign that cancels, after the mask
        "scale_after_cast",
        "sink_axis",  # heads in another order than (kv head, group)
        "shift_before_sinks",
        "floor_of_bias",  # raised to the lowest number, and a row that may be empty
        "floor_of_fills",
        "floor_grad",
        "after_floor",
        "after_clamp",  # what follows a clamp of scores without their largest
        "mask_input_written",  # a position that a trained graph counts up
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
        notes: Of replaced sites: codes of their notes, "reads cache", "mask is a tensor".
    """

    kind: str
    text: str = ""
    codes: set[str] = field(default_factory=set)
    notes: set[str] = field(default_factory=set)


def check(case: Case) -> Outcome:
    """Compile the program and compare everything it does with eager."""
    function = case.function()
    try:
        eager, exact = _references(case, function)
    except (RuntimeError, IndexError, ValueError) as error:
        return Outcome("invalid", str(error))
    outcome = _compiled(case, function, eager, exact)
    if outcome.kind == "wrong":
        # ATen's fused attention for the CPU gives v a gradient N times too large in a row of nothing but finfo.min: its
        # lse absorbs the log of N, as of 2.11 and 2.13. Products and a softmax instead have the right one.
        with sdpa_kernel(SDPBackend.MATH):
            unfused = _references(case, function)
        if _compiled(case, function, *unfused).kind == "replaced":
            return Outcome("torch", outcome.text)
    if outcome.kind == "crash" and "modified by an inplace operation" in outcome.text:
        # Eager multiplied with a copy; what we multiply is the tensor itself, overwritten before the backward.
        return Outcome("in place", outcome.text)
    if outcome.kind in ("wrong", "crash") and (case.is_cache or case.lowering != "eager"):
        plain = _compiled(case, function, eager, exact, disable=True)
        if plain.kind in ("wrong", "crash"):
            return Outcome("torch", outcome.text)  # so is torch.compile without us
    return outcome


def _references(case: Case, function: Any) -> tuple[Ran, Ran]:
    """What eager gives in the case's dtype, and in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eager = case.run(function, case.dtype)
        if case.dtype == torch.float64:
            return eager, eager
        with Float64Everywhere():
            return eager, case.run(function, torch.float64)


def _compiled(case: Case, function: Any, eager: Ran, exact: Ran, **options: Any) -> Outcome:
    torch._dynamo.reset()
    rocm_attn_compile.reset_reports()

    def backend(graph_module, example_inputs):
        return compile_graph(graph_module, example_inputs, lowering=case.lowering, options=options)

    limit = 4 if case.is_large else builder._SNAPSHOT_LIMIT
    guards: list[str] = []
    try:
        with (
            warnings.catch_warnings(),
            mock.patch.object(builder, "_SNAPSHOT_LIMIT", limit),
            mock.patch.object(pipeline, "recognize", _watched(pipeline.recognize, guards)),
        ):
            warnings.simplefilter("ignore")
            compiled = torch.compile(function, backend=backend, dynamic=case.dynamic)
            actual = case.run(compiled, case.dtype)
    except Exception as error:
        return Outcome("crash", repr(error)[:1500])
    reports = rocm_attn_compile.reports()
    entries = [entry for report in reports for entry in (*report.sites, *report.look_alikes)]
    codes = {reason.code for entry in entries for reason in entry.reasons}
    codes |= {note.code for report in reports for site in report.sites for note in site.notes if "error" in note.code}
    sites = [site for report in reports for site in report.sites if site.replaced]
    text = "\n".join(map(str, reports))
    if guards:
        return Outcome("wrong", f"guards were added: {', '.join(guards)}\n{text}", codes)
    if "internal_error" in codes or any("internal_error" in note for report in reports for note in report.notes):
        return Outcome("crash", text, codes)
    if sites or options:  # else the very same graph ran
        try:
            modes = {site.data["mask"]["empty_rows"] for site in sites}
            is_nan = bool(modes & {"nan", "nan_added"})
            compare(case, actual, eager, exact, is_nan, again=lambda seed: _rounded_again(case, function, seed))
        except AssertionError as error:
            return Outcome("wrong", f"{error}\n{text}", codes)
    has_symbols = bool(case.dynamic) or len(case.schedule) > 1
    # Head sizes are made numbers, but for a whole fraction of a symbol, which PyTorch knows nothing of.
    unknown = {"axis_split", "axis_mismatch", "axis_view", "axis_expand", "symbolic_head_dim", "symbolic_v_head_dim"}
    undecided = has_symbols and bool(codes & unknown)
    if sites and (len(sites) == len(entries) or not case.is_cache):
        return Outcome("replaced", text, codes, set().union(*map(_notes, sites)))
    if case.changes or codes & PROMISED_REFUSALS or case.has_ones or undecided:
        return Outcome("refused", text, codes)
    return Outcome("missed", text, codes)


def _watched(recognize: Any, guards: list[str]) -> Any:
    """Recognition, which may ask nothing that Dynamo has to guard, but for the number of channels.

    A program that asks more is compiled anew for every length or position.
    """

    def watched(*args: Any) -> Any:
        shape_env = current_shape_env()
        before = len(shape_env.guards) if shape_env is not None else 0
        result = recognize(*args)
        added = [guard.expr for guard in shape_env.guards[before:]] if shape_env is not None else []
        guards.extend(str(expr) for expr in added if not _is_number_of_channels(expr))
        return result

    return watched


def _is_number_of_channels(guard: sympy.Basic) -> bool:
    return isinstance(guard, sympy.Eq) and guard.rhs.is_Integer and guard.rhs > 1


def _rounded_again(case: Case, function: Any, seed: int) -> Ran:
    with RoundedAgain(seed):
        return case.run(function, case.dtype)


def _notes(site: Any) -> set[str]:
    found = {note.code for note in site.notes}
    if site.data["mask"]["has_attn_mask"]:
        found.add("mask is a tensor")
    if site.data["cache"] is not None:
        found.add("reads cache")
    return found
