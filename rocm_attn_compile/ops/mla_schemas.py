"""Schemas, argument checks and fake kernels of the ops of latent attention (MLA). Torch only.

Letters: B batch, H query heads, M q_len, N kv_len, P qk_nope_head_dim, R qk_rope_head_dim, C kv_lora_rank,
E v_head_dim. Per head, with one latent `kv_c` and one rotated key `k_pe` for all heads:

    k_nope = kv_c w_uk^T        v = kv_c w_uv^T
    out = softmax(softmax_scale * (q_nope k_nope^T + q_pe k_pe^T), masked) v

`mla_prefill` is the last line; `mla_decode` is the same with w_uk moved to the query, `q_latent = q_nope w_uk`, and
w_uv to the result, so that keys and values are kv_c itself; `mla` is the whole, in the cheaper form (mla_form.py). A
model without rotary half (R of 0) passes None for q_pe and k_pe.

In a paged cache kv_c is `(num_blocks, block_size, C)`, k_pe `(num_blocks, block_size, R)`, and key n of batch b is row
n % block_size of block block_table[b, n // block_size]; N is then max_blocks * block_size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rocm_attn_compile.ops.checks import DTYPES, check, check_dtype, check_row_masks, check_shape, check_words
from rocm_attn_compile.ops.schemas import LIBRARY, NAMESPACE, empty_grad, empty_result, lse_dtype

_MASKS = "Tensor? key_mask=None, Tensor? kv_start=None, Tensor? kv_end=None"
_SETTINGS = (
    "*, float softmax_scale, SymInt? band_lower=None, SymInt? band_upper=None, "
    'str empty_rows="nan", str out_layout="bhsd", str impl=""'
)
_PREFILL = "Tensor q_nope, Tensor? q_pe, Tensor k_nope, Tensor? k_pe, Tensor v"

for _signature in (
    f"mla_prefill({_PREFILL}, {_MASKS}, {_SETTINGS}) -> (Tensor, Tensor)",
    f"mla_prefill_backward(Tensor grad_out, {_PREFILL}, {_MASKS.replace('=None', '')}, Tensor out, Tensor lse, "
    "float softmax_scale, SymInt? band_lower, SymInt? band_upper, str empty_rows, str impl, bool[5] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "mla_decode(Tensor q_latent, Tensor? q_pe, Tensor kv_c, Tensor? k_pe, Tensor? block_table=None, "
    f"{_MASKS}, {_SETTINGS}) -> (Tensor, Tensor)",
    "mla(Tensor q_nope, Tensor? q_pe, Tensor kv_c, Tensor? k_pe, Tensor w_uk, Tensor w_uv, Tensor? block_table=None, "
    f"{_MASKS}, {_SETTINGS}) -> (Tensor, Tensor)",
):
    LIBRARY.define(_signature, tags=(torch.Tag.pt2_compliant_tag,))


def check_prefill(
    q_nope: Tensor,
    q_pe: Tensor | None,
    k_nope: Tensor,
    k_pe: Tensor | None,
    v: Tensor,
    key_mask: Tensor | None,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
    empty_rows: str,
    out_layout: str = "bhsd",
) -> None:
    """Raise ValueError, saying what was got and what is allowed, unless the arguments fit. Sizes may be symbolic."""
    given = dict(locals())
    _check_floats(q_nope=q_nope, q_pe=q_pe, k_nope=k_nope, k_pe=k_pe, v=v)
    B, H, M, P = _sizes("q_nope", q_nope, "batch, heads, len, qk_nope_head_dim")
    N = _sizes("k_nope", k_nope, "batch, heads, len, qk_nope_head_dim")[2]
    E = _sizes("v", v, "batch, heads, len, v_head_dim")[3]
    check_shape("k_nope", k_nope, (B, H, N, P))
    check_shape("v", v, (B, H, N, E))
    _check_rope(q_pe, k_pe, (B, H, M), (B, N))
    _check_positive(num_heads=H, qk_nope_head_dim=P, v_head_dim=E)
    check_row_masks(B, M, N, key_mask, kv_start, kv_end)
    check_words(empty_rows, out_layout)
    _check_devices(given)


def check_decode(
    q_latent: Tensor,
    q_pe: Tensor | None,
    kv_c: Tensor,
    k_pe: Tensor | None,
    block_table: Tensor | None,
    key_mask: Tensor | None,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
    empty_rows: str,
    out_layout: str = "bhsd",
) -> None:
    """As `check_prefill`, for the absorbed form."""
    given = dict(locals())
    _check_floats(q_latent=q_latent, q_pe=q_pe, kv_c=kv_c, k_pe=k_pe)
    B, H, M, C = _sizes("q_latent", q_latent, "batch, heads, len, kv_lora_rank")
    N = _check_cache(B, C, kv_c, block_table, kv_end)
    _check_rope(q_pe, k_pe, (B, H, M), tuple(kv_c.shape[:2]))
    _check_positive(num_heads=H, kv_lora_rank=C)
    check_row_masks(B, M, N, key_mask, kv_start, kv_end)
    check_words(empty_rows, out_layout)
    _check_devices(given)


def check_whole(
    q_nope: Tensor,
    q_pe: Tensor | None,
    kv_c: Tensor,
    k_pe: Tensor | None,
    w_uk: Tensor,
    w_uv: Tensor,
    block_table: Tensor | None,
    key_mask: Tensor | None,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
    empty_rows: str,
    out_layout: str = "bhsd",
) -> None:
    """As `check_prefill`, for the op that chooses its form."""
    given = dict(locals())
    _check_floats(q_nope=q_nope, q_pe=q_pe, kv_c=kv_c, k_pe=k_pe, w_uk=w_uk, w_uv=w_uv)
    B, H, M, P = _sizes("q_nope", q_nope, "batch, heads, len, qk_nope_head_dim")
    _, E, C = _sizes("w_uv", w_uv, "heads, v_head_dim, kv_lora_rank")
    check_shape("w_uk", w_uk, (H, P, C))
    check_shape("w_uv", w_uv, (H, E, C))
    N = _check_cache(B, C, kv_c, block_table, kv_end)
    _check_rope(q_pe, k_pe, (B, H, M), tuple(kv_c.shape[:2]))
    _check_positive(num_heads=H, qk_nope_head_dim=P, kv_lora_rank=C, v_head_dim=E)
    check_row_masks(B, M, N, key_mask, kv_start, kv_end)
    check_words(empty_rows, out_layout)
    _check_devices(given)


def _sizes(name: str, tensor: Tensor, dims: str) -> tuple:
    count = dims.count(",") + 1
    if tensor.dim() != count:
        raise ValueError(f"{name} is {tuple(tensor.shape)}; need {count} dims: ({dims})")
    return tuple(tensor.shape)


def _check_floats(**tensors: Tensor | None) -> None:
    given = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    dtypes = set(given.values())
    if len(dtypes) != 1:
        got = ", ".join(f"{name} {dtype}" for name, dtype in given.items())
        raise ValueError(f"dtypes are {got}; they must be one: cast them before")
    if not dtypes <= set(DTYPES):
        name, dtype = next(iter(given.items()))
        raise ValueError(f"{name} is {dtype}; allowed are float16, bfloat16, float32 and float64")


def _check_positive(**sizes: Any) -> None:
    for name, size in sizes.items():
        check(size >= 1, lambda name=name, size=size: f"{name} is {size}; need at least 1")  # type: ignore[misc]


def _check_rope(q_pe: Tensor | None, k_pe: Tensor | None, q_rows: tuple, k_rows: tuple) -> None:
    if (q_pe is None) != (k_pe is None):
        raise ValueError("q_pe and k_pe go together: give both or neither (a model without rotary half)")
    if q_pe is None or k_pe is None:
        return
    R = q_pe.shape[-1] if q_pe.dim() else 0
    check_shape("q_pe", q_pe, (*q_rows, R))
    check_shape("k_pe", k_pe, (*k_rows, R))
    _check_positive(qk_rope_head_dim=R)


def _check_cache(batch: Any, rank: Any, kv_c: Tensor, block_table: Tensor | None, kv_end: Tensor | None) -> Any:
    """Check kv_c, contiguous or paged; returns kv_len."""
    if block_table is None:
        _, N, _ = _sizes("kv_c", kv_c, "batch, len, kv_lora_rank")
        check_shape("kv_c", kv_c, (batch, N, rank))
        return N
    blocks, size, _ = _sizes("kv_c", kv_c, "num_blocks, block_size, kv_lora_rank")
    check_shape("kv_c", kv_c, (blocks, size, rank))
    _check_positive(num_blocks=blocks, block_size=size)
    _, most = _sizes("block_table", block_table, "batch, max_blocks")
    check_shape("block_table", block_table, (batch, most))
    check_dtype("block_table", block_table, block_table.dtype == torch.int32, "int32")
    if kv_end is None:
        raise ValueError("block_table is given without kv_end; a paged cache needs the lengths, (B, 1) or (B, M)")
    return most * size


def _check_devices(arguments: dict[str, Any]) -> None:
    """The tensors among the arguments must be where the first of them is."""
    (first, q), *others = ((name, value) for name, value in arguments.items() if isinstance(value, Tensor))
    for name, other in others:
        if other.device != q.device:
            raise ValueError(f"{name} is on {other.device}, {first} on {q.device}; move it")


def _results(q: Tensor, width: Any, out_layout: str) -> tuple[Tensor, Tensor]:
    return empty_result(q, width, out_layout), q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))


def _prefill_fake(
    q_nope: Tensor,
    q_pe: Tensor | None,
    k_nope: Tensor,
    k_pe: Tensor | None,
    v: Tensor,
    key_mask: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    *,
    empty_rows: str = "nan",
    out_layout: str = "bhsd",
    **_settings: Any,
) -> tuple[Tensor, Tensor]:
    check_prefill(q_nope, q_pe, k_nope, k_pe, v, key_mask, kv_start, kv_end, empty_rows, out_layout)
    return _results(q_nope, v.shape[3], out_layout)


def _prefill_backward_fake(grad_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    tensors, (out, lse), (*_, empty_rows, _impl, output_mask) = rest[:8], rest[8:10], rest[10:]
    check_prefill(*tensors, empty_rows)  # type: ignore[call-arg]
    check_prefill_backward(grad_out, tensors[0], tensors[4], out, lse)
    return tuple(
        empty_grad(tensor) if wanted and tensor is not None else grad_out.new_empty((0,))
        for tensor, wanted in zip(tensors, output_mask)
    )


def check_prefill_backward(grad_out: Tensor, q_nope: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """Raise ValueError unless grad_out and out are `(B, H, M, E)` and lse is `(B, H, M)`."""
    rows = tuple(q_nope.shape[:3])
    check_shape("grad_out", grad_out, (*rows, v.shape[3]))
    check_shape("out", out, (*rows, v.shape[3]))
    check_shape("lse", lse, rows)


def _decode_fake(
    q_latent: Tensor,
    q_pe: Tensor | None,
    kv_c: Tensor,
    k_pe: Tensor | None,
    block_table: Tensor | None = None,
    key_mask: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    *,
    empty_rows: str = "nan",
    out_layout: str = "bhsd",
    **_settings: Any,
) -> tuple[Tensor, Tensor]:
    check_decode(q_latent, q_pe, kv_c, k_pe, block_table, key_mask, kv_start, kv_end, empty_rows, out_layout)
    return _results(q_latent, q_latent.shape[3], out_layout)


def _whole_fake(
    q_nope: Tensor,
    q_pe: Tensor | None,
    kv_c: Tensor,
    k_pe: Tensor | None,
    w_uk: Tensor,
    w_uv: Tensor,
    block_table: Tensor | None = None,
    key_mask: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    *,
    empty_rows: str = "nan",
    out_layout: str = "bhsd",
    **_settings: Any,
) -> tuple[Tensor, Tensor]:
    masks = (block_table, key_mask, kv_start, kv_end)
    check_whole(q_nope, q_pe, kv_c, k_pe, w_uk, w_uv, *masks, empty_rows, out_layout)
    return _results(q_nope, w_uv.shape[1], out_layout)


torch.library.register_fake(f"{NAMESPACE}::mla_prefill", _prefill_fake, lib=LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::mla_prefill_backward", _prefill_backward_fake, lib=LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::mla_decode", _decode_fake, lib=LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::mla", _whole_fake, lib=LIBRARY)

mla_prefill = torch.ops.rocm_attn.mla_prefill.default
mla_prefill_backward = torch.ops.rocm_attn.mla_prefill_backward.default
mla_decode = torch.ops.rocm_attn.mla_decode.default
mla = torch.ops.rocm_attn.mla.default
