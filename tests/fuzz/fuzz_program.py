"""A program as text: statements on tensors whose axes are known, so that the text is right whatever the layout.

A dimension is named by the letters of the axes it is the row-major product of: b batch, x another batch axis, g kv
heads, r query heads per key/value head, m queries, n keys, d channels of q and k, e channels of v.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

Dims = tuple[str, ...]


@dataclass(frozen=True)
class Tensor:
    """A variable of the program and the axes of its dimensions."""

    name: str
    dims: Dims


@dataclass
class Program:
    """Statements, inputs, and what is expected.

    Attributes:
        rng: All choices come from it.
        sizes: Axis letter -> size; a text where it is a variable of the program.
        inputs: `(name, expression)`; `rand(...)` in an expression gives normal numbers in the program's dtype, and the
            names of the inputs before it are known, as are `p`, `t` and `n` of `schedule`.
        lines: Statements, without indentation.
        axes: Letters of the scores.
        is_simple: Nothing but scales and masks is done to the scores.
        changes: Edits that change the meaning, or that nobody promises to follow: the site need not be replaced.
        schedule: `(p, t)` of each call: the tokens before it, and those that it gets; `n` is their sum.
        kept: Inputs that are made for the first call, and are the same tensors in the later ones.
        feeds: Input -> the variable whose value it has in the next call.
        is_half: For a 16-bit dtype only.
        writes_results: What it writes into its inputs depends on an attention.
        detaches: It cuts gradients, which is a change only where there are some.
        layers: The caches of keys and of values that it has so far.
    """

    rng: random.Random
    sizes: dict[str, int | str]
    inputs: list[tuple[str, str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    axes: str = ""
    is_simple: bool = False
    count: int = 0
    schedule: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    kept: list[str] = field(default_factory=list)
    feeds: dict[str, str] = field(default_factory=dict)
    is_half: bool = False
    writes_results: bool = False
    detaches: bool = False
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    # --- choices ---

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, *options):
        return options[self.rng.randrange(len(options))]

    def shuffled(self, items) -> tuple:
        items = list(items)
        self.rng.shuffle(items)
        return tuple(items)

    def change(self, what: str) -> None:
        self.changes.append(what)

    # --- statements ---

    def name(self, prefix: str = "t") -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def do(self, statement: str) -> None:
        self.lines.append(statement)

    def let(self, expression: str, dims: Dims, prefix: str = "t") -> Tensor:
        name = self.name(prefix)
        self.do(f"{name} = {expression}")
        return Tensor(name, tuple(dims))

    def input(self, expression: str, dims: Dims, prefix: str = "x") -> Tensor:
        name = self.name(prefix)
        self.inputs.append((name, expression))
        return Tensor(name, tuple(dims))

    def rand_input(self, dims: Dims, prefix: str = "x") -> Tensor:
        return self.input(f"rand({', '.join(map(str, self.shape(dims)))})", dims, prefix)

    # --- sizes ---

    def size(self, dim: str) -> int | str:
        sizes = [self.sizes[letter] for letter in dim]
        number = math.prod(size for size in sizes if isinstance(size, int))
        names = [size for size in sizes if isinstance(size, str)]
        return " * ".join([*names, str(number)]) if names and number != 1 else " * ".join(names) or number

    def shape(self, dims: Dims) -> list[int | str]:
        return [self.size(dim) for dim in dims]

    # --- layout ---

    def permute(self, t: Tensor, dims: Dims) -> Tensor:
        """The same tensor with its dimensions in another order, in one of many spellings."""
        order = [t.dims.index(dim) for dim in dims]
        moved = [i for i, j in enumerate(order) if i != j]
        if not moved:
            return t
        spellings = [f"{t.name}.permute({', '.join(map(str, order))})", f"torch.permute({t.name}, {tuple(order)})"]
        letters = "abcdefgh"[: len(order)]
        spellings.append(f"torch.einsum('{letters}->{''.join(letters[i] for i in order)}', {t.name})")
        if len(moved) == 2:
            i, j = moved
            spellings += [f"{t.name}.transpose({i}, {j})", f"{t.name}.swapaxes({j}, {i})"] * 2
            if {i, j} == {len(order) - 1, len(order) - 2}:
                spellings += [f"{t.name}.mT", f"{t.name}.transpose(-2, -1)"] * 3
        return self.let(self.pick(*spellings), dims)

    def reshape(self, t: Tensor, dims: Dims) -> Tensor:
        """Other borders of the dimensions; the order of the axes stays."""
        assert "".join(t.dims) == "".join(dims), (t.dims, dims)
        if t.dims == tuple(dims):
            return t
        shape = ", ".join(map(str, self.shape(dims)))
        options = [f"{t.name}.reshape({shape})", f"torch.reshape({t.name}, ({shape},))"]
        options += [f"{t.name}.contiguous().view({shape})"]
        return self.let(self.pick(*options), dims)

    def arrange(self, t: Tensor, dims: Dims, expand: bool = False) -> Tensor:
        """Bring a tensor to `dims`; axes it lacks get size 1, or are expanded (always inside a joined dimension)."""
        if t.dims == tuple(dims):
            return t
        letters = tuple("".join(t.dims))
        t = self.reshape(t, letters)
        flat = [letter for dim in dims for letter in dim]
        assert set(letters) <= set(flat), (t.dims, dims)
        t = self.permute(t, tuple(letter for letter in flat if letter in letters))
        missing = [letter for letter in flat if letter not in letters]
        for position, letter in enumerate(flat):
            if letter in missing:
                name = self.pick(f"{t.name}.unsqueeze({position})", f"torch.unsqueeze({t.name}, {position})")
                t = self.let(name, (*t.dims[:position], letter, *t.dims[position:]))
        grown = {a for dim in dims for a in dim if a in missing and (expand or len(dim) > 1)}
        if grown:
            shape = [self.size(a) if a in grown else -1 for a in flat]
            t = self.let(f"{t.name}.expand({', '.join(map(str, shape))})", t.dims)
        if t.dims != tuple(dims) and any(len(dim) > 1 for dim in dims):
            sizes = [1 if len(d) == 1 and d in missing and d not in grown else self.size(d) for d in dims]
            t = self.let(f"{t.name}.reshape({', '.join(map(str, sizes))})", dims)
        return Tensor(t.name, tuple(dims))

    # --- the whole ---

    def source(self, result: str) -> str:
        arguments = ", ".join(name for name, _ in self.inputs)
        body = "\n".join(f"    {line}" for line in (*self.lines, f"return {result}"))
        return f"def program({arguments}):\n{body}\n"
