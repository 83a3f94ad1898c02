"""The tensors of the canonical op for one mask: row limits, key mask, segment ids, dense mask."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch

from .classify import ClosedForm, RowValue
from .emit import Builder, Emitter, Handle
from .predicate import Predicate
from .values import symbols_of

aten = torch.ops.aten


class MaskEmitter:
    """The tensors that the canonical op takes, for one mask.

    All have shape `(B or 1, ...)`: several batch symbols are joined into one dimension.

    Args:
        builder: Makes the calls.
        form: The mask; its parts are passed to the methods, so that the caller may leave some out.
    """

    def __init__(self, builder: Builder, form: ClosedForm) -> None:
        self.builder = builder
        self.context = context = form.context
        self._bounds = bounds = form.logic.bounds
        self._batch = list(context.batch.items())
        self._rows = Emitter(builder, [*self._batch, (context.q, context.q_len)], bounds)
        self._keys = Emitter(builder, [*self._batch, (context.k, context.kv_len)], bounds)

    def rows(self, limits: Sequence[RowValue], combine: str) -> Handle | None:
        """kv_start (`combine="max"`) or kv_end (`"min"`) as int64 `(B or 1, q_len or 1)`; None without limits."""
        op = {"max": aten.maximum.default, "min": aten.minimum.default}[combine]
        result = None
        for limit in limits:
            handle = self._rows.number(limit)
            result = handle if result is None else self.builder.call(op, result, handle)
        used = {s for limit in limits for s in symbols_of(limit)}
        return None if result is None else self._joined(result, used, self.context.q, self.context.q_len)

    def key_mask(self, predicates: Sequence[Predicate]) -> Handle | None:
        """The conjunction as bool `(B or 1, kv_len)`; None without predicates."""
        if not predicates:
            return None
        result = self._keys.truth(predicates[0])
        for predicate in predicates[1:]:
            result = self.builder.call(aten.bitwise_and.Tensor, result, self._keys.truth(predicate))
        used = {s for predicate in predicates for s in symbols_of(predicate)}
        return self._joined(result, used, self.context.k, self.context.kv_len)

    def ids(self, pair: tuple[sympy.Expr, sympy.Expr]) -> tuple[Handle, Handle]:
        """q_ids `(B or 1, q_len)` and kv_ids `(B or 1, kv_len)`, int64, never broadcast along the sequence."""
        context = self.context
        of_query, of_key = self._rows.number(pair[0]), self._keys.number(pair[1])
        q_ids = self._joined(of_query, symbols_of(pair[0]), context.q, context.q_len, whole=True)
        return q_ids, self._joined(of_key, symbols_of(pair[1]), context.k, context.kv_len, whole=True)

    def dense(self, predicates: Sequence[Predicate]) -> Handle | None:
        """The conjunction as bool over `(batch..., heads..., q_len or 1, kv_len or 1)`; None without predicates."""
        context = self.context
        heads = list(context.heads.items())
        axes = [*self._batch, *heads, (context.q, context.q_len), (context.k, context.kv_len)]
        emitter = Emitter(self.builder, axes, self._bounds)
        result = None
        for predicate in predicates:
            handle = emitter.truth(predicate)
            result = handle if result is None else self.builder.call(aten.bitwise_and.Tensor, result, handle)
        return result

    def _joined(
        self, tensor: Handle, used: set[sympy.Symbol], axis: sympy.Symbol, length: sympy.Expr, whole: bool = False
    ) -> Handle:
        """Batch dimensions as one, expanded only if some of them matters; the sequence expanded if `whole`."""
        call, size = self.builder.call, self.builder.size
        batch = [symbol for symbol, _ in self._batch]
        varies = bool(used & set(batch))
        lengths = [size(n) if varies else 1 for _, n in self._batch]
        last = size(length) if whole or axis in used else 1
        rank = len(batch) + 1
        if (varies and len(batch) > 1) or (whole and axis not in used):
            tensor = call(aten.expand.default, tensor, [*lengths, last])
        if rank == 2:
            return tensor
        total = sympy.prod([n for _, n in self._batch]) if varies else sympy.Integer(1)
        return call(aten.reshape.default, tensor, [size(total), last])
