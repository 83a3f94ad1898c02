"""Keys and values of a cache in blocks behind a table, or of numbers in float8 with their scales.

Axes besides those of `fuzz_program`: z blocks of the cache, y blocks of a row's table, s rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

from fuzz_lengths import Positions
from fuzz_noise import mislead, noise
from fuzz_program import Program, Tensor


@dataclass
class Store:
    """A cache and how it is read.

    Attributes:
        cache: Its axes are z, s, g and channels (or b, n, g and channels, without a table) in any order.
        table: Name of the block table, `(b, y)`.
        scale: What its numbers are multiplied with, as an expression with the axes of `scale_dims`.
        dtype: The float8, or None.
    """

    cache: Tensor
    table: str | None
    scale: Tensor | None
    dtype: str | None


def draw_stores(p: Program, paged: bool, float8: bool) -> tuple[Store, Store]:
    """The stores of keys and of values; sets the sizes of pages."""
    dtype = p.pick("torch.float8_e4m3fn", "torch.float8_e4m3fn", "torch.float8_e5m2") if float8 else None
    p.is_half = float8 and p.chance(0.8)
    axes = p.pick("zsgd", "zsgd", "zgsd", "zsgd") if paged else p.pick("bngd", "bgnd", "bngd")
    tables = [None, None]
    if paged:
        first = _table(p)
        second = first
        if p.chance(0.05):
            p.change("two tables")
            second = _table(p)
        tables = [first, second]
    made = []
    for name, letter, table in (("kc", "d", tables[0]), ("vc", "e", tables[1])):
        dims = tuple(axes.replace("d", letter))
        if dims[-2:] == ("g", letter) and p.chance(0.2):  # heads and channels in one dimension
            dims = (*dims[:-2], "g" + letter)
        shape = ", ".join(map(str, p.shape(dims)))
        name = p.name(name)
        p.inputs.append((name, f"rand({shape})" + (f".to({dtype})" if dtype else "")))
        p.kept.append(name)
        made.append(Store(Tensor(name, dims), table, _scale(p, letter) if float8 else None, dtype))
    if float8 and p.chance(0.05) and not any(set(store.scale.dims) - {"g"} for store in made):
        p.change("scales swapped")
        made[0].scale, made[1].scale = made[1].scale, made[0].scale
    return made[0], made[1]


def _table(p: Program) -> str:
    b, y = p.shape(("b", "y"))
    blocks = list(p.shuffled(range(p.sizes["z"])))[: b * y]
    rows = [blocks[i * y : (i + 1) * y] for i in range(b)]
    name, dtype = p.name("table"), p.pick("torch.int32", "torch.int64")
    p.inputs.append((name, f"torch.tensor({rows}, dtype={dtype})"))
    if p.chance(0.04):
        p.change("table of another row")
        return p.let(p.pick(f"{name}.flip(0)", f"{name}.roll(1, 0)", f"{name}.flip(1)"), ("b", "y"), "table").name
    return name


def _scale(p: Program, letter: str) -> Tensor:
    """As float32 or in the attention's dtype: a number, a tensor of one, or one per head."""
    kind = p.pick("number", "tensor", "tensor", "head", "head", "one")
    if kind == "number":
        return Tensor(str(p.pick(0.5, 0.37, 2.0)), ())
    dims = ("g",) if kind == "head" else ()
    if p.chance(0.06):
        p.change("scale per channel")
        dims = (letter,)
    shape = ", ".join(map(str, p.shape(dims))) or ("1" if kind == "one" else "")
    name = p.name("scale")
    p.inputs.append((name, f"(rand({shape}).abs() + 0.5)" + p.pick("", "", ".float()")))
    return Tensor(name, dims)


def read(p: Program, store: Store, letter: str) -> Tensor:
    """Keys or values of each row, `(b, n, g, letter)` in some order."""
    t, first = store.cache, p.chance(0.2)
    if first:
        t = _dequantised(p, t, store)
    t = noise(p, t, 0.05, numbers=False)
    if store.table is not None:
        t = _gathered(p, t, store.table, store.dtype is not None and not first)
    if not first:
        t = _dequantised(p, t, store)
    if store.table is None:
        return p.reshape(t, ("b", *"".join(t.dims[1:])))
    if p.chance(0.06):
        t = mislead(p, t)
    dims = ("b", "y", "s", "g", letter)
    t = p.permute(p.reshape(t, tuple("".join(t.dims))), dims)
    if p.chance(0.03):
        p.change("blocks and rows swapped")
        t = p.permute(t, ("b", "s", "y", "g", letter))
    shape = ", ".join(map(str, p.shape(("b", "n", "g", letter))))
    how = p.pick(f"{t.name}.reshape({shape})", f"{t.name}.flatten(1, 2)", f"{t.name}.contiguous().view({shape})")
    t = p.let(how, ("b", "n", "g", letter))
    if p.chance(0.04):
        p.change("only the first keys")
        p.sizes["n"] = "n"
        p.do(f"n = {p.size('ys')} - 1")
        t = p.let(f"{t.name}[:, :n]", t.dims)
    return t


def _gathered(p: Program, t: Tensor, table: str, is_float8: bool) -> Tensor:
    b, y = p.shape(("b", "y"))
    rest = t.dims[1:]
    dims = ("b", "y", *rest)
    shape = ", ".join(map(str, p.shape(dims)))
    if p.chance(0.03) and p.sizes["s"] == p.sizes["z"]:
        p.change("gathered along another axis")
        return p.let(
            f"{t.name}.transpose(0, {t.dims.index('s')})[{table}]" if "s" in rest else f"{t.name}[{table}]", dims
        )
    ones = ", ".join("1" for _ in rest)
    whole = ", ".join(map(str, p.shape(rest)))
    index = f"{table}.long().view(-1, {ones}).expand(-1, {whole})"
    ways = [
        f"{t.name}[{table}]",
        f"{t.name}[{table}.long()]",
        f"{t.name}[{table}.reshape(-1)].view({shape})",
        f"torch.index_select({t.name}, 0, {table}.view(-1)).view({shape})",
        f"{t.name}.index_select(0, {table}.flatten()).reshape({shape})",
        f"{t.name}.gather(0, {index}).view({shape})",  # PyTorch has none of float8
    ]
    return p.let(p.pick(*ways[: 5 if is_float8 else 6]), dims)


def _dequantised(p: Program, t: Tensor, store: Store) -> Tensor:
    if store.scale is None:
        return t
    s = store.scale
    wide = p.pick("q.dtype", "q.dtype", "q.dtype", "torch.float32")
    t = p.let(f"{t.name}.to({wide})", t.dims)
    if not s.dims:
        factor = s.name
    else:
        t = p.reshape(t, tuple("".join(t.dims)))
        factor = p.arrange(s, t.dims).name
    if wide == "q.dtype" and factor[0] not in "0123456789":
        factor = f"{factor}.to(q.dtype)"
    how = [f"{t.name} * {factor}", f"{factor} * {t.name}", f"{t.name}.mul({factor})"]
    t = p.let(p.pick(*how), t.dims)
    return p.let(f"{t.name}.to(q.dtype)", t.dims) if wide != "q.dtype" else t


def write(p: Program, store: Store, new: Tensor, pos: Positions, letter: str) -> None:
    """Put the new tokens of each row, with axes b, m, g and `letter`, where its table says."""
    x = p.arrange(new, ("b", "m", "g", letter))
    if store.scale is not None:
        s = store.scale
        factor = p.arrange(s, ("b", "m", "g", letter)).name if s.dims else s.name
        x = p.let(f"({x.name} / {factor}).to({store.dtype})", x.dims)
    c, name = store.cache, x.name
    place = p.let(pos.index, (pos.dims,), "place").name
    if p.chance(0.04):
        p.change("written elsewhere")
        place = p.let(f"({place} + 1) % {p.size('n')}", (pos.dims,), "place").name
    b, t = p.size("b"), p.size("m")
    place = p.let(f"{place}.view({b}, 1)" if pos.kind == "batch" else f"{place}.expand({b}, {t})", ("b", "m")).name
    as_bytes = ".view(torch.uint8)" if store.dtype else ""  # of which PyTorch has more ops
    cache, name = f"{c.name}{as_bytes}", f"{name}{as_bytes}"
    if c.dims[-1] == "g" + letter:
        name = f"{name}.reshape({b}, {t}, {p.size(c.dims[-1])})"
    if store.table is None:
        rows = f"torch.arange({b})[:, None]"
        order = "" if c.dims[1] == "n" else ".transpose(1, 2)"
        ways = [f"{cache}{order}[{rows}, {place}] = {name}", f"{cache}{order}.index_put_(({rows}, {place}), {name})"]
        if pos.kind != "batch":
            ways.append(f"{cache}{order}.index_copy_(1, {pos.index}, {name})")
        p.do(p.pick(*ways))
        return
    s, block, row = p.size("s"), p.name("block"), p.name("row")
    p.do(f"{block} = {store.table}.long().gather(1, {place} // {s})")
    p.do(f"{row} = {place} % {s}")
    if c.dims[1] != "s":
        cache = f"{cache}.transpose(1, 2)"
        p.do(p.pick(f"{cache}[{block}, {row}] = {name}", f"{cache}.index_put_(({block}, {row}), {name})"))
        return
    shape = ", ".join(map(str, p.shape(c.dims[2:])))
    slots = f"({block} * {s} + {row})"
    p.do(
        p.pick(
            f"{cache}[{block}, {row}] = {name}",
            f"{cache}.index_put_(({block}, {row}), {name})",
            f"{cache}.view(-1, {shape})[{slots}] = {name}",
            f"{cache}.view(-1, {shape}).index_copy_(0, {slots}.view(-1), {name}.reshape(-1, {shape}))",
        )
    )
