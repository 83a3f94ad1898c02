"""Count attention sites by watching a model run eagerly. Shares nothing with the package's recogniser.

Every tensor that a run makes is marked with what it stems from:

    score    a product of two activations, and what is computed from it element by element or by mixing heads
    weights  a softmax over scores, and what is computed from it element by element or by views

A site is a softmax over scores whose weights are then a factor of a matrix product that sums over the axis of the
softmax, or a call of `F.scaled_dot_product_attention`. A softmax of a router, of a gate or of class logits is none.
Whether the product sums over the softmax axis is seen from the numbers: there, the weights of a row add up to one.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_TORCH = os.path.dirname(torch.__file__) + os.sep
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "dot", "addmv", "matmul", "linear"}
_CUTS = {"native_layer_norm", "native_group_norm", "native_batch_norm", "embedding", "_softmax"}
_VIEWS = {
    *("slice", "select", "split", "split_with_sizes", "unbind", "chunk", "narrow", "cat", "index", "index_select"),
    *("constant_pad_nd", "as_strided", "gather", "slice_scatter", "select_scatter", "repeat", "unfold"),
}
_MOST_HEADS = 32
"""A matrix of parameters that is no larger mixes heads; a larger one mixes channels."""
_FUSED_SDPA = {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable"}


class SiteWatch(TorchDispatchMode):
    """`with SiteWatch() as watch: model(...)`, under no_grad; then `watch.softmax` and `watch.sdpa`.

    Attributes:
        softmax, sdpa: Sites by the "file:line" of the softmax, or of the call, outside PyTorch.
        other: Softmaxes that are no sites, by their line.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.sdpa: Counter[str] = Counter()
        self._softmaxes: list[dict] = []
        self._inside_sdpa = False
        self._written: dict[int, torch.UntypedStorage] = {}  # storages into which scores were copied, kept alive
        for parameter in model.parameters():
            parameter._zoo_is_parameter = True  # type: ignore[attr-defined]

    @property
    def softmax(self) -> Counter[str]:
        return Counter(s["line"] for s in self._softmaxes if s["is_site"])

    @property
    def other(self) -> Counter[str]:
        return Counter(s["line"] for s in self._softmaxes if not s["is_site"])

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[-1]
        result = function(*args, **(kwargs or {}))
        if self._inside_sdpa:
            return result
        if name in _FUSED_SDPA:
            self.sdpa[_line()] += args[1].shape[-2] > 1
            return result
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if name in _PRODUCTS:
            self._product(name, inputs, outputs[0])
        elif name in ("_softmax", "_safe_softmax"):
            self._softmax(inputs[0], outputs[0], args[1])
        elif name in ("div", "div_") and self._is_exp_over_sum(inputs):
            self._softmax(inputs[0], outputs[0], None)
        else:
            self._pass_on(name.removesuffix("_"), inputs, outputs)
        return result

    def _product(self, name: str, inputs: list[Tensor], output: Tensor) -> None:
        left, right = inputs[-2:]
        for weights, axis in ((left, -1), (right, -2 if right.ndim > 1 else -1)):
            for site in getattr(weights, "_zoo_weights", ()):
                if not site["is_site"] and site["scored"]:
                    site["is_site"] = _sums_to_one(weights, axis)
        parameters = [t for t in (left, right) if getattr(t, "_zoo_is_parameter", False)]
        is_linear = bool(parameters)
        mixes_heads = is_linear and all(size <= _MOST_HEADS for size in parameters[0].shape)
        of_weights = any(site["scored"] for t in (left, right) for site in getattr(t, "_zoo_weights", ()))
        of_scores = any(map(self._is_score, (left, right)))
        weights_of = [site for t in (left, right) for site in getattr(t, "_zoo_weights", ()) if not site["is_site"]]
        output._zoo_weights = tuple(weights_of) if mixes_heads else ()  # type: ignore[attr-defined]  # heads mixed
        output._zoo_score = of_scores and mixes_heads if is_linear else not of_weights  # type: ignore[attr-defined]

    def _softmax(self, scores: Tensor, weights: Tensor, dim: int | None) -> None:
        is_scored = getattr(scores, "_zoo_score", False) and (
            dim is None or scores.shape[dim] > 1
        )  # one key: no choice
        found = {"line": _line(), "scored": is_scored, "is_site": False}
        self._softmaxes.append(found)
        weights._zoo_weights = (found,)  # type: ignore[attr-defined]
        weights._zoo_score = False  # type: ignore[attr-defined]

    def _is_score(self, tensor: Tensor) -> bool:
        return getattr(tensor, "_zoo_score", False) or tensor.untyped_storage().data_ptr() in self._written

    def _is_exp_over_sum(self, inputs: list[Tensor]) -> bool:
        if len(inputs) != 2:
            return False
        exp = getattr(inputs[0], "_zoo_exp", None)
        return exp is not None and exp is getattr(inputs[1], "_zoo_exp_sum", None)

    def _pass_on(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if name in _CUTS:
            return
        sources = inputs[1:] if name == "copy" else inputs
        if name == "copy" and self._is_score(sources[0]):
            storage = inputs[0].untyped_storage()
            self._written[storage.data_ptr()] = storage
        for output in outputs:
            if not isinstance(output, Tensor):
                continue
            if name == "exp":
                output._zoo_exp = object()  # type: ignore[attr-defined]
            if name in ("sum", "expand", "unsqueeze", "view", "add", "clamp"):
                exp = next(
                    (e for t in inputs for k in ("_zoo_exp", "_zoo_exp_sum") if (e := getattr(t, k, None))), None
                )
                output._zoo_exp_sum = exp  # type: ignore[attr-defined]
            kept = [t for t in sources if name in _VIEWS or output.numel() == t.numel()]
            sites = tuple(site for t in kept for site in getattr(t, "_zoo_weights", ()))
            output._zoo_weights = sites  # type: ignore[attr-defined]
            output._zoo_score = any(  # type: ignore[attr-defined]
                self._is_score(t) for t in sources if output.numel() >= t.numel() or name in _VIEWS
            )
            if name in (
                "t",
                "transpose",
                "view",
                "expand",
                "_to_copy",
                "permute",
                "unsqueeze",
                "detach",
                "alias",
                "slice",
            ):
                output._zoo_is_parameter = getattr(inputs[0], "_zoo_is_parameter", False)  # type: ignore[attr-defined]

    @contextmanager
    def watching(self) -> Iterator[SiteWatch]:
        """Also sees calls of `F.scaled_dot_product_attention`, which may decompose into a softmax."""
        functional = torch.nn.functional
        original = functional.scaled_dot_product_attention

        def counted(*args, **kwargs):
            if self._inside_sdpa:
                return original(*args, **kwargs)
            key = args[1] if len(args) > 1 else kwargs["key"]
            if key.shape[-2] > 1:  # one key: no choice
                self.sdpa[_line()] += 1
            self._inside_sdpa = True
            try:
                return original(*args, **kwargs)
            finally:
                self._inside_sdpa = False

        functional.scaled_dot_product_attention = counted
        try:
            with self:
                yield self
        finally:
            functional.scaled_dot_product_attention = original


def _sums_to_one(weights: Tensor, axis: int) -> bool:
    """Over `axis`; where rows add up to one over no axis (sinks, zeroed heads), the last one is taken to be meant."""

    def share(dim: int) -> float:
        return float(((weights.double().sum(dim) - 1).abs() < 0.03).double().mean())

    if share(axis) > 0.5:
        return True
    other = -1 if axis == -2 else -2
    return weights.ndim > 1 and share(other) <= 0.5


def _line() -> str:
    """ "file:line" of the innermost frame outside PyTorch and outside this file."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and "<" not in file and not file.startswith(_TORCH):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "unknown"
