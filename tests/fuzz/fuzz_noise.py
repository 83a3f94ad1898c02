"""Edits that keep the meaning of a tensor: copies, casts, views there and back."""

from __future__ import annotations

from fuzz_program import Program, Tensor


def noise(p: Program, t: Tensor, amount: float = 0.25, numbers: bool = True) -> Tensor:
    """The same tensor after zero or more edits that change nothing."""
    while p.chance(amount):
        t = _edit(p, t, numbers)
    return t


def _edit(p: Program, t: Tensor, numbers: bool) -> Tensor:
    x, n = t.name, len(t.dims)
    kind = p.pick("pure", "transpose", "unsqueeze", "regroup", "contiguous", "number" if numbers else "pure")
    if kind == "transpose" and n >= 2:
        order = p.shuffled(t.dims)
        return p.permute(p.permute(t, order), t.dims)
    if kind == "unsqueeze":
        i = p.rng.randrange(n + 1)
        return p.let(
            p.pick(f"{x}.unsqueeze({i}).squeeze({i})", f"{x}[None].squeeze(0)", f"{x}.unsqueeze(0)[0]"), t.dims
        )
    if kind == "regroup" and n >= 2:
        i = p.rng.randrange(n - 1)
        joined = (*t.dims[:i], t.dims[i] + t.dims[i + 1], *t.dims[i + 2 :])
        return p.reshape(p.reshape(t, joined), t.dims)
    if kind == "contiguous":
        return p.let(p.pick(f"{x}.contiguous()", f"{x}.clone()", f"torch.clone({x})"), t.dims)
    if kind == "number":
        return p.let(p.pick(f"{x} * 1", f"{x} / 1.0", f"1.0 * {x}", f"-(-{x})", f"{x} * 2 / 2"), t.dims)
    return p.let(
        p.pick(
            f"{x}.to({x}.dtype)",
            f"{x}.double().to({x}.dtype)",
            f"{x}[:]",
            f"{x}[...]",
            f"{x}.expand_as({x})",
            f"{x}.type_as({x})",
            f"{x}.view({x}.shape)" if p.chance(0.3) else f"{x}.reshape({x}.shape)",
        ),
        t.dims,
    )


def mislead(p: Program, t: Tensor) -> Tensor:
    """Two dimensions of equal size take each other's place: legal, and another computation."""
    same = [
        (i, j)
        for i in range(len(t.dims))
        for j in range(i)
        if t.dims[i] != t.dims[j] and p.size(t.dims[i]) == p.size(t.dims[j])
    ]
    if not same:
        return t
    i, j = p.pick(*same)
    p.change("axes of equal size swapped")
    spellings = [f"{t.name}.transpose({i}, {j})", f"{t.name}.swapaxes({j}, {i}).contiguous()"]
    return p.let(p.pick(*spellings), t.dims)


def unread(p: Program, t: Tensor) -> None:
    """Something is computed from the tensor that nobody reads."""
    x, name = t.name, p.name("unread")
    made = p.pick(
        f"{x}.sum()", f"({x} * 2.0).mean()", f"{x}.detach()", f"{x}.clone().mul_(2.0)", f"{x}.max(-1)", f"{x}[:1]"
    )
    if "mul_" in made:
        p.change("an unread copy is written")  # what writes is kept, whoever reads it
    p.do(f"{name} = {made}")
