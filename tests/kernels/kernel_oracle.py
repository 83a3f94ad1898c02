"""Inputs and a float64 oracle for the canonical op, written apart from the package's reference implementation.

Used by the interpreter tests here and by benchmarks/gpu/check_triton.py. A case is a plain dict; see `make_inputs`.
Letters: B batch, H query heads, K key/value heads, M q_len, N kv_len, D head_dim, E v_head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

TENSOR_NAMES = ("attn_bias", "attn_mask", "key_mask", "kv_start", "kv_end", "q_ids", "kv_ids", "sinks", "dropout_seed",
                "alibi_slopes")  # fmt: skip
GRADIENTS = ("q", "k", "v", "attn_bias", "sinks")
KEYS_LSE = 16.0
"""What is left of lse without the scores: the logarithm of nine million keys."""


def make_inputs(case: dict[str, Any], device: str = "cpu") -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """Random tensors and scalar arguments of a case.

    Args:
        case: sizes B, H, K, M, N, D, E; dtype; seed; layout ("bhsd", "packed", "k_transposed", "expanded");
            bias, mask: shape as a 4-tuple of bools (True is the full size, False is 1); bias_kind ("normal", "holes",
            "finfo_min", "minus_1e9"); key_mask: True, "padding" (on both sides), "left" or "hole"; limits: whether
            kv_start and kv_end have rows, and exceed the keys; documents: their length, as kv_start and kv_end; ids:
            True, or "in turn" for documents in pieces of 100; band_lower, band_upper; soft_cap; sinks;
            alibi (True or "batch"); dropout_p; empty: kinds of rows to empty; empty_rows; out_layout; scale;
            page: block size of a paged cache, which divides N; kv_dtype: a float8, with a scale per head for k and one
            for v.
        device: Where the tensors go. Values do not depend on it.
    """
    generator = torch.Generator().manual_seed(case.get("seed", 0))
    B, H, K, M, N, D, E = (case[name] for name in "BHKMNDE")
    dtype = case.get("dtype", torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    layout = case.get("layout", "bhsd")
    if layout == "packed":
        # q, k, v are views of one projection (B, M, (H + 2 K) D); needs M == N and D == E.
        packed = normal(B, M, H + 2 * K, D).to(dtype).to(device)
        q, k, v = (part.transpose(1, 2) for part in packed.split([H, K, K], dim=2))
    else:
        q, k, v = (normal(*shape).to(dtype).to(device) for shape in ((B, H, M, D), (B, K, N, D), (B, K, N, E)))
        if layout == "k_transposed":
            k = k.mT.contiguous().mT
            v = v.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        elif layout == "expanded":
            k, v = k[:1].expand(B, K, N, D), v[:, :1].expand(B, K, N, E)

    def shape_of(full: tuple[bool, bool, bool, bool]) -> tuple[int, ...]:
        return tuple(size if flag else 1 for size, flag in zip((B, H, M, N), full))

    tensors: dict[str, Tensor | None] = dict.fromkeys(TENSOR_NAMES)
    if case.get("bias"):
        bias = normal(*shape_of(case["bias"]))
        kind = case.get("bias_kind", "normal")
        if kind == "holes":
            bias[normal(*bias.shape) > 1.0] = -math.inf
            bias[..., :1] = bias[..., :1].clamp(min=-2.0)
        elif kind in ("finfo_min", "minus_1e9"):
            value = torch.finfo(torch.float32).min if kind == "finfo_min" else -1e9
            bias[normal(*bias.shape) > 0.5] = value
            bias[..., 1::3, :] = value  # whole rows: uniform weights
        tensors["attn_bias"] = bias.to(case.get("bias_dtype", torch.float32))
    if case.get("mask"):
        mask = normal(*shape_of(case["mask"])) > -0.6
        tensors["attn_mask"] = (
            mask if "mask_rows" in case.get("empty", ()) else (mask | (torch.arange(mask.shape[3]) == 0))
        )
        if "mask_rows" in case.get("empty", ()):
            tensors["attn_mask"][..., 1::4, :] = False
    if case.get("key_mask"):
        tensors["key_mask"] = normal(B, N) > -0.6
        if case["key_mask"] == "padding":
            first, at = integers(0, N // 2, B, 1), torch.arange(N)
            tensors["key_mask"] = (at >= first) & (at < first + N // 2)
        elif case["key_mask"] == "left":
            tensors["key_mask"] = torch.arange(N) >= integers(0, N, B, 1)
        elif case["key_mask"] == "hole":
            tensors["key_mask"] = (torch.arange(N) - N // 2).abs().expand(B, N) > N // 4
        if "key_mask" in case.get("empty", ()):
            tensors["key_mask"][0] = False
    if case.get("limits"):
        rows, wide = case["limits"]
        shape = (B, M if rows else 1)
        tensors["kv_start"] = integers(-3 if wide else 0, max(N // 3, 1), *shape).to(torch.int32)
        tensors["kv_end"] = integers(N // 2, N + (5 if wide else 1), *shape)
        if wide:
            tensors["kv_end"][..., :1] = 2**40
        if "limits" in case.get("empty", ()):
            tensors["kv_end"][:, 1::3] = 0
            tensors["kv_end"][-1, 0] = -5
    if case.get("documents"):
        start = torch.arange(M) // case["documents"] * case["documents"]
        tensors["kv_start"] = start.expand(B, M).to(torch.int32)
        tensors["kv_end"] = tensors["kv_start"] + case["documents"]
    if case.get("ids") == "in turn":
        at = torch.arange(max(M, N)) // 100 % 3 + 2**40
        tensors["q_ids"], tensors["kv_ids"] = at[:M].expand(B, M), at[:N].expand(B, N)
    elif case.get("ids"):
        tensors["q_ids"] = integers(0, 3, B, M).sort(-1).values
        tensors["kv_ids"] = integers(0, 3, 1, N).sort(-1).values
        if "ids" in case.get("empty", ()):
            tensors["q_ids"][:, -2:] = 7
    if case.get("sinks"):
        tensors["sinks"] = normal(H)
    if case.get("alibi"):
        # As ALiBi has them, from 1/2 on, and one of the other sign; "batch": of each entry of the batch.
        slopes = torch.pow(2.0, -torch.arange(1.0, H + 1)) * torch.where(torch.arange(H) % 5 == 4, -0.1, 1.0)
        batches = torch.linspace(1.0, 1.5, B)[:, None]
        tensors["alibi_slopes"] = batches * slopes if case["alibi"] == "batch" else slopes
    if case.get("dropout_p"):
        tensors["dropout_seed"] = torch.tensor([case.get("dropout_seed", 12345)])
    tensors = {"q": q, "k": k, "v": v, **{name: t if t is None else t.to(device) for name, t in tensors.items()}}
    tensors.update(cached(tensors, case, generator))
    scalars = {
        "softmax_scale": case.get("scale", 1.0 / math.sqrt(D)),
        "logits_soft_cap": case.get("soft_cap"),
        "band_lower": case.get("band_lower"),
        "band_upper": case.get("band_upper"),
        "dropout_p": case.get("dropout_p", 0.0),
        "empty_rows": case.get("empty_rows", "zero"),
    }
    return tensors, scalars


def cached(tensors: dict[str, Tensor | None], case: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """k and v as a cache, with what belongs to it; nothing if the case has none. Blocks not in use hold NaN."""
    changed: dict[str, Tensor] = {}
    k, v = tensors["k"], tensors["v"]
    if kind := case.get("kv_dtype"):
        k, v = k.to(kind), v.to(kind)
        scale = torch.rand(k.shape[1], generator=generator) + 0.5
        scale[::2] *= case.get("scale_sign", 1.0)
        changed.update(k=k, v=v, k_scale=scale.to(k.device), v_scale=torch.tensor([0.7], device=k.device))
    if page := case.get("page"):
        B, K, N, _ = k.shape
        count = B * N // page
        order = torch.randperm(count + 3, generator=generator)[:count]
        order -= (count + 3) * (torch.arange(count) % 3 == 0)  # some count from the end
        table = order.view(B, N // page).to(k.device)
        for name, rows in (("k", k), ("v", v)):
            # float8 by its bits, since it cannot be indexed everywhere. 0xFF is NaN in every float there is.
            bits = rows.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[rows.element_size()])
            blocks = torch.full((count + 3, page, K, rows.shape[3]), -1, device=k.device).to(bits.dtype)
            blocks[table] = bits.view(B, K, N // page, page, -1).permute(0, 2, 3, 1, 4)
            changed[name] = blocks.view(rows.dtype).transpose(1, 2)
        changed["block_table"] = table.to(case.get("table_dtype", torch.int32))
    return changed


def plain(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The tensors with keys and values `(B, K, N, X)` in the place of a cache, in float64 where they have a scale."""
    found = dict(tensors)
    table, k_scale, v_scale = (found.pop(name, None) for name in ("block_table", "k_scale", "v_scale"))
    for name, scale in (("k", k_scale), ("v", v_scale)):
        cache = found[name]
        rows = cache if scale is None else cache.to(torch.float32).double() * scale.double().view(-1, 1, 1)
        if table is not None:
            rows = rows[table.long()].transpose(1, 2).flatten(2, 3)
        found[name] = rows
    return found


def philox_uniform(seed: int, count: int) -> np.ndarray:
    """`tl.rand(seed, arange(count))` by the published Philox-4x32-10, in numpy."""
    low32 = np.uint64(0xFFFFFFFF)
    offset = np.arange(count, dtype=np.uint64)
    c = [offset & low32, offset >> np.uint64(32), np.zeros_like(offset), np.zeros_like(offset)]
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        product0, product2 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (product2 >> np.uint64(32)) ^ c[1] ^ np.uint64(key0),
            product2 & low32,
            (product0 >> np.uint64(32)) ^ c[3] ^ np.uint64(key1),
            product0 & low32,
        ]
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    bits = c[0].astype(np.uint32).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -bits - 1, bits).astype(np.float32) * np.float32(4.6566127342e-10)


def keep_pairs(tensors: dict[str, Tensor | None], scalars: dict[str, Any], shape: tuple[int, ...]) -> Tensor:
    """The conjunction of all masks, `(B, H, M, N)` bool."""
    B, H, M, N = shape
    device = tensors["q"].device
    row = torch.arange(M, device=device)[:, None]
    col = torch.arange(N, device=device)[None, :]
    keep = torch.ones(shape, dtype=torch.bool, device=device)
    if scalars["band_lower"] is not None:
        keep = keep & (col - row >= scalars["band_lower"])
    if scalars["band_upper"] is not None:
        keep = keep & (col - row <= scalars["band_upper"])
    if tensors["kv_start"] is not None:
        keep = keep & (col >= tensors["kv_start"].unsqueeze(-1)).unsqueeze(1)
    if tensors["kv_end"] is not None:
        keep = keep & (col < tensors["kv_end"].unsqueeze(-1)).unsqueeze(1)
    if tensors["attn_mask"] is not None:
        keep = keep & tensors["attn_mask"]
    if tensors["key_mask"] is not None:
        keep = keep & tensors["key_mask"].view(-1, 1, 1, N)
    if tensors["q_ids"] is not None:
        keep = keep & (tensors["q_ids"].unsqueeze(-1) == tensors["kv_ids"].unsqueeze(-2)).unsqueeze(1)
    return keep


def alibi(tensors: dict[str, Tensor | None], dtype: torch.dtype) -> Tensor:
    """`-slope * |distance|`, the last query at the last key, up to `(B, H, M, N)`; 0 without slopes."""
    slopes, q, k = tensors["alibi_slopes"], tensors["q"], tensors["k"]
    if slopes is None:
        return torch.zeros((), dtype=dtype, device=q.device)
    M, N = q.shape[2], k.shape[2]
    ends = torch.arange(M, device=q.device)[:, None] - M - (torch.arange(N, device=q.device) - N)
    return -slopes.to(dtype).view(-1, q.shape[1], 1, 1) * ends.abs().to(dtype)


def oracle(
    tensors: dict[str, Tensor | None], scalars: dict[str, Any], dtype: torch.dtype, grad_out: Tensor | None = None
) -> dict[str, Tensor]:
    """Eager attention with everything in `dtype`, differentiated by autograd.

    Returns:
        "out", "lse", "weights" (before dropout) and, given grad_out, the gradients "q", "k", "v" and, if present,
        "attn_bias" and "sinks".
    """
    leaves = {
        name: tensors[name].detach().to(dtype).requires_grad_() for name in GRADIENTS if tensors[name] is not None
    }
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    group = q.shape[1] // k.shape[1]
    kk, vv = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = torch.einsum("bhmd,bhnd->bhmn", q, kk) * scalars["softmax_scale"]
    cap = scalars["logits_soft_cap"]
    if cap is not None:
        s = cap * torch.tanh(s / cap)
    if "attn_bias" in leaves:
        s = s + leaves["attn_bias"]
    s = s + alibi(tensors, dtype)
    keep = keep_pairs(tensors, scalars, tuple(s.shape))
    masked = s + torch.where(keep, 0.0, -math.inf).to(dtype)
    empty = (masked.detach().amax(-1) == -math.inf).unsqueeze(-1)
    mode = scalars["empty_rows"]
    lse = torch.logsumexp(masked.detach(), -1)
    if "sinks" in leaves:
        sink = leaves["sinks"].view(1, -1, 1, 1).expand(*s.shape[:3], 1)
        safe = torch.where(empty, -1e4 if dtype == torch.float16 else -1e30, masked)
        both = torch.cat([safe, sink], -1)
        lse = torch.logsumexp(both.detach(), -1)
        p = torch.softmax(both, -1)[..., :-1]
    else:
        # An empty row's scores are replaced before the softmax: its gradient is then what the mode says.
        if mode == "zero":
            p = torch.softmax(torch.where(empty, 0.0, masked), -1) * ~empty
        elif mode == "mean":
            p = torch.softmax(torch.where(empty, 0.0, masked), -1)
        elif mode == "mean_added":
            finite = torch.where(s == -math.inf, 0.0, s)
            p = torch.softmax(torch.where(empty, finite - finite.detach(), masked), -1)
        elif mode == "nan":
            p = torch.softmax(s.masked_fill(~keep, -math.inf), -1)
        else:
            p = torch.softmax(masked, -1)
    weights = p.detach()
    if scalars["dropout_p"]:
        uniform = philox_uniform(int(tensors["dropout_seed"]), p.numel())
        p = p * torch.from_numpy(uniform).to(p.device).view(p.shape).ge(scalars["dropout_p"])
        p = p / (1.0 - scalars["dropout_p"])
    out = torch.einsum("bhmn,bhne->bhme", p, vv)
    results = {"out": out.detach(), "lse": lse, "weights": weights}
    if grad_out is not None:
        grads = torch.autograd.grad(out, list(leaves.values()), grad_out.to(dtype))
        results.update(zip(leaves, grads))
    return results


def magnitudes(
    tensors: dict[str, Tensor | None], scalars: dict[str, Any], want: dict[str, Tensor], grad_out: Tensor | None
) -> dict[str, float]:
    """Per result, the norm that one relative rounding error of its terms acts on.

    The gradients of scores are sums of `p (dp - delta)`, which may cancel to nothing (one key: exactly). Their natural
    size is that of the sum of `p |dp|`.
    """
    sizes = {name: float(value.double().nan_to_num(0, 0, 0).norm()) for name, value in want.items()}
    if grad_out is None:
        return sizes
    q, k, v = (tensors[name].double() for name in "qkv")
    group = q.shape[1] // k.shape[1]
    kk, vv = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    dp = torch.einsum("bhme,bhne->bhmn", grad_out.double(), vv).abs() / (1.0 - scalars["dropout_p"])
    lse = want["lse"].double().nan_to_num(0, 0, 0)
    s = torch.einsum("bhmd,bhnd->bhmn", q, kk) * scalars["softmax_scale"]
    if scalars["logits_soft_cap"] is not None:
        s = scalars["logits_soft_cap"] * torch.tanh(s / scalars["logits_soft_cap"])
    if tensors["attn_bias"] is not None:
        s = s + tensors["attn_bias"].double()
    s = s + alibi(tensors, torch.float64)
    p = torch.where(keep_pairs(tensors, scalars, tuple(s.shape)), s - lse.unsqueeze(-1), -math.inf).exp().clamp(max=1.0)
    p = torch.where(p.sum(-1, keepdim=True) == 0, 1.0 / p.shape[-1], p)
    ds = p * dp + p * (p * dp).sum(-1, keepdim=True)
    scale = abs(scalars["softmax_scale"])
    sizes["q"] = float(torch.einsum("bhmn,bhnd->bhmd", ds, kk.abs()).norm()) * scale
    sizes["k"] = float(torch.einsum("bhmn,bhmd->bhnd", ds, q.abs()).norm()) * scale
    if tensors["attn_bias"] is not None:
        sizes["attn_bias"] = float(ds.sum_to_size(tensors["attn_bias"].shape).norm())
    if tensors["sinks"] is not None:
        sizes["sinks"] = float((p * dp).sum((0, 2, 3)).norm())
    return sizes


def error_norm(got: Tensor, want: Tensor) -> float:
    """`|got - want|` over the entries that are finite in `want`; inf if the others differ or shapes do."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape:
        return math.inf
    special = ~torch.isfinite(want)
    if not bool(((got == want) | (got.isnan() & want.isnan()))[special].all()):
        return math.inf
    error = float((got - want)[~special].norm())
    return math.inf if math.isnan(error) else error


def check_twice(
    plan: Callable[[], tuple[list, Tensor, Tensor]], tensors: dict[str, Tensor | None], scalars: dict[str, Any]
) -> None:
    """Plan and run the launches of a forward twice: both results are the same bits, and right.

    Args:
        plan: Gives the launches and the `out` and `lse` that they fill.
        tensors, scalars: As from make_inputs.
    """
    found = []
    for _ in range(2):
        launches, out, lse = plan()
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        for one in launches:
            one.run()
        found.append((out, lse))
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(*found))
    for what, (error, limit) in compare(tensors, scalars, {"out": out, "lse": lse}).items():
        assert error <= limit, f"{what}: {error:.2e} > {limit:.2e}"


def largest_score(tensors: dict[str, Tensor | None], scalars: dict[str, Any]) -> float:
    """Without a bias, which may be a fill."""
    q, k = (tensors[name].double() for name in "qk")
    products = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    return float(products.abs().max()) * abs(scalars["softmax_scale"]) if products.numel() else 0.0


def compare(
    tensors: dict[str, Tensor | None],
    scalars: dict[str, Any],
    got: dict[str, Tensor],
    grad_out: Tensor | None = None,
    oracle_dtype: torch.dtype = torch.float64,
) -> dict[str, tuple[float, float]]:
    """Errors of `got` against the oracle.

    Returns:
        Per name `(relative error, limit)`. The limit is 3 times eager's own error in the dtype of q, and at least twice
        that dtype's epsilon: where eager happens to be exact (a single key), one rounding must still be allowed. For
        gradients and weights the rounding of lse counts, too: the weights are exp(score - lse), of a float32 as large
        as log(N).
    """
    tensors = plain(tensors)
    dtype = tensors["q"].dtype
    want = oracle(tensors, scalars, oracle_dtype, grad_out)
    eager = oracle(tensors, scalars, dtype, grad_out)
    sizes = magnitudes(tensors, scalars, want, grad_out)
    lse = want["lse"][want["lse"].isfinite()].abs()
    largest_lse = min(float(lse.max()) if lse.numel() else 0.0, KEYS_LSE + largest_score(tensors, scalars))
    lse_rounding = torch.finfo(torch.float32).eps * largest_lse
    results = {}
    for name, value in got.items():
        size = sizes[name] or 1.0
        eager_error = error_norm(eager[name], want[name]) / size
        floor = torch.finfo(torch.float32 if name == "lse" else dtype).eps
        least = (4 if name == "lse" else 2) * floor
        if name in (*GRADIENTS, "weights"):
            least = max(least, lse_rounding)
        results[name] = (
            error_norm(value, want[name]) / size,
            max(3 * eager_error if math.isfinite(eager_error) else 0.0, least),
        )
    return results
