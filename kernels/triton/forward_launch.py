"""Plans the launches of one forward call: tile shapes, packing of query heads, splitting of the keys."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import common, configs, decode_hopper_launch, decode_hopper_pages_launch, forward_hopper_launch
from .bias import BIAS_TILES
from .cache_launch import COMBINE_NAMES, FP8, NO_CACHE, CacheLayout, cache_layout, check_cache, is_cache
from .cap_series import series_fits
from .combine import attention_combine_kernel
from .empty_rows import mean_launches, means_apart
from .forward import attention_forward_kernel
from .launch import (
    EMPTY_ROWS,
    MEANS,
    PACK_ROWS,
    Launch,
    Layout,
    Rope,
    Tuning,
    aligned,
    bias_kind,
    bias_storage,
    cap_kind,
    check,
    choose,
    descriptor,
    device_arch,
    dot_precision,
    is_wide,
    layout,
    min_tma_scores,
    rope_arguments,
    static_arguments,
    takes_tma,
    takes_tma_rope,
)
from .mask_ranges_launch import is_ranged, ranges_launch
from .sizes import Hint, clamped, has_symbols, is_number, known, likely, remembering

MAX_DECODE_M = 32
"""Tallest packed tile. Not 64, which on Hopper would take the warp-group matrix instructions for a few rows; see also
configs.smallest_head_block."""
MIN_SPLIT_KEYS = 128
"""Keys of a split: with fewer, the combine step costs more than it saves."""
MIN_WAVE_KEYS = 1024
"""The same where there are programs enough without splits, and they only make the last wave shorter."""
MAX_SPLIT_KEYS = 4096
"""Of prefill. A decode step in one wave of programs of 8192 keys was 3 % faster than in two of 4096."""
MAX_SPLITS = 128

RUNNING_MAX, FIRST_MAX, NO_MAX, CAP_SERIES = (
    mode.value for mode in (common.RUNNING_MAX, common.FIRST_MAX, common.NO_MAX, common.CAP_SERIES)
)


def choose_splits(tiles: int, kv_len: int, programs: int, decode: bool = True) -> int:
    """How many programs share the keys of one tile, so that about `programs` run, in whole waves.

    Depends on sizes only, so results are reproducible and nothing is read back from the device.
    """
    if tiles >= programs and not decode:
        return 1
    splits = _filling_splits(tiles, programs, decode)
    if not decode:
        splits = max(splits, kv_len // MAX_SPLIT_KEYS)
    return max(1, min(splits, kv_len // _shortest_split(tiles, programs), MAX_SPLITS))


def _filling_splits(tiles: int, programs: int, decode: bool) -> int:
    least = max(1, programs // tiles)
    # If that leaves more than a sixth of the device idle, cut finer: the last wave then weighs less.
    finer = range(least, max(4 * least, 8 if decode else 4) + 1)
    return next((n for n in finer if n * tiles / (-(-n * tiles // programs) * programs) > 0.83), least)


def _shortest_split(tiles: int, programs: int) -> int:
    return MIN_SPLIT_KEYS if tiles < programs else MIN_WAVE_KEYS


def splits_of_any_size(tiles: Any, q_len: Any, kv_len: Any, programs: int, decode: bool, hint: Hint) -> Any:
    """choose_splits of numbers that may be symbols (see sizes.py): a number, or what the compiled program computes.

    Prefill is not split where it fills the device in the call at hand, or sees no keys but its own.
    """
    if is_number(tiles, kv_len):
        return choose_splits(tiles, kv_len, programs, decode)
    if not decode and (hint(tiles) >= programs or known(q_len == kv_len)):
        return 1
    wanted = _filling_splits(tiles, programs, decode) if is_number(tiles) else programs // tiles
    if is_number(wanted) and wanted == 1:
        return 1
    longest = torch.sym_min(kv_len // _shortest_split(hint(tiles), programs), MAX_SPLITS)
    return clamped(wanted, 1, longest)


def forward_launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
    q_ids: Tensor | None,
    kv_ids: Tensor | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    alibi_slopes: Tensor | None,
    softmax_scale: float,
    logits_soft_cap: float | None,
    band_lower: int | None,
    band_upper: int | None,
    dropout_p: float,
    empty_rows: str,
    out_layout: str,
    tuning: Tuning | None = None,
    rope: Rope = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[list[Launch], Tensor, Tensor]:
    """Allocate the outputs and describe the launches that fill them. Arguments as attention.attention_forward.

    With `rope`, for latent attention, q and k are what is not in it.

    Returns:
        The launches in order, `out` and `lse`.
    """
    tuning = tuning or Tuning()
    traced = tuning.traced
    arch, num_units = device_arch(q.device)
    arch = tuning.arch or arch
    cache = NO_CACHE
    if is_cache(q, k, block_table, k_scale, v_scale):
        check_cache(q, k, v, kv_end, block_table, k_scale, v_scale, dropout_p, empty_rows, out_layout, arch)
        cache = cache_layout(k, block_table, k_scale, v_scale)
    else:
        check(q, k, v, empty_rows, out_layout)
    batch, num_heads, q_len, _ = q.shape
    kv_len, v_head_dim = v.shape[2] * (1 if block_table is None else block_table.shape[1]), v.shape[3]
    if out_layout == "bhsd":
        out = torch.empty((batch, num_heads, q_len, v_head_dim), dtype=q.dtype, device=q.device)
    else:
        # With its strides, not as a view of another tensor, so that autograd lets it be changed in place.
        out_strides = (q_len * num_heads * v_head_dim, v_head_dim, num_heads * v_head_dim, 1)
        out = q.new_empty_strided((batch, num_heads, q_len, v_head_dim), out_strides)
    lse = torch.empty((batch, num_heads, q_len), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return [], out, lse
    if kv_len == 0:
        # A sum over no keys is 0 in eager, whatever the mode; there is nothing to launch for.
        out.zero_()
        lse.fill_(float("-inf")) if sinks is None else lse.copy_(sinks[None, :, None].expand_as(lse))
        return [], out, lse

    if dropout_p > 0.0 and dropout_seed is None:
        raise ValueError("dropout_p > 0 needs dropout_seed, an int64 tensor of one element on the same device")
    plan = remembering(forward_plan, tuning.hint)(
        (layout(q), layout(k), layout(v), layout(attn_bias), layout(attn_mask), layout(key_mask), layout(kv_start),
         layout(kv_end), layout(q_ids), layout(kv_ids), layout(alibi_slopes)),
        (softmax_scale, logits_soft_cap, band_lower, band_upper, dropout_p),
        out.stride(), arch, num_units, q.dtype, dot_precision(q.dtype, arch), sinks is not None, empty_rows,
        aligned(q, k, v, *(rope or ()), traced=traced), tuning, *bias_storage(attn_bias, traced),
        (layout(rope[0]), layout(rope[1])) if rope else (None, None), cache,
    )  # fmt: skip
    # Hopper's own kernels know no symbols, see traced.leave_to_hopper.
    is_static = not has_symbols(tuning.hint)
    tile = is_static and forward_hopper_launch.choose(arch, q.dtype, plan.arguments, tuning, plan.is_describable)
    after = []
    if plan.means_apart or (tile and plan.arguments["EMPTY_ROWS"] in MEANS):
        after = mean_launches(plan.arguments, {"v": v, "out": out, "lse": lse}, tuning.hint)
    if tile:
        tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "kv_start": kv_start, "kv_end": kv_end,
                   "key_mask": key_mask, "q_ids": q_ids, "kv_ids": kv_ids, "sinks": sinks}  # fmt: skip
        given = {**plan.arguments, "SHIFT": plan.hopper_shift}
        return [*forward_hopper_launch.launches(tile, num_units, given, tensors, rope), *after], out, lse
    tensors = {
        "q": q, "k": k, "v": v, "q_rest": None, "k_rest": None, "out": out, "lse": lse, "partial": None,
        "partial_stats": None, "attn_bias": attn_bias, "attn_mask": attn_mask, "key_mask": key_mask,
        "kv_start": kv_start, "kv_end": kv_end, "q_ids": q_ids, "kv_ids": kv_ids, "sinks": sinks,
        "dropout_seed": dropout_seed if dropout_p > 0.0 else None, "alibi_slopes": alibi_slopes,
        "block_table": block_table, "k_scale": k_scale, "v_scale": v_scale, "ranges": None,
    }  # fmt: skip
    if rope:
        tensors["q_rest"], tensors["k_rest"] = rope
    if plan.is_split:
        shares = lse.numel() * plan.num_splits
        tensors["partial"] = torch.empty((shares, v_head_dim), dtype=torch.float32, device=q.device)
        tensors["partial_stats"] = torch.empty((shares, 2), dtype=torch.float32, device=q.device)
    arguments = {**plan.arguments, **tensors}
    if plan.means_apart:
        arguments["EMPTY_ROWS"] = EMPTY_ROWS["zero"]
    if plan.arguments["TMA"]:
        arguments.update(forward_descriptors(q, k, v, attn_bias, plan.arguments, rope))
    launches = []
    if arguments["RANGED"]:
        launches.append(ranges_launch(arguments, arguments["BLOCK_M"], arguments["BLOCK_N"]))
        arguments["ranges"] = launches[0].arguments["ranges"]
    words = None
    if is_static and not plan.pages:
        words = decode_hopper_launch.choose(arch, k.dtype, aligned(q, k, v, traced=traced), arguments, tuning)
    if plan.pages:
        launches.append(decode_hopper_pages_launch.launch(plan.pages, num_units, arguments))
    elif words:
        launches.append(decode_hopper_launch.launch(words, plan.grid, arguments))
    else:
        main = Launch(attention_forward_kernel, plan.grid, arguments, plan.options, plan.direction, plan.config)
        launches.append(main)
    if plan.is_split:
        names = ("partial", "partial_stats", "v", "out", "lse", "sinks", "block_table", "v_scale")
        combined = {name: tensors[name] for name in names}
        launches.append(
            Launch(attention_combine_kernel, lse.numel(), {**plan.combine, **combined}, plan.combine_options)
        )
    return [*launches, *after], out, lse


def forward_descriptors(
    q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None, plan: dict[str, Any], rope: Rope = None
) -> dict[str, Any]:
    """The tensor descriptors that take the place of q, k, v, of their second pieces, and of the bias."""
    rows, keys = plan["BLOCK_M"], plan["BLOCK_N"]
    found = {"k": descriptor(k, keys, plan["BLOCK_D"]), "v": descriptor(v, keys, plan["BLOCK_E"])}
    if not plan.get("LATE_QUERIES"):
        found["q"] = descriptor(q, rows, plan["BLOCK_D"])
    if plan["BLOCK_REST"]:
        q_rest, k_rest = (rope[0], rope[1].unsqueeze(1)) if rope else (q, k)
        found["q_rest"] = descriptor(q_rest, rows, plan["BLOCK_REST"])
        found["k_rest"] = descriptor(k_rest, keys, plan["BLOCK_REST"])
    if attn_bias is not None and plan["BIAS"] == BIAS_TILES.value:
        found["attn_bias"] = descriptor(attn_bias, rows, keys)
    return found


def feature(arguments: dict[str, Any], dtype: torch.dtype, arch: str, forward: bool = True) -> str:
    """Which special rows of the configuration tables a call takes, see configs.TABLES."""
    if arguments["HAS_BIAS"] or arguments["HAS_ATTN_MASK"]:
        return "bias"
    if arguments["logits_soft_cap"] is not None:
        return "cap"
    if arguments["HAS_ALIBI"] and (arch.startswith("gfx") or not forward):
        return "alibi"
    # ALiBi is 0 beside the query, so that the products of the first keys serve; on AMD there are no registers for both.
    alibi = arguments["HAS_ALIBI"] and arguments["softmax_scale"] > 0
    # Masks of one element each need the registers, and are then what bounds.
    plain = (arguments["RAW"] or alibi) and not arguments["HAS_KEY_MASK"] and not arguments["HAS_IDS"]
    first = plain and (dtype == torch.bfloat16 or (dtype == torch.float16 and arch.startswith("gfx")))
    words = (["alibi"] if arguments["HAS_ALIBI"] else []) + (["first"] if first else [])
    return "_".join(words)


def score_shift(arguments: dict[str, Any], dtype: torch.dtype, special: str, first_max: bool) -> int:
    """What the forward kernel of prefill subtracts from the scores before it exponentiates them; see forward.py.

    Anything but the running maximum needs weights with the exponents of float32; those of float16 are checked.
    A soft cap up to 50 bounds the weights to exp(-50) .. exp(50). A million of them, times values up to 1e10, fit. It
    may then be a polynomial (cap_series.py), with code that computes a tile again as for the first maximum.
    """
    if special.endswith("first") and first_max:
        return FIRST_MAX
    cap = arguments["logits_soft_cap"]
    bounded = cap is not None and cap <= 50.0 and dtype == torch.bfloat16
    bounded = bounded and not arguments["HAS_BIAS"] and not arguments["HAS_ALIBI"]
    if not bounded:
        return RUNNING_MAX
    # Other masks may leave rows without a key, whose tiles would all be computed twice.
    plain = not any(arguments[name] for name in ("HAS_ATTN_MASK", "HAS_KEY_MASK", "HAS_IDS"))
    fits = first_max and plain and series_fits(arguments["softmax_scale"], cap, arguments["kv_len"])
    return CAP_SERIES if fits else NO_MAX


class ForwardPlan(NamedTuple):
    """What one forward call launches, without its tensors. Shared between calls: do not modify.

    The last three are for Hopper's own kernels: whether tensor descriptors can be made of q, k and v, and SHIFT, for
    prefill; the tile of decode over pages, None if that kernel does not take the call.
    """

    arguments: dict[str, Any]
    options: dict[str, int]
    grid: Any
    num_splits: Any
    combine: dict[str, Any]
    combine_options: dict[str, int]
    direction: str
    config: configs.KernelConfig
    means_apart: bool
    is_describable: bool
    hopper_shift: int
    pages: decode_hopper_pages_launch.Tile | None

    @property
    def is_split(self) -> bool:
        """Whether shares of the keys are added up. Where their number is a symbol, it may be one."""
        return self.arguments["SPLIT"]


@functools.lru_cache(maxsize=1024)
def forward_plan(
    layouts: tuple[Any, ...],
    scalars: tuple[Any, ...],
    out_strides: tuple[int, ...],
    arch: str,
    num_units: int,
    dtype: torch.dtype,
    precision: str,
    has_sinks: bool,
    empty_rows: str,
    is_aligned: bool,
    tuning: Tuning | None,
    bias_itemsize: int,
    bias_is_aligned: bool,
    rope: tuple[Layout, Layout] = (None, None),
    cache: CacheLayout = NO_CACHE,
) -> ForwardPlan:
    """Choose tiles, packing and splits. Remembered per shapes and strides: planning costs more than launching.

    Args:
        layouts: Of q, k, v and the mask tensors in the order of launch.static_arguments.
        scalars: softmax_scale, logits_soft_cap, band_lower, band_upper, dropout_p.
        out_strides: Strides of the output.
        arch, num_units: From launch.device_arch.
        dtype: Of q.
        precision: From launch.dot_precision.
        has_sinks, empty_rows: As the op's arguments.
        is_aligned: From launch.aligned, of q, k and v.
        tuning: Overrides, or None.
        bias_itemsize, bias_is_aligned: From launch.bias_storage.
        rope: Of q_pe and k_pe, or None.
        cache: From cache_launch.cache_layout.
    """
    tuning = tuning or Tuning()
    hint = tuning.hint
    caches, batch = layouts[1:3], layouts[0][0][0]
    layouts = (layouts[0], *(cache.sequences(where, batch) for where in caches), *layouts[3:])
    (batch, num_heads, q_len, head_dim), (_, kv_heads, kv_len, v_head_dim) = layouts[0][0], layouts[2][0]
    itemsize = dtype.itemsize
    if rope[1]:
        blocks = configs.rope_blocks(arch, itemsize, head_dim, rope[1][0][2], v_head_dim)
    else:
        blocks = configs.head_blocks(arch, itemsize, head_dim, v_head_dim)
    arguments = dict(remembering(static_arguments, hint)(*layouts, *scalars, blocks))
    arguments.update(rope_arguments(*rope))
    arguments.update(cache.arguments(caches[0]))
    in_place = cache.dtype in FP8 and configs.converts_in_place(arch)
    half = in_place and dtype == torch.bfloat16
    # A factor on the keys may be negative: then the largest product is not the largest score. With float16 queries each
    # row has a factor.
    arguments["RAW"] = arguments["RAW"] and not arguments["HAS_K_SCALE"] and not half
    group = num_heads // kv_heads
    # Queries whose number is a symbol are those of prompts.
    # One query of many heads fills several tiles, which read the keys once each, as heads of their own would.
    pack = tuning.pack or (group if is_number(q_len) and (q_len * group <= PACK_ROWS or q_len == 1) else 1)
    rows = q_len * pack
    decode = is_number(q_len) and (rows <= PACK_ROWS or q_len == 1)
    likely_keys = likely(kv_len, hint)
    scores = hint(batch) * num_heads * likely(q_len, hint) * likely_keys
    head_block = configs.head_size(blocks, v_head_dim)
    special = cache.feature or feature(arguments, dtype, arch)
    # Heads in one piece, of whose rows several numbers are loaded at once.
    is_plain = cache == NO_CACHE and not blocks[1] and all(known(arguments[x] == 1) for x in ("stride_kd", "stride_ve"))
    is_describable = (
        tuning.tma is not False
        and (is_plain or not decode)
        and cache == NO_CACHE
        and is_aligned
        and all(takes_tma(where, itemsize) for where in layouts[:3])
        and takes_tma_rope(rope, itemsize)
    )
    can_tma = is_describable and scores >= min_tma_scores(tuning, decode)
    direction = "decode" if decode else "forward"
    config, tma = choose(tuning, arch, direction, head_block, itemsize, special, can_tma)
    block_m = config.block_m
    if decode and tuning.config is None:
        block_m = max(block_m, min(MAX_DECODE_M, triton.next_power_of_2(rows)))
    tiles = batch * (num_heads // pack) * triton.cdiv(rows, block_m)
    # Splits would each need the whole row's dropout mask in the combine step for empty rows; not worth it.
    programs = num_units * configs.programs_per_unit(arch, in_place)
    splits = functools.partial(splits_of_any_size, tiles, q_len, kv_len, programs, decode, hint)
    num_splits = tuning.num_splits or (splits() if scalars[-1] == 0.0 else 1)
    pages = None
    if decode and cache.block_table is not None and not has_symbols(hint):
        pages = decode_hopper_pages_launch.choose(
            arch, (dtype, cache.dtype), caches, arguments, (batch, pack), out_strides,
            not has_sinks and EMPTY_ROWS[empty_rows] in MEANS, is_aligned, tuning,
            functools.partial(choose_splits, kv_len=kv_len, programs=num_units),
        )  # fmt: skip
    if pages:
        num_splits = pages.num_splits
    splits_at_most = num_splits if is_number(num_splits) else MAX_SPLITS
    likely_splits = num_splits if is_number(num_splits) else choose_splits(hint(tiles), likely_keys, programs, decode)
    if decode:
        share = configs.decode_feature(likely_keys, likely_splits)
        is_paged = cache.block_table is not None and share != "one"
        if (is_plain or is_paged) and hint(tiles) * likely_splits <= num_units:
            share = "wave"
        special = "_".join(filter(None, (cache.feature, share)))
        config, tma = choose(tuning, arch, direction, head_block, itemsize, special, can_tma)
    is_cache = cache != NO_CACHE
    shift = RUNNING_MAX if decode or is_cache else score_shift(arguments, dtype, special, config.first_max)
    hopper_shift = RUNNING_MAX if decode or is_cache else score_shift(arguments, dtype, special, True)
    if tuning.shift is not None:
        shift = hopper_shift = tuning.shift
    arguments.update(zip(("stride_ob", "stride_oh", "stride_om", "stride_oe"), out_strides))
    if pack > 1:
        of_heads = (arguments[name] for name in ("stride_qh", "stride_oh", "stride_bh", "stride_mh"))
        arguments["WIDE"] = arguments["WIDE"] or any(is_wide(stride) for stride in of_heads if stride is not None)
    heads = batch * kv_heads
    # A tile has rows of one head, and a program all of their keys, in tensors of their own.
    in_one = pack == 1 and splits_at_most == 1 and not is_cache
    arguments.update(
        batch_size=batch,
        num_splits=num_splits,
        heads_at_once=configs.heads_at_once(
            arch, arguments["HAS_UPPER"], heads, likely_keys * (head_dim + v_head_dim) * itemsize, hint=hint
        ),
        SOFT_CAP=cap_kind(scalars[1], dtype, arch),
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        PACK=pack,
        SPLIT=splits_at_most > 1,
        ONE_TILE=decode and config.merged and is_plain and known(tiles == heads),
        LATE_QUERIES=decode and is_plain and (config.merged or tma),
        INTERLEAVED=decode and config.merged and splits_at_most > 1,
        TMA=tma,
        MERGED=config.merged,
        BIAS=bias_kind(layouts[3], bias_itemsize, tma and not decode and bias_is_aligned, pack),
        SHIFT=shift,
        RANGED=in_one and is_ranged(arguments, scores, tuning),
        FLOAT8_ASM=in_place,
        HALF=half,
        ROUND_BITS=configs.rounds_bits(arch),
        TRANSPOSE_KEYS=configs.transposes_keys(arch),
        HAS_SINKS=has_sinks,
        # With a sink no row can be empty: the sink takes all the weight.
        EMPTY_ROWS=EMPTY_ROWS["zero" if has_sinks else empty_rows],
        PRECISION=precision,
    )
    combine = {
        name: arguments[name]
        for name in (
            "stride_vb", "stride_vh", "stride_vn", "stride_ve", "stride_ob", "stride_oh", "stride_om", "stride_oe",
            "num_heads", "gqa_group_size", "q_len", "kv_len", "num_splits", "V_HEAD_DIM", "BLOCK_E",
            "HAS_BIAS", "HAS_SINKS", "EMPTY_ROWS", *COMBINE_NAMES,
        )
    }  # fmt: skip
    is_apart = in_one and means_apart(arguments, arguments["EMPTY_ROWS"], scores, tuning)
    combine.update(
        WAITS=pages is not None, COLUMN_BLOCKS=1, BLOCK_S=triton.next_power_of_2(splits_at_most), CHUNK=16, BLOCK_N=16
    )
    options = config.options(arch.startswith("gfx"))
    combine_options = {"num_warps": configs.combine_warps(arch), "num_stages": 1}
    if pages:
        combine_options["launch_pdl"] = True
    return ForwardPlan(
        arguments, options, tiles * num_splits, num_splits, combine, combine_options, direction, config, is_apart,
        is_describable and (not decode or tuning.in_flight), hopper_shift, pages,
    )  # fmt: skip
