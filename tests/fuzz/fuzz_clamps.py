"""Scores, biases and masks that are clamped: to the lowest number, where it does nothing, or to one that matters."""

from __future__ import annotations

from fuzz_program import Program, Tensor

_SMALL = ("-1e9", "-1e4", "-100.0", "-3.0", "-0.5", "0.0")


def at_least(p: Program, x: str, floor: str) -> str:
    """`x` raised to a number, in one of many spellings."""
    number = p.pick(f"torch.tensor({floor}, dtype={x}.dtype)", f"torch.full([], {floor}, dtype={x}.dtype)")
    return p.pick(
        f"torch.max({x}, {number})",
        f"torch.maximum({number}, {x})",
        f"{x}.clamp(min={floor})",
        f"{x}.clamp_min({floor})",
        f"torch.clamp({x}, {floor})",
        f"{x}.clip(min={floor})",
    )


def floored(p: Program, s: Tensor) -> Tensor:
    """Scores raised to the lowest number, as XGLM and OPT write it, or to a number that matters."""
    floor = f"torch.finfo({s.name}.dtype).min"
    if p.chance(0.3):
        p.change("floor")
        floor = p.pick(*_SMALL)
    return p.let(at_least(p, s.name, floor), s.dims)


def clamped(p: Program, s: Tensor) -> Tensor:
    """Scores clamped to a range, without their largest, as in Grounding DINO, or with something in the way of it."""
    axis, x = s.dims.index("n"), s.name
    kind = p.pick(*["all"] * 8, "row", "some", "none", "given")
    bound = p.pick("50000.0", "5.0", "2.0", "1.0", "0.3")
    if kind != "all":
        p.change(f"clamped below the maximum of {kind}")
    largest = {
        "all": p.pick(f"{x}.max()", f"{x}.amax()", f"{x}.max().detach()"),
        "row": f"{x}.amax({axis}, keepdim=True)",
        "some": f"{x}.amax({p.rng.randrange(len(s.dims))}, keepdim=True)",
        "none": "0.0",
        "given": p.pick("1.5", "-2.0"),
    }[kind]
    if ".detach()" in largest:
        p.change("clamped below a maximum without a gradient")
    s = p.let(f"{x} - {largest}", s.dims)
    high = p.pick(bound, bound, "0.0", "torch.inf")
    if p.chance(0.1):
        p.change("clamped from above")
        high = "-0.5"
    s = p.let(p.pick(f"{s.name}.clamp(-{bound}, {high})", f"torch.clamp({s.name}, min=-{bound}, max={high})"), s.dims)
    if p.chance(0.2):  # once more, to the same bound or another
        again = p.pick(bound, bound, "3.0", "0.2")
        if again != bound:
            p.change("clamped twice")
        s = p.let(f"({s.name} - {s.name}.amax({axis}, keepdim=True)).clamp(min=-{again})", s.dims)
    return s


def clamped_mask(p: Program, bias: str, scores: str) -> str:
    """A float mask that is raised to a number before it is added: fills may change, two may become one."""
    floor = p.pick(f"torch.finfo({scores}.dtype).min", f"torch.finfo({scores}.dtype).min", *_SMALL)
    if "finfo" not in floor:
        p.change(f"mask clamped to {floor}")
    name = p.name("bias")
    p.do(f"{name} = {bias}")
    return at_least(p, name, floor)
