"""`options={"verify": True}`: run what was rewritten both ways, and refuse it if the results differ.

The captured values of the old attention and the emitted nodes of the new one are computed from the same tensors: q, k,
v and the like are random numbers of the real shapes and strides; what masks are made of is first what the user passed
in, then adversarial: rows without a key, nothing masked, ones and twos. Both are judged against float64, gradients too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _torch_private, ops
from ..capture.replay import Replay
from ..capture.trace import Value
from ..reasons import Refusal
from ..recognize.kv_cache import leaves as cache_leaves
from ..recognize.region import Region
from ..spec import EmptyRows
from .builder import GraphBuilder

ROUNDS = ("as passed", "rows without a key", "nothing masked")
"""What the tensors that masks are made of hold."""

_FACTOR = 4.0
"""How many times the old code's error is allowed, both against float64: orders of summation differ by less."""

_ROUNDINGS = 8.0
"""As many roundings of the largest number are allowed where the old code happens to be exact."""


def verify(builder: GraphBuilder, region: Region, value: Value, result: fx.Node, inputs: Mapping[fx.Node, Any]) -> None:
    """Compare the old computation of `value` with the emitted nodes up to `result`.

    Args:
        builder: Holds the emitted nodes.
        region: The attention.
        value: What the old code gives where `result` now stands.
        result: The emitted node that replaces it.
        inputs: Placeholder -> tensor of the call that is being compiled, if it is known.

    Raises:
        Refusal: `verify_failed` with figures, or `verify_impossible`.
    """
    device = builder.device
    devices = [device] if device.type != "cpu" else []
    with (
        _torch_private.without_dispatch_modes(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
    ):
        for index, name in enumerate(ROUNDS):
            try:
                checked = list(_run(builder, region, value, result, _Leaves(region, inputs, index)))
            except Refusal:
                raise
            except Exception as error:  # a size that depends on data, an index out of range
                raise Refusal("verify_impossible", f"{name}: {type(error).__name__}: {error}") from error
            for what, old, new, exact in checked:
                _compare(f"{name}, {what}", old, new, exact, region.spec.mask.empty_rows)


class _Leaves:
    """The tensors that both ways start from; gradients flow to the float ones."""

    def __init__(self, region: Region, inputs: Mapping[fx.Node, Any], index: int) -> None:
        operands = [region.q, region.k, region.v, *(o for q, k, _ in region.second for o in (q, k))]
        operands += [factor for operand in operands for factor, _ in operand.factors]
        operands += [sinks for sinks in (region.sinks, region.row_sinks) if sinks is not None]
        # A latent form may be computed from what lies before k and v, so both ways start there.
        starts = [operand.value for operand in operands] if region.latent is None else region.latent.leaves
        if region.cache is not None:
            starts = [value for value in starts if value not in (region.k.value, region.v.value)]
            starts += cache_leaves(region.cache)
        self.cut = frozenset(value.id for value in starts if value.op != "constant")
        self.opened = frozenset(() if region.latent is None else (value.id for value in region.latent.opened))
        self._inputs, self._round = inputs, index
        self._generator = torch.Generator().manual_seed(index)
        self._known: dict[int, Tensor] = {}
        self._wants_grad = region.spec.requires_grad

    def __call__(self, value: Value) -> Tensor:
        if value.id not in self._known:
            tensor = self._make(value)
            if self._wants_grad and tensor.is_floating_point():
                tensor.requires_grad_()
            self._known[value.id] = tensor
        return self._known[value.id]

    @property
    def floats(self) -> list[Tensor]:
        return [tensor for tensor in self._known.values() if tensor.requires_grad]

    def _make(self, value: Value) -> Tensor:
        shape = [_torch_private.hint(size) for size in value.shape]
        stride = [_torch_private.hint(step) for step in value.stride]
        number = value.kwargs.get("value") if value.op == "constant" else None
        if number is not None:
            return torch.full(shape, number, dtype=value.dtype, device=value.device)
        # A dimension that is not in memory is expanded afterwards: nothing can be written to it.
        dense = [1 if step == 0 else size for size, step in zip(shape, stride)]
        tensor = torch.empty_strided(dense, stride, dtype=value.dtype, device=value.device)
        tensor.copy_(self._numbers(value, dense))
        return tensor.expand(shape)

    def _numbers(self, value: Value, shape: list[int]) -> Tensor:
        if value.dtype.is_floating_point:
            drawn = torch.randn(shape, generator=self._generator)
            return drawn if value.id in self.cut or self._is_learned(value) else self._bias(drawn, value.dtype)
        real = self._inputs.get(value.node) if value.op == "input" and value.node is not None else None
        if isinstance(real, Tensor) and _torch_private.is_fake(real):
            real = None
        drawn = torch.randint(0, 2, shape, generator=self._generator)
        if value.dtype == torch.bool:
            kept = drawn if real is None or self._round else real.detach().reshape(shape).cpu()
            return self._kept(kept.bool())
        if real is None:
            return drawn
        real = real.detach().reshape(shape).cpu()
        if self._round == 0 or real.numel() == 0 or not (real.min() >= 0 and real.max() <= 1):
            return real  # positions, lengths, tokens: other numbers may be out of range
        return self._kept(drawn.bool()).long() * (1 if self._round == 1 else 2)

    def _kept(self, drawn: Tensor) -> Tensor:
        """Round 1: nothing in the first half of the leading dimension; round 2: everything."""
        if self._round == 1 and drawn.ndim:
            drawn = drawn.clone()
            drawn[: (drawn.shape[0] + 1) // 2] = False
        return torch.ones_like(drawn) if self._round == 2 else drawn

    def _bias(self, drawn: Tensor, dtype: torch.dtype) -> Tensor:
        """A float tensor that may be a mask."""
        if self._round != 1 or not drawn.ndim:
            return drawn
        dropped = torch.rand(drawn.shape, generator=self._generator) < 0.5
        dropped[: (drawn.shape[0] + 1) // 2] = True
        return drawn.masked_fill(dropped, torch.finfo(dtype).min)

    def _is_learned(self, value: Value) -> bool:
        if value.node is None:
            return False
        nodes = [value.node, *value.node.all_input_nodes]
        return any(isinstance(node.meta.get("example_value"), torch.nn.Parameter) for node in nodes)


def _run(
    builder: GraphBuilder, region: Region, value: Value, result: fx.Node, leaves: _Leaves
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """`(what, old, new, exact)` for the result and each gradient."""
    replay = Replay(leaves, leaves.cut, opened=leaves.opened)
    old = replay(value)
    exact = Replay(leaves, leaves.cut, wide=True, opened=leaves.opened)(value)
    new = _run_emitted(builder, result, replay, leaves.cut)
    yield "result", old, new, exact
    floats = leaves.floats
    if not (floats and old.requires_grad and new.requires_grad):
        return
    weight = torch.randn(old.shape, generator=torch.Generator().manual_seed(9)).to(old.device)
    grads = [
        torch.autograd.grad((out * weight.to(out.dtype)).sum(), floats, allow_unused=True, retain_graph=True)
        for out in (old, new, exact)
    ]
    for tensor, *three in zip(floats, *grads):
        if any(grad is not None for grad in three):
            a, b, c = (torch.zeros_like(tensor) if grad is None else grad for grad in three)
            yield f"gradient of {list(tensor.shape)}", a, b, c.double()


def _run_emitted(builder: GraphBuilder, result: fx.Node, replay: Replay, cut: frozenset[int]) -> Tensor:
    """The emitted nodes, with the tensors of the old program for what they read."""
    known: dict[fx.Node, Any] = {}

    def read(node: fx.Node) -> Any:
        if node not in known:
            value = builder.sources.get(node)
            example = node.meta.get("example_value")
            known[node] = replay(value) if value is not None else _torch_private.hint(example)
        return known[node]

    for node in builder.emitted:
        if node in builder.sources or not isinstance(node.meta.get("example_value"), (Tensor, tuple)):
            continue
        if node in builder.remade and builder.remade[node].id in cut:
            known[node] = replay(builder.remade[node])  # the old way does not compute it either
            continue
        args, kwargs = pytree.tree_map_only(fx.Node, read, (node.args, dict(node.kwargs)))
        if node.target in (ops.attention, ops.attention_floored):
            kwargs["dropout_p"] = 0.0
        assert callable(node.target)
        known[node] = node.target(*args, **kwargs)
    return known[result]


def _compare(what: str, old: Tensor, new: Tensor, exact: Tensor, mode: EmptyRows) -> None:
    if old.shape != new.shape or old.dtype != new.dtype:
        raise Refusal("verify_failed", f"{what}: {new.dtype}{list(new.shape)} instead of {old.dtype}{list(old.shape)}")
    eps = torch.finfo(old.dtype).eps
    old, new, exact = (tensor.detach().double().cpu() for tensor in (old, new, exact))
    if mode is EmptyRows.NAN_ADDED and "gradient" in what:  # may spread NaN further, see recognize/masks.py
        new = torch.where(new.isnan() & old.isnan().any(), old, new)
    finite = old.isfinite()
    if not torch.equal(finite, new.isfinite()):
        count = int((finite != new.isfinite()).sum())
        raise Refusal("verify_failed", f"{what}: {count} of {old.numel()} numbers are finite in one of both only")
    finite &= exact.isfinite()
    if not finite.any():
        return
    error, reference = ((tensor - exact)[finite].abs().max().item() for tensor in (new, old))
    allowed = max(_FACTOR * reference, _ROUNDINGS * eps * max(exact[finite].abs().max().item(), 1.0))
    if error > allowed:
        raise Refusal(
            "verify_failed",
            f"{what}: off by {error:.3g} from float64, what it replaces by {reference:.3g}; allowed is {allowed:.3g}",
        )
