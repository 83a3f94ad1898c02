"""Natural loops of a kernel's control flow graph (Aho, Lam, Sethi, Ullman, "Compilers", section 9.6)."""

from __future__ import annotations

from dataclasses import dataclass

from .assembly import Instruction, Kernel

_ENDS = ("s_endpgm", "s_setpc_b64")


@dataclass(frozen=True)
class Loop:
    """One loop.

    Attributes:
        header: Index of its first instruction.
        body: Indices of all of its instructions, those of inner loops included.
        innermost: Whether it contains no other loop.
    """

    header: int
    body: frozenset[int]
    innermost: bool


def loops(kernel: Kernel) -> list[Loop]:
    """All natural loops, loops with the same header merged, in the order of their headers."""
    blocks, successors = _blocks(kernel)
    dominators = _dominators(successors)
    predecessors: dict[int, list[int]] = {block: [] for block in dominators}
    for block in dominators:
        for successor in successors[block]:
            predecessors[successor].append(block)
    bodies: dict[int, set[int]] = {}
    for block in dominators:
        for header in successors[block]:
            if header in dominators[block]:
                body = bodies.setdefault(header, {header})
                stack = [block]
                while stack:
                    member = stack.pop()
                    if member not in body:
                        body.add(member)
                        stack += predecessors[member]
    return [
        Loop(
            blocks[header][0],
            frozenset(index for block in body for index in range(*blocks[block])),
            not any(other < body for other in bodies.values()),
        )
        for header, body in sorted(bodies.items())
    ]


def _target(kernel: Kernel, instruction: Instruction) -> int | None:
    return None if instruction.target is None else kernel.labels.get(instruction.target)


def _blocks(kernel: Kernel) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Basic blocks as ranges of instructions, and the blocks that follow each."""
    code = kernel.instructions
    starts = {0}
    for index, instruction in enumerate(code):
        target = _target(kernel, instruction)
        if target is not None:
            starts.add(target)
        if instruction.target is not None or instruction.mnemonic in _ENDS:
            starts.add(index + 1)
    ordered = sorted(start for start in starts if start < len(code))
    blocks = list(zip(ordered, [*ordered[1:], len(code)]))
    number = {start: block for block, (start, _) in enumerate(blocks)}
    successors = []
    for _, end in blocks:
        last = code[end - 1]
        target = _target(kernel, last)
        following = [number[target]] if target in number else []
        if last.mnemonic not in ("s_branch", *_ENDS) and end in number:
            following.append(number[end])
        successors.append(following)
    return blocks, successors


def _dominators(successors: list[list[int]]) -> dict[int, set[int]]:
    """Per block that can be reached: the blocks on every way to it, itself included."""
    reachable = {0}
    stack = [0]
    while stack:
        for block in successors[stack.pop()]:
            if block not in reachable:
                reachable.add(block)
                stack.append(block)
    predecessors = {block: [p for p in reachable if block in successors[p]] for block in reachable}
    dominators = {block: set(reachable) for block in reachable}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(reachable - {0}):
            new = set.intersection(*(dominators[p] for p in predecessors[block])) | {block}
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators
