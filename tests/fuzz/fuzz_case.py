"""A generated program with its settings: drawn from a random generator, run on inputs of its own, and listed."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fuzz_attention import attention
from fuzz_decoding import decoding

CACHES = 0.4
"""How many of the programs have a KV cache, and are called several times."""


@dataclass
class Ran:
    """What a program did in all its calls: results, gradients, and what is in its inputs after each call.

    `aliases` are pairs of a result and an input that share memory.
    """

    results: list = field(default_factory=list)
    gradients: list = field(default_factory=list)
    inputs: list = field(default_factory=list)
    aliases: list[tuple[int, int]] = field(default_factory=list)

    def all(self) -> list:
        return [*self.results, *self.gradients, *self.inputs]


@dataclass
class Case:
    """A program with its inputs and settings; `listing` is a script that shows it again.

    Attributes:
        source, inputs, changes, schedule, kept, feeds: See `Program`; `feeds` has the number of a result.
        dtype: Of what `rand` makes.
        grads: Which inputs require grad.
        dynamic, lowering: As for `compile_graph`.
        has_ones: A product over one element is a multiplication.
        is_cache: The program has a KV cache.
        writes_exactly: What it writes into its inputs does not depend on an attention.
        no_grad: It runs under `torch.no_grad`.
        is_large: What is overwritten is taken for too large to be copied before.
    """

    source: str
    inputs: list[tuple[str, str]]
    changes: list[str]
    dtype: torch.dtype
    grads: list[bool]
    dynamic: bool | None
    lowering: str
    has_ones: bool
    schedule: list[tuple[int, int]]
    kept: list[str]
    feeds: dict[str, int]
    is_cache: bool = False
    writes_exactly: bool = False
    no_grad: bool = False
    is_large: bool = False

    @classmethod
    def draw(cls, rng: random.Random) -> Case:
        """A program of any kind: of a cache, or of one attention."""
        is_cache = rng.random() < CACHES
        draw = decoding if is_cache else attention
        program, result = draw(rng)
        if rng.random() < 0.4:  # most have an edit that changes the meaning, and are refused
            for _ in range(9):
                if program.changes:
                    program, result = draw(rng)
        dtypes = [torch.float64] * 5 + [torch.float32] * 3 + [torch.bfloat16, torch.float16]
        dtype = rng.choice([torch.bfloat16, torch.float16] if program.is_half else dtypes)
        trains = rng.random() < (0.15 if is_cache else 0.5)
        # A cache that trains would be a leaf that is written in place, which autograd forbids.
        stays = {*program.kept, *program.feeds}
        floats = [e.startswith("rand(") and e.endswith(")") and name not in stays for name, e in program.inputs]
        grads = [trains and may and rng.random() < 0.8 for may in floats]
        if program.detaches and any(grads):
            program.change("detached")
        dynamic = rng.choice([None, None, None, True])
        if any(name.startswith("alias") for name, _ in program.inputs):
            dynamic = (
                None  # see docs/recognition.md: AOTAutograd cannot compare such inputs where a size became a number
            )
        source = program.source(result)
        # Without functionalisation, a write after the op is a write to what autograd saved.
        writes = any(grads) if is_cache else "_(" in source
        lowering = "aot_eager" if writes or rng.random() < (0.5 if is_cache else 0.1) else "eager"
        names = result.strip("(),").split(", ")
        has_ones = 1 in program.sizes.values()
        if is_cache:  # any size but that of what is summed over may be one: here the keys of a first call
            has_ones = program.sizes["n"] == "n" and (0, 1) in program.schedule
        return cls(
            source, program.inputs, program.changes, dtype, grads, dynamic, lowering,
            has_ones=has_ones,
            # What the first call's backward needs is overwritten by the second.
            schedule=program.schedule[: 1 if any(grads) and program.kept and not program.feeds else None],
            kept=program.kept,
            feeds={name: names.index(variable) for name, variable in program.feeds.items()},
            is_cache=is_cache, writes_exactly=is_cache and not program.writes_results,
            no_grad=is_cache and not any(grads) and rng.random() < 0.5, is_large=is_cache and rng.random() < 0.5,
        )  # fmt: skip

    def listing(self) -> str:
        """The program, and how it is called, as Python."""
        settings = f"dynamic={self.dynamic}, {self.lowering}, changes: {', '.join(self.changes) or 'none'}"
        lines = ["import numpy as np", "import torch", "import torch.nn.functional as F", "", "", self.source, ""]
        lines += [f"DTYPE = {self.dtype}  # {settings}", "numbers = np.random.RandomState(0)"]
        lines += ["rand = lambda *shape: torch.as_tensor(numbers.standard_normal(shape)).to(DTYPE)"]
        if self.is_cache:
            lines.append(f"# (p, t) of each call: {self.schedule}, n = p + t; the same in all: {self.kept}")
            lines.append(f"# the next call's: {self.feeds}; no_grad={self.no_grad}, is_large={self.is_large}")
        lines.append("inputs = [")
        for (name, expression), grad in zip(self.inputs, self.grads):
            lines.append(f"    {expression}{'.requires_grad_()' if grad else ''},  # {name}")
        return "\n".join([*lines, "]"])

    def function(self) -> Any:
        names: dict[str, Any] = {"torch": torch, "F": F}
        exec(compile(self.source, "<fuzz>", "exec"), names)
        return names["program"]

    def run(self, function: Any, dtype: torch.dtype) -> Ran:
        """Results, gradients and what is in the inputs afterwards."""
        numbers = np.random.RandomState(0)  # not torch's: Float64Everywhere would change them

        def rand(*shape: int) -> torch.Tensor:
            return torch.from_numpy(np.asarray(numbers.standard_normal(shape))).to(self.dtype).to(dtype)

        ran, leaves, kept = Ran(), [], {}
        with torch.no_grad() if self.no_grad else nullcontext():
            for p, t in self.schedule:
                names = {"torch": torch, "rand": rand, "p": p, "t": t, "n": p + t}
                for (name, expression), grad in zip(self.inputs, self.grads):
                    made = kept[name] if name in kept else eval(expression, names)
                    names[name] = made.requires_grad_() if grad else made
                inputs = [names[name] for name, _ in self.inputs]
                leaves += [x for x, grad in zip(inputs, self.grads) if grad]
                results = function(*[x.clone() if grad else x for x, grad in zip(inputs, self.grads)])
                kept = {name: names[name] for name in self.kept}
                kept.update((name, results[number]) for name, number in self.feeds.items())
                ran.aliases += _aliases(results, inputs)
                ran.results += [r.clone() if isinstance(r, torch.Tensor) else r for r in results]
                ran.inputs += [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in inputs]
        outputs = [r for r in ran.results if isinstance(r, torch.Tensor) and r.requires_grad]
        ran.gradients = [None] * len(leaves)
        if leaves and outputs:
            numbers = np.random.RandomState(1)
            weights = [torch.from_numpy(np.asarray(numbers.standard_normal(r.shape))) for r in outputs]
            total = sum((r * w.to(torch.bfloat16).to(r.dtype)).sum() for r, w in zip(outputs, weights))
            ran.gradients = list(torch.autograd.grad(total, leaves, allow_unused=True))
        ran.results = [t.detach() if isinstance(t, torch.Tensor) else t for t in ran.results]
        return ran


def _aliases(results: Any, inputs: list) -> list[tuple[int, int]]:
    pairs = [(i, j, r, x) for i, r in enumerate(results) for j, x in enumerate(inputs)]
    tensors = [(i, j, r, x) for i, j, r, x in pairs if isinstance(r, torch.Tensor) and isinstance(x, torch.Tensor)]
    return [(i, j) for i, j, r, x in tensors if r.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() != 0]
