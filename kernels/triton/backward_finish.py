"""From the sum that backward_hopper.py leaves to dq."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_heads", "q_len", "num_row_blocks"])
def backward_finish_kernel(
    partial, turns, ticket, grad_q, stride_dqb, stride_dqh, stride_dqm, stride_dqd, num_heads, q_len, num_row_blocks,
    softmax_scale, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Write `grad_q` `(B, H, M, D)`, one block of 64 queries a program; 0 where no key has been added.

    The counters become 0 again, so that the launches can be repeated.
    """
    softmax_scale = tl.full((), softmax_scale, tl.float32)
    tile = tl.program_id(0)
    head_index = tile // num_row_blocks
    any_key = tl.load(turns + tile) > 0
    x = tl.load(partial + tile.to(tl.int64) * (64 * 128) + tl.arange(0, 64 * 128), mask=any_key, other=0.0)
    # The inverse of backward_hopper_parts.pack, for both halves of the columns.
    x = tl.reshape(x, (2, 8, 4, 8, 4, 2, 2)).permute(2, 5, 3, 0, 1, 4, 6).reshape(64, 128)
    rows = tile % num_row_blocks * 64 + tl.arange(0, 64)
    columns = tl.arange(0, 128)
    grad_q += (head_index // num_heads).to(tl.int64) * stride_dqb + (head_index % num_heads).to(tl.int64) * stride_dqh
    tl.store(
        grad_q + rows.to(tl.int64)[:, None] * stride_dqm + (columns * stride_dqd)[None, :],
        (x * softmax_scale).to(grad_q.dtype.element_ty),
        mask=(rows < q_len)[:, None] & (columns < HEAD_DIM)[None, :],
    )
    # When all warps have read it.
    tl.debug_barrier()
    tl.store(turns + tile, 0)
    if tile == 0:
        tl.store(ticket, 0)
