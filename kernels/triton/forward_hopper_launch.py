"""Which forward calls Hopper's own kernel takes, and how it is launched; see forward_hopper.py."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton

from . import configs
from .cap_series import series_fits
from .common import CAP_FAST, CAP_SERIES, FIRST_MAX, NO_CAP, NO_MAX, RUNNING_MAX
from .launch import Launch, Rope, Tuning, layout, swizzled, takes_tma
from .mask_ranges_launch import ranges_launch

MIN_KEYS = 2**8
"""From how many keys of a query on a call is given to the kernel."""


class Tile(NamedTuple):
    """Keys of a block, how many blocks of keys and of values lie in shared memory, and columns of a stored result."""

    block_n: int
    stages: int
    box_e: int


Blocks = tuple[int, int, int]
"""BLOCK_D, BLOCK_REST, BLOCK_E, see configs.head_blocks."""

TILES: dict[Blocks, Tile] = {
    (64, 0, 64): Tile(128, 4, 64),
    (128, 0, 128): Tile(128, 2, 128),
    (128, 64, 128): Tile(128, 2, 64),
    (256, 0, 256): Tile(64, 2, 128),
}
"""What fits: 227 KiB of shared memory hold 128 queries, all stages and 128 x box_e of a result,
a thread's 240 registers 64 x block_n scores, half as many weights, and the result."""

FASTER: dict[Blocks, int] = {(64, 0, 64): 2**36, (128, 0, 128): 2**35, (128, 64, 128): 2**35, (256, 0, 256): 2**35}
"""From how many products on (B H M N (D + E), see `products`) a call is given to the kernel: where it was faster than
forward.py's on an H200 (docs/kernels.md) by more than an opaque call costs, for Inductor cannot launch it."""

CAP_BY_SERIES: frozenset[Blocks] = frozenset({(128, 0, 128)})
"""Where a soft cap begins with the polynomial of cap_series.py: with heads of 256 it was slower than tanh.approx."""

_ABSENT = ("HAS_BIAS", "HAS_ATTN_MASK", "HAS_DROPOUT", "HAS_ALIBI", "SPLIT", "PAGE")
_SHARED = (
    "stride_ob", "stride_oh", "stride_om", "stride_start_b", "stride_start_m", "stride_end_b", "stride_end_m",
    "num_heads", "gqa_group_size", "q_len", "kv_len", "softmax_scale", "logits_soft_cap",
    "band_lower", "band_upper", "V_HEAD_DIM", "BLOCK_D", "BLOCK_REST", "BLOCK_E", "ROPE", "SOFT_CAP", "HAS_START",
    "HAS_END", "HAS_LOWER", "HAS_UPPER", "HAS_SINKS", "EMPTY_ROWS", "stride_key_b", "stride_key_n", "stride_qid_b",
    "stride_qid_m", "stride_kid_b", "stride_kid_n", "HAS_KEY_MASK", "HAS_IDS", "RANGED",
)  # fmt: skip
"""Arguments that mean the same in both kernels."""


def _blocks(arguments: dict[str, Any]) -> Blocks:
    return arguments["BLOCK_D"], arguments["BLOCK_REST"], arguments["BLOCK_E"]


def products(batch: int, num_heads: int, q_len: int, keys: int, head_dims: int) -> int:
    """Of queries with keys and weights with values, multiply-adds; `head_dims` is that of queries and that of values.

    A window's keys count, not those outside; half of a causal mask's are none, but they count.
    """
    return batch * num_heads * q_len * keys * head_dims


def choose(
    arch: str, dtype: torch.dtype, arguments: dict[str, Any], tuning: Tuning, is_describable: bool
) -> Tile | None:
    """The tile if the kernel takes the call, else None.

    Args:
        arch: "sm90" is Hopper.
        dtype: Of q, k, v.
        arguments: Those of attention_forward_kernel, as planned.
        tuning: `in_flight` asks for the kernel wherever it can run; other choices than the tables' are for forward.py.
        is_describable: Tensor descriptors can be made of q, k and v.
    """
    blocks = _blocks(arguments)
    tile = TILES.get(blocks)
    fits = (
        tile is not None
        and configs.has_hopper_kernels(arch)
        and dtype.itemsize == 2
        and is_describable
        and arguments["RAW"]
        and arguments["PACK"] == 1
        and arguments["SOFT_CAP"] in (NO_CAP.value, CAP_FAST.value)
        and not any(arguments[name] for name in _ABSENT)
        and (arguments["RANGED"] or not (arguments["HAS_KEY_MASK"] or arguments["HAS_IDS"]))
    )
    if not fits or tuning.in_flight:
        return tile if fits else None
    keys = _longest_row(arguments)
    # Narrower heads are padded with zeros, as in forward.py, but were not measured.
    sizes = arguments["HEAD_DIM"] + arguments["ROPE"], arguments["V_HEAD_DIM"]
    is_whole = sizes == (blocks[0] + blocks[1], blocks[2])
    counted = products(arguments["batch_size"], arguments["num_heads"], arguments["q_len"], keys, sum(sizes))
    is_long = keys >= MIN_KEYS and counted >= FASTER.get(blocks, math.inf)
    is_free = not (tuning.config or tuning.pack or tuning.num_splits or tuning.shift is not None)
    is_free = is_free and all(direction != "forward" for direction, _, _ in tuning.chosen)
    return tile if is_free and is_long and is_whole else None


def _shift(arguments: dict[str, Any], dtype: torch.dtype) -> int:
    """SHIFT, where forward.py has no registers for another copy of its loop."""
    shift, cap = int(arguments["SHIFT"]), arguments["SOFT_CAP"]
    masks = arguments["HAS_KEY_MASK"] or arguments["HAS_IDS"]
    blocks = _blocks(arguments)
    if shift == RUNNING_MAX.value and masks and cap == NO_CAP.value and dtype == torch.bfloat16:
        return FIRST_MAX.value
    if shift == CAP_SERIES.value and (masks or blocks not in CAP_BY_SERIES):
        return NO_MAX.value
    # With other masks a row may have no key, and its tile would be computed twice.
    fits = shift == NO_MAX.value and cap == CAP_FAST.value and blocks in CAP_BY_SERIES and not masks
    if fits and series_fits(arguments["softmax_scale"], arguments["logits_soft_cap"], arguments["kv_len"]):
        return CAP_SERIES.value
    return shift


def _longest_row(arguments: dict[str, Any]) -> int:
    """The most keys that the band leaves a query."""
    lower, upper = arguments["band_lower"], arguments["band_upper"]
    bounded = lower is not None and upper is not None
    return min(arguments["kv_len"], max(upper - lower + 1, 0)) if bounded else arguments["kv_len"]


def launches(
    tile: Tile, num_units: int, arguments: dict[str, Any], tensors: dict[str, Any], rope: Rope
) -> list[Launch]:
    """The launches: of the ranges where masks need them, and of the kernel, to which empty rows are 0 or NaN.

    Args:
        tile: From `choose`.
        num_units: Multiprocessors of the device: as many programs, each of which takes many tiles.
        arguments: As of `choose`.
        tensors: q, k, v, out, lse, sinks and the masks.
        rope: The second pieces of queries and keys, if these lie elsewhere.
    """
    # Here, since Gluon is experimental, and only Hopper needs it.
    from .forward_hopper import BLOCK_M, attention_forward_hopper_kernel
    from .hopper_parts import ROWS

    given = {name: arguments[name] for name in _SHARED} | tensors | {"ranges": None}
    before = []
    if arguments["RANGED"]:
        before.append(ranges_launch({**arguments, **tensors}, BLOCK_M.value, tile.block_n))
        given["ranges"] = before[0].arguments["ranges"]
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    q_rest, k_rest = (rope[0], rope[1].unsqueeze(1)) if rope else (q, k)
    rest, columns = arguments["BLOCK_REST"], arguments["BLOCK_E"]
    out = tensors["out"]
    box_e = tile.box_e if takes_tma(layout(out), out.element_size()) else 0
    num_tiles = arguments["batch_size"] * arguments["num_heads"] * triton.cdiv(arguments["q_len"], BLOCK_M.value)
    given.update(
        q=swizzled(q, ROWS.value, arguments["BLOCK_D"]),
        k=swizzled(k, tile.block_n, arguments["BLOCK_D"]),
        v=swizzled(v, tile.block_n, columns),
        out_boxes=swizzled(out, ROWS.value, box_e) if box_e else None,
        BOX_E=box_e,
        q_rest=swizzled(q_rest, ROWS.value, rest) if rest else None,
        k_rest=swizzled(k_rest, tile.block_n, rest) if rest else None,
        counters=torch.zeros(2, dtype=torch.int32, device=q.device),
        num_tiles=num_tiles,
        BLOCK_N=tile.block_n,
        STAGES=tile.stages,
        SHIFT=_shift(arguments, q.dtype),
    )
    names = [parameter.name for parameter in attention_forward_hopper_kernel.params]
    main = Launch(
        attention_forward_hopper_kernel,
        min(num_tiles, num_units),
        {name: given[name] for name in names},
        {"num_warps": 4, "num_stages": 1},
    )
    return [*before, main]
