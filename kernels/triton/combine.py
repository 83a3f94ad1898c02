"""Adds up the splits of one row: the second kernel of split-KV decode, and what the forward kernel shares with it."""

import triton
import triton.language as tl

from .common import EMPTY_MEAN, EMPTY_MEAN_ADDED, EMPTY_NAN, EMPTY_NAN_ADDED, LN2, LOG2E
from .pages import page_number


@triton.jit
def finish_rows(acc, m, total, sink, HAS_SINKS: tl.constexpr, HAS_BIAS: tl.constexpr, EMPTY_ROWS: tl.constexpr):
    """Normalise: `(acc, m, total)` of finished rows to `(out, lse)`; lse in natural units, -inf for an empty row.

    Args:
        acc: `(R, E)` float32, sum of exp(s - m) v.
        m: `(R,)` row maximum in the domain's units, -inf for an empty row.
        total: `(R,)` sum of exp(s - m), 0 for an empty row. Not m decides emptiness: a NaN score leaves m at -inf.
        sink: `(R,)` float32 natural, ignored without HAS_SINKS.
    """
    if not HAS_BIAS:
        m = m * LN2
    if HAS_SINKS:
        top = tl.maximum(m, sink)
        top = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.exp2((m - top) * LOG2E)
        total = total * shrink + tl.exp2((sink - top) * LOG2E)
        acc = acc * shrink[:, None]
        m = top
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out = acc / total[:, None]
    if EMPTY_ROWS == EMPTY_NAN or EMPTY_ROWS == EMPTY_NAN_ADDED:
        out = tl.where(empty[:, None], float("nan"), out)
    lse = tl.where(empty, float("-inf"), m + tl.log2(total) * LN2)
    return out, lse


@triton.jit(do_not_specialize=["q_len", "kv_len", "num_blocks", "num_splits"])
def attention_combine_kernel(
    partial, partial_stats, v, out, lse, sinks, block_table, v_scale,
    stride_vb, stride_vh, stride_vn, stride_ve, stride_ob, stride_oh, stride_om, stride_oe,
    stride_tb, stride_tn, stride_v_scale, num_heads, gqa_group_size, q_len, kv_len, num_blocks, num_splits,
    V_HEAD_DIM: tl.constexpr, BLOCK_E: tl.constexpr, COLUMN_BLOCKS: tl.constexpr, BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, HAS_V_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SINKS: tl.constexpr, EMPTY_ROWS: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one row, in a fixed order, to out and lse; partial and partial_stats as in forward.py.

    COLUMN_BLOCKS programs share a row's columns, BLOCK_E each; all of them write its lse. WAITS: Launched before the
    shares are there (CUDA's programmatic dependent launch).
    """
    # Divided in 32 bits: a division in 64 takes a hundred instructions.
    row = tl.program_id(0) // COLUMN_BLOCKS
    q_pos = (row % q_len).to(tl.int64)
    head = (row // q_len % num_heads).to(tl.int64)
    batch = (row // q_len // num_heads).to(tl.int64)
    row_flat = row.to(tl.int64)
    offs_e = tl.program_id(0) % COLUMN_BLOCKS * BLOCK_E + tl.arange(0, BLOCK_E)
    e_ok = offs_e < V_HEAD_DIM
    partial += row_flat * num_splits * V_HEAD_DIM
    partial_stats += row_flat * num_splits * 2

    if WAITS:
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    # Everything of the first chunk is loaded before the first result is needed; there seldom is a second.
    split = tl.arange(0, CHUNK)
    ok = split < num_splits
    shares = tl.load(
        partial + split[:, None] * V_HEAD_DIM + offs_e[None, :], mask=ok[:, None] & e_ok[None, :], other=0.0
    )
    m_part = tl.load(partial_stats + split * 2, mask=ok, other=float("-inf"))
    l_part = tl.load(partial_stats + split * 2 + 1, mask=ok, other=0.0)
    offs_s = tl.arange(0, BLOCK_S)
    m = tl.max(tl.load(partial_stats + offs_s * 2, mask=offs_s < num_splits, other=float("-inf")), 0)
    m_safe = tl.where(m == float("-inf"), 0.0, m)
    weight = tl.exp2((m_part - m_safe) * LOG2E) if HAS_BIAS else tl.exp2(m_part - m_safe)
    total = tl.sum(l_part * weight, 0)
    acc = tl.sum(shares * weight[:, None], 0)
    for first in range(CHUNK, num_splits, CHUNK):
        split = first + tl.arange(0, CHUNK)
        ok = split < num_splits
        m_part = tl.load(partial_stats + split * 2, mask=ok, other=float("-inf"))
        l_part = tl.load(partial_stats + split * 2 + 1, mask=ok, other=0.0)
        weight = tl.exp2((m_part - m_safe) * LOG2E) if HAS_BIAS else tl.exp2(m_part - m_safe)
        total += tl.sum(l_part * weight, 0)
        ptrs = partial + split[:, None] * V_HEAD_DIM + offs_e[None, :]
        acc += tl.sum(tl.load(ptrs, mask=ok[:, None] & e_ok[None, :], other=0.0) * weight[:, None], 0)
    if EMPTY_ROWS == EMPTY_MEAN or EMPTY_ROWS == EMPTY_MEAN_ADDED:
        if total == 0.0:
            kv_head = head // gqa_group_size
            for start_n in range(0, kv_len, BLOCK_N):
                kv_pos = (start_n + tl.arange(0, BLOCK_N)).to(tl.int64)
                entry = batch
                token = kv_pos
                if PAGE > 0:  # a multiple of BLOCK_N
                    table = block_table + batch * stride_tb
                    entry = page_number(table, start_n // PAGE, start_n // PAGE, num_blocks, stride_tn)
                    token = kv_pos % PAGE
                v_row = v + entry * stride_vb + kv_head * stride_vh + token * stride_vn
                v_ptrs = v_row[:, None] + offs_e[None, :].to(tl.int64) * stride_ve
                v_tile = tl.load(v_ptrs, mask=(kv_pos < kv_len)[:, None] & e_ok[None, :], other=0.0)
                acc += tl.sum(v_tile.to(tl.float32), 0)
            acc = acc / kv_len
            if HAS_V_SCALE:
                acc = acc * tl.load(v_scale + kv_head * stride_v_scale).to(tl.float32)
    sink = 0.0
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
    one_row = tl.zeros((1,), tl.float32)
    result, row_lse = finish_rows(
        acc[None, :], one_row + m, one_row + total, one_row + sink, HAS_SINKS, HAS_BIAS, EMPTY_ROWS
    )
    out += batch * stride_ob + head * stride_oh + q_pos * stride_om
    tl.store(out + offs_e[None, :] * stride_oe, result.to(out.dtype.element_ty), mask=e_ok[None, :])
    tl.store(lse + row_flat + tl.arange(0, 1), row_lse)
