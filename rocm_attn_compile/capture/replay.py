"""Compute captured values again, on real tensors: the captured program as a program that runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _torch_private
from .trace import Value

_NARROW = (torch.float16, torch.bfloat16, torch.float32)


class Replay:
    """Values on real tensors, each computed once.

    Args:
        leaf: Makes the tensor of a value that has no visible producer, or is in `cut`.
        cut: Ids of values that are taken from `leaf` although they are computed.
        wide: Every float dtype becomes float64.
        opened: Ids of calls of `F.linear` that are computed from their factors; others are leaves, as all opaque ones.
    """

    def __init__(
        self,
        leaf: Callable[[Value], Tensor],
        cut: frozenset[int] = frozenset(),
        wide: bool = False,
        opened: frozenset[int] = frozenset(),
    ) -> None:
        self._leaf, self._cut, self._wide, self._opened = leaf, cut, wide, opened
        self._known: dict[int, Tensor] = {}

    def __call__(self, value: Value) -> Tensor:
        """The tensor of `value`."""
        todo = [value]  # not recursive: a model may be deep
        while todo:
            top = todo[-1]
            missing = [] if top.id in self._known else [a for a in self._arguments(top) if a.id not in self._known]
            if missing:
                todo.extend(missing)
                continue
            todo.pop()
            if top.id not in self._known:
                with torch.set_grad_enabled(top.grad_mode):
                    self._known[top.id] = self._compute(top)
        return self._known[value.id]

    def _is_leaf(self, value: Value) -> bool:
        if value.op == "opaque":
            return value.id in self._cut or value.id not in self._opened
        return value.id in self._cut or value.op in ("input", "constant")

    def _arguments(self, value: Value) -> list[Value]:
        if self._is_leaf(value):
            return []
        return [a for a in pytree.tree_leaves((list(value.args), value.kwargs)) if isinstance(a, Value)]

    def _compute(self, value: Value) -> Tensor:
        if self._is_leaf(value):
            tensor = self._leaf(value)
            return tensor.double() if self._wide and tensor.is_floating_point() else tensor
        args, kwargs = pytree.tree_map(
            self._argument, (list(value.args), dict(value.kwargs)), is_leaf=lambda a: isinstance(a, Value)
        )
        if value.op == "dropout":
            return args[0]
        if value.op == "sdpa":
            return F.scaled_dot_product_attention(**{**kwargs, "dropout_p": 0.0})
        if value.op == "view_scatter":
            return self._scatter(value)
        if value.op == "opaque":  # autocast may have cast the factors to the result's dtype
            dtype = torch.float64 if self._wide else value.dtype
            tensor, weight, bias = pytree.tree_map_only(Tensor, lambda factor: factor.to(dtype), kwargs["linear"])
            return F.linear(tensor, weight, bias)
        assert not isinstance(value.op, str), value
        result = value.op(*args, **kwargs)
        return result if value.output_index is None else result[value.output_index]

    def _scatter(self, value: Value) -> Tensor:
        base, source, chain = value.args
        whole = self._known[base.id].clone()
        view = whole
        for op, others, kwargs, index in chain:
            others, kwargs = pytree.tree_map(self._argument, (list(others), dict(kwargs)))
            view = op(view, *others, **kwargs)
            view = view if index is None else view[index]
        view.copy_(self._known[source.id])
        return whole

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, Value):
            return self._known[argument.id]
        if self._wide and isinstance(argument, torch.dtype) and argument in _NARROW:
            return torch.float64
        return _torch_private.hint(argument)
