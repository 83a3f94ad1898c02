"""Captures a mask function through Dynamo, and evaluates proved forms number by number against the real mask."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from rocm_attn_compile.capture import capture
from rocm_attn_compile.recognize.mask import ClosedForm, MaskContext, MaskEmitter, index_symbol, size_arithmetic
from rocm_attn_compile.recognize.mask.integers import FloorDiv, from_size, loaded_value
from rocm_attn_compile.recognize.mask.predicate import And, BoolLoad, Or, Rel
from rocm_attn_compile.recognize.mask.values import FloatLoad, If

B, H, Q, K = (index_symbol(name) for name in "bhqk")


class Captured:
    """One traced call: the Value of its output, and what every captured Value and symbol really is."""

    def __init__(self, function: Callable, *args: Any, dynamic: bool = False) -> None:
        torch._dynamo.reset()
        self.symbols: dict[sympy.Symbol, int] = {}
        self._tensors: dict[Any, torch.Tensor] = {}
        self.real = self._trace(function, args, dynamic)

    def _trace(self, function: Callable, args: tuple, dynamic: bool) -> torch.Tensor:
        def backend(graph_module: torch.fx.GraphModule, inputs: list) -> Callable:
            self._adopt(graph_module, inputs)
            return graph_module.forward

        return torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args)

    def _adopt(self, graph_module: torch.fx.GraphModule, inputs: Sequence) -> None:
        trace = capture(graph_module, inputs)
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        for node, real in zip(placeholders, inputs, strict=True):
            if not isinstance(real, torch.Tensor):
                # Converting the SymInt to an int would specialise it; its hint does not.
                self.symbols[real.node.expr] = real.node.hint
                continue
            self._tensors[trace.tensors[node].value] = real.clone()
            example = node.meta["example_value"] if "example_value" in node.meta else node.meta["val"]
            for size, number in zip(example.shape, real.shape, strict=True):
                if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                    self.symbols[size.node.expr] = int(number)
        (output,) = [node for node in graph_module.graph.nodes if node.op == "output"]
        result = output.args[0]
        self.value = self._value_at_end(trace, result if isinstance(result, torch.fx.Node) else result[0])

    @staticmethod
    def _value_at_end(trace: Any, node: torch.fx.Node) -> Any:
        held = trace.tensors[node]
        return held.storage.value if held.is_base else held.value

    def number(self, x: Any) -> Any:
        """A captured argument with SymInts made ints."""
        if isinstance(x, (torch.SymInt, torch.SymFloat)):
            return expression(x.node.expr, self.symbols, self)
        if isinstance(x, (list, tuple)):
            return type(x)(self.number(item) for item in x)
        return self.tensor(x) if hasattr(x, "op") and hasattr(x, "args") else x

    def tensor(self, value: Any) -> torch.Tensor:
        """What a captured Value really holds: its program, run."""
        if value not in self._tensors:
            if value.op == "constant":
                result = torch.full(self.number(value.shape), value.kwargs["value"], dtype=value.dtype)
            elif value.op == "view_scatter":
                base, source, chain = value.args
                result = self.tensor(base).clone()
                view = result
                for op, args, kwargs, output_index in chain:
                    view = op(view, *self.number(args), **{k: self.number(x) for k, x in kwargs.items()})
                    view = view if output_index is None else view[output_index]
                view.copy_(self.tensor(source))
            else:
                assert not isinstance(value.op, str), f"{value!r} is not known"
                kwargs = {name: self.number(x) for name, x in value.kwargs.items()}
                result = value.op(*self.number(tuple(value.args)), **kwargs)
                if value.output_index is not None:
                    result = result[value.output_index]
            self._tensors[value] = result
        return self._tensors[value]


class Recorded(Captured):
    """As `Captured`, but by make_fx, which takes a tenth of Dynamo's time."""

    def _trace(self, function: Callable, args: tuple, dynamic: bool) -> torch.Tensor:
        real = function(*(x.clone() for x in args))
        self._adopt(make_fx(function, tracing_mode="symbolic" if dynamic else "fake")(*args), args)
        return real


def expression(expr: sympy.Expr, env: dict[sympy.Symbol, int], captured: Captured) -> Any:
    """An integer expression as an int."""
    if isinstance(expr, sympy.Integer):
        return int(expr)
    if isinstance(expr, sympy.Symbol):
        return env[expr]
    parts = [expression(argument, env, captured) for argument in expr.args]
    if isinstance(expr, sympy.Add):
        return sum(parts)
    if isinstance(expr, sympy.Mul):
        return sympy.prod(parts)
    if isinstance(expr, sympy.Pow):
        return parts[0] ** parts[1]
    if isinstance(expr, FloorDiv) or type(expr).__name__ == "FloorDiv":
        return parts[0] // parts[1]
    if isinstance(expr, sympy.Max):
        return max(parts)
    if isinstance(expr, sympy.Min):
        return min(parts)
    assert isinstance(expr, sympy.core.function.AppliedUndef), expr
    return element(captured.tensor(loaded_value(expr)), parts)


def element(tensor: torch.Tensor, index: list[int]) -> Any:
    """An element; anything at all outside of the tensor, where it must not matter."""
    assert len(index) == tensor.dim()
    if all(0 <= i < size for i, size in zip(index, tensor.shape)):
        return tensor[tuple(index)].item()
    return random.choice([-3, -1, 0, 1, 2, 7])


def scalar(x: Any, env: dict[sympy.Symbol, int], captured: Captured) -> Any:
    """Any element or predicate as a Python number."""
    if isinstance(x, (bool, int, float)):
        return x
    if isinstance(x, And):
        return all(scalar(part, env, captured) for part in x.parts)
    if isinstance(x, Or):
        return any(scalar(part, env, captured) for part in x.parts)
    if isinstance(x, Rel):
        number = expression(x.expr, env, captured)
        return {"le": number <= 0, "eq": number == 0, "ne": number != 0}[x.op]
    if isinstance(x, BoolLoad):
        index = [expression(i, env, captured) for i in x.index]
        return bool(element(captured.tensor(x.value), index)) != x.negated
    if isinstance(x, FloatLoad):
        return element(captured.tensor(x.value), [expression(i, env, captured) for i in x.index])
    if isinstance(x, If):
        return scalar(x.then if scalar(x.condition, env, captured) else x.otherwise, env, captured)
    return expression(x, env, captured)


def context_of(captured: Captured, names: str = "bhqk") -> tuple[list[sympy.Expr], MaskContext]:
    """The index and context of a mask whose last dimensions are `names`."""
    value = captured.value
    symbols = [index_symbol(name) for name in names[len(names) - value.ndim :]]
    sizes = dict(zip(symbols, map(from_size, value.shape)))
    context = MaskContext(
        Q,
        K,
        sizes.get(Q, sympy.Integer(1)),
        sizes.get(K, sympy.Integer(1)),
        {B: sizes[B]} if B in sizes else {},
        {H: sizes[H]} if H in sizes else {},
    )
    return [sympy.Integer(0) if sizes[s] == 1 else s for s in symbols], context


def points(captured: Captured, context: MaskContext) -> Iterator[tuple[dict[sympy.Symbol, int], tuple[int, ...]]]:
    """Every index: the values of all symbols, and the position in the real mask."""
    sizes = {**context.batch, **context.heads, context.q: context.q_len, context.k: context.kv_len}
    order = [index_symbol(name) for name in "bhqk"[4 - captured.value.ndim :]]
    ranges = [range(expression(sizes.get(s, sympy.Integer(1)), captured.symbols, captured)) for s in order]
    for at in itertools.product(*ranges):
        yield {**captured.symbols, **dict(zip(order, at))}, at


def keeps(form: ClosedForm, env: dict[sympy.Symbol, int], captured: Captured) -> bool:
    """The conjunction of all parts of a closed form at one point."""
    q, k = env[form.context.q], env[form.context.k]
    fine = form.band_lower is None or k - q >= expression(form.band_lower, env, captured)
    fine &= form.band_upper is None or k - q <= expression(form.band_upper, env, captured)
    fine &= all(k >= scalar(start, env, captured) for start in form.kv_start)
    fine &= all(k < scalar(end, env, captured) for end in form.kv_end)
    fine &= all(scalar(predicate, env, captured) for predicate in form.key_masks)
    fine &= all(expression(a, env, captured) == expression(b, env, captured) for a, b in form.segment_ids)
    return bool(fine and all(scalar(predicate, env, captured) for predicate in form.residual))


def assert_exact(form: ClosedForm, captured: Captured, kept: torch.Tensor) -> None:
    """The predicate, and the conjunction of the parts, equal the real mask everywhere."""
    for env, at in points(captured, form.context):
        real = bool(kept[at])
        assert scalar(form.predicate, env, captured) == real, f"predicate {form.predicate} at {env}: mask is {real}"
        assert keeps(form, env, captured) == real, f"{form} at {env}: mask is {real}"
    if form.every_row_keeps_a_key():
        assert kept.any(-1).all(), f"a row keeps no key: {form.predicate}"
    emitted = emitted_mask(form, captured)
    shape = [expression(n, captured.symbols, captured) for n in sizes_of(form.context)]
    assert torch.equal(emitted.expand(shape), kept.expand(shape)), f"emitted tensors differ from the mask: {form}"


def parts_of(form: ClosedForm) -> set[str]:
    """Names of the parts that a closed form has."""
    found = {
        "band": form.band_lower is not None or form.band_upper is not None,
        "kv_start": form.kv_start,
        "kv_end": form.kv_end,
        "key": form.key_masks,
        "ids": form.segment_ids,
        "residual": form.residual,
    }
    return {name for name, present in found.items() if present}


class ExecutingBuilder:
    """A Builder whose handles are real tensors and ints: every call runs at once."""

    device = torch.device("cpu")

    def __init__(self, captured: Captured) -> None:
        self.captured = captured

    def tensor(self, value: Any) -> torch.Tensor:
        return self.captured.tensor(value)

    def size(self, expr: sympy.Expr) -> int:
        return int(size_arithmetic(expr, self.captured.symbols))

    def call(self, op: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return op(*args, **kwargs)


def sizes_of(context: MaskContext) -> list[sympy.Expr]:
    """(B, H, M, N) of a mask: products over the batch and head symbols."""
    batch, heads = (sympy.prod(x.values()) if x else sympy.Integer(1) for x in (context.batch, context.heads))
    return [batch, heads, context.q_len, context.kv_len]


def emitted_mask(form: ClosedForm, captured: Captured) -> torch.Tensor:
    """The mask that the canonical op applies, from the emitted tensors: (B or 1, H or 1, M, N)."""
    builder = ExecutingBuilder(captured)
    emitter = MaskEmitter(builder, form)
    batch, _, m, n = (builder.size(size) for size in sizes_of(form.context))
    q, k = torch.arange(m)[:, None], torch.arange(n)[None, :]
    keep = torch.ones(1, 1, m, n, dtype=torch.bool)
    if form.band_lower is not None:
        keep = keep & (k - q >= builder.size(form.band_lower))
    if form.band_upper is not None:
        keep = keep & (k - q <= builder.size(form.band_upper))
    start, end = emitter.rows(form.kv_start, "max"), emitter.rows(form.kv_end, "min")
    for rows in (start, end):
        assert rows is None or (rows.dtype == torch.int64 and rows.shape[0] in (1, batch) and rows.shape[1] in (1, m))
    keep = keep if start is None else keep & (k >= start[:, None, :, None])
    keep = keep if end is None else keep & (k < end[:, None, :, None])
    key_mask = emitter.key_mask(form.key_masks)
    if key_mask is not None:
        assert key_mask.dtype == torch.bool
        assert key_mask.shape[0] in (1, batch) and key_mask.shape[1] == n
        keep = keep & key_mask[:, None, None, :]
    for pair in form.segment_ids:
        q_ids, kv_ids = emitter.ids(pair)
        assert q_ids.shape[0] in (1, batch) and q_ids.shape[1] == m
        assert kv_ids.shape[0] in (1, batch) and kv_ids.shape[1] == n
        keep = keep & (q_ids[:, None, :, None] == kv_ids[:, None, None, :])
    dense = emitter.dense(form.residual)
    return keep if dense is None else keep & dense
