"""Pointwise ops: logic on predicates, exact integer arithmetic, and constants computed by torch itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch

from ..._torch_private import schema_arguments
from .arithmetic import SYMBOLIC, common_dtype, compare
from .predicate import is_predicate
from .values import Opaque, Scalar, as_constant, constant

if TYPE_CHECKING:
    from ...capture.trace import Value
    from .evaluate import Call, Evaluator

Index = tuple[sympy.Expr, ...]

COMPARISONS = ("le", "lt", "ge", "gt", "eq", "ne")

# fmt: off
ROUNDED_ONCE = (
    "add", "sub", "rsub", "mul", "div", "neg", "abs", "sign", "sgn", "square", "reciprocal",
    "sqrt", "floor", "ceil", "trunc", "round", "clamp", "clamp_min", "clamp_max", "minimum", "maximum", "fmin",
    "fmax", "floor_divide", "remainder", "fmod", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not",
    "bitwise_left_shift", "bitwise_right_shift", "isnan", "isinf", "isposinf", "isneginf", "nan_to_num",
    "rsqrt", "pow", "exp", "log",
)
# fmt: on
"""Ops whose result on constants is computed with torch on the CPU. All but a few are rounded once, alike everywhere."""

_WIDE = {bool: torch.bool, int: torch.int64, float: torch.float64}

_SPECIAL_POINTS = {"exp": (0.0, float("-inf"), float("inf")), "log": (0.0, 1.0, float("inf")), "rsqrt": (1.0,)}
"""Functions that devices may round differently, and where they may not."""


def cast(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """`to(dtype)`; device and layout do not matter."""
    source = call["self"]
    x = ev.at(source, index)
    return x if source.dtype == value.dtype else ev.values.cast(x, value.dtype)


def operands(call: Call) -> list[tuple[str, Any]]:
    """Arguments that are elementwise inputs: tensors, and numbers in the places of tensors."""
    names = ("self", "other", "min", "max", "exponent", "values")
    return [(name, call[name]) for name in names if name in call and call[name] is not None]


def arithmetic(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """Numbers in, numbers out; every case of an `If` on its own."""
    named = operands(call)
    elements = [ev.operand(x, index) for _, x in named]
    if all(x.dtype == torch.bool if hasattr(x, "shape") else isinstance(x, bool) for _, x in named):
        return _on_bools(ev, value, elements)

    def leaf(*numbers: Scalar) -> Scalar:
        constants = [as_constant(x) for x in numbers]
        if None not in constants and value.name in ROUNDED_ONCE:
            return on_constants(value, call, dict(zip((name for name, _ in named), constants)))
        symbolic = SYMBOLIC.get(value.name)
        if symbolic is None:
            raise Opaque(f"{value.name} of something that is not constant")
        return symbolic(ev, value, call, {name: x for (name, _), x in zip(named, numbers)})

    return ev.values.lift(leaf, *elements)


def on_constants(value: Value, call: Call, constants: dict[str, Any]) -> Scalar:
    """The op itself on one-element CPU tensors of the dtypes of its arguments."""
    allowed = _SPECIAL_POINTS.get(value.name)
    if (value.name == "div" and constants.get("other") == 0) or (value.name == "reciprocal" and constants["self"] == 0):
        raise Opaque("division by a zero whose sign is not kept")
    if value.name == "pow" and value.dtype.is_floating_point:
        raise Opaque("a float power depends on the device")
    if allowed is not None and constants["self"] not in allowed:
        raise Opaque(f"{value.name}({constants['self']}) depends on the device")

    def swap(name: str, x: Any) -> Any:
        if name not in constants or not hasattr(x, "shape"):
            return x
        # 0-d tensors promote differently from tensors with dimensions.
        number = torch.tensor(constants[name], dtype=_WIDE[type(constants[name])], device="cpu")
        return number.to(x.dtype).reshape([1] * min(x.ndim, 1))

    op: Any = value.op
    args = [swap(name, x) for (name, _), x in zip(schema_arguments(op), value.args)]
    kwargs = {name: swap(name, x) for name, x in value.kwargs.items()}
    result = op(*args, **kwargs)
    if result.dtype != value.dtype or result.numel() != 1:
        raise Opaque(f"{value.name} gives {result.dtype} on constants")
    return constant(result.item())


def _on_bools(ev: Evaluator, value: Value, elements: list[Scalar]) -> Scalar:
    """Arithmetic that stays bool: `mul` is and, `add` and `maximum` are or."""
    elements = [ev.values.cast(x, torch.bool) for x in elements]
    if value.name in ("mul", "minimum", "bitwise_and"):
        return ev.logic.all_of(elements)
    if value.name in ("add", "maximum", "bitwise_or"):
        return ev.logic.any_of(elements)
    if value.name == "bitwise_xor":
        return ev.logic.choose(elements[0], ev.logic.negate(elements[1]), elements[1])
    if value.name == "bitwise_not":
        return ev.logic.negate(elements[0])
    raise Opaque(f"{value.name} of bools")


def comparison(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """`le`, `eq`, ... of numbers or bools."""
    left, right = (ev.operand(call[name], index) for name in ("self", "other"))
    if is_predicate(left) and is_predicate(right) and value.name in ("eq", "ne"):
        equal = ev.logic.choose(left, right, ev.logic.negate(right))
        return equal if value.name == "eq" else ev.logic.negate(equal)
    dtype = common_dtype(call["self"], call["other"])
    return ev.values.lift(lambda a, b: compare(ev, value.name, a, b, dtype), left, right)


def connective(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """`logical_and`, `logical_or`, `logical_xor`, `logical_not`: inputs of any dtype, by truth."""
    truths = [ev.values.cast(ev.operand(x, index), torch.bool) for _, x in operands(call)]
    if value.name == "logical_not":
        return ev.logic.negate(truths[0])
    if value.name == "logical_xor":
        return ev.logic.choose(truths[0], ev.logic.negate(truths[1]), truths[1])
    return ev.logic.all_of(truths) if value.name == "logical_and" else ev.logic.any_of(truths)


def converted(ev: Evaluator, value: Value, x: Any, index: Index) -> Scalar:
    """An operand converted to the result's dtype."""
    element = ev.operand(x, index)
    return element if getattr(x, "dtype", None) == value.dtype else ev.values.cast(element, value.dtype)


def where(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """Elementwise choice."""
    condition = ev.values.cast(ev.operand(call["condition"], index), torch.bool)
    return _choice(ev, value, condition, call["self"], call["other"], index)


def masked_fill(ev: Evaluator, value: Value, call: Call, index: Index) -> Scalar:
    """The fill where the mask is True."""
    mask = ev.values.cast(ev.operand(call["mask"], index), torch.bool)
    return _choice(ev, value, mask, call["value"], call["self"], index)


def _choice(ev: Evaluator, value: Value, condition: Any, then: Any, otherwise: Any, index: Index) -> Scalar:
    if condition is True:
        return converted(ev, value, then, index)
    if condition is False:
        return converted(ev, value, otherwise, index)
    return ev.values.choose(condition, converted(ev, value, then, index), converted(ev, value, otherwise, index))


RULES = {
    "_to_copy": cast,
    "to": cast,
    "type_as": cast,
    "where": where,
    "masked_fill": masked_fill,
    **dict.fromkeys(ROUNDED_ONCE, arithmetic),
    **dict.fromkeys(("logical_and", "logical_or", "logical_xor", "logical_not"), connective),
    **dict.fromkeys(("__and__", "__or__", "__xor__"), arithmetic),
    **dict.fromkeys(COMPARISONS, comparison),
}
