"""What the program reads is written somewhere in it: before it is read, after it, or between two reads."""

from __future__ import annotations

from fuzz_program import Program


def write_in_between(p: Program) -> list[str]:
    """Inputs are written at one to three places; returns the names of results that show what they held somewhere."""
    p.change("inputs written in between")
    name, made = p.pick(*p.inputs)
    holder, first = name, 0
    if p.chance(0.3):  # another input that shares its memory, or a part of it
        part = p.pick("...", "..., :1", "::2" if made.startswith("rand(") else "...")
        holder = p.input(f"{name}[{part}]", (), "alias").name
    elif p.chance(0.5):  # a tensor of the program's own, which may train
        holder = p.name("own")
        p.lines = [_renamed(line, name, holder) for line in p.lines]
        is_float = made.startswith("rand(") and made.endswith(")")
        p.lines.insert(0, f"{holder} = {name}{' * 1.0' if is_float else '.clone()'}")
        first = 1
    extras = []
    places = sorted((_place(p, first) for _ in range(p.pick(1, 1, 2, 3))), reverse=True)
    for place in places:
        p.lines.insert(place, p.pick(*_writes(p, holder, made)))
        if p.chance(0.3):
            extras.append(p.name("seen"))
            p.lines.insert(p.pick(place, place + 1), f"{extras[-1]} = {holder}.clone()")
    return extras


def _writes(p: Program, x: str, made: str) -> list[str]:
    """Statements no two of which may change places."""
    if "torch.bool" in made or ">" in made:
        flipped, rolled = f"{x}.copy_({x}.flip(-1))", f"{x}.bitwise_and_({x}.roll(1, -1))"
        return [f"{x}.logical_not_()", f"{x}[..., :1] = True", flipped, rolled]
    if not made.startswith("rand("):
        return [f"{x}.add_(1)", f"{x}[..., :1] = 0", f"{x}.copy_({x}.flip(-1))", f"{x}.clamp_(max=1)"]
    return [
        f"{x}.mul_(2.0)",
        f"{x}.add_(1.0)",
        f"{x}[..., :1] = 0.5",
        f"{x}[..., 0].fill_(2.0)",
        f"{x}.copy_({x}.flip(-1))",
        f"{x}.transpose(0, -1).neg_()",
        f"{x}[...].sub_(0.25)",
    ]


def _renamed(line: str, name: str, other: str) -> str:
    words = [""]
    for character in line:
        if (character.isalnum() or character == "_") != (words[-1][-1:].isalnum() or words[-1][-1:] == "_"):
            words.append("")
        words[-1] += character
    return "".join(other if word == name else word for word in words)


def _place(p: Program, first: int) -> int:
    """A line after which a statement may stand."""
    places = [i for i in range(first, len(p.lines) + 1) if i == 0 or not p.lines[i - 1].startswith("with")]
    return p.pick(*places)
