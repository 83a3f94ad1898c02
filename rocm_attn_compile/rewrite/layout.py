"""Which memory layout the op's output should have, so that what follows needs no copy and no view fails."""

from __future__ import annotations

import torch.fx as fx

from ..capture.trace import Value
from ..recognize.region import Region

_SWAP_NAMES = frozenset(("transpose", "permute", "swapaxes"))
_COPYING_NAMES = frozenset(("reshape", "contiguous", "flatten", "clone"))


def choose_out_layout(target: fx.Node, region: Region, value: Value) -> str:
    """ "bshd" if every reader swaps heads and queries and then copies or reshapes; else "bhsd".

    The usual `(p @ v).transpose(1, 2).reshape(b, s, h * d)` then reads memory that is already in order. A `.view` keeps
    the layout eager would have given it, because it fails on any other.
    """
    if value is not region.output.value or len(value.shape) != 4 or not target.users:
        return "bhsd"
    return "bshd" if all(_swaps_then_copies(user) for user in target.users) else "bhsd"


def _swaps_then_copies(node: fx.Node) -> bool:
    name = _name(node)
    if name not in _SWAP_NAMES or not node.users:
        return False
    numbers = list(node.args[1:])
    if len(numbers) == 1 and isinstance(numbers[0], (tuple, list)):
        numbers = list(numbers[0])
    swaps = numbers in ([1, 2], [2, 1], [-3, -2], [-2, -3]) if name != "permute" else numbers == [0, 2, 1, 3]
    return swaps and all(_name(user) in _COPYING_NAMES for user in node.users)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "").split(".")[0]
