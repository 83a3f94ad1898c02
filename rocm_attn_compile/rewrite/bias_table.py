"""Give the tables that biases with a gradient are looked up in a gradient that is a product; see ops.bias_table.

The call that looks up is replaced where it stands, in Dynamo's graph: what it gives stays the same for all readers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F

from .. import _torch_private, ops
from ..capture.trace import Trace, Value
from ..ops.bias_table import MAX_ONES
from ..recognize.region import Operand, Region

aten = torch.ops.aten

_MAX_ROWS, _MIN_NUMBERS, _MIN_READS = 1024, 2**20, 64
"""Rows of the table, numbers looked up, and how often each row is read on average: from where additions wait for one
another. A window of Swin, 169 rows read 14 times each, is below."""


def improve_lookups(trace: Trace, regions: Iterable[Region]) -> list[str]:
    """Replace the calls; returns a sentence for each."""
    biases = [
        b for region in regions if region.spec.bias_requires_grad for b in region.biases if isinstance(b, Operand)
    ]
    sentences = []
    for value in _behind(bias.value for bias in biases):
        found = _lookup_of(trace, value)
        if found is None:
            continue
        node, table, index, wraps = found
        graph = trace.graph_module.graph
        with graph.inserting_before(node):
            new = graph.call_function(ops.lookup, (table, index), {"wraps": True} if wraps else {})
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        rows = table.meta["example_value"].shape[0]
        numbers = _product(value.shape)
        sentences.append(
            f"{node.name} looks up a bias, {numbers} numbers in {rows} rows: their gradient is added up by a product"
        )
    return sentences


def _behind(values: Iterable[Value]) -> Iterator[Value]:
    """All values that these are computed from, each once."""
    path, seen = list(values), set()
    while path:
        value = path.pop()
        if value.id in seen:
            continue
        seen.add(value.id)
        yield value
        path += [argument for argument in value.args if isinstance(argument, Value)]


def _lookup_of(trace: Trace, value: Value) -> tuple[fx.Node, fx.Node, fx.Node, bool] | None:
    """`(call, table, index, wraps)` where it pays; None for all else."""
    node = value.node
    if node is None or not node.users or node in trace.transformed or not value.grad_mode:
        return None
    known = trace.tensors.get(node)
    call = _parts_of(node) if known is not None and known.value is value else None
    if call is None or not all(isinstance(part, fx.Node) for part in call[:2]):
        return None
    table, index = (part.meta.get("example_value") for part in call[:2])
    if not isinstance(table, torch.Tensor) or not isinstance(index, torch.Tensor):
        return None
    if not (table.requires_grad and table.dtype.is_floating_point and index.dtype in (torch.int32, torch.int64)):
        return None
    # An index may lie on the CPU, and its table elsewhere.
    if table.device != index.device or not table.ndim or not all(isinstance(size, int) for size in table.shape):
        return None
    rows, reads = table.shape[0], _product(index.shape)
    if not 0 < rows <= _MAX_ROWS or reads < _MIN_READS * rows or reads * math.prod(table.shape[1:]) < _MIN_NUMBERS:
        return None
    is_symbolic = not all(isinstance(size, int) for size in index.shape)
    if is_symbolic and rows * reads > MAX_ONES:  # which makes one piece of all
        return None
    return node, *call


def _product(shape: Iterable[Any]) -> int:
    """The number of elements, in the call that is being compiled; 0 where that depends on data."""
    try:
        return math.prod(map(_torch_private.hint, shape))
    except ValueError:
        return 0


def _parts_of(node: fx.Node) -> tuple[Any, Any, bool] | None:
    """`(table, index, wraps)` of a call that gives rows of a table and does nothing else."""
    args = node.args
    if node.target is F.embedding and len(args) >= 2 and not node.kwargs:
        plain = (None, None, 2.0, False, False)
        return (args[1], args[0], False) if args[2:] == plain[: len(args) - 2] else None
    if node.target in (torch.embedding, aten.embedding.default) and len(args) == 2 and not node.kwargs:
        return args[0], args[1], False
    if node.target is operator.getitem and isinstance(args[1], fx.Node):
        return args[0], args[1], True
    return None
