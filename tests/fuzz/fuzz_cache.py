"""Keys and values of a cache: it grows by concatenation, or has all its places and is written in one of many ways."""

from __future__ import annotations

from fuzz_lengths import Positions
from fuzz_noise import mislead, noise
from fuzz_program import Dims, Program, Tensor


def cache_inputs(p: Program, length: str) -> tuple[Tensor, Tensor]:
    """The caches of keys and of values, two tensors or views of one; `length` is a number or an expression."""
    axes = p.pick("bgnd", "bgnd", "bngd", "".join(p.shuffled("bgnd")))
    k_dims, v_dims = tuple(axes), tuple(axes.replace("d", "e"))
    if p.chance(0.1):
        v_dims = p.shuffled(v_dims)
    same = p.sizes["d"] == p.sizes["e"] and tuple(axes.replace("d", "e")) == v_dims

    def shape(dims: Dims) -> list[str]:
        return [length if dim == "n" else str(p.size(dim)) for dim in dims]

    if same and p.chance(0.2):  # one buffer, keys and values along a dimension of their own or of the batch
        at = p.pick(0, 0, 1)
        both, sizes = p.name("kv"), shape(k_dims)
        sizes.insert(at, "2")
        p.inputs.append((both, f"rand({', '.join(sizes)})"))
        p.kept.append(both)
        how = p.pick(f"{both}.unbind({at})", f"{both}.select({at}, 0), {both}.select({at}, 1)")
        names = p.name("kc"), p.name("vc")
        p.do(f"{names[0]}, {names[1]} = {how}")
        return Tensor(names[0], k_dims), Tensor(names[1], v_dims)
    made = []
    for name, dims in (("kc", k_dims), ("vc", v_dims)):
        cache = p.input(f"rand({', '.join(shape(dims))})", dims, name)
        p.kept.append(cache.name)
        if p.chance(0.08):  # of a narrower dtype than what attends to it
            p.inputs[-1] = (cache.name, f"{p.inputs[-1][1]}.to(torch.bfloat16)")
        elif p.chance(0.05) and length != "p":  # a longer or wider buffer, of which this is a part
            p.inputs[-1] = (cache.name, f"rand(3, {', '.join(shape(dims))})")
            cache = p.let(f"{cache.name}[{p.rng.randrange(3)}]", dims, name)
        made.append(cache)
    if same and p.chance(0.03):
        p.change("one cache for keys and values")
        return made[0], Tensor(made[0].name, v_dims)
    return made[0], made[1]


def fresh(p: Program, channels: str, name: str, made: Tensor | None = None) -> Tensor:
    """Keys or values of the call's tokens, in a layout of their own."""
    if made is None:
        axes = p.pick("bgm", "bmg") + channels
        made = p.rand_input(tuple(axes) if p.chance(0.7) else p.shuffled(axes), name)
    if p.chance(0.2):
        made = p.let(p.pick(f"{made.name} + 0.5", f"torch.sin({made.name})", f"{made.name} * 2"), made.dims, name)
    return noise(p, made, 0.1)


def is_narrow(p: Program, cache: Tensor) -> bool:
    """It is an input of another dtype than the program's."""
    return any(name == cache.name and "bfloat16" in made for name, made in p.inputs)


def _as_in(p: Program, cache: Tensor, new: Tensor) -> Tensor:
    return p.let(f"{new.name}.to({cache.name}.dtype)", new.dims) if is_narrow(p, cache) else new


def grown(p: Program, cache: Tensor, new: Tensor) -> Tensor:
    """The cache with the new tokens behind it, which is the next call's cache."""
    dims = tuple("m" if dim == "n" else dim for dim in cache.dims)
    at, new = cache.dims.index("n"), p.arrange(_as_in(p, cache, new), dims)
    parts = f"{cache.name}, {new.name}"
    if p.chance(0.03):
        p.change("tokens before the cache")
        parts = f"{new.name}, {cache.name}"
    made = p.let(f"torch.cat([{parts}], {p.pick(f'dim={at}', at - len(dims))})", cache.dims, "grown")
    p.feeds[cache.name] = made.name
    if p.chance(0.1):  # beams change places
        order = p.shuffled(range(p.sizes["b"]))
        beams = p.input(f"torch.tensor({list(order)})", ("b",), "beams")
        batch = cache.dims.index("b")
        made = p.let(f"{made.name}.index_select({batch}, {beams.name})", cache.dims, "grown")
    return made


def written(p: Program, cache: Tensor, new: Tensor, pos: Positions, index: str) -> Tensor:
    """What holds the cache after the new tokens were put at `index`: the cache itself, unless it is the next call's."""
    if p.chance(0.04):
        p.change("written elsewhere")
        index = p.let(f"({index} + 1) % {p.size('n')}", (pos.dims,), "index").name
    dims = tuple("m" if dim == "n" else dim for dim in cache.dims)
    x, at = p.arrange(_as_in(p, cache, new), dims), cache.dims.index("n")
    if p.chance(0.05):
        x = mislead(p, x)
    others = [i for i, dim in enumerate(dims) if i != at and p.size(dim) == p.size("n")]
    if others and p.size("m") == p.size("n") and p.chance(0.1):
        p.change("written along another axis")
        at = p.pick(*others)
    if pos.kind == "batch":
        return _written_by_row(p, cache, x, at, index)
    if at == cache.dims.index("n") and p.chance(0.25):
        made = _returned(p, cache, x, at, pos, index)
        if made is not None:
            return made
    c, t, n, slices = cache.name, p.size("m"), p.size("n"), ":, " * at
    line = ["1"] * len(dims)
    line[at] = "-1"
    column = f"{index}.view({', '.join(line)})"
    ways = [
        f"{c}.index_copy_({at}, {index}, {x.name})",
        f"{c}[{slices}{index}] = {x.name}",
        f"{c}.scatter_({at}, {column}.expand({', '.join(map(str, p.shape(dims)))}), {x.name})",
        f"{c}.transpose(0, {at}).index_put_(({index},), {x.name}.transpose(0, {at}))",
        f"{c}.copy_({c}.index_copy({at}, {index}, {x.name}))",
    ] * 2
    if t == 1:
        hit = f"(torch.arange({n}).view({', '.join(line)}) == {column})"
        ways += [
            f"{c}.copy_(torch.where({hit}, {x.name}, {c}))",
            f"{c}.masked_scatter_({hit}.expand_as({c}), {x.name})",
        ]
        ways += [f"{c}.mul_(~{hit}).add_({x.name} * {hit})", f"{c}.index_add_({at}, {index}, {x.name})"]
    if pos.kind == "int" and index == pos.index:
        ways += [
            f"{c}[{slices}{pos.name}:{pos.name} + {t}] = {x.name}",
            f"{c}[{slices}{pos.name}:{pos.name} + {t}].copy_({x.name})",
            f"{c}.narrow({at}, {pos.name}, {t}).copy_({x.name})",
        ] * 3
        if t == 1:
            ways += [f"{c}.select({at}, {pos.name}).copy_({x.name}.squeeze({at}))"] * 2
    p.do(p.pick(*ways))
    return cache


def _returned(p: Program, cache: Tensor, x: Tensor, at: int, pos: Positions, index: str) -> Tensor | None:
    """A new tensor, which the caller keeps; not where the cache is a view of an input."""
    if cache.name not in p.kept:
        return None
    t = p.size("m")
    ways = [
        f"{cache.name}.index_copy({at}, {index}, {x.name})",
        f"torch.index_copy({cache.name}, {at}, {index}, {x.name})",
    ]
    if pos.kind == "int" and index == pos.index:
        ways += [f"torch.slice_scatter({cache.name}, {x.name}, {at}, {pos.name}, {pos.name} + {t})"] * 3
    made = p.let(p.pick(*ways), cache.dims, "kept")
    p.feeds[cache.name] = made.name
    return made


def _written_by_row(p: Program, cache: Tensor, x: Tensor, at: int, index: str) -> Tensor:
    """Each row of the batch at a place of its own."""
    batch, c = cache.dims.index("b"), cache.name
    rest = [i for i in range(len(cache.dims)) if i not in (batch, at)]
    order = ", ".join(map(str, (batch, at, *rest)))
    shape = ["1"] * len(cache.dims)
    shape[batch] = "-1"
    column = f"{index}.view({', '.join(shape)})"
    rows = f"torch.arange({p.sizes['b']})"
    ways = [
        f"{c}.permute({order})[{rows}, {index}] = {x.name}.permute({order})[:, 0]",
        f"{c}.permute({order}).index_put_(({rows}, {index}), {x.name}.permute({order}).squeeze(1))",
        f"{c}.permute({order})[{rows}[:, None], {index}[:, None]] = {x.name}.permute({order})",
        f"{c}.scatter_({at}, {column}.expand({', '.join(map(str, p.shape(x.dims)))}), {x.name})",
    ]
    p.do(p.pick(*ways))
    return cache


def shifted(p: Program, cache: Tensor, new: Tensor) -> Tensor:
    """The oldest tokens leave a window at its front, the new ones come in at its end."""
    dims = tuple("m" if dim == "n" else dim for dim in cache.dims)
    x, at, t, n = p.arrange(_as_in(p, cache, new), dims), cache.dims.index("n"), p.size("m"), p.size("n")
    c, slices = cache.name, ":, " * at
    if p.chance(0.5):
        p.do(f"{c}.copy_(torch.cat([{c}[{slices}{t}:], {x.name}], {at}))")
    elif p.chance(0.5):
        p.do(f"{c}.copy_({c}.roll(-{t}, {at}))")
        p.do(f"{c}[{slices}{n} - {t}:] = {x.name}")
    else:
        p.do(f"{c}[{slices}:-{t}] = {c}[{slices}{t}:].clone()")
        p.do(f"{c}[{slices}-{t}:] = {x.name}")
    return cache
