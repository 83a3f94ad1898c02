"""Launches planned on tensors whose sizes are symbols, then run at other sizes than those they were planned at.

That is what a compiled program does: it is planned once, with the sizes of the first call as hints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from rocm_attn_compile.kernels.triton.launch import Descriptor, Launch, Tuning


class Symbols:
    """Fakes of tensors, a symbol wherever the size is another one than it is in `actual`.

    Attributes:
        fakes: By name, as `actual`.
        env: In which guards would be noted.
    """

    def __init__(self, hints: dict[str, Any], actual: dict[str, Any]) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env)
        self.fakes: dict[str, Any] = {}
        self._values: dict[Any, int] = {}
        self._tensors: dict[int, Tensor] = {}
        for name, tensor in actual.items():
            fake = tensor if tensor is None else self._fake(name, hints[name], tensor)
            self.fakes[name] = fake
            self._tensors[id(fake)] = tensor

    def _fake(self, name: str, hint: Tensor, tensor: Tensor) -> Tensor:
        sizes = [DimDynamic.STATIC if a == b else DimDynamic.DUCK for a, b in zip(hint.shape, tensor.shape)]
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        fake = self.mode.from_tensor(hint, source=ConstantSource(name), symbolic_context=context)
        for symbols, values in ((fake.shape, tensor.shape), (fake.stride(), tensor.stride())):
            for symbol, value in zip(symbols, values):
                if isinstance(symbol, torch.SymInt) and symbol.node.expr.is_symbol:
                    assert self._values.setdefault(symbol.node.expr, value) == value, f"{name}: {symbol} is two sizes"
        assert self.value(fake.stride()) == tensor.stride(), f"{name}: {fake.stride()} for {tensor.stride()}"
        return fake

    @staticmethod
    def hint(number: Any) -> int:
        """As _torch_private.hint."""
        return number.node.hint if isinstance(number, torch.SymInt) else number

    def value(self, planned: Any) -> Any:
        """A number, tensor, descriptor or tuple of a plan, at the actual sizes.

        Tensors that the plan allocated are full of NaN.
        """
        if isinstance(planned, tuple):
            return tuple(map(self.value, planned))
        if isinstance(planned, torch.SymInt):
            return int(planned.node.expr.xreplace(self._values))
        if isinstance(planned, Descriptor):
            base, shape, strides = map(self.value, (planned.base, planned.shape, planned.strides))
            return replace(planned, base=base, shape=shape, strides=strides)
        if not isinstance(planned, Tensor):
            return planned
        if id(planned) not in self._tensors:
            made = torch.empty_strided(
                self.value(tuple(planned.shape)), self.value(planned.stride()), dtype=planned.dtype
            )
            self._tensors[id(planned)] = made.fill_(float("nan") if made.is_floating_point() else 0)
        return self._tensors[id(planned)]

    def run(self, plan: Callable[..., Any], tuning: dict[str, Any], is_free: bool = True, **settings: Any) -> Any:
        """`plan(**fakes, **settings, tuning=...)` gives launches and results; run them; return the results.

        Raises:
            AssertionError: The plan asked a size what made PyTorch guard, unless it is not `is_free`.
        """
        with self.mode:
            launches, *results = plan(**self.fakes, **settings, tuning=Tuning(traced=True, hint=self.hint, **tuning))
        assert not is_free or not self.env.guards, [str(guard.expr) for guard in self.env.guards]
        self.launches = [
            Launch(x.kernel, self.value(x.grid), {k: self.value(v) for k, v in x.arguments.items()}, x.options)
            for x in launches
        ]
        for launch in self.launches:
            launch.run()
        return tuple(map(self.value, results))
