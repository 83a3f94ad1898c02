"""A Dynamo backend that only captures, and a replay that checks a trace against the real run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch._guards import TracingContext

from rocm_attn_compile.capture import Expansion, Trace, Value, capture, expand


@dataclass
class Captured:
    """One compilation: the trace, Dynamo's graph, what it was called with, and guards that capture added."""

    trace: Trace
    graph_module: fx.GraphModule
    example_inputs: list[Any]
    new_guards: list[Any]
    result: Any
    expansion: Expansion | None

    @property
    def names(self) -> list[str]:
        """The ops of the trace without its leaves."""
        return [value.name for value in self.trace.values if value.name not in ("input", "constant")]

    @property
    def codes(self) -> list[str]:
        return [code for _, code, _ in self.trace.not_executed]

    def value(self, name: str) -> Value:
        """The only value of that op."""
        (value,) = [value for value in self.trace.values if value.name == name]
        return value

    def output(self, index: int = 0) -> Value:
        """The value that the graph returns."""
        (output,) = [node for node in self.graph_module.graph.nodes if node.op == "output"]
        return self.trace.tensors[output.args[0][index]].value


@pytest.fixture
def captured() -> Callable[..., Captured]:
    """Compile and call a function; capture its only graph."""

    def run(function: Callable, *args: Any, expanded: bool = False, **options: Any) -> Captured:
        seen: list[Any] = []

        def backend(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable:
            shape_env = TracingContext.get().fake_mode.shape_env
            expansion = expand(graph_module) if expanded else None
            code, guards = graph_module.code, list(shape_env.guards)
            modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
            trace = capture(graph_module, example_inputs, shape_env)
            assert graph_module.code == code, "capture must not change the graph"
            assert modes == (
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
            )
            seen.append((trace, graph_module, example_inputs, shape_env.guards[len(guards) :], expansion))
            return graph_module.forward

        options.setdefault("fullgraph", True)
        result = torch.compile(function, backend=backend, **options)(*args)
        ((trace, graph_module, inputs, guards, expansion),) = seen
        return Captured(trace, graph_module, inputs, guards, result, expansion)

    return run


@pytest.fixture
def check_replay() -> Callable[..., int]:
    """Check a static trace against a real run: every value, and every answer of `nodes_holding`.

    The returned function takes the trace and the graph's inputs (which are written to) and returns how many
    `(value, time, node)` answers of `nodes_holding` were confirmed.
    """
    return _check_replay


def _check_replay(trace: Trace, inputs: Sequence[torch.Tensor]) -> int:
    contents = _contents_over_time(trace.graph_module, inputs)
    last = len(trace.order) - 2
    known: dict[Value, torch.Tensor] = {}
    confirmed = 0
    for value in trace.values:
        holding = [(t, n) for t in range(max(value.time, 0), last + 1) for n in trace.nodes_holding(value, t)]
        real = [(t, n, contents[t][n]) for t, n in holding]
        if isinstance(value.op, str) and value.op in ("input", "opaque", "constant"):
            # A leaf claims no content; but whoever holds it must agree, at every time.
            number = value.kwargs.get("value")
            if number is not None:
                known[value] = torch.full(value.shape, number, dtype=value.dtype)
        else:
            result = _replay(value, known)
            if result is not None:
                known[value] = result
        if real:
            known.setdefault(value, real[0][2])
        for time, node, content in real:
            assert tuple(content.shape) == tuple(value.shape), (value, node, time)
            message = f"{value} is not what {node} holds after position {time}"
            torch.testing.assert_close(content, known[value], equal_nan=True, msg=message)
            confirmed += 1
    for node, tensor in trace.tensors.items():
        assert node in trace.nodes_holding(tensor.value, trace.order[node]), f"{node} must hold its own value"
    return confirmed


def _contents_over_time(graph_module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> list[dict[fx.Node, Any]]:
    """For each position in the graph a copy of every tensor made so far."""
    snapshots: list[dict[fx.Node, Any]] = []

    class Spy(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            self.env[node] = result
            held = {n: t.clone() for n, t in self.env.items() if isinstance(t, torch.Tensor)}
            snapshots.append(held)
            return result

    with torch.no_grad():
        Spy(graph_module, garbage_collect_values=False).run(*inputs)
    return snapshots


def _replay(value: Value, known: dict[Value, torch.Tensor]) -> torch.Tensor | None:
    """The value from its arguments' contents, or None if one of them is not known."""
    missing = [used for used in _values((value.args, value.kwargs)) if used not in known]
    if missing:
        return None
    args, kwargs = torch.utils._pytree.tree_map_only(
        Value, lambda used: known[used].clone(), (list(value.args), dict(value.kwargs))
    )
    with torch.no_grad():
        if value.op == "view_scatter":
            base, source, chain = args
            view = base
            for op, rest, keywords, index in chain:
                view = op(view, *rest, **keywords)
                view = view if index is None else view[index]
            view.copy_(source)
            return base
        if value.op == "sdpa":
            return F.scaled_dot_product_attention(**kwargs)
        assert not isinstance(value.op, str), value
        result = value.op(*args, **kwargs)
        return result if value.output_index is None else result[value.output_index]


def _values(tree: Any) -> list[Value]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Value)]
