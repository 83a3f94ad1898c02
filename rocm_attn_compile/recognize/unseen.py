"""Calls that are an attention or a softmax by name, on tensors that capture cannot look into."""

from __future__ import annotations

from collections.abc import Iterator

import torch.fx as fx

from ..capture import policy
from ..capture.trace import Trace
from ..reasons import Reason
from .region import LookAlike


def unseen(trace: Trace) -> Iterator[LookAlike]:
    """Each of them with why it was not executed: nested tensors, DTensors, a fake run that failed."""
    for node, code, text in trace.not_executed:
        is_sdpa = node.target in policy.SDPA
        if node in trace.tensors and (is_sdpa or _name(node) == "softmax"):
            yield LookAlike(trace.tensors[node].value, Reason(code, text), is_attention=is_sdpa)


def _name(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", "")
