"""What Dynamo noted about a node's result (`example_value`), and whether a fake run agrees with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.fx as fx

from rocm_attn_compile import _torch_private as private
from rocm_attn_compile.capture import policy
from rocm_attn_compile.capture.memory import tensors_in
from rocm_attn_compile.symbolic import to_expr

MISSING: Any = object()
"""The node carries no example; None is an example too."""


class Opaque(Exception):
    """Raised while a node is handled: it is not executed, and its result becomes a leaf.

    Attributes:
        code: Why, for `Trace.not_executed`; the message is the text.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


def example_of(node: fx.Node) -> Any:
    """Dynamo's example of the result (`val` in graphs made by make_fx), or `MISSING`."""
    meta = node.meta
    return meta["example_value"] if "example_value" in meta else meta.get("val", MISSING)


def target_name(node: fx.Node) -> str:
    """The node's target in words."""
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def is_foreign(tensor: torch.Tensor) -> bool:
    """True for tensors that a strided fake cannot stand for: DTensor, nested, sparse, quantized."""
    return private.is_wrapper_subclass(tensor) or tensor.layout != torch.strided or tensor.is_quantized


def reshaped_in_place(nodes: Iterable[fx.Node]) -> dict[fx.Node, str]:
    """Nodes whose example is the tensor object that a `transpose_` or the like reshapes somewhere, with a code.

    Dynamo keeps one example per tensor object, so that all of them show the shape after the change.
    """
    nodes = list(nodes)
    changed = {id(example_of(node)) for node in nodes if policy.is_in_place_view(node)} - {id(MISSING)}
    if not changed:
        return {}
    return {node: "reshaped_in_place" for node in nodes if id(example_of(node)) in changed}


def contradicts(example: torch.Tensor, real: torch.Tensor) -> bool:
    """True if the example cannot describe the real tensor: then it was changed after it was noted."""
    if example.dim() != real.dim() or example.dtype != real.dtype:
        return True
    return any(
        isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(example.shape, real.shape, strict=True)
    )


def check_result(name: str, result: Any, example: Any) -> None:
    """Compare the tensors of a fake run with Dynamo's.

    Raises:
        Opaque: "meta_mismatch" if they differ in number, rank, dtype, device or a known size.
    """
    got, expected = tensors_in(result), tensors_in(example)
    if len(got) != len(expected):
        raise Opaque("meta_mismatch", f"{name} gave {len(got)} tensors; Dynamo noted {len(expected)}")
    for mine, theirs in zip(got, expected, strict=True):
        same = mine.dtype == theirs.dtype and mine.device.type == theirs.device.type and mine.dim() == theirs.dim()
        if not same or any(_differ(a, b) for a, b in zip(mine.shape, theirs.shape, strict=True)):
            raise Opaque("meta_mismatch", f"{name} gave {_words(mine)}; Dynamo noted {_words(theirs)}")


def _differ(left: Any, right: Any) -> bool:
    """True if the two sizes are numbers and differ; symbols may be spelled in different ways."""
    if isinstance(left, int) and isinstance(right, int):
        return left != right
    a, b = to_expr(left), to_expr(right)
    return bool(a.is_number and b.is_number and a != b)


def _words(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device.type}"
