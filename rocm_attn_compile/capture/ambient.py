"""Grad mode, inference mode and autocast, as a Dynamo graph switches them along the way.

Autocast is really entered, on the fakes' run only, so that the casts it inserts appear in the trace. Grad and
inference mode are only kept track of: the fakes run under `no_grad`, and a value just notes the mode it was made in.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.fx as fx

from rocm_attn_compile import _torch_private as private


class Ambient(AbstractContextManager):
    """Follows the mode switches of one graph; leaves the process as it found it.

    Attributes:
        grad_mode: Whether autograd would record at this point.
        functorch_depth: Number of vmap, grad and jvp levels entered and not left.
    """

    def __init__(self, grad_mode: bool | None = None) -> None:
        inference = torch.is_inference_mode_enabled()
        self._grad_enabled = torch.is_grad_enabled() and not inference if grad_mode is None else grad_mode
        self._inference: dict[fx.Node, bool] = {}
        self._autocast: dict[fx.Node, Any] = {}
        self.functorch_depth = 0

    @property
    def grad_mode(self) -> bool:
        """Whether autograd would record at this point."""
        return self._grad_enabled and not any(self._inference.values())

    def switch(self, node: fx.Node) -> bool:
        """Follow the node if it switches a mode.

        Returns:
            True if it was such a node, so that it must not run again.
        """
        if node.op != "call_function":
            return False
        target = node.target
        entry: Any = node.args[0] if node.args else None
        if target is private.set_grad_enabled:
            self._grad_enabled = bool(entry)
        elif target is private.enter_inference_mode:
            self._inference[node] = bool(entry)
        elif target is private.exit_inference_mode:
            self._inference.pop(entry, None)
        elif target is private.enter_autocast:
            self._autocast[node] = private.enter_autocast(*node.args)
        elif target is private.exit_autocast:
            mode = self._autocast.pop(entry, None)
            if mode is not None:
                private.exit_autocast(mode)
        else:
            name = getattr(target, "__name__", "")
            if name.endswith("_increment_nesting"):
                self.functorch_depth += 1
            elif name.endswith("_decrement_nesting"):
                self.functorch_depth -= 1
            return False
        return True

    def __exit__(self, *exception: object) -> None:
        # A graph can end inside `with autocast`, when Dynamo breaks it there.
        for mode in reversed(self._autocast.values()):
            private.exit_autocast(mode)
        self._autocast.clear()
