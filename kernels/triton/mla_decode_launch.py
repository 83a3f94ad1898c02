"""Plans the launches of one absorbed latent attention: tile shape and splitting of the keys."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import configs, mla_configs
from .cache_launch import COMBINE_NAMES, NO_CACHE
from .combine import attention_combine_kernel
from .launch import (
    DTYPES,
    EMPTY_ROWS,
    Launch,
    Layout,
    Tuning,
    aligned,
    broadcast_strides,
    clamped_band,
    device_arch,
    dot_precision,
    layout,
)
from .mla_combine import mla_combine_kernel
from .mla_decode import mla_decode_kernel
from .mla_descriptors import query_boxes, share_descriptor, takes_tma, token_descriptor
from .sizes import is_number, likely, remembering

MAX_LATENT, MAX_ROPE = 512, 128
MIN_PAGE = 16
MEANS = ("mean", "mean_added")
NAN_ROWS = (EMPTY_ROWS["nan"], EMPTY_ROWS["nan_added"])


def check(
    q_latent: Tensor, q_pe: Tensor | None, kv_c: Tensor, k_pe: Tensor | None, block_table: Tensor | None,
    kv_end: Tensor | None, empty_rows: str, out_layout: str,
) -> None:  # fmt: skip
    """Raise on what the kernel cannot take. Shapes of the masks are checked by the op's fake kernel.

    Raises:
        ValueError: Wrong ranks or sizes that do not fit together, an unknown mode, or a paged cache without kv_end.
        NotImplementedError: A dtype, size or layout outside what the kernel was built for.
    """
    if q_latent.dim() != 4 or kv_c.dim() != 3:
        raise ValueError(
            "q_latent must be 4-D (batch, heads, q_len, kv_lora_rank) and kv_c 3-D (batch or blocks, tokens, "
            f"kv_lora_rank); got {q_latent.dim()}-D and {kv_c.dim()}-D"
        )
    batch, num_heads, q_len, latent = q_latent.shape
    if kv_c.shape[2] != latent or (block_table is None and kv_c.shape[0] != batch):
        raise ValueError(f"kv_c must fit q_latent: got q_latent {tuple(q_latent.shape)}, kv_c {tuple(kv_c.shape)}")
    if (q_pe is None) != (k_pe is None):
        raise ValueError("q_pe and k_pe belong together: give both or neither")
    if q_pe is not None and k_pe is not None:
        wanted = (batch, num_heads, q_len, k_pe.shape[2]), (*kv_c.shape[:2], k_pe.shape[2])
        if (tuple(q_pe.shape), tuple(k_pe.shape)) != wanted:
            raise ValueError(f"q_pe and k_pe must be {wanted}; got {tuple(q_pe.shape)} and {tuple(k_pe.shape)}")
    given = [tensor for tensor in (q_latent, q_pe, kv_c, k_pe) if tensor is not None]
    if q_latent.dtype not in DTYPES or any(tensor.dtype != q_latent.dtype for tensor in given):
        raise NotImplementedError(
            "q_latent, q_pe, kv_c, k_pe must share one dtype of float16, bfloat16, float32; got "
            f"{', '.join(str(tensor.dtype) for tensor in given)}"
        )
    rope = 0 if k_pe is None else k_pe.shape[2]
    if not (1 <= latent <= MAX_LATENT and rope <= MAX_ROPE):
        raise NotImplementedError(
            f"kv_lora_rank must be 1 to {MAX_LATENT} and qk_rope_head_dim at most {MAX_ROPE}; got {latent} and {rope}"
        )
    if any(tensor.stride(-1) != 1 and tensor.shape[-1] > 1 for tensor in (kv_c, k_pe) if tensor is not None):
        raise NotImplementedError("the last dimension of kv_c and k_pe must have unit stride")
    if empty_rows not in EMPTY_ROWS:
        raise ValueError(f"empty_rows must be one of {sorted(EMPTY_ROWS)}; got {empty_rows!r}")
    if out_layout not in ("bhsd", "bshd"):
        raise ValueError(f"out_layout must be 'bhsd' or 'bshd'; got {out_layout!r}")
    if block_table is not None:
        if kv_end is None:
            raise ValueError("a paged cache needs kv_end, the number of tokens of each sequence")
        if block_table.dim() != 2 or block_table.shape[0] != batch or block_table.dtype != torch.int32:
            raise ValueError(
                f"block_table must be int32 ({batch}, max_blocks); got {block_table.dtype} {tuple(block_table.shape)}"
            )
        if kv_c.shape[1] < MIN_PAGE or kv_c.shape[1] % MIN_PAGE:
            raise NotImplementedError(
                f"block_size must be a multiple of {MIN_PAGE}; got {kv_c.shape[1]}: choose ROCM_AITER_MLA or another "
                "block_size"
            )
        if empty_rows in MEANS:
            raise NotImplementedError(f"empty_rows={empty_rows!r} has no meaning for a paged cache: it has no length")


def rows_adjacent(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a copy whose last dimension has unit stride; queries are small."""
    return tensor if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def mla_decode_launches(
    q_latent: Tensor,
    q_pe: Tensor | None,
    kv_c: Tensor,
    k_pe: Tensor | None,
    block_table: Tensor | None,
    key_mask: Tensor | None,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
    softmax_scale: float,
    band_lower: int | None,
    band_upper: int | None,
    empty_rows: str,
    out_layout: str,
    tuning: Tuning | None = None,
) -> tuple[list[Launch], Tensor, Tensor]:
    """Allocate the outputs and describe the launches that fill them. Arguments as mla.mla_decode.

    Returns:
        The launches in order, `out_latent` and `lse`.
    """
    check(q_latent, q_pe, kv_c, k_pe, block_table, kv_end, empty_rows, out_layout)
    batch, num_heads, q_len, latent = q_latent.shape
    if out_layout == "bhsd":
        out = q_latent.new_empty((batch, num_heads, q_len, latent))
    else:
        out_strides = (q_len * num_heads * latent, latent, num_heads * latent, 1)
        out = q_latent.new_empty_strided((batch, num_heads, q_len, latent), out_strides)
    lse = torch.empty((batch, num_heads, q_len), dtype=torch.float32, device=q_latent.device)
    kv_len = kv_c.shape[1] if block_table is None else block_table.shape[1] * kv_c.shape[1]
    if out.numel() == 0:
        return [], out, lse
    if kv_len == 0:
        # A sum over no keys is 0 in eager, whatever the mode; there is nothing to launch for.
        out.zero_()
        lse.fill_(float("-inf"))
        return [], out, lse
    if q_pe is not None and q_pe.shape[3] == 0:
        q_pe = k_pe = None
    q_latent, q_pe = rows_adjacent(q_latent), rows_adjacent(q_pe)
    assert q_latent is not None
    tuning = tuning or Tuning()
    arch, num_units = device_arch(q_latent.device)
    arch = tuning.arch or arch
    given = [tensor for tensor in (kv_c, k_pe) if tensor is not None]
    plan = remembering(mla_decode_plan, tuning.hint)(
        (layout(q_latent), layout(q_pe), layout(kv_c), layout(k_pe), layout(block_table), layout(key_mask),
         layout(kv_start), layout(kv_end)),
        (softmax_scale, band_lower, band_upper), out.stride(), arch, num_units, q_latent.element_size(),
        dot_precision(q_latent.dtype, arch), empty_rows, aligned(*given, traced=tuning.traced), tuning,
    )  # fmt: skip
    tensors: dict[str, Any] = {
        "q": q_latent, "q_pe": q_pe, "kv": kv_c, "k_pe": k_pe, "kv_blocks": None, "pe_blocks": None,
        "block_table": block_table, "out": out, "lse": lse, "partial": None, "partial_stats": None,
        "key_mask": key_mask, "kv_start": kv_start, "kv_end": kv_end,
    }  # fmt: skip
    scaled = plan.in_flight and mla_configs.scales_shares(plan.arguments["BLOCK_M"], q_latent.dtype, latent)
    if plan.is_split:
        shares = lse.numel() * plan.num_splits
        kind = torch.float16 if scaled else torch.float32
        tensors["partial"] = torch.empty((shares, latent), dtype=kind, device=out.device)
        tensors["partial_stats"] = torch.empty((shares, 3 if scaled else 2), dtype=torch.float32, device=out.device)
    arguments = {**plan.arguments, **tensors}
    if plan.in_flight:
        launches = [hopper_launch(plan, arguments)]
    else:
        if plan.arguments["TMA"]:
            arguments["kv_blocks"] = token_descriptor(kv_c, plan.arguments["BLOCK_N"], plan.arguments["BLOCK_C"])
            if k_pe is not None:
                arguments["pe_blocks"] = token_descriptor(k_pe, plan.arguments["BLOCK_N"], plan.arguments["BLOCK_R"])
        launches = [Launch(mla_decode_kernel, plan.grid, arguments, plan.options)]
    if plan.is_split and plan.in_flight and plan.arguments["BLOCK_M"] > mla_configs.FEW_ROWS:
        launches.append(tall_combine(plan, arguments, scaled))
    elif plan.is_split:
        combined = {
            "partial": tensors["partial"], "partial_stats": tensors["partial_stats"], "v": kv_c, "out": out, "lse": lse,
            "sinks": None, "block_table": None, "v_scale": None,
        }  # fmt: skip
        launches.append(
            Launch(
                attention_combine_kernel,
                lse.numel() * plan.combine["COLUMN_BLOCKS"],
                {**plan.combine, **combined},
                {"num_warps": 4, "num_stages": 1, **({"launch_pdl": True} if plan.in_flight else {})},
            )
        )
    return launches, out, lse


def hopper_launch(plan: DecodePlan, arguments: dict[str, Any]) -> Launch:
    """The launch of one of Hopper's own kernels, whose arguments are among those of mla_decode_kernel."""
    # Here, since Gluon is experimental, and only Hopper needs it.
    from .mla_decode_few import mla_decode_few_kernel
    from .mla_decode_hopper import mla_decode_hopper_kernel

    kernel = mla_decode_few_kernel if arguments["BLOCK_M"] == mla_configs.FEW_ROWS else mla_decode_hopper_kernel
    box = math.gcd(arguments["PAGE"], arguments["BLOCK_N"])
    given = {**arguments, "NAN_ROWS": arguments["EMPTY_ROWS"] in NAN_ROWS, "BOX": box}
    for name, columns in (("kv", 256), ("k_pe", arguments["BLOCK_R"])):
        if (cache := arguments[name]) is not None:
            swizzle = min(128, columns * cache.element_size())
            given[name] = token_descriptor(cache, box, columns, swizzle)
    rows, partial = arguments["BLOCK_M"], arguments["partial"]
    given.update(query_boxes(arguments["q"], arguments["q_pe"], rows, 256, arguments["BLOCK_R"]), share_boxes=None)
    if partial is not None and given["QUERY_TMA"]:
        given["share_boxes"] = share_descriptor(partial, arguments["out"], arguments["num_splits"], rows, 256)
    names = [parameter.name for parameter in kernel.params]
    return Launch(kernel, plan.grid, {name: given[name] for name in names}, plan.options)


def tall_combine(plan: DecodePlan, arguments: dict[str, Any], scaled: bool) -> Launch:
    """The launch that adds up the shares of mla_decode_hopper_kernel, whose arguments are given."""
    rows = arguments["lse"].numel()
    names = (
        "partial", "partial_stats", "out", "lse", "stride_ob", "stride_oh", "stride_om", "num_heads", "q_len",
        "num_splits", "LATENT", "BLOCK_C",
    )  # fmt: skip
    given = {name: arguments[name] for name in names}
    given.update(num_rows=rows, ROWS=mla_configs.COMBINED_ROWS, CHUNK=mla_configs.COMBINED_SHARES, SCALED=scaled)
    given["NAN_ROWS"] = arguments["EMPTY_ROWS"] in NAN_ROWS
    options = {"num_warps": 8, "num_stages": 1, "launch_pdl": True}
    return Launch(mla_combine_kernel, -(-rows // mla_configs.COMBINED_ROWS), given, options)


class DecodePlan(NamedTuple):
    """What one call launches, without its tensors. Shared between calls: do not modify."""

    arguments: dict[str, Any]
    options: dict[str, int]
    grid: Any
    num_splits: Any
    in_flight: bool
    combine: dict[str, Any]

    @property
    def is_split(self) -> bool:
        """Whether shares of the keys are added up. Where their number is a symbol, it may be one."""
        return self.arguments["SPLIT"]


def choose(
    arch: str, rows: int, blocks: tuple[int, int], itemsize: int, page: int, softmax_scale: float,
    empty_rows: str, descriptors: bool, is_prefix: bool, tuning: Tuning,
) -> tuple[configs.KernelConfig, bool, bool]:  # fmt: skip
    """The launch configuration, whether it reads through tensor descriptors, and whether it is the Hopper kernel's.

    Args:
        arch, itemsize, softmax_scale, empty_rows, tuning: As of mla_decode_plan.
        rows: From mla_configs.searched_rows.
        blocks: Padded kv_lora_rank and qk_rope_head_dim.
        page: Block size of a paged cache, 0 for a contiguous one.
        descriptors: Whether tensor descriptors can address the cache.
        is_prefix: A query sees the first keys up to some key, and no mask cuts any of them out.
    """
    if tuning.config is not None:
        return tuning.config, bool(tuning.tma), tuning.in_flight
    if descriptors and tuning.tma is not False:
        own = {} if tuning.traced else mla_configs.DECODE_IN_FLIGHT  # Inductor cannot launch a kernel in Gluon
        config = mla_configs.select(own, arch, rows, sum(blocks), itemsize)
        fits = softmax_scale > 0 and mla_configs.fits_in_flight(blocks) and empty_rows not in MEANS
        # The kernel for few rows has run on a GPU with prefixes alone; other masks go to the kernels that were checked.
        if config and config.block_m == mla_configs.FEW_ROWS:
            fits = fits and is_prefix
        if config and fits:
            return config, True, True
        config = mla_configs.select(mla_configs.DECODE_TMA, arch, rows, sum(blocks), itemsize)
        if config and page % config.block_n == 0:
            return config, True, False
    config = mla_configs.select(mla_configs.DECODE, arch, rows, sum(blocks), itemsize)
    if page:
        config = mla_configs.select(mla_configs.DECODE_PAGES, arch, rows, sum(blocks), itemsize) or config
    assert config, f"no configuration for {arch}, {rows} rows, {blocks}, {itemsize} bytes"
    return config, False, False


@functools.lru_cache(maxsize=1024)
def mla_decode_plan(
    layouts: tuple[Layout, ...],
    scalars: tuple[Any, ...],
    out_strides: tuple[int, ...],
    arch: str,
    num_units: int,
    itemsize: int,
    precision: str,
    empty_rows: str,
    is_aligned: bool,
    tuning: Tuning | None,
) -> DecodePlan:
    """Choose tile and splits. Remembered per shapes and strides.

    Args:
        layouts: Of q_latent, q_pe, kv_c, k_pe, block_table, key_mask, kv_start, kv_end.
        scalars: softmax_scale, band_lower, band_upper.
        out_strides: Strides of the output.
        arch, num_units: From launch.device_arch.
        itemsize: Bytes of one element of q_latent.
        precision: From launch.dot_precision.
        empty_rows: As the op's argument.
        is_aligned: From launch.aligned, of kv_c and k_pe.
        tuning: Overrides, or None.
    """
    tuning = tuning or Tuning()
    q, q_pe, kv, k_pe, table, key_mask, kv_start, kv_end = layouts
    assert q is not None
    assert kv is not None
    (batch, num_heads, q_len, latent), page = q[0], 0 if table is None else kv[0][1]
    kv_len = kv[0][1] if table is None else table[0][1] * page
    rope = 0 if k_pe is None else k_pe[0][2]
    softmax_scale, band_lower, band_upper = scalars
    band_lower, band_upper = clamped_band(band_lower, band_upper, q_len, kv_len)
    block_c, block_r = mla_configs.blocks(arch, itemsize, latent, rope)
    rows = q_len * num_heads
    hint = tuning.hint
    searched = mla_configs.searched_rows(arch, hint(rows), hint(batch), likely(kv_len, hint), num_units)
    config, tma, in_flight = choose(
        arch, searched, (block_c, block_r), itemsize, page, softmax_scale, empty_rows,
        is_aligned and takes_tma(kv, itemsize) and takes_tma(k_pe, itemsize),
        key_mask is None and kv_start is None and band_lower is None, tuning,
    )  # fmt: skip
    tiles = batch * triton.cdiv(rows, config.block_m)
    num_splits = tuning.num_splits or mla_configs.choose_splits(
        arch, tiles, kv_len, num_units, mla_configs.step_tokens(config, in_flight)
    )
    if empty_rows in MEANS:
        num_splits = torch.sym_max(num_splits, 2)  # only the combine kernel knows the mean
    splits_at_most = num_splits if is_number(num_splits) else mla_configs.MAX_SPLITS
    arguments: dict[str, Any] = {}
    for names, values in (
        (("stride_qb", "stride_qh", "stride_qm"), q[1][:3]),
        (("stride_pb", "stride_ph", "stride_pm"), q_pe[1][:3] if q_pe else (None,) * 3),
        (("stride_cb", "stride_cn"), kv[1][:2]),
        (("stride_kb", "stride_kn"), k_pe[1][:2] if k_pe else (None,) * 2),
        (("stride_tb",), table[1][:1] if table else (None,)),
        (("stride_ob", "stride_oh", "stride_om"), out_strides[:3]),
        (("stride_key_b", "stride_key_n"), broadcast_strides(key_mask, 2)),
        (("stride_start_b", "stride_start_m"), broadcast_strides(kv_start, 2)),
        (("stride_end_b", "stride_end_m"), broadcast_strides(kv_end, 2)),
    ):
        arguments.update(zip(names, values))
    arguments.update(
        batch_size=batch, num_heads=num_heads, q_len=q_len, kv_len=kv_len, num_splits=num_splits,
        softmax_scale=float(softmax_scale), band_lower=band_lower, band_upper=band_upper, LATENT=latent, ROPE=rope,
        BLOCK_C=block_c, BLOCK_R=block_r, BLOCK_M=config.block_m, BLOCK_N=config.block_n, PAGE=page,
        SPLIT=splits_at_most > 1, TMA=tma, MERGED=config.merged and not (tma and page),
        TILES_LAST=configs.kv_heads_first(arch),
        ROUND_BITS=configs.rounds_bits(arch), TRANSPOSE_KEYS=mla_configs.transposes_keys(arch),
        HAS_KEY_MASK=key_mask is not None, HAS_START=kv_start is not None, HAS_END=kv_end is not None,
        HAS_LOWER=band_lower is not None, HAS_UPPER=band_upper is not None, EMPTY_ROWS=EMPTY_ROWS[empty_rows],
        PRECISION=precision,
        PIECE=mla_configs.score_columns(arch, block_c, key_mask is not None),
    )  # fmt: skip
    columns, chunk = mla_configs.combine_blocks(hint(batch * rows), block_c, splits_at_most, num_units)
    combine = {
        "stride_vb": kv[1][0], "stride_vh": 0, "stride_vn": kv[1][1], "stride_ve": 1,
        "stride_ob": out_strides[0], "stride_oh": out_strides[1], "stride_om": out_strides[2], "stride_oe": 1,
        "num_heads": num_heads, "gqa_group_size": num_heads, "q_len": q_len, "kv_len": kv_len, "num_splits": num_splits,
        "V_HEAD_DIM": latent, "BLOCK_E": columns, "COLUMN_BLOCKS": block_c // columns, "HAS_BIAS": False,
        "HAS_SINKS": False, "WAITS": in_flight, "EMPTY_ROWS": EMPTY_ROWS[empty_rows],
        "BLOCK_S": triton.next_power_of_2(splits_at_most), "CHUNK": chunk, "BLOCK_N": 16,
    }  # fmt: skip
    # Not paged: with pages the mean, the only thing for which the kernel reads values, is refused.
    plain = NO_CACHE.arguments(kv)
    combine.update({name: plain[name] for name in COMBINE_NAMES})
    options = config.options(arch.startswith("gfx"))
    return DecodePlan(arguments, options, tiles * num_splits, num_splits, in_flight, combine)
