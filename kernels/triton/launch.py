"""Host side shared by forward and backward: checks, kernel arguments common to all kernels, and the launch itself.

A launch is data first (`Launch`), so that the ahead-of-time tests compile exactly what the device would run.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import configs, relaunch
from .bias import BIAS_ELEMENTS, BIAS_ROW, BIAS_TILES
from .common import CAP_FAST, CAP_PLAIN, CAP_PRECISE, CAP_RECIPROCAL, NO_CAP
from .sizes import Hint, known
from .tuned import Chosen

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EMPTY_ROWS = {"impossible": 0, "zero": 0, "nan": 1, "mean": 2, "mean_added": 3, "nan_added": 4}
"""Value of the kernels' EMPTY_ROWS argument (common.py) for each `rocm_attn_compile.spec.EmptyRows`."""
MEANS = (EMPTY_ROWS["mean"], EMPTY_ROWS["mean_added"])
"""Those by which a row that keeps no key averages all values."""


Layout = tuple[torch.Size, tuple[int, ...]] | None
"""Sizes and strides of a tensor, None where it is absent."""


NO_SWIZZLE = -1


@dataclass(frozen=True)
class Descriptor:
    """A tensor that a kernel reads through a tensor descriptor, one `block_shape` at a time.

    Attributes:
        base: Gives data and dtype.
        shape, strides: What the descriptor says; for an expanded or a one-element dimension not those of `base`.
        block_shape: Of one read.
        swizzle: Of the tile in shared memory, in bytes, which kernels in Gluon choose, NO_SWIZZLE for rows that lie as
            they are; 0: Triton chooses.
    """

    base: torch.Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]
    swizzle: int = 0

    def layout(self) -> Any:
        """Gluon's layout of the tile in shared memory."""
        return _shared_layout(self.swizzle, 8 * self.base.element_size(), len(self.block_shape))


@functools.cache
def _shared_layout(swizzle: int, bits: int, rank: int) -> Any:
    # Here, since Gluon is experimental, and only Hopper needs it.
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(max(0, swizzle), bits, rank=rank)


def base_of(argument: Any) -> Any:
    """An argument of a launch; for a descriptor its tensor, from whose sizes and strides a launcher makes it again."""
    return argument.base if isinstance(argument, Descriptor) else argument


@dataclass
class Launch:
    """One kernel launch: `kernel[(grid,)](**arguments, **options)`, each `Descriptor` as Triton's.

    Attributes:
        direction, config: Of a kernel that can be tuned: where its configuration was looked up, and what was found.
    """

    kernel: Any
    grid: Any
    arguments: dict[str, Any]
    options: dict[str, int]
    direction: str = ""
    config: configs.KernelConfig | None = None

    def run(self) -> None:
        """Launch on the current stream of the current device."""
        if not self.grid:
            return
        if relaunch.takes(self.kernel):
            relaunch.launch(self.kernel, self.grid, self.arguments, self.options, _encode)
        else:
            self.kernel[(self.grid,)](**self._encoded(), **self.options)

    def compile(self) -> None:
        """Compile for the current device without launching."""
        self.kernel.warmup(grid=(self.grid,), **self._encoded(), **self.options)

    def _encoded(self) -> dict[str, Any]:
        return {k: _encode(v) if isinstance(v, Descriptor) else v for k, v in self.arguments.items()}


def is_gluon(kernel: Any) -> bool:
    """Whether a kernel is written in Gluon; one that Triton interprets has no such method."""
    return hasattr(kernel, "is_gluon") and kernel.is_gluon()


def _encode(described: Descriptor) -> Any:
    fields = described.base, list(described.shape), list(described.strides), list(described.block_shape)
    if described.swizzle:
        from triton.experimental.gluon.nvidia import hopper

        return hopper.TensorDescriptor(*fields, described.layout())
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(*fields)


@dataclass(frozen=True)
class Tuning:
    """Overrides of the host's choices, for tests and autotuning.

    Attributes:
        config: Launch configuration of every kernel of the call; None takes the table's.
        pack: Query heads of one group per tile; must divide H / K.
        num_splits: Programs that share the keys of one tile.
        shift: What the forward subtracts from the scores, common.RUNNING_MAX, FIRST_MAX or NO_MAX.
        arch: Architecture whose table is used.
        tma: With `config`: whether the kernels read through tensor descriptors (Hopper only). False also keeps the
            tables' configurations from doing so.
        separate: With `config`: one launch for dk and one for dv.
        in_flight: With `config`: latent decode by the Hopper kernel in Gluon. Without: the backward by Hopper's one
            kernel wherever it can.
        ranged: Whether padding and ids are read beforehand, see mask_ranges_launch.is_ranged, and means of empty rows
            written afterwards, see empty_rows.means_apart; None: where it pays.
        traced: The tensors have no data: what is aligned is told by their offsets in their storages.
        replayed: With `traced`: CUDA graphs will replay the call. Without, they will unless it is `opaque`.
        opaque: Triton's own launcher will run the call, not a CUDA graph and not Inductor.
        chosen: Without `config`: configurations that take the place of the tables', see autotune.py. One that needs
            tensor descriptors counts where these can be had.
        hint: From a size to its value in the call at hand; not `int` where sizes may be symbols, see sizes.py.
    """

    config: configs.KernelConfig | None = None
    pack: int | None = None
    num_splits: int | None = None
    shift: int | None = None
    arch: str | None = None
    tma: bool | None = None
    separate: bool = False
    in_flight: bool = False
    ranged: bool | None = None
    traced: bool = False
    replayed: bool = False
    opaque: bool = False
    chosen: Chosen = ()
    hint: Hint = int


def choose(
    tuning: Tuning, arch: str, direction: str, head_block: int, itemsize: int, feature: str, can_tma: bool
) -> tuple[configs.KernelConfig, bool]:
    """The configuration of one kernel of the main work, and whether it reads through tensor descriptors.

    Args:
        tuning: Overrides.
        arch, direction, head_block, itemsize, feature: As for configs.select.
        can_tma: Descriptors of the tensors can be had, and the call is long enough to pay for them.
    """
    if tuning.config:
        return tuning.config, bool(tuning.tma)
    for name, config, tma in tuning.chosen:
        if name == direction and (can_tma or not tma):
            return config, tma
    faster = configs.select_tma(arch, f"{direction}_tma", head_block, itemsize, feature) if can_tma else None
    return (faster, True) if faster else (configs.select(arch, direction, head_block, itemsize, feature), False)


@functools.cache
def device_arch(device: torch.device) -> tuple[str, int]:
    """The architecture's name ("gfx942", "sm90"; "interpreter" without a GPU) and the number of compute units."""
    if device.type in ("cpu", "meta"):
        return "interpreter", 4
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return f"sm{properties.major}{properties.minor}", properties.multi_processor_count


def dot_precision(dtype: torch.dtype, arch: str) -> str:
    """How float32 tiles are multiplied: "ieee", or "tf32" if the user's torch.backends settings allow it.

    tf32 exists on NVIDIA and on gfx942 (as xf32). For 16-bit types the answer does not matter.
    """
    if dtype != torch.float32 or (arch.startswith("gfx") and arch != "gfx942") or arch == "interpreter":
        return "ieee"
    precision = torch.backends.cuda.matmul.fp32_precision
    if precision == "none":
        precision = torch.backends.fp32_precision
    return "tf32" if precision == "tf32" else "ieee"


MIN_TMA_SCORES, MIN_TMA_SCORES_OPAQUE, MIN_TMA_SCORES_REPLAYED = 2**20, 2**28, 2**16
"""Below this many scores (B * H * M * N) a call is short, and making descriptors on the host would cost more than it
saves on the device. Inductor's launcher makes them in a few microseconds, Triton's own, in an opaque call, in hundreds.
A CUDA graph has them: a step of decoding is then faster even if it is short, but not if it is shorter still.
"""


def min_tma_scores(tuning: Tuning, decode: bool = False) -> int:
    """From how many scores on a call reads through descriptors."""
    if tuning.opaque:
        return MIN_TMA_SCORES_OPAQUE
    return MIN_TMA_SCORES_REPLAYED if decode and (tuning.replayed or not tuning.traced) else MIN_TMA_SCORES


PACK_ROWS = 64
"""Up to this many (query, head of a group) rows, a group's query heads share one tile."""


def takes_tma(where: Layout, itemsize: int) -> bool:
    """Whether the tensor memory accelerator can address a 4-D tensor: unit last stride, others of whole 16 bytes."""
    if where is None:
        return False
    shape, strides = where
    outer = all(known(size == 1) or is_whole(stride, itemsize) for size, stride in zip(shape, strides[:3]))
    return outer and known(strides[3] == 1) and known(shape[3] * itemsize >= 32)


def is_whole(stride: int, itemsize: int) -> bool:
    """Whether a stride is of whole 16 bytes, and not 0."""
    return known(stride > 0) and known(stride * itemsize % 16 == 0)


def takes_tma_rope(rope: tuple[Layout, Layout], itemsize: int) -> bool:
    """The same of the layouts of q_pe and k_pe, where they exist."""
    q_pe, k_pe = rope
    if k_pe is None:
        return True
    (batch, kv_len, width), (stride_b, stride_n, stride_r) = k_pe
    as_4d = torch.Size((batch, 1, kv_len, width)), (stride_b, stride_b, stride_n, stride_r)
    return takes_tma(q_pe, itemsize) and takes_tma(as_4d, itemsize)


def aligned(*tensors: torch.Tensor, traced: bool = False) -> bool:
    """Whether all start at a multiple of 16 bytes, as tensor descriptors must. For `traced` see Tuning.

    A storage is aligned; and where an input of the compiled program begins elsewhere than it did when it was compiled,
    Inductor copies it.
    """
    if traced:
        return all(known(tensor.storage_offset() * tensor.element_size() % 16 == 0) for tensor in tensors)
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def cap_kind(logits_soft_cap: float | None, dtype: torch.dtype, arch: str) -> int:
    """The kernels' SOFT_CAP argument, see common.soft_cap: a function of what forward and backward share."""
    if logits_soft_cap is None:
        return NO_CAP.value
    if dtype == torch.float32:
        return CAP_PRECISE.value
    if arch.startswith("gfx"):
        return CAP_RECIPROCAL.value
    return CAP_FAST.value if dtype == torch.bfloat16 and configs.has_tanh(arch) else CAP_PLAIN.value


def bias_storage(bias: torch.Tensor | None, traced: bool) -> tuple[int, bool]:
    """Bytes of an element, and whether a descriptor can be made of it by its address; without a bias something.

    In a trace a descriptor has its tensor's own sizes, so that no dimension may be expanded.
    """
    if bias is None:
        return 1, False
    is_expanded = any(stride == 0 and size > 1 for size, stride in zip(bias.shape, bias.stride()))
    return bias.element_size(), aligned(bias, traced=traced) and not (traced and is_expanded)


def bias_kind(bias: Layout, itemsize: int, tma: bool, pack: int = 1) -> int:
    """How a kernel reads a bias; see bias.py.

    Args:
        bias: Layout of the bias, None without one.
        itemsize: Bytes of one of its elements.
        tma: Whether the kernel reads through tensor descriptors, and the bias starts at a multiple of 16 bytes.
        pack: Query heads in one tile.
    """
    if bias is None:
        return BIAS_ELEMENTS.value
    _, head, row, _ = broadcast_strides(bias, 4)
    if row == 0 and (head == 0 or pack == 1):
        return BIAS_ROW.value
    shape, strides = bias
    stored = torch.Size(1 if stride == 0 else size for size, stride in zip(shape, strides))
    return BIAS_TILES.value if tma and takes_tma((stored, strides), itemsize) else BIAS_ELEMENTS.value


def descriptor(tensor: torch.Tensor, rows: int, columns: int, swizzle: int = 0, heads: int = 1) -> Descriptor:
    """The descriptor of a 4-D tensor (see takes_tma) read in blocks of `rows` x `columns`, of one head or several."""
    # An expanded dimension is stored once. The stride of a dimension of size 1 says nothing, but must be valid.
    shape = tuple(1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride()))
    itemsize = tensor.element_size()
    strides = [
        stride if known(size > 1) or is_whole(stride, itemsize) else 16 // itemsize
        for size, stride in zip(shape[:3], tensor.stride()[:3])
    ]
    return Descriptor(tensor, shape, (*strides, 1), (1, heads, rows, columns), swizzle)


def swizzled(tensor: torch.Tensor, rows: int, columns: int, heads: int = 1) -> Descriptor:
    """The same for a kernel in Gluon, in whose shared memory rows of up to 128 bytes are swizzled."""
    return descriptor(tensor, rows, columns, min(128, columns * tensor.element_size()), heads)


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, empty_rows: str, out_layout: str = "bhsd") -> None:
    """Raise on what these kernels cannot take. Shapes of the optional tensors are checked by the op's fake kernel.

    Raises:
        ValueError: Wrong ranks or sizes that do not fit together, or an unknown mode.
        NotImplementedError: A dtype or head size outside what the kernels were built for.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"q, k, v must be 4-D (batch, heads, length, head_dim); got {q.dim()}-D, {k.dim()}-D, {v.dim()}-D"
        )
    (batch, heads, _, head_dim), (_, kv_heads, kv_len, _) = q.shape, k.shape
    if k.shape != (batch, kv_heads, kv_len, head_dim) or v.shape[:3] != (batch, kv_heads, kv_len):
        raise ValueError(f"k and v must fit q: got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads; got {kv_heads} and {heads}")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise NotImplementedError(
            f"q, k, v must share one dtype of float16, bfloat16, float32; got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    check_modes(head_dim, v.shape[3], empty_rows, out_layout)


def check_modes(head_dim: int, v_head_dim: int, empty_rows: str, out_layout: str) -> None:
    """The part of `check` that says nothing of where keys and values are."""
    if not (1 <= head_dim <= MAX_HEAD_DIM and 1 <= v_head_dim <= MAX_HEAD_DIM):
        raise NotImplementedError(
            f"head_dim and v_head_dim must be 1 to {MAX_HEAD_DIM}; got {head_dim} and {v_head_dim}"
        )
    if empty_rows not in EMPTY_ROWS:
        raise ValueError(f"empty_rows must be one of {sorted(EMPTY_ROWS)}; got {empty_rows!r}")
    if out_layout not in ("bhsd", "bshd"):
        raise ValueError(f"out_layout must be 'bhsd' or 'bshd'; got {out_layout!r}")


def layout(tensor: torch.Tensor | None) -> Layout:
    """Sizes and strides: all that a launch depends on besides dtype and data."""
    return None if tensor is None else (tensor.shape, tensor.stride())


def broadcast_strides(where: Layout, count: int) -> tuple[int | None, ...]:
    """Strides for a broadcasting kernel argument: 0 where the size is 1, None for an absent tensor."""
    if where is None:
        return (None,) * count
    return tuple(0 if known(size == 1) else stride for size, stride in zip(*where))


@functools.lru_cache(maxsize=1024)
def static_arguments(
    q: tuple[torch.Size, tuple[int, ...]],
    k: tuple[torch.Size, tuple[int, ...]],
    v: tuple[torch.Size, tuple[int, ...]],
    attn_bias: Layout,
    attn_mask: Layout,
    key_mask: Layout,
    kv_start: Layout,
    kv_end: Layout,
    q_ids: Layout,
    kv_ids: Layout,
    alibi_slopes: Layout,
    softmax_scale: float,
    logits_soft_cap: float | None,
    band_lower: int | None,
    band_upper: int | None,
    dropout_p: float,
    head_blocks: tuple[int, int, int],
) -> dict[str, Any]:
    """The arguments that all kernels share and that are not tensors; remembered, do not modify the result.

    Args:
        head_blocks: Tile extents of head_dim, in one or two pieces, and of v_head_dim; from configs.head_blocks.
    """
    batch, num_heads, q_len, head_dim = q[0]
    _, kv_heads, kv_len, v_head_dim = v[0]
    band_lower, band_upper = clamped_band(band_lower, band_upper, q_len, kv_len)
    arguments: dict[str, Any] = {}
    for names, values in (
        (("stride_qb", "stride_qh", "stride_qm", "stride_qd"), q[1]),
        (("stride_kb", "stride_kh", "stride_kn", "stride_kd"), k[1]),
        (("stride_vb", "stride_vh", "stride_vn", "stride_ve"), v[1]),
        (("stride_bb", "stride_bh", "stride_bm", "stride_bn"), broadcast_strides(attn_bias, 4)),
        (("stride_mb", "stride_mh", "stride_mm", "stride_mn"), broadcast_strides(attn_mask, 4)),
        (("stride_key_b", "stride_key_n"), broadcast_strides(key_mask, 2)),
        (("stride_start_b", "stride_start_m"), broadcast_strides(kv_start, 2)),
        (("stride_end_b", "stride_end_m"), broadcast_strides(kv_end, 2)),
        (("stride_qid_b", "stride_qid_m"), broadcast_strides(q_ids, 2)),
        (("stride_kid_b", "stride_kid_n"), broadcast_strides(kv_ids, 2)),
        (("stride_slopes_b", "stride_slopes_h"), _slope_strides(alibi_slopes)),
    ):
        arguments.update(zip(names, values))
    # Offsets inside a tile are 32-bit numbers unless a stride is so large that 256 steps of it would overflow.
    matrices = [where for where in (q, k, v, attn_bias, attn_mask) if where is not None]
    arguments.update(
        num_heads=num_heads,
        gqa_group_size=num_heads // kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        softmax_scale=float(softmax_scale),
        logits_soft_cap=None if logits_soft_cap is None else float(logits_soft_cap),
        band_lower=band_lower,
        band_upper=band_upper,
        dropout_p=float(dropout_p) if dropout_p > 0.0 else None,
        HEAD_DIM=head_dim,
        V_HEAD_DIM=v_head_dim,
        BLOCK_D=head_blocks[0],
        BLOCK_REST=head_blocks[1],
        BLOCK_E=head_blocks[2],
        WIDE=any(is_wide(stride) for _, strides in matrices for stride in strides[2:]),
        RAW=attn_bias is None and alibi_slopes is None and (logits_soft_cap or softmax_scale) > 0,
        HAS_BIAS=attn_bias is not None,
        HAS_ATTN_MASK=attn_mask is not None,
        HAS_KEY_MASK=key_mask is not None,
        HAS_START=kv_start is not None,
        HAS_END=kv_end is not None,
        HAS_IDS=q_ids is not None,
        HAS_LOWER=band_lower is not None,
        HAS_UPPER=band_upper is not None,
        HAS_DROPOUT=dropout_p > 0.0,
        HAS_ALIBI=alibi_slopes is not None,
    )
    return arguments


def clamped_band(lower: Any, upper: Any, q_len: Any, kv_len: Any) -> tuple[Any, Any]:
    """The edges within 32 bits: one outside of the score matrix drops everything, or nothing, and then is None."""
    if lower is not None:
        lower = None if known(lower <= 1 - q_len) else torch.sym_min(lower, kv_len)
    if upper is not None:
        upper = None if known(upper >= kv_len - 1) else torch.sym_max(upper, -q_len)
    return lower, upper


def is_wide(stride: int) -> bool:
    """Whether up to 256 steps of it may not fit 32 bits."""
    return not known(256 * stride < 2**31)


def _slope_strides(where: Layout) -> tuple[int | None, ...]:
    """Strides over batch and heads of ALiBi's slopes, `(H,)` or `(B, H)`."""
    strides = broadcast_strides(where, 2)
    return strides if len(strides) == 2 else (0, *strides)


Rope = tuple[Tensor, Tensor] | None
"""q_pe `(B, H, M, R)` and k_pe `(B, N, R)` of latent attention, with unit last strides: a piece of the head dimension
that lies elsewhere, and whose keys all heads share. None where there is none."""


def rope_arguments(q_pe: Layout, k_pe: Layout) -> dict[str, Any]:
    """What the forward, dq and dk/dv kernels know of such a piece."""
    q_strides = (None,) * 3 if q_pe is None else q_pe[1][:3]
    k_strides = (None,) * 2 if k_pe is None else k_pe[1][:2]
    names = ("stride_qpb", "stride_qph", "stride_qpm", "stride_kpb", "stride_kpn")
    return {**dict(zip(names, (*q_strides, *k_strides))), "ROPE": 0 if k_pe is None else k_pe[0][2]}


def run_all(launches: list[Launch], device: torch.device) -> None:
    """Launch in order on the current stream of `device`, which need not be the current device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            for launch in launches:
                launch.run()
    else:
        for launch in launches:
            launch.run()
