"""Operands of latent attention: keys and values from one latent, or nearly so.

Axes besides those of `fuzz_program`: c channels of the latent, p channels of a head without rotation, o with.
"""

from __future__ import annotations

from fuzz_program import Program, Tensor


def latent_operands(p: Program) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v; whether it is latent attention or a near miss, it is an attention."""
    p.is_simple = p.chance(0.7)
    p.sizes.update(c=p.pick(3, 5, 8), p=p.pick(2, 3, 4), o=p.pick(1, 2, 4))
    return _absorbed(p) if p.chance(0.35) else _expanded(p)


def _expanded(p: Program) -> tuple[Tensor, Tensor, Tensor]:
    p.sizes["d"] = p.sizes["p"] + p.sizes["o"]
    heads = p.pick("g", "g", "g", "")
    c = _rows(p, "c", "latent")
    other = c
    miss = p.pick(*["none"] * 12, "latents", "activated", "biased", "rotated per head", "normed", "batched weight")
    if miss == "latents":
        other = _rows(p, "c", "latent")
    elif miss == "activated":
        other = p.let(f"torch.tanh({c.name})", c.dims)
    if miss == "batched weight":
        heads = "g"
    k_nope, v = _both(p, c, other, heads, miss)
    if miss == "normed":
        k_nope = p.let(f"{k_nope.name} * torch.rsqrt({k_nope.name}.square().mean(-1, keepdim=True) + 0.1)", k_nope.dims)
    rope = p.rand_input(("b", *heads, "n", "o"), "pe") if miss == "rotated per head" else _rows(p, "o", "pe")
    if p.chance(0.5):
        rope = p.let(f"torch.cos({rope.name}) * {rope.name}", rope.dims, "pe")
    k_pe = p.arrange(rope, ("b", *heads, "n", "o"), expand=True)
    k = _joined(p, k_nope, k_pe, ("b", *heads, "n", "d"), "k")
    dims = ("b", *heads, "m")
    if p.chance(0.7):
        q = _joined(p, p.rand_input((*dims, "p"), "q"), p.rand_input((*dims, "o"), "q"), (*dims, "d"), "q")
    else:
        q = p.rand_input((*dims, "d"), "q")
    return q, k, v


def _both(p: Program, c: Tensor, other: Tensor, heads: str, miss: str) -> tuple[Tensor, Tensor]:
    """k_nope and v, by one weight or by two."""
    widths = (p.sizes["p"], p.sizes["e"])
    if miss == "batched weight" or p.chance(0.3):
        made = []
        for row, name, latent in (("p", "k", c), ("e", "v", other)):
            batch = "b" if miss == "batched weight" else ""
            w = p.rand_input((*batch, *heads, row, "c"), "w")
            equation = f"bnc,{batch}{heads}{row}c->b{heads}n{row}"
            made.append(p.let(f"torch.einsum('{equation}', {latent.name}, {w.name})", ("b", *heads, "n", row), name))
        return made[0], made[1]
    count = p.sizes["g"] if heads else 1
    w = p.input(f"rand({count * sum(widths)}, {p.sizes['c']})", (), "w")
    bias = ""
    if miss == "biased":
        bias = ", " + p.input(f"rand({count * sum(widths)})", (), "bias").name
    shape = ", ".join(map(str, (*p.shape(("b", "n")), *([count] if heads else []), sum(widths))))
    parts = []
    for latent in (c, other):
        how = p.pick(f"F.linear({latent.name}, {w.name}{bias})", f"({latent.name} @ {w.name}.T)")
        if bias:
            how = f"F.linear({latent.name}, {w.name}{bias})"
        both = p.let(f"{how}.view({shape})", ("b", "n", *heads, "pe"), "kv")
        if heads:
            both = p.let(f"{both.name}.transpose(1, 2)", ("b", *heads, "n", "pe"), "kv")
        parts.append(both.name)
        if other is c:
            parts.append(both.name)
            break
    first, second = (
        (f"{parts[0]}[..., :{widths[0]}]", f"{parts[1]}[..., {widths[0]}:]")
        if p.chance(0.5)
        else (
            f"{parts[0]}.split([{widths[0]}, {widths[1]}], -1)[0]",
            f"{parts[1]}.narrow(-1, {widths[0]}, {widths[1]})",
        )
    )
    dims = ("b", *heads, "n")
    return p.let(first, (*dims, "p"), "k"), p.let(second, (*dims, "e"), "v")


def _absorbed(p: Program) -> tuple[Tensor, Tensor, Tensor]:
    p.sizes["d"], p.sizes["e"] = p.sizes["c"] + p.sizes["o"], p.sizes["c"]
    dims = ("b", *p.pick("r", "r", ""), "m")
    q = p.rand_input((*dims, "d"), "q")
    width = p.sizes["c"]
    if p.chance(0.5):
        k = _rows(p, "d", "kv")
        kv = k.name
    else:
        c, rope = _rows(p, "c", "latent"), _rows(p, "o", "pe")
        k = p.let(f"torch.cat([{c.name}, {rope.name}], -1)", ("b", "n", "d"), "kv")
        kv = c.name if p.chance(0.5) else k.name
    miss = p.pick(*["none"] * 9, "shifted", "columns", "elsewhere")
    if miss == "shifted":
        kv = f"{kv}.roll(1, 1)"
    first = p.sizes["o"] if miss == "columns" and kv == k.name else 0
    v = p.let(f"{kv}[..., {first}:][..., :{width}]", ("b", "n", "e"), "v")
    if miss == "elsewhere":
        v = p.rand_input(("b", "n", "e"), "v")
    return q, k, v


def _rows(p: Program, channels: str, name: str) -> Tensor:
    """One row per token: an input, the filled part of a cache, or rows gathered by a table of blocks."""
    b, n, width = p.shape(("b", "n", channels))
    kind = p.pick("input", "input", "cache", "written", "paged")
    if kind == "cache":
        longer = p.input(f"rand({b}, {n + 2}, {width})", (), "cache")
        return p.let(f"{longer.name}[:, :{n}]", ("b", "n", channels), name)
    if kind == "written" and n > 1:
        cache = p.input(f"rand({b}, {n}, {width})", (), "cache")
        fresh = p.input(f"rand({b}, 1, {width})", (), name)
        p.do(f"{cache.name} = {cache.name} * 1.0")
        p.do(f"{cache.name}[:, {p.rng.randrange(n)}:][:, :1] = {fresh.name}")
        return Tensor(cache.name, ("b", "n", channels))
    if kind == "paged" and n % 2 == 0:
        cache = p.input(f"rand(9, {n // 2}, {width})", (), "cache")
        table = p.input(f"torch.tensor({[[(3 * i + 1) % 9, -1 - i % 9] for i in range(b)]})", (), "table")
        return p.let(f"{cache.name}[{table.name}].reshape({b}, {n}, {width})", ("b", "n", channels), name)
    return p.rand_input(("b", "n", channels), name)


def _joined(p: Program, left: Tensor, right: Tensor, dims: tuple[str, ...], name: str) -> Tensor:
    """Two tensors side by side along the last dimension: concatenated, or written into a buffer."""
    if p.chance(0.6):
        return p.let(f"torch.cat([{left.name}, {right.name}], -1)", dims, name)
    shape, at = ", ".join(map(str, p.shape(dims))), p.size(left.dims[-1])
    buffer = p.let(f"{left.name}.new_empty({shape})", dims, name)
    p.do(f"{buffer.name}[..., :{at}] = {left.name}")
    p.do(p.pick(f"{buffer.name}[..., {at}:] = {right.name}", f"{buffer.name}[..., {at}:].copy_({right.name})"))
    return buffer
