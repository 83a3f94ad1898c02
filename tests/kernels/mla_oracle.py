"""Inputs and a float64 oracle for latent attention, written apart from the package's reference implementation.

Used by the tests here and by benchmarks/gpu/check_mla.py. A case is a plain dict; see `decode_inputs`.
Letters: B batch, H query heads, M q_len, N kv_len, C kv_lora_rank, R qk_rope_head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from kernel_oracle import TENSOR_NAMES, error_norm, magnitudes, make_inputs
from kernel_oracle import oracle as plain_oracle
from torch import Tensor

DECODE_TENSORS = ("q_latent", "q_pe", "kv_c", "k_pe", "block_table", "key_mask", "kv_start", "kv_end")


def decode_inputs(case: dict[str, Any], device: str = "cpu") -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """Random tensors and scalar arguments of mla_decode.

    Args:
        case: sizes B, H, M, N, C, R; dtype; seed; page: block size of a paged cache, 0 for none; joint: kv_c and k_pe
            are views of one buffer; q_layout: "bshd" for queries of another memory order; key_mask, limits: as in
            kernel_oracle; band_lower, band_upper, scale, empty_rows, out_layout; empty: rows without keys.
        device: Where the tensors go. Values do not depend on it.
    """
    generator = torch.Generator().manual_seed(case.get("seed", 0))
    B, H, M, N, C, R = (case[name] for name in ("B", "H", "M", "N", "C", "R"))
    dtype, page = case.get("dtype", torch.float32), case.get("page", 0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    if case.get("q_layout") == "bshd":
        q, q_pe = (normal(B, M, H, width).transpose(1, 2) for width in (C, max(R, 1)))
    else:
        q, q_pe = normal(B, H, M, C), normal(B, H, M, max(R, 1))
    tensors: dict[str, Tensor | None] = dict.fromkeys(DECODE_TENSORS)
    blocks, size = (B, N) if not page else (B * -(-N // page) + 3, page)
    if case.get("joint", True):
        kv_c, k_pe = normal(blocks, size, C + R).split([C, R], dim=2)
    else:
        kv_c, k_pe = normal(blocks, size, C), normal(blocks, size, R)
    if page:
        # Entries behind the last block in use point nowhere. What no sequence owns or has filled is NaN.
        count = -(-N // page)
        order = torch.randperm(blocks, generator=generator)[: B * count].view(B, count)
        owned = torch.zeros(blocks, dtype=torch.bool)
        owned[order] = True
        kv_c[~owned] = math.nan
        tensors["block_table"] = torch.full((B, count + 2), 2**30, dtype=torch.int32)
        tensors["block_table"][:, :count] = order
        tensors["kv_end"] = torch.full((B, 1), N, dtype=torch.int32)
        N = (count + 2) * page
    if case.get("key_mask"):
        tensors["key_mask"] = torch.randn(B, N, generator=generator) > -0.6
    if case.get("limits"):
        # Lengths of their own per sequence, and with a start; with "rows" also per query.
        n, rows = case["N"], M if case["limits"] == "rows" else 1
        tensors["kv_start"] = torch.randint(0, n // 3 + 1, (B, rows), generator=generator).to(torch.int32)
        tensors["kv_end"] = torch.randint(n // 2, n + 1, (B, rows), generator=generator)
    if case.get("empty"):
        tensors["kv_end"] = torch.full((B, M), case["N"], dtype=torch.int64)
        tensors["kv_end"][:, 1::2] = 0
    if page:
        for sequence, last in enumerate(tensors["kv_end"].amax(1).tolist()):
            for token in range(last, tensors["block_table"].shape[1] * page):
                block = int(tensors["block_table"][sequence, token // page])
                if block < blocks:
                    kv_c[block, token % page] = math.nan
                    k_pe[block, token % page] = math.nan
    tensors.update(q_latent=q, q_pe=q_pe if R else None, kv_c=kv_c, k_pe=k_pe if R else None)
    scalars = {
        "softmax_scale": case.get("scale", 1.0 / math.sqrt(C // 4 + R)),
        "band_lower": case.get("band_lower"),
        "band_upper": case.get("band_upper"),
        "empty_rows": case.get("empty_rows", "zero"),
    }
    return {name: tensor if tensor is None else to(tensor, device) for name, tensor in tensors.items()}, scalars


def to(tensor: Tensor, device: str) -> Tensor:
    """On the device, with the same strides."""
    if device == "cpu":
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


def gathered(tensors: dict[str, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """kv_c and k_pe as `(B, N, width)`; of a paged cache, 0 behind the last token."""
    kv_c, k_pe, table = tensors["kv_c"], tensors["k_pe"], tensors["block_table"]
    if table is None:
        return kv_c, k_pe
    page = kv_c.shape[1]
    position = torch.arange(table.shape[1] * page, device=table.device)
    used = position < tensors["kv_end"].amax(1, keepdim=True)
    index = torch.where(table < kv_c.shape[0], table, 0).long()
    return tuple(
        None if cache is None else torch.where(used[:, :, None], cache[index].flatten(1, 2), 0.0)
        for cache in (kv_c, k_pe)
    )


def oracle(tensors: dict[str, Tensor | None], scalars: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """ "out" and "lse" with everything in `dtype`."""
    kv_c, k_pe = gathered(tensors)
    q, kv_c = tensors["q_latent"].to(dtype), kv_c.to(dtype)
    s = torch.einsum("bhmc,bnc->bhmn", q, kv_c)
    if k_pe is not None:
        s = s + torch.einsum("bhmr,bnr->bhmn", tensors["q_pe"].to(dtype), k_pe.to(dtype))
    s = s * scalars["softmax_scale"]
    (B, _, M, N), device = s.shape, s.device
    row, col = torch.arange(M, device=device)[:, None], torch.arange(N, device=device)[None, :]
    keep = torch.ones((B, 1, M, N), dtype=torch.bool, device=device)
    if scalars["band_lower"] is not None:
        keep = keep & (col - row >= scalars["band_lower"])
    if scalars["band_upper"] is not None:
        keep = keep & (col - row <= scalars["band_upper"])
    if tensors["kv_start"] is not None:
        keep = keep & (col >= tensors["kv_start"].unsqueeze(-1)).unsqueeze(1)
    if tensors["kv_end"] is not None:
        keep = keep & (col < tensors["kv_end"].unsqueeze(-1)).unsqueeze(1)
    if tensors["key_mask"] is not None:
        keep = keep & tensors["key_mask"][:, None, None, :]
    s = torch.where(keep, s, -math.inf)
    lse = torch.logsumexp(s, -1)
    p = torch.softmax(s, -1)
    empty = (lse == -math.inf).unsqueeze(-1)
    mode = scalars["empty_rows"]
    if mode in ("zero", "impossible"):
        p = torch.where(empty, 0.0, p)
    elif mode in ("mean", "mean_added"):
        p = torch.where(empty, 1.0 / N, p)
    return {"out": torch.einsum("bhmn,bnc->bhmc", p, kv_c), "lse": lse}


def compare(
    tensors: dict[str, Tensor | None], scalars: dict[str, Any], got: dict[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """Per name `(relative error, limit)`; the limit as in kernel_oracle.compare."""
    dtype = tensors["q_latent"].dtype
    want, eager = oracle(tensors, scalars, torch.float64), oracle(tensors, scalars, dtype)
    results = {}
    for name, value in got.items():
        size = float(want[name].nan_to_num(0, 0, 0).norm()) or 1.0
        eager_error = error_norm(eager[name], want[name]) / size
        floor = torch.finfo(torch.float32 if name == "lse" else dtype).eps
        results[name] = (
            error_norm(value, want[name]) / size,
            max(3 * eager_error if math.isfinite(eager_error) else 0.0, 4 * floor if name == "lse" else 2 * floor),
        )
    return results


PREFILL_GRADIENTS = ("q_nope", "q_pe", "k_nope", "k_pe", "v")


def prefill_inputs(case: dict[str, Any], device: str = "cpu") -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """Random tensors and scalar arguments of mla_prefill.

    Args:
        case: sizes B, H, M, N, P, R, E, and what kernel_oracle.make_inputs takes of masks and scalars. k_nope and v are
            views of one projection, as models make them.
        device: Where the tensors go.
    """
    fields = {**case, "K": case["H"], "D": case["P"], "layout": "bhsd"}
    tensors, scalars = make_inputs(fields, device)
    generator = torch.Generator().manual_seed(case.get("seed", 0) + 1)
    B, H, M, N, P, R, E = (case[name] for name in ("B", "H", "M", "N", "P", "R", "E"))
    dtype = case.get("dtype", torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    k_nope, v = normal(B, N, H, P + E).transpose(1, 2).split([P, E], dim=3)
    latent = {"q_nope": tensors["q"], "q_pe": normal(B, H, M, R), "k_nope": k_nope, "k_pe": normal(B, N, R), "v": v}
    masks = {name: tensors[name] for name in ("key_mask", "kv_start", "kv_end")}
    kept = ("softmax_scale", "band_lower", "band_upper", "empty_rows")
    return {**latent, **masks}, {name: scalars[name] for name in kept}


def compare_prefill(
    tensors: dict[str, Tensor | None],
    scalars: dict[str, Any],
    got: dict[str, Tensor],
    grad_out: Tensor | None = None,
) -> dict[str, tuple[float, float]]:
    """As kernel_oracle.compare, for a plain attention over concatenated keys; its gradients taken apart again."""
    q_nope, q_pe, k_nope, k_pe = (tensors[name] for name in PREFILL_GRADIENTS[:4])
    nope = q_nope.shape[3]
    plain: dict[str, Tensor | None] = {
        **dict.fromkeys(TENSOR_NAMES),
        **{name: tensors[name] for name in ("v", "key_mask", "kv_start", "kv_end")},
        "q": torch.cat((q_nope, q_pe), 3),
        "k": torch.cat((k_nope, k_pe.unsqueeze(1).expand(*k_nope.shape[:3], -1)), 3),
    }
    settings = {**scalars, "logits_soft_cap": None, "dropout_p": 0.0}

    def apart(dtype: torch.dtype) -> dict[str, Tensor]:
        found = plain_oracle(plain, settings, dtype, grad_out)
        if grad_out is not None:
            (found["q_nope"], found["q_pe"]), (found["k_nope"], shared) = (
                found[name].tensor_split([nope], 3) for name in "qk"
            )
            found["k_pe"] = shared.sum(1)
        return found

    dtype = q_nope.dtype
    want, eager = apart(torch.float64), apart(dtype)
    sizes = magnitudes(plain, settings, {name: want[name] for name in ("out", "lse")}, grad_out)
    if grad_out is not None:
        sizes["v"] = float(want["v"].nan_to_num(0, 0, 0).norm())
    results = {}
    for name, value in got.items():
        size = sizes[name[0] if name[0] in "qk" else name] or 1.0
        eager_error = error_norm(eager[name], want[name]) / size
        floor = torch.finfo(torch.float32 if name == "lse" else dtype).eps
        results[name] = (
            error_norm(value, want[name]) / size,
            max(3 * eager_error if math.isfinite(eager_error) else 0.0, 4 * floor if name == "lse" else 2 * floor),
        )
    return results
