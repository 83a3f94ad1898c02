"""Masks: which keys a query sees, in many spellings, and the ways in which programs apply them to scores."""

from __future__ import annotations

from fuzz_clamps import clamped_mask
from fuzz_program import Program, Tensor

HARD_FILLS = (
    "float('-inf')",
    "torch.finfo({s}.dtype).min",
    "float('-inf')",
    "-torch.inf",
    "torch.finfo({s}.dtype).min",
)
SOFT_FILLS = ("-1e9", "-10000.0", "-1e4", "-3.0", "0.0", "-65504.0", "torch.finfo(torch.float32).min", "-1e30")


def keep_mask(p: Program, depth: int = 1) -> Tensor:
    """A bool tensor, True where a query sees a key."""
    if depth and p.chance(0.35):
        a, b = keep_mask(p, depth - 1), keep_mask(p, 0)
        dims = tuple(x for x in "bxgrmn" if x in "".join(a.dims + b.dims))
        a, b = p.arrange(a, dims), p.arrange(b, dims)
        joint = p.pick(
            "{a} & {b}", "{b} & {a}", "torch.logical_and({a}, {b})", "~(~{a} | ~{b})", "{a} | {b}", "{a} * {b}"
        )
        return p.let(joint.format(a=a.name, b=b.name), dims, "keep")
    kinds = [_band, _band, _chunks, _prefix, _padding, _padding, _documents, _table]
    made = kinds[p.rng.randrange(len(kinds))](p)
    if made.dims[0] == "b" and "b" not in p.axes:
        return p.let(f"{made.name}[0]", made.dims[1:], "keep")
    return made


def _indices(p: Program) -> tuple[str, str]:
    m, n = p.sizes["m"], p.sizes["n"]
    i, j = p.name("i"), p.name("j")
    p.do(f"{i} = torch.arange({m})[:, None]" if p.chance(0.7) else f"{i} = torch.arange({m}).view(-1, 1)")
    p.do(f"{j} = torch.arange({n})[None, :]" if p.chance(0.7) else f"{j} = torch.arange({n})")
    return i, j


def _band(p: Program) -> Tensor:
    m, n = p.sizes["m"], p.sizes["n"]
    offset = p.pick(0, 0, n - m, 1, -1, n - m - 1)
    w = p.rng.randint(0, max(m, n))
    if p.chance(0.4):
        ones = f"torch.ones({m}, {n}, dtype=torch.bool)"
        made = p.pick(
            f"{ones}.tril({offset})",
            f"~{ones}.triu({offset + 1})",
            f"torch.tril({ones}, diagonal={offset})",
            f"torch.ones({m}, {n}).tril({offset}) == 1",
            f"{ones}.tril({offset}) & {ones}.triu({offset - w})",
            f"torch.tril(torch.ones({m}, {n})).bool()",
        )
        return p.let(made, ("m", "n"), "keep")
    i, j = _indices(p)
    made = p.pick(
        f"{j} <= {i} + {offset}",
        f"{i} >= {j}",
        f"({j} <= {i}) & ({i} - {j} < {w})",
        f"({i} - {j}).abs() <= {w}",
        f"(({j} - {i}) <= {offset}) & ({j} > {i} - {w})",
        f"~(({j} > {i}) | ({j} <= {i} - {w}))",
        f"({i} + {n - m} - {j}).clamp(min=0) == {i} + {n - m} - {j}",
    )
    return p.let(made, ("m", "n"), "keep")


def _chunks(p: Program) -> Tensor:
    i, j = _indices(p)
    c = p.pick(1, 2, 3, 4)
    made = p.pick(f"{i} // {c} == {j} // {c}", f"({i} // {c} == {j} // {c}) & ({j} <= {i})", f"{i} % {c} == {j} % {c}")
    return p.let(made, ("m", "n"), "keep")


def _prefix(p: Program) -> Tensor:
    i, j = _indices(p)
    if p.chance(0.5):
        return p.let(f"({j} <= {i}) | ({j} < {p.rng.randint(0, 4)})", ("m", "n"), "keep")
    lengths = [p.rng.randint(0, p.sizes["n"]) for _ in range(p.sizes["b"])]
    prefix = p.input(f"torch.tensor({lengths}, dtype=torch.int64)", ("b",), "len")
    return p.let(f"({j} <= {i}) | ({j} < {prefix.name}[:, None, None])", ("b", "m", "n"), "keep")


def _padding(p: Program) -> Tensor:
    b, n = p.sizes["b"], p.sizes["n"]
    kind = p.pick("bool", "int", "float", "lengths", "tokens", "segment")
    ragged = p.pick("right", "left", "any", "none")
    rows = []
    for _ in range(b):
        length = p.rng.randint(0, n)
        row = {
            "right": [k < length for k in range(n)],
            "left": [k >= length for k in range(n)],
            "any": [p.chance(0.6) for k in range(n)],
            "none": [True] * n,
        }[ragged]
        rows.append(row)
    if kind == "lengths":
        lengths = p.input(f"torch.tensor({[sum(row) for row in rows]}, dtype=torch.int64)", ("b",), "len")
        return p.let(f"torch.arange({n})[None, :] < {lengths.name}[:, None]", ("b", "n"), "keep")
    numbers = [[int(x) for x in row] for row in rows]
    if kind == "tokens":
        pad = p.pick(0, 1)
        ids = [[(p.rng.randint(2, 5) if x else pad) for x in row] for row in rows]
        t = p.input(f"torch.tensor({ids}).view({b}, {n})", ("b", "n"), "ids")
        return p.let(p.pick(f"{t.name} != {pad}", f"~({t.name} == {pad})", f"{t.name}.ne({pad})"), ("b", "n"), "keep")
    if kind == "segment":
        numbers = [[x * p.rng.randint(1, 2) for x in row] for row in numbers]
    dtype = {"bool": "torch.bool", "float": "torch.float32"}.get(kind, "torch.int64")
    t = p.input(f"torch.tensor({numbers}, dtype={dtype}).view({b}, {n})", ("b", "n"), "pad")
    if kind == "bool":
        return p.let(
            p.pick(f"{t.name}.clone()", f"{t.name}.bool()", f"~~{t.name}", f"{t.name} == True"), t.dims, "keep"
        )
    spellings = [f"{t.name}.bool()", f"{t.name} != 0", f"{t.name} > 0", f"~({t.name} == 0)", f"{t.name} == 1"]
    return p.let(p.pick(*spellings), t.dims, "keep")


def _documents(p: Program) -> Tensor:
    b, m, n = p.sizes["b"], p.sizes["m"], p.sizes["n"]
    keys = [[p.rng.randint(0, 2) for _ in range(n)] for _ in range(b)]
    k = p.input(f"torch.tensor({keys}).view({b}, {n})", ("b", "n"), "doc")
    q = k
    if m != n:
        queries = [[p.rng.randint(0, 2) for _ in range(m)] for _ in range(b)]
        q = p.input(f"torch.tensor({queries}).view({b}, {m})", ("b", "m"), "doc")
    made = f"{q.name}[:, :, None] == {k.name}[:, None, :]"
    return p.let(made, ("b", "m", "n"), "keep")


def _table(p: Program) -> Tensor:
    """A mask of unknown contents, over some of the axes in any order."""
    letters = [x for x in "bxgr" if x in p.axes and p.chance(0.3)] + [x for x in "mn" if p.chance(0.8)]
    dims = p.shuffled(letters or ["n"])
    shape = ", ".join(map(str, p.shape(dims)))
    return p.input(f"rand({shape}).double() > {p.pick(-0.5, 0.3, -3.0)}", dims, "keep")


def integer_padding(p: Program, s: Tensor) -> Tensor:
    """Scores plus an integer mask of the keys times a fill, which nothing compares: the mask may hold any numbers."""
    b, n = p.sizes["b"], p.sizes["n"]
    if "b" not in p.axes or isinstance(b, str) or isinstance(n, str):
        return s
    first = [p.rng.randint(0, n) for _ in range(b)]
    rows = [[int(k >= start) for k in range(n)] for start in first]
    t = p.input(f"torch.tensor({rows}, dtype=torch.int64).view({b}, {n})", ("b", "n"), "pad")
    fill = p.pick("torch.finfo({s}.dtype).min", "torch.finfo({s}.dtype).min", "-1e9", "-1e4").format(s=s.name)
    if p.chance(0.6):  # a causal mask with the same fill: in rows that keep nothing, either is as low
        keep = p.let(f"torch.ones({p.sizes['m']}, {n}, dtype=torch.bool).tril()", ("m", "n"), "keep")
        s = p.let(f"torch.where({p.arrange(keep, s.dims).name}, {s.name}, {fill})", s.dims)
    x = p.arrange(t, s.dims).name
    dtype = f"{s.name}.dtype"
    made = [f"(1.0 - {x}.to({dtype})) * {fill}", f"(1 - {x}) * {fill}", f"((1 - {x}) * -1000000000).to({dtype})"]
    made.append(f"(1 - {x}.to({dtype})) * -1000 * 1000 * 1000")
    made.append(f"({x} - 1) * torch.tensor(1e9, dtype={dtype})")
    added = p.let(p.pick(*made), s.dims, "bias")
    return p.let(p.pick(f"{s.name} + {added.name}.to({dtype})", f"{added.name}.to({dtype}) + {s.name}"), s.dims)


def apply_mask(p: Program, s: Tensor, keep: Tensor) -> Tensor:
    """Scores with a mask on them."""
    hard = p.chance(0.75)
    fill = p.pick(*(HARD_FILLS if hard else SOFT_FILLS)).format(s=s.name)
    m = p.arrange(keep, s.dims, expand=p.chance(0.15)).name
    x = s.name
    how = p.pick("fill", "fill", "where", "where", "inplace", "add", "add", "add", "multiply")
    if not hard and how in ("fill", "where", "inplace"):
        p.change(f"fill {fill}")
    if how == "fill":
        return p.let(p.pick(f"{x}.masked_fill(~{m}, {fill})", f"{x}.masked_fill({m} == 0, {fill})"), s.dims)
    if how == "where":
        tensor = f"torch.full([], {fill}, dtype={x}.dtype)"
        return p.let(
            p.pick(
                f"torch.where({m}, {x}, {fill})",
                f"torch.where(~{m}, {fill}, {x})",
                f"torch.where({m}, {x}, {tensor})",
                f"torch.where({m}.logical_not(), torch.tensor({fill}), {x})",
            ),
            s.dims,
        )
    if how == "inplace":
        p.change("scores written in place")  # followed, unless they are a view of what else was written
        p.do(f"{x}.masked_fill_(~{m}, {fill})")
        return s
    if how == "multiply":
        p.change("scores times mask")
        return p.let(f"{x} * {m} + torch.where({m}, 0.0, {fill})", s.dims)
    bias = p.pick(
        f"torch.where({m}, 0.0, {fill})",
        f"torch.zeros({m}.shape, dtype={x}.dtype).masked_fill(~{m}, {fill})",
        f"torch.zeros({m}.shape, dtype={x}.dtype).masked_fill_({m}.logical_not(), {fill})",
        f"(1.0 - {m}.to({x}.dtype)) * {fill}" if "inf" not in fill.replace("finfo", "") else f"{m}.to({x}.dtype).log()",
        f"torch.full({m}.shape, {fill}, dtype={x}.dtype).masked_fill({m}, 0)",
    )
    if p.chance(0.2):
        bias = clamped_mask(p, bias, x)
    b = p.name("bias")
    p.do(f"{b} = {bias}")
    if p.chance(0.1):
        p.change("scores written in place")
        p.do(f"{x} += {b}.to({x}.dtype)")
        return s
    return p.let(p.pick(f"{x} + {b}", f"{b} + {x}", f"{x} - (-{b})", f"torch.add({x}, {b})"), s.dims)
