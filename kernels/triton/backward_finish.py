"""From the sum that backward_hopper.py leaves to dq."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_heads", "q_len", "num_row_blocks"])
def backward_finish_kernel(
    partial, turns, ticket, grad_q, stride_dqb, stride_dqh, stride_dqm, stride_dqd, num_heads, q_len, num_row_blocks,
    softmax_scale, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write `grad_q` `(B, H, M, D)`, one block of queries a program; 0 where no key has been added.

    A block is two tiles of 64 x 64: the halves of 128 columns, or, where WIDTH is 64, of 128 queries.

    The counters become 0 again, so that the launches can be repeated.
    """
    softmax_scale = tl.full((), softmax_scale, tl.float32)
    tile = tl.program_id(0)
    head_index = tile // num_row_blocks
    any_key = tl.load(turns + tile) > 0
    x = tl.load(partial + tile.to(tl.int64) * (64 * 128) + tl.arange(0, 64 * 128), mask=any_key, other=0.0)
    BLOCK_M: tl.constexpr = 128 * 64 // WIDTH
    # The inverse of backward_hopper_parts.pack, for both tiles.
    x = tl.reshape(x, (2, 8, 4, 8, 4, 2, 2))
    x = x.permute(2, 5, 3, 0, 1, 4, 6) if WIDTH == 128 else x.permute(0, 2, 5, 3, 1, 4, 6)
    x = x.reshape(BLOCK_M, WIDTH)
    rows = tile % num_row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, WIDTH)
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
