"""A whole program: operands, scores, softmax, output, with edits that change the meaning here and there."""

from __future__ import annotations

import random
from collections.abc import Callable

from fuzz_clamps import clamped, floored
from fuzz_latent import latent_operands
from fuzz_masks import integer_padding
from fuzz_noise import mislead, noise, unread
from fuzz_order import write_in_between
from fuzz_program import Program, Tensor
from fuzz_site import (
    bias,
    cap,
    contract,
    draw_sizes,
    letters_of,
    masked,
    operands,
    positions,
    scale,
    shifted,
    tensor_scale,
)

LATENT = 0.1
"""How many of the programs are latent attention, or nearly."""


def attention(rng: random.Random) -> tuple[Program, str]:
    """A random program and the expression that it returns."""
    p = Program(rng, {})
    draw_sizes(p)
    q, k, v = latent_operands(p) if p.chance(LATENT) else operands(p)
    if p.chance(0.3):
        q = scale(p, q)
    if p.chance(0.2):
        k = scale(p, k)
    out, extras = site(p, q, k, v, _steps)
    if p.chance(0.05):  # a second attention on the result, with the same keys
        dims = tuple(x.replace("e", "d") for x in out.dims)
        if p.sizes["e"] == p.sizes["d"]:
            p.change("two attentions")
            out, more = site(p, Tensor(out.name, dims), k, v, _steps)
            extras += more
    out = noise(p, out, 0.3)
    letters = "".join(out.dims)
    if p.chance(0.5):
        out = p.reshape(out, tuple(letters))
        out = p.permute(out, p.shuffled(letters))
    if p.chance(0.04):
        name = p.pick(q.name, k.name, v.name)
        p.change("overwritten afterwards")
        p.do(f"{name}.mul_(2.0)")
    elif p.chance(0.08):
        extras += write_in_between(p)
    if p.chance(0.05):
        p.change("result written in place")
        p.do(f"{out.name}.add_(1.0)")
    return p, f"({', '.join([out.name, *extras])},)"


def site(p: Program, q: Tensor, k: Tensor, v: Tensor, steps: Callable[[Program], list]) -> tuple[Tensor, list[str]]:
    """The result of one attention, and what else the program returns; `steps` says what is done to its scores."""
    s = contract(p, q, k, "d")
    p.axes = letters_of(s)
    if p.chance(0.04):
        s = mislead(p, s)
    for step in steps(p):
        s = step(p, s)
        s = _rearranged(p, s)
        if p.chance(0.03):
            s = _changed(p, s)
        if p.chance(0.03):
            unread(p, s)
    extras = []
    if p.chance(0.03):
        p.change("scores returned")
        extras.append(s.name)
    weights, keys = _softmax(p, s)
    weights = _after_softmax(p, weights)
    if keys:
        weights = p.let(f"{weights.name}[..., :-1]", weights.dims)
    weights = noise(p, weights, 0.15, numbers=False)
    if p.chance(0.05):
        unread(p, weights)
    if p.chance(0.03):
        weights = mislead(p, weights)
    read = ""
    if p.chance(0.06):
        read = p.pick("returned", "returned", "averaged", "averaged", "returned before and after", "written")
        p.change(f"weights {read}")
        extras.append(_average(p, weights) if read == "averaged" else weights.name)
    before = weights.name
    if p.chance(0.9):  # else only where no step made them wider
        weights = p.let(f"{weights.name}.to({v.name}.dtype)", weights.dims)
    if read == "returned before and after":
        extras.append(weights.name)
    out = contract(p, weights, v, "n")
    if read == "written":
        p.do(f"{before}.mul_(0.5)")
    return out, extras


def _average(p: Program, weights: Tensor) -> str:
    """Over one of the leading dimensions, as over the heads."""
    name = p.name("m")
    p.do(f"{name} = {weights.name}.mean({p.pick(0, 1)})")
    return name


def _steps(p: Program) -> list:
    steps = [scale] * p.pick(0, 1, 1, 2)
    if p.chance(0.1):
        steps.append(tensor_scale)
    if p.chance(0.08):  # before what changes the scores' largest
        steps.append(clamped)
    if p.chance(0.15):
        if p.chance(0.15):
            p.change("inside the cap")
            steps.append(p.pick(bias, masked, positions))
        steps.append(cap)
    if p.is_simple:
        return [*steps[:1], *[masked] * p.pick(0, 1, 1)]
    if p.chance(0.08):
        return [*steps, integer_padding, *[masked] * p.pick(0, 0, 1)]
    if p.chance(0.03):
        p.change("scaled after a bias")
        return [*steps, bias, tensor_scale]
    later = [masked] * p.pick(0, 1, 1, 1, 2) + [bias] * p.pick(0, 0, 1) + [positions] * p.pick(0, 0, 0, 1)
    steps += p.shuffled(later)
    if p.chance(0.08):
        steps.append(floored)
    if p.chance(0.1):
        steps.append(shifted)
    if p.chance(0.04):
        p.change("steps in another order")
        steps = list(p.shuffled([*steps, p.pick(scale, cap, tensor_scale, floored, clamped)]))
    return steps


def _rearranged(p: Program, s: Tensor) -> Tensor:
    if p.chance(0.12):
        letters = tuple(letters_of(s))
        s = p.reshape(s, letters)
        if p.chance(0.5):
            s = p.permute(s, p.shuffled(letters))
    if p.chance(0.1):
        s = p.let(
            p.pick(f"{s.name}.float().to({s.name}.dtype)", f"{s.name}.double()", f"{s.name}.to(torch.float32)"), s.dims
        )
    return noise(p, s, 0.1)


def _changed(p: Program, s: Tensor) -> Tensor:
    x, n = s.name, len(s.dims)
    kind = p.pick("detach", "no_grad", "flip", "clamp", "negate", "symmetric", "mean", "fill_zero", "double", "roll")
    p.change(kind)
    if kind == "no_grad":
        name = p.name()
        p.do("with torch.no_grad():")
        p.do(f"    {name} = {x} * 1.5")
        return Tensor(name, s.dims)
    if kind == "symmetric" and n >= 2 and p.size(s.dims[-1]) == p.size(s.dims[-2]):
        return p.let(f"{x} + {x}.mT", s.dims)
    return p.let(
        {
            "detach": f"{x}.detach()",
            "flip": f"{x}.flip({p.rng.randrange(n)})",
            "clamp": f"{x}.clamp(-1, 1)",
            "mean": f"{x} - {x}.mean({p.rng.randrange(n)}, keepdim=True)",
            "fill_zero": f"torch.where({x} > 0, {x}, 0.0)",
            "double": f"{x} + {x}",
            "roll": f"{x}.roll(1, {p.rng.randrange(n)})",
        }.get(kind, f"-{x}"),
        s.dims,
    )


def _softmax(p: Program, s: Tensor) -> tuple[Tensor, bool]:
    """The weights, and whether a column of sinks was joined to the keys."""
    axis = s.dims.index("n")
    sinks = axis == len(s.dims) - 1 and p.chance(0.06)
    if p.chance(0.02) and len(s.dims) > 1 and not set("gr") & set(s.dims[-1]):
        p.change("cut and joined without sinks")
        sinks = True
    if sinks:
        rest = "".join(s.dims[:-1])
        heads = tuple(x for x in rest if x in "gr" or (x in "bm" and p.chance(0.2)))
        if not heads:
            p.change("a sink without heads")
        t = p.rand_input(heads, "sinks")
        rest = p.arrange(t, s.dims[:-1], expand=True)
        shape = ", ".join(str(p.size(d)) for d in s.dims[:-1])
        column = f"{rest.name}.expand({shape})[..., None]"
        s = p.let(f"torch.cat([{s.name}, {column}], -1)", s.dims)
    if p.chance(0.05):
        axis = p.rng.randrange(len(s.dims))
        p.change("softmax over another axis")
    x = s.name
    d = axis if p.chance(0.6) else axis - len(s.dims)
    spellings = [
        f"{x}.softmax({d})",
        f"torch.softmax({x}, {d})",
        f"F.softmax({x}, dim={d})",
        f"F.softmax({x}, dim={d}, dtype=torch.float32).to({x}.dtype)",
        f"torch.nn.Softmax(dim={d})({x})",
        f"F.log_softmax({x}, {d}).exp()",
        f"torch.exp({x} - torch.logsumexp({x}, {d}, keepdim=True))",
    ]
    if p.chance(0.2):
        top = p.pick(f"{x}.amax({d}, keepdim=True)", f"{x}.max({d}, keepdim=True)[0]", f"{x}.amax({d}).unsqueeze({d})")
        if p.chance(0.1):
            p.change("maximum of another row")
            top = p.pick(f"{x}.amax({d})", f"{x}.amax({d}).unsqueeze({p.rng.randrange(len(s.dims))})", f"{x}.amax(0)")
        e = p.let(f"torch.exp({x} - {top})" if p.chance(0.8) else f"torch.exp({x})", s.dims, "e")
        total = f"{e.name}.sum({d}, keepdim=True)"
        return p.let(
            p.pick(f"{e.name} / {total}", f"{e.name} * {total}.reciprocal()", f"{e.name}.div({total})"), s.dims
        ), sinks
    return p.let(p.pick(*spellings), s.dims), sinks


def _after_softmax(p: Program, w: Tensor) -> Tensor:
    x = w.name
    kind = p.pick(*["nothing"] * 12, "nan_to_num", "dropout", "cast", "zeroed", "changed")
    if kind == "nan_to_num":
        return p.let(f"torch.nan_to_num({x}, 0.0)" if p.chance(0.5) else f"{x}.nan_to_num()", w.dims)
    if kind == "dropout":
        return p.let(p.pick(f"F.dropout({x}, 0.0)", f"F.dropout({x}, 0.4, training=False)"), w.dims)
    if kind == "cast":
        return p.let(f"{x}.float().to({x}.dtype)", w.dims)
    keeps = [line.split(" = ")[0] for line in p.lines if line.startswith("keep")]
    if kind == "zeroed" and keeps:
        p.change("weights zeroed")
        return p.let(f"{x}.masked_fill(~{p.pick(*keeps)}, 0.0)", w.dims)
    if kind == "changed":
        p.change("weights changed")
        return p.let(
            p.pick(f"{x} * 2.0", f"{x}.square()", f"{x}.detach()", f"torch.where({x} > 0.1, {x}, 0.0)", f"{x} + 0.01"),
            w.dims,
        )
    return w
