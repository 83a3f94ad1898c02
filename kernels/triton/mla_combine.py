"""Adds up the shares of Hopper's latent decode for many heads: as combine.py, several rows at once.

There are thousands of rows. Programs of one row each take longer to start than to read their shares.
"""

import triton
import triton.language as tl

from .common import LN2


@triton.jit(do_not_specialize=["q_len", "num_splits"])
def mla_combine_kernel(
    partial, partial_stats, out, lse, stride_ob, stride_oh, stride_om, num_rows, num_heads, q_len, num_splits,
    LATENT: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, SCALED: tl.constexpr,
    NAN_ROWS: tl.constexpr,
):  # fmt: skip
    """Combine the splits of ROWS rows, in a fixed order, to out and lse.

    Launched before the shares are there (CUDA's programmatic dependent launch).

    Args:
        partial: `(rows * splits, LATENT)`, the sums of exp(s - m) v.
        partial_stats: `(rows * splits, 2 or 3)` float32: m in powers of two, the sum of exp(s - m), and with SCALED
            what the share is to be multiplied by.
        CHUNK: As many splits as are loaded at once.
        NAN_ROWS: A row without keys gives NaN, not 0.
    """
    STATS: tl.constexpr = 3 if SCALED else 2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < num_rows
    columns = tl.arange(0, BLOCK_C)
    ok = row_ok[:, None] & (columns < LATENT)[None, :]
    q_pos = (row % q_len).to(tl.int64)
    head = (row // q_len % num_heads).to(tl.int64)
    batch = (row // q_len // num_heads).to(tl.int64)
    first = row.to(tl.int64) * num_splits
    partial += first[:, None] * LATENT + columns[None, :]
    partial_stats += first * STATS
    target = out + (batch * stride_ob + head * stride_oh + q_pos * stride_om)[:, None] + columns[None, :]

    tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in range(0, num_splits, CHUNK):
        # All loads stand before the first use of one: threads wait once.
        shares = ()
        stats = ()
        for index in tl.static_range(CHUNK):
            split = start + index
            there = row_ok & (split < num_splits)
            shares = shares + (tl.load(partial + split * LATENT, mask=ok & (split < num_splits), other=0.0),)
            m_part = tl.load(partial_stats + split * STATS, mask=there, other=float("-inf"))
            l_part = tl.load(partial_stats + split * STATS + 1, mask=there, other=0.0)
            scale = m_part
            if SCALED:
                scale = tl.load(partial_stats + split * STATS + 2, mask=there, other=0.0)
            stats = stats + ((m_part, l_part, scale),)
        for index in tl.static_range(CHUNK):
            m_part, l_part, scale = stats[index]
            m_new = tl.maximum(m, m_part)
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            alpha = tl.exp2(m - m_safe)
            beta = tl.exp2(m_part - m_safe)
            m = m_new
            total = total * alpha + l_part * beta
            if SCALED:
                beta *= scale
            acc = acc * alpha[:, None] + shares[index].to(tl.float32) * beta[:, None]
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    result = acc / total[:, None]
    if NAN_ROWS:
        result = tl.where(empty[:, None], float("nan"), result)
    tl.store(target, result.to(out.dtype.element_ty), mask=ok)
    tl.store(lse + row, tl.where(empty, float("-inf"), (m + tl.log2(total)) * LN2), mask=row_ok)
