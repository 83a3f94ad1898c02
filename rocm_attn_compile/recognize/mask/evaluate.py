"""The value of a tensor of the captured program at a symbolic index.

    evaluator = Evaluator(Bounds({q: (0, q_len - 1), k: (0, kv_len - 1)}))
    evaluator.at(mask, (0, 0, q, k))      # [k - q <= 0] & %12:input[4, 16][0, k]

An index is pulled through the program from the mask to its inputs, one rule per ATen op (`rules_*.py`). An op without
a rule, or one whose exact result has no closed form, is read as a tensor: the result is always exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch

from ..._torch_private import schema_arguments
from .bounds import Bounds
from .integers import ZERO, expand, from_size, load
from .logic import Logic
from .predicate import BoolLoad
from .values import FloatLoad, Opaque, Scalar, Values, complexity, constant, symbols_of

if TYPE_CHECKING:
    from ...capture.trace import Value

# fmt: off
_BLIND_TO_SIGN_OF_ZERO = frozenset((
    "le", "lt", "ge", "gt", "eq", "ne", "logical_and", "logical_or", "logical_xor", "logical_not", "where",
    "masked_fill", "add", "sub", "rsub", "mul", "neg", "abs", "sign", "clamp", "clamp_min", "clamp_max", "maximum",
    "minimum", "isnan", "isinf", "exp", "log", "sigmoid", "tanh", "relu", "_to_copy", "copy", "nan_to_num", "sqrt",
))
# fmt: on
"""Elements are known up to the sign of a zero; only for these does a float result not depend on it otherwise."""

_DEPTH_LIMIT = 80
_COMPLEXITY_LIMIT = 128


class Call:
    """The arguments of a Value's op, by the names of its schema, defaults filled in."""

    def __init__(self, value: Value) -> None:
        self.value = value
        op: Any = value.op
        names = schema_arguments(op)
        self._arguments = dict(names)
        self._arguments.update(zip((name for name, _ in names), value.args))
        self._arguments.update(value.kwargs)

    def __getitem__(self, name: str) -> Any:
        return self._arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument, or `default` where the schema has none of that name."""
        return self._arguments.get(name, default)

    def __contains__(self, name: str) -> bool:
        return name in self._arguments


class Evaluator:
    """Evaluates elements of captured tensors under fixed facts about the index symbols.

    Attributes:
        bounds: Ranges of the index symbols; rules may add symbols of their own.
        logic, values: The algebra, simplifying by those ranges.
        unknown: `(value, reason)` for every tensor that had to be read although the program shows how it is computed.
        running_sums: Tensor read as it is -> `(summand, dim)` of the cumulative sum that it holds.
    """

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.logic = Logic(bounds)
        self.values = Values(self.logic)
        self.unknown: list[tuple[Value, str]] = []
        self.running_sums: dict[Value, tuple[Value, int]] = {}
        self._known: dict[tuple[Value, tuple[sympy.Expr, ...]], Scalar] = {}
        self._depth = 0

    def at(self, value: Value, index: tuple[sympy.Expr, ...] | list[sympy.Expr]) -> Scalar:
        """The element of `value` at `index`, one in-range expression per dimension. Never fails."""
        point = tuple(ZERO if from_size(size) == 1 else expand(i) for i, size in zip(index, value.shape))
        assert len(point) == value.ndim == len(index), f"index {index} for {value!r}"
        key = (value, point)
        if key not in self._known:
            self._depth += 1
            try:
                self._known[key] = self._evaluate(value, point)
            except (Opaque, RecursionError) as reason:
                self.unknown.append((value, str(reason)))
                self._known[key] = self.read(value, self._used_index(value, point))
            finally:
                self._depth -= 1
        return self._known[key]

    def operand(self, x: Any, index: tuple[sympy.Expr, ...]) -> Scalar:
        """An argument of a pointwise op at `index` of its result: a Value broadcasts, a number is itself."""
        if not hasattr(x, "shape"):
            return self.scalar(x)
        missing = len(index) - x.ndim
        return self.at(x, index[missing:])

    def scalar(self, x: Any) -> Scalar:
        """A Python number or `SymInt` argument."""
        if isinstance(x, (bool, int, float)):
            return constant(x)
        if isinstance(x, (torch.SymInt, sympy.Expr)):
            return from_size(x)
        raise Opaque(f"scalar argument of type {type(x).__name__}")

    def size(self, value: Value, dim: int) -> sympy.Expr:
        """A size of `value` as an expression."""
        return from_size(value.shape[dim])

    def read(self, value: Value, index: tuple[sympy.Expr, ...]) -> Scalar:
        """The element itself, as an atom."""
        if value.dtype == torch.bool:
            return BoolLoad(value, index)
        if value.dtype.is_floating_point or value.dtype.is_complex:
            return FloatLoad(value, index)
        return load(value, index)

    def _evaluate(self, value: Value, index: tuple[sympy.Expr, ...]) -> Scalar:
        if self._depth > _DEPTH_LIMIT:
            raise Opaque("computed in too many steps")
        if value.op == "constant" and value.kwargs.get("value") is not None:
            return self.values.cast(constant(value.kwargs["value"]), value.dtype)
        if value.op == "view_scatter":
            return RULES["view_scatter"](self, value, None, index)
        if isinstance(value.op, str):
            return self.read(value, index)
        rule = RULES.get(value.name)
        if rule is None:
            raise Opaque(f"no rule for {value.name}")
        result = rule(self, value, Call(value), index)
        if complexity(result) > _COMPLEXITY_LIMIT:
            raise Opaque(f"more than {_COMPLEXITY_LIMIT} cases")
        return result

    def _used_index(self, value: Value, index: tuple[sympy.Expr, ...]) -> tuple[sympy.Expr, ...]:
        """`index` with 0 in the dimensions along which a pointwise op's result does not change."""
        if isinstance(value.op, str):
            return index
        if any(isinstance(x, (list, tuple)) for x in (*value.args, *value.kwargs.values())):
            return index
        if torch.Tag.pointwise not in value.op.tags and value.name not in ("_to_copy", "copy"):
            return index
        arguments = [x for x in (*value.args, *value.kwargs.values()) if hasattr(x, "shape")]
        if value.name not in _BLIND_TO_SIGN_OF_ZERO and any(x.dtype.is_floating_point for x in arguments):
            return index
        used: set[sympy.Symbol] = set()
        for argument in arguments:
            used |= symbols_of(self.operand(argument, index))
        return tuple(ZERO if i.free_symbols.isdisjoint(used) else i for i in index)


from .rules import RULES  # noqa: E402  (the rules need the classes above)
