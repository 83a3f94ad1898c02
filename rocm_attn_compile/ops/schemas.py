"""Schemas, argument checks and fake kernels of the ops. Torch only: importing this never imports a kernel.

Letters: B batch, H query heads, K key/value heads, M q_len, N kv_len, D head_dim, E v_head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAMESPACE = "rocm_attn"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

EMPTY_ROWS = ("impossible", "nan", "zero", "mean", "mean_added")
OUT_LAYOUTS = ("bhsd", "bshd")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

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
)
"""The optional tensor arguments, in schema order, after q, k, v."""

_OPTIONALS = ", ".join(f"Tensor? {name}=None" for name in OPTIONAL_TENSORS)

LIBRARY.define(
    f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONALS}, *, float softmax_scale, float? logits_soft_cap=None, "
    'SymInt? band_lower=None, SymInt? band_upper=None, float dropout_p=0.0, str empty_rows="nan", '
    'str out_layout="bhsd", str impl="") -> (Tensor, Tensor)',
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
    B, H, M, _ = q.shape
    E = v.shape[3]
    if out_layout == "bshd":
        return q.new_empty_strided((B, H, M, E), (M * H * E, E, H * E, 1))
    return q.new_empty((B, H, M, E))


def empty_grad(tensor: Tensor) -> Tensor:
    """Uninitialised gradient of `tensor`: its strides where it is dense, else contiguous."""
    grad = torch.empty_like(tensor)
    # torch.empty_like keeps the strides exactly of dense tensors only.
    return grad if grad.stride() == tensor.stride() else tensor.new_empty(tensor.shape)


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
    dropout_p: float,
    empty_rows: str,
    out_layout: str = "bhsd",
) -> None:
    """Raise ValueError, saying what was got and what is allowed, unless the arguments fit. Sizes may be symbolic."""
    check: Any = torch._check_value
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check(
            tensor.dim() == 4, lambda n=name, t=tensor: f"{n} has {t.dim()} dims; need 4: (batch, heads, len, head_dim)"
        )
    check(q.dtype in DTYPES, lambda: f"q is {q.dtype}; allowed are float16, bfloat16, float32 and float64")
    check(
        q.dtype == k.dtype and q.dtype == v.dtype,
        lambda: f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must have one dtype, cast them before the call",
    )
    B, H, M, D = q.shape
    K, N, E = k.shape[1], k.shape[2], v.shape[3]
    shapes = lambda: f"q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"  # noqa: E731
    check(k.shape[0] == B, lambda: f"{shapes()}: k must have q's batch size; expand it")
    check(k.shape[3] == D, lambda: f"{shapes()}: k must have q's head_dim (last size)")
    check(v.shape[0] == B, lambda: f"{shapes()}: v must have q's batch size; expand it")
    check(v.shape[1] == K, lambda: f"{shapes()}: v must have k's number of heads")
    check(v.shape[2] == N, lambda: f"{shapes()}: v must have k's length")
    check(D >= 1, lambda: f"{shapes()}: head_dim must be at least 1")
    check(E >= 1, lambda: f"{shapes()}: v's head_dim must be at least 1")
    check(K >= 1, lambda: f"{shapes()}: k needs at least one head")
    check(H % K == 0, lambda: f"{shapes()}: k's number of heads must divide q's")

    def check_tensor(name: str, tensor: Tensor | None, sizes: tuple, kind: str) -> None:
        """`sizes[i]` is the full size; a size given as (full,) may also be 1, to broadcast."""
        if tensor is None:
            return
        text = lambda: (  # noqa: E731
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}; need {kind} "
            f"({', '.join(f'{s[0]} or 1' if isinstance(s, tuple) else str(s) for s in sizes)})"
        )
        check(tensor.dim() == len(sizes), text)
        for got, size in zip(tensor.shape, sizes):
            full, broadcasts = (size[0], True) if isinstance(size, tuple) else (size, False)
            # A static 1 is tried first, so that a symbolic size is not compared (and guarded) without need.
            if not (broadcasts and isinstance(got, int) and got == 1):
                check(got == full, text)
        fits = {
            "bool": tensor.dtype == torch.bool,
            "float": tensor.dtype.is_floating_point,
            "int32 or int64": tensor.dtype in (torch.int32, torch.int64),
        }
        check(fits[kind], text)

    check_tensor("attn_bias", attn_bias, ((B,), (H,), (M,), (N,)), "float")
    check_tensor("attn_mask", attn_mask, ((B,), (H,), (M,), (N,)), "bool")
    check_tensor("key_mask", key_mask, ((B,), N), "bool")
    check_tensor("kv_start", kv_start, ((B,), (M,)), "int32 or int64")
    check_tensor("kv_end", kv_end, ((B,), (M,)), "int32 or int64")
    check_tensor("q_ids", q_ids, ((B,), M), "int32 or int64")
    check_tensor("kv_ids", kv_ids, ((B,), N), "int32 or int64")
    check_tensor("sinks", sinks, (H,), "float")
    check((q_ids is None) == (kv_ids is None), lambda: "q_ids and kv_ids go together: give both or neither")
    check(0.0 <= dropout_p < 1.0, lambda: f"dropout_p is {dropout_p}; allowed is 0 <= dropout_p < 1")
    if dropout_p > 0.0:
        check(dropout_seed is not None, lambda: "dropout_p > 0 needs dropout_seed, an int64 tensor of one element")
    if dropout_seed is not None:
        check(
            dropout_seed.dtype == torch.int64 and dropout_seed.numel() == 1,
            lambda: f"dropout_seed is {dropout_seed.dtype} {tuple(dropout_seed.shape)}; need int64 with one element",
        )
    check(empty_rows in EMPTY_ROWS, lambda: f"empty_rows is {empty_rows!r}; allowed are {', '.join(EMPTY_ROWS)}")
    check(out_layout in OUT_LAYOUTS, lambda: f"out_layout is {out_layout!r}; allowed are {', '.join(OUT_LAYOUTS)}")
    for name, tensor in zip(
        ("k", "v", *OPTIONAL_TENSORS),
        (k, v, attn_bias, attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, sinks, dropout_seed),
    ):
        check(
            tensor is None or tensor.device == q.device,
            lambda n=name, t=tensor: f"{n} is on {t.device}, q on {q.device}; move it",
        )


def check_backward_inputs(grad_out: Tensor, q: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """Raise ValueError unless grad_out and out are `(B, H, M, E)` and lse is `(B, H, M)`."""
    check: Any = torch._check_value
    shape = (q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    for name, tensor in (("grad_out", grad_out), ("out", out)):
        check(tensor.dim() == 4, lambda n=name, t=tensor: f"{n} has {t.dim()} dims; need 4")
        for got, size in zip(tensor.shape, shape):
            check(
                got == size, lambda n=name, t=tensor: f"{n} is {tuple(t.shape)}; need {shape}, the shape of the output"
            )
    check(lse.dim() == 3, lambda: f"lse has {lse.dim()} dims; need 3")
    for got, size in zip(lse.shape, shape[:3]):
        check(got == size, lambda: f"lse is {tuple(lse.shape)}; need {shape[:3]}")


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
    optionals = (attn_bias, attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, sinks, dropout_seed)
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
    optionals = (attn_bias, attn_mask, key_mask, kv_start, kv_end, q_ids, kv_ids, sinks, dropout_seed)
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
