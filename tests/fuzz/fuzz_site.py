"""One attention: where q, k and v come from, both products, what is done to the scores, and the softmax."""

from __future__ import annotations

from fuzz_masks import HARD_FILLS, SOFT_FILLS, apply_mask, keep_mask
from fuzz_noise import mislead, noise
from fuzz_program import Dims, Program, Tensor


def draw_sizes(p: Program) -> None:
    """All different, all equal, with ones, or anything."""
    letters = "bxgrmnde"
    kind = p.pick("different", "different", "equal", "ones", "any", "any")
    if kind == "different":
        sizes = dict(zip(letters, (2, 4, 3, 2, 5, 7, 6, 9)))
    elif kind == "equal":
        size = p.pick(2, 3, 4)
        sizes = dict.fromkeys(letters, size)
    else:
        sizes = {x: p.pick(2, 2, 3, 4, 6) for x in letters}
        if kind == "ones":
            for x in p.shuffled(letters)[:4]:
                sizes[x] = 1
    if p.chance(0.4):
        sizes["n"], sizes["e"] = sizes["m"], sizes["d"]
    p.sizes = sizes


def letters_of(t: Tensor) -> str:
    return "".join(t.dims)


def operands(p: Program) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with axes of their own, in any layout."""
    batch = p.pick("b", "b", "b", "bx", "")
    heads = p.pick("gr", "gr", "g", "g", "r", "")
    shared = heads.replace("r", "")
    if p.chance(0.15) and p.sizes["m"] == p.sizes["n"] and p.sizes["d"] == p.sizes["e"]:
        return _packed(p, batch, heads)
    drop = p.pick("", "", "", "", "q", "k", "v")  # one of the three is shared by the batch
    made = []
    for name, axes in (("q", batch + heads + "md"), ("k", batch + shared + "nd"), ("v", batch + shared + "ne")):
        if name == drop and batch:
            axes = axes.replace("b", "")
            if name != "q":
                p.change("shared by the batch")
        made.append(_operand(p, axes, name))
    q, k, v = made
    if p.chance(0.05) and p.sizes["m"] == p.sizes["n"]:
        q = Tensor(k.name, tuple(x.replace("n", "m") for x in k.dims))
    if p.chance(0.05) and p.sizes["d"] == p.sizes["e"]:
        v = Tensor(k.name, tuple(x.replace("d", "e") for x in k.dims))
    return q, k, v


def _packed(p: Program, batch: str, heads: str) -> tuple[Tensor, Tensor, Tensor]:
    """One tensor that holds all three, along its last dimension or along one of its own."""
    width = p.size(heads + "d")
    rows = p.shape((*batch, "m"))
    qkv = p.name("qkv")
    if p.chance(0.5):
        p.inputs.append((qkv, f"rand({', '.join(map(str, [*rows, 3 * width]))})"))
        names = [p.name("part") for _ in range(3)]
        how = p.pick(f"{qkv}.chunk(3, dim=-1)", f"{qkv}.split({width}, dim=-1)")
        p.do(f"{', '.join(names)} = {how}")
    else:
        p.inputs.append((qkv, f"rand({', '.join(map(str, [*rows, 3, width]))})"))
        names = [p.name("part") for _ in range(3)]
        at = len(rows)
        p.do(
            f"{', '.join(names)} = {qkv}.unbind({at})"
            if p.chance(0.5)
            else f"{', '.join(names)} = {qkv}.permute({at}, {', '.join(map(str, range(at)))}, {at + 1})"
        )
    q, k, v = (Tensor(name, (*batch, "m", heads + "d")) for name in names)
    out = []
    for t, row, depth in ((q, "m", "d"), (k, "n", "d"), (v, "n", "e")):
        t = Tensor(t.name, (*batch, row, heads + depth))
        out.append(p.reshape(t, (*batch, row, *heads, depth)))
    return out[0], out[1], out[2]


def _operand(p: Program, axes: str, name: str) -> Tensor:
    dims: Dims = p.shuffled(axes) if p.chance(0.5) else tuple(axes)
    if "n" in axes and p.chance(0.2) and p.sizes["n"] > 1:
        t = _cached(p, dims, name)
    else:
        if p.chance(0.2) and len(dims) > 1:
            i = p.rng.randrange(len(dims) - 1)
            dims = (*dims[:i], dims[i] + dims[i + 1], *dims[i + 2 :])
        t = p.rand_input(dims, name)
        if p.chance(0.15):
            t = p.let(p.pick(f"{t.name} + 0.5", f"torch.sin({t.name})", f"{t.name} * {t.name}"), dims, name)
    t = noise(p, t)
    return mislead(p, t) if p.chance(0.06) else t


def _cached(p: Program, dims: Dims, name: str) -> Tensor:
    """Keys or values out of a cache to which some were just written."""
    at, n = dims.index("n"), p.sizes["n"]
    new = p.rng.randint(1, n - 1)

    def shape(length: int) -> str:
        return ", ".join(str(length if d == "n" else p.size(d)) for d in dims)

    fresh, start = p.name(name), p.rng.randint(0, n - new)
    p.inputs.append((fresh, f"rand({shape(new)})"))
    cache = p.name("cache")
    slices = ":, " * at
    if p.chance(0.4):
        p.inputs.append((cache, f"rand({shape(n - new)})"))
        return p.let(f"torch.cat([{cache}, {fresh}], dim={at})", dims, name)
    p.inputs.append((cache, f"rand({shape(n)})"))
    index = f"torch.arange({start}, {start + new})"
    how = p.pick("slice", "index_copy", "index_put", "functional")
    if how == "functional":
        return p.let(f"{cache}.index_copy({at}, {index}, {fresh})", dims, name)
    statement = {
        "slice": f"{cache}[{slices}{start}:{start + new}] = {fresh}",
        "index_copy": f"{cache}.index_copy_({at}, {index}, {fresh})",
        "index_put": f"{cache}[{slices}{index}] = {fresh}",
    }[how]
    p.do(statement)
    return Tensor(cache, dims)


def contract(p: Program, left: Tensor, right: Tensor, over: str) -> Tensor:
    """The product of two tensors, summed over one axis, in one of many spellings."""
    a, b = letters_of(left), letters_of(right)
    own_left = [x for x in a if x not in b]
    own_right = [x for x in b if x not in a and x not in "bxgr"]
    row = "m"
    column = own_right[-1]
    batch = [x for x in "bxgr" if x in a + b]
    assert row in own_left
    how = p.pick("einsum", "matmul", "matmul", "matmul", "bmm", "sum")
    if how == "einsum" or (how == "bmm" and not batch):
        left, right = p.reshape(left, tuple(a)), p.reshape(right, tuple(b))
        result = p.shuffled([*batch, row, column]) if p.chance(0.4) else (*batch, row, column)
        pairs = [(left, a), (right, b)]
        if p.chance(0.3):
            pairs.reverse()
        (x, x_letters), (y, y_letters) = pairs
        return p.let(f"torch.einsum('{x_letters},{y_letters}->{''.join(result)}', {x.name}, {y.name})", result)
    groups = _batch_groups(p, batch, how)
    expand = how == "bmm" or p.chance(0.2)
    if how == "sum":
        left = p.arrange(left, (*groups, row, column, over))
        right = p.arrange(right, (*groups, row, column, over))
        x, y = p.pick((left, right), (right, left))
        return p.let(
            p.pick(f"({x.name} * {y.name}).sum(-1)", f"torch.sum({x.name} * {y.name}, dim=-1)"), (*groups, row, column)
        )
    if p.chance(0.25):  # the transposed product
        x, y = p.arrange(right, (*groups, column, over), expand), p.arrange(left, (*groups, over, row), expand)
        result = (*groups, column, row)
    else:
        x, y = p.arrange(left, (*groups, row, over), expand), p.arrange(right, (*groups, over, column), expand)
        result = (*groups, row, column)
    if how == "bmm":
        return p.let(p.pick(f"torch.bmm({x.name}, {y.name})", f"{x.name}.bmm({y.name})"), result)
    return p.let(p.pick(f"{x.name} @ {y.name}", f"torch.matmul({x.name}, {y.name})"), result)


def _batch_groups(p: Program, batch: list[str], how: str) -> Dims:
    if how == "bmm":
        return ("".join(batch),)
    if "g" in batch and "r" in batch and p.chance(0.6):
        rest = [x for x in batch if x not in "gr"]
        return (*rest, p.pick("gr", "gr", "rg"))
    if p.chance(0.15) and len(batch) > 1:
        return ("".join(batch),)
    return tuple(batch)


def bias(p: Program, s: Tensor) -> Tensor:
    """Scores plus a float tensor over some of their axes."""
    letters = [x for x in letters_of(s) if p.chance(0.7 if x in "mn" else 0.4)] or ["n"]
    b = p.arrange(p.rand_input(p.shuffled(letters), "bias"), s.dims)
    if p.chance(0.2):
        b = p.arrange(noise(p, b), s.dims)
    if p.chance(0.2):
        b = with_fills(p, p.let(p.pick(f"{b.name}.tanh()", b.name), b.dims, "bias"), s)
    x = s.name
    spelled = p.pick(f"{x} + {b.name}", f"{b.name} + {x}", f"{x} - {b.name}", f"torch.add({x}, {b.name}, alpha=2)")
    return p.let(spelled, s.dims)


def positions(p: Program, s: Tensor) -> Tensor:
    """ALiBi, or a table of relative positions."""
    m, n = p.sizes["m"], p.sizes["n"]
    heads = [x for x in letters_of(s) if x in "gr"]
    i = p.name("i")
    p.do(f"{i} = torch.arange({n})[None, :] - torch.arange({m})[:, None]")
    if p.chance(0.6):
        slopes = p.rand_input(tuple(heads), "slopes") if heads else p.let("torch.tensor(0.5)", (), "slopes")
        if p.chance(0.7):  # else it may train
            slopes = p.let(f"{slopes.name}.detach()", slopes.dims, "slopes")
        if p.chance(0.7):  # the last query at the last key; else the first at the first
            p.do(f"{i} = {i} - {n - m}")
        i = p.pick(i, f"(-{i}.abs())", f"({i} + 1).abs()", f"({i} + torch.arange({m})[:, None])", f"{i}.clamp(min=-2)")
        b = p.let(f"{slopes.name}{'[..., None, None]' if heads else ''} * {i}", (*heads, "m", "n"), "bias")
        if p.chance(0.6):
            kept = p.pick(f"torch.arange({m})[:, None] + {n - m}", f"torch.arange({m})[:, None]")
            drop = p.let(f"torch.arange({n})[None, :] > {kept}", ("m", "n"), "drop")
            s = p.let(f"{s.name}.masked_fill({p.arrange(drop, s.dims).name}, {p.pick('-torch.inf', -1e30)})", s.dims)
    else:
        table = p.name("table")
        p.inputs.append((table, f"rand({m + n}, {p.size(''.join(heads))})"))
        joined = "".join(heads)
        b = p.let(f"{table}[{i} + {m - 1}]", ("m", "n", *([joined] if joined else [])), "bias")
        if not joined:
            b = p.let(f"{b.name}.squeeze(-1)", ("m", "n"), "bias")
    b = p.arrange(b, s.dims)
    if p.chance(0.3):
        b = with_fills(p, b, s)
    return p.let(p.pick(f"{s.name} + {b.name}", f"{b.name} + {s.name}"), s.dims)


def with_fills(p: Program, bias: Tensor, s: Tensor) -> Tensor:
    """The bias with a number in the place of what a mask drops, as Falcon has it."""
    if any(isinstance(p.sizes[x], str) for x in "mn"):  # a cache's program has masks of its own
        return bias
    keep = p.arrange(keep_mask(p), s.dims).name
    fill = p.pick(*HARD_FILLS, *SOFT_FILLS).format(s=s.name)
    x = bias.name
    filled = p.pick(f"{x}.masked_fill(~{keep}, {fill})", f"torch.where({keep}, {x}, {fill})")
    return p.let(filled, s.dims, "bias")


def scale(p: Program, s: Tensor, anywhere: bool = True) -> Tensor:
    c = p.pick(0.5, 0.25, 2.0, 0.37, 1.0)
    x = s.name
    options = [f"{x} * {c}", f"{c} * {x}", f"{x} / {1 / c}", f"{x}.mul({c})", f"{x} * torch.tensor({c})"]
    options += [f"{x} / torch.full([], {1 / c}, dtype={x}.dtype)", f"{x}.div({1 / c})"]
    return p.let(p.pick(*options), s.dims)


def tensor_scale(p: Program, s: Tensor) -> Tensor:
    """Scores times a tensor: per head, per query or per key."""
    letters = [x for x in letters_of(s) if x in p.pick("gr", "gr", "bgrm", "bgn") and p.chance(0.6)]
    if not letters:
        return s
    if "n" in letters and "r" in letters:
        p.change("scale over groups and keys")
    t = p.arrange(p.rand_input(p.shuffled(letters), "scale"), s.dims)
    return p.let(p.pick(f"{s.name} * {t.name}", f"{t.name} * {s.name}", f"{s.name} / ({t.name}.abs() + 1)"), s.dims)


def cap(p: Program, s: Tensor) -> Tensor:
    c = p.pick(2.0, 5.0)
    return p.let(p.pick(f"{c} * torch.tanh({s.name} / {c})", f"({s.name} * {1 / c}).tanh() * {c}"), s.dims)


def masked(p: Program, s: Tensor) -> Tensor:
    return apply_mask(p, s, keep_mask(p))


def shifted(p: Program, s: Tensor) -> Tensor:
    axis = s.dims.index("n")
    x = s.name
    if p.chance(0.15):
        p.change("another maximum subtracted")
        axis = p.rng.randrange(len(s.dims))
        return p.let(
            p.pick(f"{x} - {x}.amax({axis})", f"{x} - {x}.amax({axis}).unsqueeze({p.rng.randrange(len(s.dims))})"),
            s.dims,
        )
    return p.let(
        p.pick(
            f"{x} - {x}.amax({axis}, keepdim=True)",
            f"{x} - {x}.max({axis}, keepdim=True).values",
            f"{x} - {x}.amax({axis}, keepdim=True).detach()",
            f"{x} + 1.5",
            f"{x} - {x}.amax()" if p.chance(0.2) else f"{x} - 0.5",
        ),
        s.dims,
    )
