"""What `mode="max-autotune"` tries for one kernel: the shipped launch configuration and its neighbours.

A neighbour differs in one thing. Those that cannot fit the shared memory (LDS), or whose accumulators alone need more
registers than a lane has, are left out by a count of bytes that errs on the safe side, so that nothing that is tried
fails to launch. Which of the rest is best the device says.

Letters: D head_dim and R its second piece, E v_head_dim, all as tile extents from configs.head_blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from . import configs
from .configs import KernelConfig

SHARED_BYTES = {**configs.LDS_BYTES, "sm90": 232448, "cuda": 101376, "interpreter": 1 << 30}
"""Shared memory of one workgroup, per family."""

LANE_REGISTERS = {"gfx90a": 512, "gfx942": 512, "gfx950": 512, "rdna": 256}
"""32-bit registers of a lane on AMD; 255 elsewhere."""

OTHER_REGISTERS = 40
"""What a kernel needs beside accumulators, scores and gradients of scores."""

MAX_WARPS, MAX_STAGES = 8, 4


@dataclass(frozen=True)
class Problem:
    """What decides which configurations of a kernel fit.

    Attributes:
        arch: "gfx942", "sm90", ... or "interpreter".
        direction: "forward", "decode", "backward_kv", "backward_k", "backward_v" or "backward_q".
        blocks: Tile extents D, R (0: none) and E.
        itemsize: Bytes of one element of q.
        bias_itemsize: Bytes of one element of a bias or mask that is loaded tile by tile, 0 without one.
    """

    arch: str
    direction: str
    blocks: tuple[int, int, int]
    itemsize: int
    bias_itemsize: int = 0

    @property
    def owns_keys(self) -> bool:
        """A program owns keys and walks over queries, instead of the other way round."""
        return self.direction in ("backward_kv", "backward_k", "backward_v")


def candidates(problem: Problem, shipped: KernelConfig, tma: bool, plain: KernelConfig | None = None) -> list[tuple]:
    """`(configuration, through tensor descriptors)` of all that is to be tried, the shipped one first.

    Args:
        problem: The kernel.
        shipped: What configs.py gives for it.
        tma: Whether that reads through tensor descriptors.
        plain: What it gives for pointers where `tma`: another candidate.
    """
    found = [(shipped, tma)]
    for config in neighbours(shipped, problem):
        if fits(config, problem):
            found.append((config, tma))
    if plain is not None:
        found.append((plain, False))
    return list(dict.fromkeys(found))


def neighbours(config: KernelConfig, problem: Problem) -> Iterator[KernelConfig]:
    """Configurations that differ from `config` in one thing, or in rows (keys) and warps together."""
    owner, walked = ("block_n", "block_m") if problem.owns_keys else ("block_m", "block_n")
    owned, steps = getattr(config, owner), getattr(config, walked)
    yield replace(config, **{walked: steps * 2})
    yield replace(config, **{walked: steps // 2})
    if problem.direction != "decode":  # there it follows from the number of rows
        for size, warps in ((owned * 2, config.num_warps * 2), (owned // 2, config.num_warps // 2)):
            yield replace(config, **{owner: size, "num_warps": warps})
            yield replace(config, **{owner: size})
    yield replace(config, num_warps=config.num_warps * 2)
    yield replace(config, num_warps=config.num_warps // 2)
    yield replace(config, num_stages=config.num_stages + 1)
    yield replace(config, num_stages=config.num_stages - 1)
    if problem.arch.startswith("gfx"):
        yield replace(config, waves_per_eu=0 if config.waves_per_eu else 2)
        if problem.arch.startswith("gfx9"):
            yield replace(config, matrix_instr_nonkdim=0 if config.matrix_instr_nonkdim else 16)
    elif problem.direction != "decode":
        yield replace(config, merged=not config.merged)
    if config.first_max:
        yield replace(config, first_max=False)


def fits(config: KernelConfig, problem: Problem) -> bool:
    """Whether a configuration is sensible, fits the shared memory and does not need too many registers."""
    family = configs.family(problem.arch)
    smallest = 16
    if family == "sm90" and problem.direction != "decode" and problem.itemsize == 2:
        smallest = 32 if problem.direction.startswith("backward_") else 64
    return (
        config.block_m >= smallest
        and config.block_n >= 16
        and max(config.block_m, config.block_n) <= 256
        and 1 <= config.num_warps <= MAX_WARPS
        and 1 <= config.num_stages <= MAX_STAGES
        and shared_bytes(config, problem) <= SHARED_BYTES[family]
        and registers(config, problem) <= LANE_REGISTERS.get(family, 255)
    )


def shared_bytes(config: KernelConfig, problem: Problem) -> int:
    """At most this much shared memory is used, checked against what compilers give in tests/kernels/test_autotune.py.

    NVIDIA keeps the operands of the program's own rows there, every tile in flight, and weights on their way from one
    product to the next. AMD holds the first in registers, where they pass through shared memory one at a time, and of a
    pipeline all but the last stage.
    """
    m, n, (d, r, e) = config.block_m, config.block_n, problem.blocks
    columns = d + r + e
    own, walked = (n, m) if problem.owns_keys else (max(m, 32) if problem.direction == "decode" else m, n)
    exchanged = m * n * (1 if problem.direction in ("forward", "decode") else 2)
    if config.first_max:
        exchanged += n * (d + r)
    if problem.arch.startswith("gfx"):
        stages = max(1, config.num_stages - 1)
        elements = max(own * max(d + r, e), stages * walked * columns + exchanged)
    else:
        stages = config.num_stages
        elements = own * (d + r if problem.direction in ("forward", "decode", "backward_v") else columns)
        elements += stages * walked * columns + exchanged
    return elements * problem.itemsize + m * n * stages * problem.bias_itemsize


def registers(config: KernelConfig, problem: Problem) -> int:
    """32-bit registers of a lane for accumulators and scores, and something for the rest."""
    m, n, (d, r, e) = config.block_m, config.block_n, problem.blocks
    held = {
        "forward": m * e + m * n,
        "decode": max(m, 32) * (e + n),
        "backward_kv": n * (d + r + e) + 2 * m * n,
        "backward_k": n * (d + r) + 2 * m * n,
        "backward_v": n * e + m * n,
        "backward_q": m * (d + r) + 2 * m * n,
    }[problem.direction]
    lanes = config.num_warps * (64 if problem.arch.startswith("gfx9") else 32)
    return held // lanes + OTHER_REGISTERS
