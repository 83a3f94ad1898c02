"""Runs a program with one attention, and looks at the bias and the slopes of the op that replaced it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from recorder import Recorder

import rocm_attn_compile
from rocm_attn_compile.testing import Float64Everywhere, assert_as_accurate_as_eager


def site_with_bias(
    function: Callable, call: Callable, inputs: Callable, dtype: torch.dtype, dynamic: bool | None
) -> tuple[Any, torch.Tensor | None, torch.Tensor | None]:
    """The site, and the op's attn_bias and alibi_slopes as Dynamo's examples; results are compared with float64.

    Args:
        function: The program.
        call: `call(function, *inputs)` gives all results to compare.
        inputs: `inputs(dtype, rounded_to)` makes the arguments.
        dtype, dynamic: To compile for.
    """
    with Float64Everywhere():
        exact = call(function, *inputs(torch.float64, dtype))
    eager = call(function, *inputs(dtype))
    recorder = Recorder(lowering="aot_eager")
    actual = call(torch.compile(function, backend=recorder, fullgraph=True, dynamic=dynamic), *inputs(dtype))
    assert recorder.calls == 1
    assert_as_accurate_as_eager(actual, eager, tuple(t.double() for t in exact), factor=8.0)
    (site,) = [site for report in rocm_attn_compile.reports() for site in report.sites]
    (node,) = [n for g in recorder.graphs for n in g.graph.nodes if n.target is torch.ops.rocm_attn.attention.default]
    bias, slopes = (None if a is None else a.meta["example_value"] for a in (node.args[3], node.args[12]))
    return site, bias, slopes
