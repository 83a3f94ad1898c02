"""Where the tokens of a call are in a sequence, and masks that say how many keys a cache holds by then."""

from __future__ import annotations

from dataclasses import dataclass

from fuzz_program import Program, Tensor


@dataclass
class Positions:
    """The places of a call's tokens.

    Attributes:
        name: The input that they come from.
        kind: "vector" of all, "scalar" tensor of the first, "int" of the first, "counter" that the program itself
            counts up, "batch" of one per row (one token a call).
        index: A variable with int64 `(m,)`, or `(b,)` of the kind "batch".
    """

    name: str
    kind: str
    index: str

    @property
    def dims(self) -> str:
        return "b" if self.kind == "batch" else "m"


def draw_schedule(p: Program, longest: int) -> None:
    """Calls of one token, of several, or a long one first; sizes["m"] is their number of tokens."""
    kind = p.pick("decode", "decode", "decode", "decode", "chunk", "prefill", "whole")
    calls = p.pick(1, 2, 2, 3)
    if kind == "whole" or longest < 4:
        t = p.pick(1, longest)
        p.schedule = [(longest - t, t)]
    elif kind == "prefill":
        t = p.rng.randint(2, longest - 1)
        p.schedule = [(0, t), *((at, 1) for at in range(t, longest))][: calls + 1]
    else:
        t = 1 if kind == "decode" else p.pick(2, 2, 3)
        calls = min(calls, longest // t)
        start = p.rng.randint(0, longest - calls * t)
        p.schedule = [(start + i * t, t) for i in range(calls)]
    varies = len({t for _, t in p.schedule}) > 1
    p.sizes["m"] = "t" if varies or p.chance(0.2) else p.schedule[0][1]


def draw_positions(p: Program, may_vary: bool = True) -> Positions:
    """The positions of the schedule's tokens in one of the ways that models get them."""
    t = p.size("m")
    kinds = ["vector", "vector", "int", "int", "scalar", "counter"]
    kind = p.pick(*kinds, *(["batch", "batch"] if t == 1 and may_vary else []))
    name = p.name("pos")
    dtype = p.pick("torch.int64", "torch.int64", "torch.int64", "torch.int32")
    behind = [p.rng.randint(0, p.schedule[0][0]) for _ in range(p.sizes["b"])]
    made = {
        "vector": f"torch.arange(p, p + t, dtype={dtype})",
        "scalar": f"torch.tensor(p, dtype={dtype})",
        "counter": f"torch.tensor([p], dtype={dtype})",
        "batch": f"torch.tensor([{', '.join(f'p - {x}' for x in behind)}], dtype={dtype})",
        "int": "p",
    }[kind]
    p.inputs.append((name, made))
    if kind == "counter":
        p.kept.append(name)
    index = p.name("index")
    if kind in ("vector", "batch"):
        p.do(f"{index} = {name}.long()" if "32" in dtype or p.chance(0.2) else f"{index} = {name}")
    elif kind == "int":
        p.do(f"{index} = torch.arange({name}, {name} + {t})")
    else:
        p.do(p.pick(f"{index} = {name} + torch.arange({t})", f"{index} = torch.arange({t}) + {name}"))
    return Positions(name, kind, index)


def count_up(p: Program, pos: Positions) -> None:
    """The counter of the kind "counter" moves on, at the end or, which changes the meaning, elsewhere."""
    if pos.kind != "counter":
        return
    at = len(p.lines)
    if p.chance(0.15):
        p.change("counted up elsewhere")
        at = p.rng.randint(at // 2, at)
    p.lines.insert(at, f"{pos.name}.add_({p.size('m')})")


def length_mask(p: Program, pos: Positions, ends_here: bool) -> Tensor | None:
    """Which keys there are, of the whole cache; None where nothing need be said.

    Args:
        p: The program.
        pos: Where the queries are.
        ends_here: The last key is that of the last query.
    """
    t, n = p.size("m"), p.size("n")
    if ends_here and t == 1 and p.chance(0.4):
        return None
    if p.chance(0.04):
        p.change("no mask")
        return None
    index = pos.index
    if p.chance(0.08):
        p.change("another length")
        index = p.name("index")
        if p.chance(0.3):
            p.inputs.append((index, f"torch.arange({p.size(pos.dims)}) + p // 2"))
        else:
            p.do(f"{index} = {pos.index}{p.pick(' + 1', ' - 1', ' * 2', '.flip(0)', ' // 2')}")
    j = p.pick(f"torch.arange({n})", f"torch.arange({n})", f"torch.ones({n}, dtype=torch.int64).cumsum(0) - 1")
    if j[-1] == "1":
        j = f"({j})"
    if p.chance(0.3):
        name = p.name("j")
        p.do(f"{name} = {j}")
        j = name
    i = p.pick(f"{index}[:, None]", f"{index}.unsqueeze(-1)", f"{index}.view(-1, 1)")
    keep = p.let(p.pick(*_spellings(p, pos, j, i, index, ends_here)), (pos.dims, "n"), "keep")
    if p.chance(0.15):
        keep = _narrowed(p, keep, f"({j} > {i} - {p.rng.randint(1, 4)})", (pos.dims, "n"))
    if p.chance(0.15) and isinstance(n, int):
        rows = [[int(p.chance(0.8)) for _ in range(n)] for _ in range(p.sizes["b"])]
        dtype = p.pick("torch.bool", "torch.int64")
        pad = p.input(f"torch.tensor({rows}, dtype={dtype}).view({p.sizes['b']}, {n})", ("b", "n"), "pad")
        keep = _narrowed(p, keep, f"{pad.name}.bool()", ("b", "n"))
    return keep


def _spellings(p: Program, pos: Positions, j: str, i: str, index: str, ends_here: bool) -> list[str]:
    t, n = p.size("m"), p.size("n")
    spelled = [f"{j} <= {i}", f"{i} >= {j}", f"~({j} > {i})", f"{j} < {i} + 1", f"({j} - {i}) <= 0"] * 2
    spelled += [f"torch.ones({n}, {n}, dtype=torch.bool).tril()[{index}]", f"torch.where({j} > {i}, 0, 1).bool()"]
    spelled += [f"~torch.ones({n}, {n}, dtype=torch.bool).triu(1).index_select(0, {index})"]
    if pos.kind == "batch":
        return spelled
    if ends_here:
        spelled += [f"torch.ones({t}, {n}, dtype=torch.bool).tril({n} - {t})"] * 3
        spelled += [f"{j} <= torch.arange({t})[:, None] + ({n} - {t})"] * 3
    if p.chance(0.2):  # no query of a chunk is kept from the later ones
        spelled = [f"({j} <= {index}[-1]).expand({t}, {n})", f"({j} < {index}.max() + 1)[None].expand({t}, {n})"]
        if pos.kind == "int" and index == pos.index:
            spelled += [f"({j} < {pos.name} + {t}).expand({t}, {n})"] * 3
    return spelled


def ring_mask(p: Program, pos: Positions, is_window: bool) -> Tensor:
    """Which places of `n` are filled: of a ring, whose one token of this call is at `pos % n`, or of a window's end."""
    n = p.size("n")
    if p.chance(0.1):
        p.change("another length")
    off = p.pick(" + 1", " - 1") if p.changes[-1:] == ["another length"] else ""
    last = p.let(f"({pos.index}[:, None]{off})", (pos.dims, "n"), "last").name
    j = f"torch.arange({n})"
    if is_window:
        return p.let(p.pick(f"{j} >= {n} - 1 - {last}", f"{j} + {last} >= {n} - 1"), (pos.dims, "n"), "keep")
    spelled = (
        f"({j} <= {last}) | ({last} >= {n})",
        f"{last} - ({last} - {j}) % {n} >= 0",
        f"{j} < ({last} + 1).clamp(max={n})",
        f"{j} <= torch.clamp({last}, max={n} - 1)",
    )
    return p.let(p.pick(*spelled), (pos.dims, "n"), "keep")


def _narrowed(p: Program, keep: Tensor, other: str, dims: tuple[str, ...]) -> Tensor:
    also = p.let(other, dims, "keep")
    joint = tuple(x for x in "bmn" if x in keep.dims + also.dims)
    a, b = p.arrange(keep, joint), p.arrange(also, joint)
    return p.let(p.pick(f"{a.name} & {b.name}", f"{b.name} & {a.name}", f"~(~{a.name} | ~{b.name})"), joint, "keep")
