"""Launch configurations of latent attention, as data; see configs.py for what bounds them."""

from __future__ import annotations

from typing import Any

import torch

from .configs import KernelConfig, family, gluon_is_known, power_of_two
from .sizes import clamped, is_number

C = KernelConfig

# (rows up to, columns of kv_c and k_pe up to, bytes per element) -> configuration, first match wins.
Table = dict[tuple[int, int, int], KernelConfig | None]

ANY = 1 << 30

# A tile of 16 rows is bound by memory: 16 tokens leave room for two workgroups on a compute unit, whose loads and
# products overlap. More rows are bound by products or LDS: a wave owns 16 rows, whose queries it keeps
# in registers. One stage: a transposed tile that the pipeliner keeps in LDS has bank conflicts, see
# configs.transposes_keys. Compiled, counted and simulated, not run on hardware; see docs/mla.md.
_CDNA: Table = {
    (16, ANY, 2): C(16, 16, 4, 1),
    (32, ANY, 2): C(32, 16, 4, 1),
    (ANY, ANY, 2): C(64, 16, 4, 1, 0, 16),
    (ANY, ANY, 4): C(16, 16, 4, 1),
}
_RDNA: Table = {
    (ANY, ANY, 2): C(16, 16, 8, 1),
    (ANY, ANY, 4): C(16, 16, 16, 1),
}
# Measured on an H200, see docs/mla.md.
_HOPPER_TMA: Table = {
    (16, ANY, 2): C(16, 64, 8, 3, merged=True),
    (ANY, ANY, 2): C(64, 64, 8, 2, merged=True),
}
_HOPPER: Table = {
    (16, ANY, 2): C(16, 64, 8, 3, merged=True),
    (ANY, ANY, 2): C(64, 64, 8, 2, merged=True),
    (ANY, ANY, 4): C(16, 16, 4, 2),
}
_CUDA: Table = {
    (ANY, ANY, 2): C(16, 32, 4, 2),
    (ANY, ANY, 4): C(16, 16, 4, 1),
}
_INTERPRETER: Table = {(ANY, ANY, 4): C(16, 16, 1, 1)}

DECODE: dict[str, Table] = {
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
    "gfx950": _CDNA,
    "rdna": _RDNA,
    "sm90": _HOPPER,
    "cuda": _CUDA,
    "interpreter": _INTERPRETER,
}
"""Family -> table of the decode kernel."""

DECODE_PAGES: dict[str, Table] = {
    "sm90": {(16, ANY, 2): C(16, 64, 8, 5, merged=True), (ANY, ANY, 2): C(64, 64, 8, 3, merged=True)},
}
"""The same where it gathers pages through pointers, if that has its own: loads that wait for the block table take two
more stages of the pipeline."""

DECODE_TMA: dict[str, Table] = {"sm90": _HOPPER_TMA}
"""The same where it reads the cache through tensor descriptors."""

MIN_OWN_SCORES = 2**25
"""From so many scores on (B * H * M * N) a call on Hopper stays opaque outside of CUDA graphs, too: its own kernel,
which Inductor cannot launch, saves the device more than an opaque call costs the host (0.3 to 0.5 ms)."""

FEW_ROWS = 16
DECODE_IN_FLIGHT: dict[str, Table] = {
    "sm90": {(FEW_ROWS, ANY, 2): C(FEW_ROWS, 64, 4, 1), (ANY, ANY, 2): C(64, 64, 4, 1)},
}
"""The same of Hopper's own kernels, which have one tile each: mla_decode_few.py for FEW_ROWS, mla_decode_hopper.py."""

MIN_SPLIT_KEYS = 64
MAX_SPLITS = 64


def select(tables: dict[str, Table], arch: str, rows: int, columns: int, itemsize: int) -> KernelConfig | None:
    """The first configuration that fits, None where there is none.

    Args:
        tables: One of the dictionaries above.
        arch: "gfx942", "sm90", ... or "interpreter".
        rows: q_len * num_heads.
        columns: Padded kv_lora_rank plus qk_rope_head_dim.
        itemsize: Bytes of one element of the cache.
    """
    for (max_rows, max_columns, max_bytes), config in tables.get(family(arch), {}).items():
        if rows <= max_rows and columns <= max_columns and itemsize <= max_bytes:
            return config
    return None


def searched_rows(arch: str, rows: int, batch: int, kv_len: int, num_units: int) -> int:
    """The rows by which the tables are searched.

    Where tall tiles would leave each of Hopper's multiprocessors no more than two blocks, the time to start is what
    counts, and low tiles take less: 17.4 instead of 18.5 us with one sequence, 128 heads, 4096 tokens.
    """
    is_short = batch * -(-rows // 64) * -(-kv_len // 128) <= num_units
    return min(rows, 16) if is_short and arch == "sm90" else rows


def fits_in_flight(blocks: tuple[int, int]) -> bool:
    """Whether the Hopper kernel takes these padded sizes of kv_lora_rank and qk_rope_head_dim, with this Triton."""
    return blocks[0] == 512 and blocks[1] <= 64 and gluon_is_known()


def scales_shares(block_m: int, dtype: torch.dtype, latent: int) -> bool:
    """Whether Hopper's kernels store shares of a result as float16 under a power of two for each row.

    Where tiles are tall, shares are most of what is written, and each costs half of the time; of bfloat16 results their
    error is an eighth of the last rounding's. Rows have to be whole 16 bytes.
    """
    return block_m > FEW_ROWS and dtype == torch.bfloat16 and latent % 8 == 0


def blocks(arch: str, itemsize: int, latent: int, rope: int) -> tuple[int, int]:
    """Tile extents of kv_lora_rank and of qk_rope_head_dim (0: none)."""
    smallest = 64 if arch == "sm90" and itemsize == 2 else 16
    return max(smallest, power_of_two(latent)), max(16, power_of_two(rope)) if rope else 0


def transposes_keys(arch: str) -> bool:
    """Whether the decode kernel loads the keys once more, transposed by the pointers, instead of transposing the tile.

    Triton exchanges a transposed tile through LDS with two-way bank conflicts in each read: on CDNA2 and CDNA3, where
    the simulator counts them. The second load of the same bytes finds them in the L1 cache, if it is not left out.
    """
    return arch in ("gfx90a", "gfx942")


def score_columns(arch: str, block_c: int, has_key_mask: bool) -> int:
    """Columns that the scores are added up from at once.

    Radeon's 256 registers do not hold 512 columns of queries; with a key mask pieces of them spill more than the whole.
    """
    in_pieces = family(arch) == "rdna" and block_c > 256 and not has_key_mask
    return 64 if in_pieces else block_c


def step_tokens(config: KernelConfig, in_flight: bool) -> int:
    """Tokens that a program takes at once: mla_decode_hopper.py's kernel two blocks."""
    return 2 * config.block_n if in_flight and config.block_m > FEW_ROWS else config.block_n


def choose_splits(arch: str, tiles: Any, kv_len: Any, num_units: int, block_n: int) -> Any:
    """How many programs share the keys of one tile, so that they fill the device once, each with a block at least.

    Of symbols (sizes.py) a symbol, unless there is only one.
    """
    splits = num_units // tiles if arch.startswith("sm") else 2 * num_units // tiles
    if is_number(splits) and splits <= 1:
        return 1
    longest = torch.sym_min(kv_len // max(MIN_SPLIT_KEYS, block_n), MAX_SPLITS)
    return clamped(splits, 1, longest)


COMBINED_COLUMNS, COMBINED_ELEMENTS = 128, 8192
"""Of the sum of the shares: the least columns of a program, and how many elements it loads at once."""


def combine_blocks(rows: int, block_c: int, num_splits: int, num_units: int) -> tuple[int, int]:
    """Columns of a program of the combine kernel, and splits that it loads at once.

    Few rows are shared by several programs, as long as these fill the device no more than twice.
    """
    columns = block_c
    while columns > COMBINED_COLUMNS and rows * (block_c // columns) < 2 * num_units:
        columns //= 2
    return columns, min(max(16, COMBINED_ELEMENTS // columns), power_of_two(num_splits))


COMBINED_ROWS, COMBINED_SHARES = 4, 4
"""Of mla_combine.py: rows of a program, and shares that it loads at once."""
