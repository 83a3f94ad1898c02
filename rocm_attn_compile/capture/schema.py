"""What one ATen overload does to memory: what it writes, what it aliases, and its functional twin."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch._ops import OpOverload

# In these two the schema is silent about a write: training-mode batch norm updates its running statistics.
_UNDECLARED_WRITES = {
    "aten::native_batch_norm": ("running_mean", "running_var"),
    "aten::cudnn_batch_norm": ("running_mean", "running_var"),
    "aten::miopen_batch_norm": ("running_mean", "running_var"),
}


@dataclass(frozen=True)
class Effects:
    """Memory behaviour of an overload, from its schema.

    Attributes:
        writes: `(position, name)` of each argument that is written; position is None for keyword-only ones.
        aliased: `(position, name)` of the argument that the outputs alias, or None.
        functional: The overload that returns what this one writes (`add` for `add_`), or None.
        changes_metadata: An in-place view (`transpose_`): the tensor object gets a new shape, no data is written.
        unchecked: Shape and stride of a written tensor may change (`resize_`, `set_`, `out=`).
    """

    writes: tuple[tuple[int | None, str], ...]
    aliased: tuple[int | None, str] | None
    functional: OpOverload | None
    changes_metadata: bool
    unchecked: bool


@functools.cache
def effects(op: OpOverload) -> Effects:
    """Read the memory behaviour of `op` from its schema."""
    schema = op._schema
    undeclared = _UNDECLARED_WRITES.get(schema.name, ())
    writes: list[tuple[int | None, str]] = []
    aliased = None
    for position, argument in enumerate(schema.arguments):
        place = (None if argument.kwarg_only else position, argument.name)
        alias = argument.alias_info
        if (alias is not None and alias.is_write) or argument.name in undeclared:
            writes.append(place)
        elif alias is not None and aliased is None and any(r.alias_info is not None for r in schema.returns):
            aliased = place
    changes_metadata = torch.Tag.inplace_view in op.tags
    functional = functional_overload(op) if len(writes) == 1 and not undeclared else None
    unchecked = bool(writes) and (any(name == "out" for _, name in writes) or (changes_metadata and functional is None))
    return Effects(tuple(writes), aliased, functional, changes_metadata and functional is not None, unchecked)


def functional_overload(op: OpOverload) -> OpOverload | None:
    """The functional overload with the same arguments (`aten.add.Tensor` for `aten.add_.Tensor`), or None.

    None also for random in-place ops whose functional overload takes other arguments, and for `out=` variants.
    """
    namespace, name = op._schema.name.split("::")
    if name.startswith("__i") and name.endswith("__"):
        name = "__" + name[3:]
    elif name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    else:
        return None
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if packet is None:
        return None
    overloads = [packet_overload for packet_overload in packet.overloads() if packet_overload == op._overloadname]
    overloads += [other for other in packet.overloads() if other != op._overloadname]
    for overload in overloads:
        candidate = getattr(packet, overload)
        if _same_arguments(op, candidate) and not candidate._schema.is_mutable and len(candidate._schema.returns) == 1:
            return candidate
    return None


def _same_arguments(op: OpOverload, candidate: OpOverload) -> bool:
    left, right = op._schema.arguments, candidate._schema.arguments
    return len(left) == len(right) and all(
        # `type` prints alias annotations; the kind of the unannotated type is what must agree.
        a.name == b.name and a.kwarg_only == b.kwarg_only and str(a.type) == str(b.type)
        for a, b in zip(left, right, strict=True)
    )
