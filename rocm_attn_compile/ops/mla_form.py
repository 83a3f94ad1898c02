"""Which form of latent attention is cheaper: a plain function of sizes; docs/mla.md states it in words.

Both forms are predicted as a sum of stages, each of which takes the longer of its multiply-adds and its bytes:

    prefill form    expand kv_c into k_nope and v over all N keys; attend with P + R and E channels
    absorbed form   project the queries and the results, M rows each; attend with C + R and C channels

Absorbed pays wide products for every (query, key) pair, the prefill form pays C * (P + E) products for every key.
"""

from __future__ import annotations

MULTIPLY_ADDS_PER_BYTE = 100
"""How many half-precision multiply-adds a GPU does in the time of one byte of memory: H200 103, MI300X 123, MI355X 145
(half the peak FLOP/s by the peak bandwidth, from the vendors' data sheets)."""


def prefers_absorbed(
    q_len: int,
    kv_len: int,
    num_heads: int,
    qk_nope_head_dim: int,
    qk_rope_head_dim: int,
    kv_lora_rank: int,
    v_head_dim: int,
    *,
    itemsize: int = 2,
    band_lower: int | None = None,
    band_upper: int | None = None,
) -> bool:
    """True if the absorbed form (`mla_decode` between two projections) is predicted to take less time.

    The batch does not matter: every term but the weights', which both forms read, is proportional to it.

    Args:
        itemsize: Bytes of an element.
        band_lower: Keys are kept for `k - q >= band_lower`; None is no limit.
        band_upper: Keys are kept for `k - q <= band_upper`; None is no limit.
    """
    M, N, H = q_len, kv_len, num_heads
    P, R, C, E = qk_nope_head_dim, qk_rope_head_dim, kv_lora_rank, v_head_dim
    pairs = M * _mean_keys(M, N, band_lower, band_upper)
    project = C * (P + E)

    def stage(multiply_adds: float, elements: float) -> float:
        return max(multiply_adds, elements * itemsize * MULTIPLY_ADDS_PER_BYTE)

    expanded = H * N * (P + E)
    queries = H * M * (P + R + E)
    prefill = stage(H * N * project, N * C + expanded)
    prefill += stage(H * pairs * (P + R + E), expanded + N * R + queries)
    absorbed = stage(H * M * project, H * M * (P + E + 2 * C))
    absorbed += stage(H * pairs * (C + R + C), N * (C + R) + H * M * (2 * C + R))
    return absorbed < prefill


def _mean_keys(q_len: int, kv_len: int, band_lower: int | None, band_upper: int | None) -> float:
    """Keys a query sees by the band, on average, from the first and the last query."""

    def keys(row: int) -> int:
        first = 0 if band_lower is None else max(0, row + band_lower)
        last = kv_len - 1 if band_upper is None else min(kv_len - 1, row + band_upper)
        return max(0, last - first + 1)

    return (keys(0) + keys(q_len - 1)) / 2
