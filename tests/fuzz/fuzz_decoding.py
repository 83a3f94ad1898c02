"""A whole program with a KV cache: what is written, what is read, masks by length, and what happens in between."""

from __future__ import annotations

import random

import fuzz_paged as paged
from fuzz_attention import site
from fuzz_cache import cache_inputs, fresh, grown, is_narrow, shifted, written
from fuzz_lengths import Positions, count_up, draw_positions, draw_schedule, length_mask, ring_mask
from fuzz_masks import apply_mask
from fuzz_noise import mislead, noise
from fuzz_program import Program, Tensor
from fuzz_site import bias, cap, scale


def decoding(rng: random.Random) -> tuple[Program, str]:
    """A random program that is called several times on the same caches, and the expression that it returns."""
    p = Program(rng, {})
    kind = p.pick("static", "static", "static", "growing", "ring", "window", "paged", "paged", "float8", "paged float8")
    _draw_sizes(p, kind)
    q = _queries(p)
    grows = kind == "growing"
    pos = draw_positions(p, may_vary=not grows)
    first, longest = len(p.lines), p.sizes["n"]
    out, extras = _layer(p, kind, q, pos)
    if kind in ("static", "growing", "ring", "window") and p.chance(0.2):
        out, more = _second_layer(p, kind, q, pos, out, longest)
        extras += more
    _meanwhile(p, pos, first, extras)
    count_up(p, pos)
    out = noise(p, out, 0.2)
    names = dict.fromkeys([out.name, *extras, *p.feeds.values()])
    if p.chance(0.1) and not p.feeds:
        names[p.pick(*p.kept)] = None  # the cache itself is returned
    return p, f"({', '.join(names)},)"


def _draw_sizes(p: Program, kind: str) -> None:
    """All different, or all equal."""
    equal = p.chance(0.35)
    if equal:
        size = p.pick(2, 4, 4)
        p.sizes = dict.fromkeys("bgrnde", size)
    else:
        p.sizes = dict(zip("bgrnde", (p.pick(1, 2, 2, 3), p.pick(1, 3, 3), p.pick(1, 2), 11, 6, p.pick(6, 5))))
    if p.chance(0.4):
        p.sizes["r"] = 1
    if "paged" in kind:
        s, y = (p.sizes["n"], 2) if equal else (p.pick(4, 8), 3)
        p.sizes.update(s=s, y=y, n=s * y, z=max(p.sizes["b"] * y, s) + p.pick(0, 1))
    longest = p.sizes["n"]
    draw_schedule(p, longest)
    if kind in ("ring", "window"):
        turns = p.sizes["n"] * p.rng.randrange(3)
        p.schedule = [(at + turns, 1) for at, _ in p.schedule]
        p.sizes["m"] = 1
    if kind == "growing":
        p.sizes["n"] = "n"


def _queries(p: Program) -> Tensor:
    heads = [x for x in "gr" if p.sizes[x] != 1 or p.chance(0.2)]
    if "g" not in heads:  # keys have the axis, whatever its size is
        heads.insert(0, "g")
    axes = p.pick(("b", *heads, "m", "d"), ("b", "m", *heads, "d"))
    q = p.input(f"rand({', '.join(map(str, p.shape(axes)))})", axes, "x")
    name = q.name
    if p.sizes["m"] == "t":
        p.do(f"t = {name}.shape[{axes.index('m')}]")
    p.do(f"q = {name}")
    return Tensor("q", axes)


def _layer(p: Program, kind: str, q: Tensor, pos: Positions, made: Tensor | None = None) -> tuple[Tensor, list[str]]:
    mask_first = kind != "growing" and p.chance(0.5)
    keep = _mask(p, kind, pos, False) if mask_first else None
    k, v, late = _keys_and_values(p, kind, pos, made)
    ends_here = kind == "growing"
    if kind == "static" and not late and not mask_first and p.chance(0.4):
        k, v, ends_here = _sliced(p, pos, k, v)
    if not mask_first:
        keep = _mask(p, kind, pos, ends_here)
    k, v = (_unchanged(p, t) for t in (k, v))
    if kind != "growing" and p.chance(0.25):
        out, extras = _sdpa(p, q, k, v, keep), []
    else:
        out, extras = site(p, q, k, v, lambda p: _steps(p, keep))
    for write in late:
        write()
    return out, extras


def _unchanged(p: Program, t: Tensor) -> Tensor:
    if p.chance(0.05):
        p.detaches = True
        t = p.let(f"{t.name}.detach()", t.dims)
    return mislead(p, t) if p.chance(0.03) else noise(p, t, 0.1)


def _mask(p: Program, kind: str, pos: Positions, ends_here: bool) -> Tensor | None:
    return ring_mask(p, pos, kind == "window") if kind in ("ring", "window") else length_mask(p, pos, ends_here)


def _keys_and_values(p: Program, kind: str, pos: Positions, made: Tensor | None) -> tuple[Tensor, Tensor, list]:
    """k, v, and writes that are to be made after they have been read."""
    late: list = []
    if "paged" in kind or kind == "float8":
        stores = paged.draw_stores(p, "paged" in kind, "float8" in kind)
        parts = []
        for store, letter in zip(stores, "de"):
            new = fresh(p, letter, "new")
            if p.chance(0.06):
                p.change("written after it was read")
                late.append(lambda store=store, new=new, letter=letter: paged.write(p, store, new, pos, letter))
            elif p.chance(0.85):
                paged.write(p, store, new, pos, letter)
            if p.chance(0.5):
                parts.append(paged.read(p, store, letter))
            else:
                parts.append(None)
        k, v = (part or paged.read(p, store, letter) for part, store, letter in zip(parts, stores, "de"))
        return k, v, late
    caches = _caches(p, kind)
    if caches in p.layers and p.chance(0.4):  # layers that share keys and values
        return (*caches, late)
    p.layers.append(caches)
    index = pos.index
    if kind == "ring":
        index = p.let(f"{pos.index} % {p.size('n')}", (pos.dims,), "index").name
    read = []
    for cache, letter in zip(caches, "de"):
        source = None if made is None else Tensor(made.name, tuple(letter if x == "d" else x for x in made.dims))
        new = fresh(p, letter, "new", source)
        if kind == "growing":
            read.append(grown(p, cache, new))
        elif kind == "window":
            read.append(shifted(p, cache, new))
        elif p.chance(0.06):
            p.change("written after it was read")
            late.append(lambda cache=cache, new=new: written(p, cache, new, pos, index))
            read.append(cache)
        else:
            read.append(written(p, cache, new, pos, index))
    if kind == "growing":
        at = read[0].dims.index("n")
        p.do(f"n = {read[0].name}.shape[{at}]")
    k, v = (p.let(f"{t.name}.to(q.dtype)", t.dims) if is_narrow(p, cache) else t for t, cache in zip(read, caches))
    if p.sizes["d"] == p.sizes["e"] and k.dims[:-1] == v.dims[:-1] and p.chance(0.03):
        p.change("keys and values swapped")
        k, v = Tensor(v.name, k.dims), Tensor(k.name, v.dims)
    return k, v, late


def _caches(p: Program, kind: str) -> tuple[Tensor, Tensor]:
    """Caches of a layer's own, or those of the layer before."""
    static = kind != "growing" and not any(is_narrow(p, cache) for pair in p.layers for cache in pair)
    if p.layers and static and not p.feeds and p.chance(0.3):
        p.change("another layer's cache")
        return p.layers[0]
    return cache_inputs(p, "p" if kind == "growing" else str(p.sizes["n"]))


def _sliced(p: Program, pos: Positions, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Only the places that are filled by now, or some more; and whether they end with this call's tokens."""
    last = max(at + t for at, t in p.schedule)
    if pos.kind == "int" and p.chance(0.7):
        p.do(f"n = {pos.name} + {p.size('m')}")
        p.sizes["n"] = end = "n"
    elif last < p.sizes["n"]:
        p.sizes["n"] = end = p.rng.randint(last, p.sizes["n"] - 1)
    else:
        return k, v, False
    parts = []
    for t in (k, v):
        at = t.dims.index("n")
        slices = ":, " * at
        parts.append(p.let(p.pick(f"{t.name}[{slices}:{end}]", f"{t.name}.narrow({at}, 0, {end})"), t.dims))
    return parts[0], parts[1], end == "n"


def _steps(p: Program, keep: Tensor | None) -> list:
    steps = [scale] * p.pick(0, 1, 1)
    if p.chance(0.1):
        steps.append(cap)
    later = [] if keep is None else [lambda p, s: apply_mask(p, s, keep)]
    if p.chance(0.1):
        later.append(bias)
    return [*steps, *p.shuffled(later)]


def _sdpa(p: Program, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
    grouped = "".join(x for x in "gr" if x in "".join(q.dims))
    q = p.arrange(q, ("b", grouped, "m", "d"))
    gqa = grouped == "gr" and p.chance(0.5)
    kv_heads = "g" if gqa else grouped
    k, v = (p.arrange(t, ("b", kv_heads, "n", x), expand=True) for t, x in ((k, "d"), (v, "e")))
    more = ", enable_gqa=True" if gqa else p.pick("", ", scale=0.3")
    if keep is not None:
        index = ", ".join(":" if x in keep.dims else "None" for x in "bhmn")
        mask = p.let(f"{keep.name}[{index}]", ("b", "h", "m", "n"), "keep").name
        if p.chance(0.3):
            fill = p.pick("float('-inf')", "torch.finfo(q.dtype).min")
            mask = f"torch.zeros({mask}.shape, dtype=q.dtype).masked_fill(~{mask}, {fill})"
        more = f", attn_mask={mask}{more}"
    return p.let(f"F.scaled_dot_product_attention({q.name}, {k.name}, {v.name}{more})", ("b", grouped, "m", "e"))


def _second_layer(
    p: Program, kind: str, q: Tensor, pos: Positions, out: Tensor, longest: int | str
) -> tuple[Tensor, list[str]]:
    """Another layer with caches of its own."""
    if kind != "growing" and p.sizes["n"] != longest:
        return out, []  # the sizes are those of a slice by now
    extras, made = [out.name], None
    q = p.rand_input(q.dims, "x") if p.sizes["d"] != p.sizes["e"] else _as_queries(p, out)
    if "r" not in "".join(q.dims) and q.name != out.name and p.chance(0.3) and p.sizes["d"] == p.sizes["e"]:
        p.writes_results = True
        made = q
    out, more = _layer(p, kind, q, pos, made)
    return out, [*extras, *more]


def _as_queries(p: Program, out: Tensor) -> Tensor:
    dims = tuple(dim.replace("e", "d") for dim in out.dims)
    return p.let(f"{out.name} * 0.5", dims, "x")


def _meanwhile(p: Program, pos: Positions, first: int, extras: list[str]) -> None:
    """Reads and writes of the caches elsewhere in the program."""
    names = [name for name in p.kept if name != pos.name]
    if p.chance(0.15):
        name = p.name("read")
        p.lines.insert(_place(p, first), f"{name} = {p.pick(*names)}.float() * 1.0")
        extras.append(name)
    aliased = None
    if p.chance(0.08):
        p.change("another view of a cache")
        aliased = p.name("alias")
        p.inputs.append((aliased, f"{p.pick(*names)}{p.pick('[:1]', '', '.transpose(0, 1)', '[..., :1]')}"))
    for _ in range(p.pick(0, 0, 0, 0, 0, 0, 0, 1, 1, 2)):
        place = _place(p, p.pick(first, (first + len(p.lines)) // 2))
        if place < len(p.lines):
            p.change("written in between")
        c = p.pick(*names) if aliased is None else p.pick(aliased, *names)
        is_float8 = any(name == c and "float8" in made for name, made in p.inputs) or (
            aliased and "float8" in str(p.inputs)
        )
        ways = [f"{c}[:1] = 0", f"{c}.zero_()", f"{c}[..., :1].fill_(0)"]
        if not is_float8:
            ways += [f"{c}.mul_(2.0)", f"{c}.add_(1.0)", f"{c}.copy_({c}.flip(0))"]
        p.lines.insert(place, p.pick(*ways))
        if p.chance(0.3):
            extras.append(p.name("seen"))
            p.lines.insert(p.pick(place, place + 1), f"{extras[-1]} = {c}.float()")


def _place(p: Program, first: int) -> int:
    """A line after which a statement may stand."""
    places = [i for i in range(first, len(p.lines) + 1) if i == 0 or not p.lines[i - 1].startswith("with")]
    return p.pick(*places)
