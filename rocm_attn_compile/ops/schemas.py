"""Schemas, argument checks and fake kernels of the ops. Torch only: importing this never imports a kernel.

Letters: B batch, H query heads, K key/value heads, M q_len, N kv_len, D head_dim, E v_head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from rocm_attn_compile import _torch_private
from rocm_attn_compile.ops.checks import (
    DTYPES,
    INTEGERS,
    check,
    check_dtype,
    check_row_masks,
    check_shape,
    check_words,
)
from rocm_attn_compile.ops.kv_cache import CACHE_TENSORS, resolved

NAMESPACE = "rocm_attn"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

OPTIONAL_TENSORS = (
    "attn_bias",
    "attn_mask",
    "key_mask",
    "kv_start",
    "kv_end",
    "q_ids",
    "kv_ids",
    "sinks",
    "dropout_seed",
    "alibi_slopes",
)
"""The optional tensor arguments, in schema order, after q, k, v."""

NUM_TENSORS = 3 + len(OPTIONAL_TENSORS)
"""q, k, v and the optional ones. Those of a cache come after them, see kv_cache.py."""

_OPTIONALS = ", ".join(f"Tensor? {name}=None" for name in OPTIONAL_TENSORS)
_CACHE = ", ".join(f"Tensor? {name}=None" for name in CACHE_TENSORS)

LIBRARY.define(
    f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONALS}, {_CACHE}, *, float softmax_scale, "
    "float? logits_soft_cap=None, SymInt? band_lower=None, SymInt? band_upper=None, float dropout_p=0.0, "
    'str empty_rows="nan", str out_layout="bhsd", str impl="") -> (Tensor, Tensor)',
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    f"attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, {_OPTIONALS.replace('=None', '')}, "
    "Tensor out, Tensor lse, float softmax_scale, float? logits_soft_cap, SymInt? band_lower, SymInt? band_upper, "
    "float dropout_p, str empty_rows, str impl, bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "dropout_keep_mask(Tensor dropout_seed, float dropout_p, SymInt[4] size) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what scores, softmax and lse are computed: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_out(q: Tensor, v: Tensor, out_layout: str) -> Tensor:
    """Uninitialised output `(B, H, M, E)`: contiguous for "bhsd", `(B, M, H, E)` memory for "bshd".

    Allocated with its strides, not as a view, so that in-place changes of the output stay legal in autograd.
    """
    return empty_result(q, v.shape[3], out_layout)


def empty_result(q: Tensor, width: Any, out_layout: str) -> Tensor:
    """As `empty_out`, with `width` channels a row."""
    B, H, M, _ = q.shape
    if out_layout == "bshd":
        return q.new_empty_strided((B, H, M, width), (M * H * width, width, H * width, 1))
    return q.new_empty((B, H, M, width))


def empty_grad(tensor: Tensor) -> Tensor:
    """Uninitialised gradient of `tensor`: its strides where it is dense, else contiguous."""
    grad = torch.empty_like(tensor)
    # torch.empty_like keeps the strides exactly of dense tensors only.
    return grad if _torch_private.same_if_known(grad.stride(), tensor.stride()) else tensor.new_empty(tensor.shape)


def as_promised(grad: Tensor, tensor: Tensor) -> Tensor:
    """`grad` as the fake kernels promise that of `tensor`, see empty_grad: no copy if it is that already.

    Compiled programs rely on its strides. It shares no memory with another gradient.
    """
    is_same = grad.dtype == tensor.dtype and grad.stride() == tensor.stride()
    return grad if is_same and _is_dense(grad) else empty_grad(tensor).copy_(grad)


def _is_dense(tensor: Tensor) -> bool:
    steps = zip(tensor.shape, tensor.stride())
    return tensor.is_contiguous() or 1 + sum((size - 1) * stride for size, stride in steps) == tensor.numel()


def check_inputs(
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
    dropout_p: float,
    empty_rows: str,
    out_layout: str = "bhsd",
) -> None:
    """Raise ValueError, saying what was got and what is allowed, unless the arguments fit. Sizes may be symbolic."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; need 4 dims: (batch, heads, len, head_dim)")
    if q.dtype not in DTYPES:
        raise ValueError(f"q is {q.dtype}; allowed are float16, bfloat16, float32 and float64")
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must have one dtype: cast them before")
    B, H, M, D = q.shape
    _, K, N, _ = k.shape
    E = v.shape[3]
    check_shape("k", k, (B, K, N, D))
    check_shape("v", v, (B, K, N, E))
    heads = lambda: f"q has {H} heads of {D}, k has {K}, v has {K} of {E}; k's number must divide q's, none is 0"  # noqa: E731
    check(K >= 1, heads)
    check(H % K == 0, heads)
    check(D >= 1, heads)
    check(E >= 1, heads)
    if attn_bias is not None:
        check_shape("attn_bias", attn_bias, (B, H, M, N), broadcast=4)
        check_dtype("attn_bias", attn_bias, attn_bias.dtype.is_floating_point, "a float dtype")
    if attn_mask is not None:
        check_shape("attn_mask", attn_mask, (B, H, M, N), broadcast=4)
        check_dtype("attn_mask", attn_mask, attn_mask.dtype == torch.bool, "bool, True keeps")
    check_row_masks(B, M, N, key_mask, kv_start, kv_end)
    for name, ids, length in (("q_ids", q_ids, M), ("kv_ids", kv_ids, N)):
        if ids is not None:
            check_shape(name, ids, (B, length), broadcast=1)
            check_dtype(name, ids, ids.dtype in INTEGERS, "int32 or int64")
    if (q_ids is None) != (kv_ids is None):
        raise ValueError("q_ids and kv_ids go together: give both or neither")
    if sinks is not None:
        check_shape("sinks", sinks, (H,))
        check_dtype("sinks", sinks, sinks.dtype.is_floating_point, "a float dtype")
    if alibi_slopes is not None:
        check_shape("alibi_slopes", alibi_slopes, (H,) if alibi_slopes.dim() == 1 else (B, H))
        wide = lse_dtype(q.dtype)
        check_dtype("alibi_slopes", alibi_slopes, alibi_slopes.dtype == wide, f"{wide} beside q of {q.dtype}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; allowed is 0 <= dropout_p < 1")
    if dropout_seed is not None:
        check_dtype("dropout_seed", dropout_seed, dropout_seed.dtype == torch.int64, "int64")
        if dropout_seed.numel() != 1:
            raise ValueError(f"dropout_seed is {tuple(dropout_seed.shape)}; need one element")
    elif dropout_p > 0.0:
        raise ValueError(f"dropout_p is {dropout_p} without dropout_seed; give an int64 tensor of one element")
    check_words(empty_rows, out_layout)
    others = (k, v, attn_bias, attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, sinks, dropout_seed, alibi_slopes)
    for name, other in zip(("k", "v", *OPTIONAL_TENSORS), others):
        if other is not None and other.device != q.device:
            raise ValueError(f"{name} is on {other.device}, q on {q.device}; move it")


def check_backward_inputs(grad_out: Tensor, q: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """Raise ValueError unless grad_out and out are `(B, H, M, E)` and lse is `(B, H, M)`."""
    B, H, M, _ = q.shape
    E = v.shape[3]
    check_shape("grad_out", grad_out, (B, H, M, E))
    check_shape("out", out, (B, H, M, E))
    check_shape("lse", lse, (B, H, M))


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    q_ids: Tensor | None = None,
    kv_ids: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    softmax_scale: float,
    logits_soft_cap: float | None = None,
    band_lower: int | None = None,
    band_upper: int | None = None,
    dropout_p: float = 0.0,
    empty_rows: str = "nan",
    out_layout: str = "bhsd",
    impl: str = "",
) -> tuple[Tensor, Tensor]:
    q, k, v, *_ = resolved((q, k, v, *[None] * 4, kv_end, block_table, k_scale, v_scale), 8)
    optionals = (attn_bias, attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, sinks, dropout_seed, alibi_slopes)
    check_inputs(q, k, v, *optionals, dropout_p, empty_rows, out_layout)
    return empty_out(q, v, out_layout), q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))


def _attention_backward_fake(
    grad_out: Tensor,
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
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    logits_soft_cap: float | None,
    band_lower: int | None,
    band_upper: int | None,
    dropout_p: float,
    empty_rows: str,
    impl: str,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    optionals = (attn_bias, attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, sinks, dropout_seed, alibi_slopes)
    check_inputs(q, k, v, *optionals, dropout_p, empty_rows)
    check_backward_inputs(grad_out, q, v, out, lse)
    dq, dk, dv, dbias, dsinks = (
        empty_grad(tensor) if wanted and tensor is not None else q.new_empty((0,))
        for tensor, wanted in zip((q, k, v, attn_bias, sinks), output_mask)
    )
    return dq, dk, dv, dbias, dsinks


def _dropout_keep_mask_fake(dropout_seed: Tensor, dropout_p: float, size: list[int]) -> Tensor:
    return torch.empty(size, dtype=torch.bool, device=dropout_seed.device)


torch.library.register_fake(f"{NAMESPACE}::attention", _attention_fake, lib=LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::attention_backward", _attention_backward_fake, lib=LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::dropout_keep_mask", _dropout_keep_mask_fake, lib=LIBRARY)

attention = torch.ops.rocm_attn.attention.default
attention_backward = torch.ops.rocm_attn.attention_backward.default
dropout_keep_mask = torch.ops.rocm_attn.dropout_keep_mask.default


def named_arguments(op: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every argument of a call of one of the ops above by name, defaults included."""
    schema = _torch_private.schema_arguments(op)
    given = dict(zip((name for name, _ in schema), args))
    return {name: given.get(name, kwargs.get(name, default)) for name, default in schema}


def tensors_of(arguments: dict[str, Any]) -> list[Tensor]:
    """The tensors among a call's arguments by name."""
    return [argument for argument in arguments.values() if isinstance(argument, Tensor)]


def are_never_empty(tensors: list[Tensor]) -> bool:
    """Whether each has an element whatever the symbols in its sizes are. Asks nothing that would make PyTorch guard."""
    return all(statically_known_true(tensor.numel() > 0) for tensor in tensors)


def is_static(arguments: dict[str, Any]) -> bool:
    """Whether every size, stride and band edge of a call's arguments by name is a number."""
    numbers = [arguments["band_lower"], arguments["band_upper"]]
    numbers += [number for t in tensors_of(arguments) for number in (*t.shape, *t.stride())]
    return all(number is None or isinstance(number, int) for number in numbers)
