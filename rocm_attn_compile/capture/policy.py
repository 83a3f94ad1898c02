"""Which nodes of a Dynamo graph capture may run, which it cuts, and which it leaves opaque.

Running a node on fake tensors is safe only if it touches nothing but its tensors. So this is an allow-list:
what is not known to be a plain tensor function is not run.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F

from rocm_attn_compile import _torch_private as private

aten = torch.ops.aten

CUT: frozenset[Callable] = frozenset(
    {
        F.linear,
        F.bilinear,
        F.layer_norm,
        F.rms_norm,
        F.group_norm,
        F.embedding,
        F.gelu,
        F.silu,
        F.mish,
        F.relu,
        F.relu6,
        F.hardswish,
        F.leaky_relu,
        F.elu,
        torch.layer_norm,
        torch.rms_norm,
        torch.group_norm,
        torch.embedding,
        torch.relu,
        torch.cos,
        torch.sin,
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        torch.conv_transpose1d,
        torch.conv_transpose2d,
        torch.conv_transpose3d,
        F.cross_entropy,
        aten.linear.default,
        aten.layer_norm.default,
        aten.rms_norm.default,
        aten.group_norm.default,
        aten.embedding.default,
        aten.gelu.default,
        aten.silu.default,
        aten.relu.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
    }
)
"""Functions whose result is taken from Dynamo's `example_value` without running them, to halve the time of capture.

Each returns fresh memory and writes nothing (`is_cut` excludes the calls that do). No attention or mask is seen
through any of them, so nothing is lost: their output is "opaque", an exact leaf.
"""

# Function, position and name of the argument that makes it write in place: `max_norm` renormalises the table.
_CUT_UNLESS = (
    (F.embedding, 3, "max_norm"),
    (F.relu, 1, "inplace"),
    (F.relu6, 1, "inplace"),
    (F.silu, 1, "inplace"),
    (F.mish, 1, "inplace"),
    (F.hardswish, 1, "inplace"),
    (F.leaky_relu, 2, "inplace"),
    (F.elu, 2, "inplace"),
)

SDPA: frozenset[Callable] = frozenset(
    {F.scaled_dot_product_attention, aten.scaled_dot_product_attention, aten.scaled_dot_product_attention.default}
)
"""Calls recorded whole as "sdpa"."""

DROPOUT: frozenset[Callable] = frozenset({F.dropout, torch.dropout, aten.dropout, aten.dropout.default})
"""Calls recorded whole as "dropout" that return one tensor."""

DROPOUT_IN_PLACE: frozenset[Callable] = frozenset({torch.dropout_, aten.dropout_, aten.dropout_.default})
"""As DROPOUT, but they write their input."""

NATIVE_DROPOUT: frozenset[Callable] = frozenset(
    {torch.native_dropout, aten.native_dropout, aten.native_dropout.default}
)
"""As DROPOUT, but they return `(output, keep mask)`."""

_TENSOR_MODULES = frozenset(
    {
        "torch.functional",
        "torch.nn.functional",
        "torch._C._nn",
        "torch._C._linalg",
        "torch._C._special",
        "torch._C._fft",
        "torch._tensor",
    }
)
_EINOPS = frozenset({"rearrange", "repeat", "einsum"})
"""Functions of einops that Dynamo of torch before 2.13 puts into the graph as they are: views, `expand`, `einsum`."""
_TENSOR_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "real", "imag"})
_IDENTITY_METHODS = frozenset({"requires_grad_", "retain_grad"})
# These change what a tensor *is* (its storage, history or hooks), which a fake copy cannot follow.
_STATEFUL_METHODS = frozenset(
    {"backward", "set_", "set_data", "resize_", "resize_as_", "register_hook", "share_memory_", "storage", "data_ptr"}
)
_IN_PLACE_VIEWS = frozenset(
    {"t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "as_strided_", "resize_", "set_"}
)

_WRITING_DUNDERS = frozenset({name for name in dir(operator) if name.startswith("__i")} | {"__setitem__"}) - {
    "__index__",
    "__inv__",
    "__invert__",
}

FUNCTORCH_MODULES = ("torch._C._functorch", "torch._functorch", "torch.autograd.forward_ad")
_FUNCTORCH_NAMES = frozenset({"_make_dual", "_unpack_dual"})
"""Functions of no module, as torch 2.12 has them in the graph of `torch.func.jvp`."""

NESTED_REGIONS = frozenset(
    {"tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap", "cond", "invoke_subgraph", "hints_wrapper"}
)
"""Higher-order ops whose bodies run once per call on the op's own operands, so that each can be compiled by itself."""

PURE_REGIONS = frozenset(
    {"cond", "flex_attention", "flex_attention_backward", "scan", "associative_scan", "map", "map_impl", "while_loop"}
)
"""Higher-order ops that PyTorch keeps from writing their operands."""


def is_cut(node: fx.Node) -> bool:
    """True if the node is a call of a `CUT` function that returns fresh memory and writes nothing."""
    if node.op != "call_function" or node.target not in CUT:
        return False
    for function, position, name in _CUT_UNLESS:
        if node.target is function:
            flag = node.args[position] if len(node.args) > position else node.kwargs.get(name)
            return flag is None or flag is False
    return True


def higher_order_name(node: fx.Node) -> str | None:
    """The name of the higher-order op a node calls, or None."""
    if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
        return node.target.name()
    return None


def is_functorch(node: fx.Node) -> bool:
    """True for calls that enter, leave or cross a vmap/grad/jvp level."""
    if node.op != "call_function":
        return False
    module = getattr(node.target, "__module__", None) or ""
    return module.startswith(FUNCTORCH_MODULES) or getattr(node.target, "__name__", "") in _FUNCTORCH_NAMES


def is_identity(node: fx.Node) -> bool:
    """True for methods that return their tensor unchanged and only concern autograd."""
    return node.op == "call_method" and node.target in _IDENTITY_METHODS


def is_data_attribute(node: fx.Node) -> bool:
    """True for `x.data`, which Dynamo spells as a call of a private function."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "_get_data_attr"


def is_in_place_view(node: fx.Node) -> bool:
    """True for methods that change a tensor object's own shape (`transpose_`)."""
    return node.op == "call_method" and node.target in _IN_PLACE_VIEWS


def is_runnable(node: fx.Node) -> bool:
    """True if the node is a plain tensor computation that can run on fakes without side effects."""
    if node.op == "call_method":
        return node.target not in _STATEFUL_METHODS and not str(node.target).startswith("__set")
    if node.op != "call_function":
        return False
    target: Any = node.target
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return True
    if target is getattr:
        return node.args[1] in _TENSOR_ATTRIBUTES
    module = getattr(target, "__module__", None) or ""
    name = getattr(target, "__name__", "")
    if module in ("_operator", "operator"):
        return True
    if _is_method_descriptor(target):
        return name not in _STATEFUL_METHODS
    if _is_einops(target):
        return True
    if module in _TENSOR_MODULES:
        return not name.startswith("_") or module == "torch._tensor"
    # Underscored names are also PyTorch's own switches; those that are ATen ops are plain functions.
    return private.is_generated_function(target) and (not name.startswith("_") or hasattr(aten, name))


def may_write(node: fx.Node) -> bool:
    """True unless the call, by its name or schema, cannot write its arguments."""
    target: Any = node.target
    if node.op == "call_method":
        return _is_writing_method(target)
    if node.op != "call_function":
        return True
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    name = getattr(target, "__name__", "")
    module = getattr(target, "__module__", None) or ""
    if target is operator.setitem or "out" in node.kwargs:
        return True
    if module == "_operator":
        return f"__{name}__" in _WRITING_DUNDERS
    if _is_method_descriptor(target):
        return _is_writing_method(name)
    if private.is_generated_function(target):
        return name.endswith("_") or name in ("batch_norm", "instance_norm", "native_batch_norm")
    # Of anything that is not known to leave its arguments alone, assume the worst.
    return not (is_functorch(node) or _is_einops(target) or target is getattr or module in ("builtins", "math"))


def _is_writing_method(name: str) -> bool:
    return name.endswith("_") and (not name.endswith("__") or name in _WRITING_DUNDERS)


def _is_einops(target: Any) -> bool:
    return getattr(target, "__module__", None) == "einops.einops" and getattr(target, "__name__", "") in _EINOPS


def _is_method_descriptor(target: Any) -> bool:
    owner = getattr(target, "__objclass__", None)
    return isinstance(owner, type) and issubclass(torch.Tensor, owner)
