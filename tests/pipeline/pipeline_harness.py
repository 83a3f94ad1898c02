"""Run a program three times (float64, eager, compiled by our pipeline) and compare everything it does.

Compared are the results, the gradients of all leaves, and what the program wrote into its inputs. A program is a
function and a maker of its inputs; the maker is called anew for every run, so that inputs may alias one another.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch._dynamo
import torch.fx as fx
from torch import Tensor
from torch.utils import _pytree as pytree

import rocm_attn_compile
from rocm_attn_compile.pipeline import compile_graph
from rocm_attn_compile.report import Report, Site
from rocm_attn_compile.testing import (
    Float64Everywhere,
    assert_as_accurate_as_eager,
    assert_same_computation,
    count_attention_calls,
)

B, H, M, N, D = 2, 3, 6, 9, 8
"""Default sizes: batch, heads, q_len, kv_len, head_dim; all different, so that no axis passes for another."""

SCALE = D**-0.5
INF = float("inf")

FACTOR = 8.0
"""How many times eager's error is allowed: of a few hundred numbers in float32, eager's largest is often lucky."""


def rand(*shape: int) -> Tensor:
    """The same numbers in every default dtype."""
    return torch.randn(*shape, dtype=torch.float32).to(torch.get_default_dtype())


def qkv(q_len: int = M, kv_len: int = N, heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    return rand(B, heads, q_len, D), rand(B, heads, kv_len, D), rand(B, heads, kv_len, D)


def square() -> tuple[Tensor, Tensor, Tensor]:
    return qkv(kv_len=M)


def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    """Attention as a textbook writes it; `keep` is True where a key is seen."""
    scores = q @ k.transpose(-1, -2) * SCALE
    if keep is not None:
        scores = scores.masked_fill(~keep, -INF)
    return scores.softmax(-1) @ v


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


class Pipeline:
    """A Dynamo backend: our pipeline with the graphs it was given (rewritten in place).

    Args:
        lowering: "eager", "aot_eager" or "inductor".
        options: As for `torch.compile`.
    """

    def __init__(self, lowering: str = "aot_eager", **options: Any) -> None:
        self.lowering, self.options = lowering, options
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph_module: fx.GraphModule, example_inputs: list) -> Callable:
        self.graphs.append(graph_module)
        return compile_graph(graph_module, example_inputs, lowering=self.lowering, options=self.options)

    @property
    def calls(self) -> int:
        """Calls of our op in all graphs."""
        return sum(map(count_attention_calls, self.graphs))


def reports() -> list[Report]:
    return rocm_attn_compile.reports()


def sites() -> list[Site]:
    return [site for report in reports() for site in report.sites]


def codes() -> set[str]:
    """Codes of all reasons in all reports, look-alikes included."""
    entries = [entry for report in reports() for entry in (*report.sites, *report.look_alikes)]
    return {reason.code for entry in entries for reason in entry.reasons}


def everything(function: Callable, make: Callable[[], tuple], trains: bool, rounded_to: torch.dtype | None = None):
    """`(results, gradients of leaves, inputs afterwards)` of one run from seed 0."""
    torch.manual_seed(0)
    inputs = make()
    if rounded_to is not None:
        inputs = pytree.tree_map_only(Tensor, lambda t: t.to(rounded_to).to(t.dtype) if _is_float(t) else t, inputs)
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if _is_float(leaf) and leaf.is_leaf] if trains else []
    for leaf in leaves:
        leaf.requires_grad_()
    results = function(*inputs)
    gradients: tuple = ()
    if trains:
        torch.manual_seed(1)
        outputs = [t for t in pytree.tree_leaves(results) if isinstance(t, Tensor) and t.requires_grad]
        weighted = sum((t * rand(*t.shape).to(t.dtype)).sum() for t in outputs)
        gradients = torch.autograd.grad(weighted, leaves, allow_unused=True)
    return pytree.tree_map_only(Tensor, Tensor.detach, (results, list(gradients), list(inputs)))


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def check(
    function: Callable,
    make: Callable[[], tuple] = qkv,
    *,
    calls: int,
    refused: str | set[str] | None = None,
    trains: bool = False,
    dynamic: bool | None = None,
    fullgraph: bool = True,
    lowering: str = "aot_eager",
    around: Callable[[], AbstractContextManager] = nullcontext,
    rounds_to: torch.dtype | None = None,
    **options: Any,
) -> Pipeline:
    """Compile `function`, and assert that it is as right as eager and rewritten as often as it should be.

    Args:
        function: Called with what `make` returns; its results may be any tree.
        make: Makes the inputs, in the default dtype.
        calls: How often our op must be in the graphs.
        refused: Codes (all of them) of the reasons in the reports; None for no reason at all.
        trains: Require grad of the float leaves among the inputs, and compare gradients too.
        dynamic, fullgraph: As for `torch.compile`.
        lowering, options: See `Pipeline`.
        around: Context entered around each of the three runs.
        rounds_to: In float64 the program is another one, since it rounds, or relies on rounding: it is compared with
            eager, to within some roundings to this dtype.
    """
    torch._dynamo.reset()  # a second check in one test must not see sizes of the first as dynamic
    rocm_attn_compile.reset_reports()
    with Float64Everywhere(), around():
        exact = everything(function, make, trains)
    with around():
        eager = everything(function, make, trains)
    pipeline = Pipeline(lowering, **options)
    compiled = torch.compile(function, backend=pipeline, fullgraph=fullgraph, dynamic=dynamic)
    with around():
        actual = everything(compiled, make, trains)
    expected = set() if refused is None else {refused} if isinstance(refused, str) else refused
    assert (pipeline.calls, codes()) == (calls, expected), "\n".join(map(str, reports()))
    if rounds_to is not None:
        close = 8 * torch.finfo(rounds_to).eps
        torch.testing.assert_close(actual, eager, rtol=close, atol=close, equal_nan=True)
        return pipeline
    exact = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, exact)
    assert_same_computation(eager[0], exact[0])
    assert_as_accurate_as_eager(actual, eager, exact, factor=FACTOR)
    return pipeline
