"""What is near an attention, and has no softmax that recognition could start from.

Calls that are an attention or a softmax by name, on tensors that capture cannot look into; and exponentials that are
divided by another sum than their own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.fx as fx

from ..capture import policy
from ..capture.trace import Trace
from ..normalize.quotients import find_quotients
from ..normalize.softmax import SoftmaxAnchor
from ..reasons import Reason
from .kinship import stands_between_products
from .region import LookAlike


def unseen(trace: Trace) -> Iterator[LookAlike]:
    """Each of them with why it was not executed: nested tensors, DTensors, a fake run that failed."""
    for node, code, text in trace.not_executed:
        is_sdpa = node.target in policy.SDPA
        if node in trace.tensors and (is_sdpa or _name(node) == "softmax"):
            yield LookAlike(trace.tensors[node].value, Reason(code, text), is_attention=is_sdpa)


def quotients(trace: Trace, softmaxes: list[SoftmaxAnchor]) -> Iterator[LookAlike]:
    """Those between two matrix products."""
    for value, exponential in find_quotients(trace, softmaxes):
        if stands_between_products(exponential.args[0], value):
            text = "exponentials are divided by something else than the sum of their row: there is no softmax"
            yield LookAlike(value, Reason("no_softmax", text), is_attention=False)


def _name(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", "")
