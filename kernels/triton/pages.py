"""Where the keys of a tile are in a paged cache: `(num_blocks, K, PAGE, D)` and a block table `(B, max_blocks)`.

A tile lies in one page, or in several whole pages. The table's entries are loaded as scalars, one a page, and each row
selects its own: nothing is loaded row by row, and nothing moves between register layouts before an address is known.

An entry counts from the end where it is negative, as an index does. Behind the last page in use a table may hold
anything: there the last page is read once more.
"""

import triton
import triton.language as tl


@triton.jit
def page_number(block_table, index, last_page, num_blocks, stride_tn, NOW: tl.constexpr = False):
    """The page in one entry of a batch entry's block table, int64. NOW: a compiler may not put the load off."""
    page = tl.load(block_table + tl.minimum(index, last_page).to(tl.int64) * stride_tn, volatile=NOW).to(tl.int64)
    return tl.where(page < 0, page + num_blocks, page)


@triton.jit
def pages_of_tile(block_table, start_n, last_page, num_blocks, stride_tn, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pages of the keys `start_n..`: one where a page holds the whole tile, else one for each, int64 (BLOCK_N,)."""
    if PAGE % BLOCK_N == 0:
        page = page_number(block_table, start_n // PAGE, last_page, num_blocks, stride_tn)
    elif BLOCK_N % PAGE == 0:
        slot = tl.arange(0, BLOCK_N) // PAGE
        page = page_number(block_table, start_n // PAGE, last_page, num_blocks, stride_tn) + slot * 0
        for i in tl.static_range(1, BLOCK_N // PAGE):
            one = page_number(block_table, start_n // PAGE + i, last_page, num_blocks, stride_tn)
            page = tl.where(slot == i, one, page)
    else:
        kv_pos = start_n + tl.arange(0, BLOCK_N)
        page = page_number(block_table, kv_pos // PAGE, last_page, num_blocks, stride_tn)
    return page


@triton.jit
def place_tile(source, page, start_n, end, stride_page, stride_row, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where load_head_tile finds the tile of the keys `start_n..` that lie in `page`; PAGE == 0 is no paged cache.

    Returns:
        `(source, at, first, row_end)`: the pointer, and either offsets of the rows, for PAGED, or the first row;
        row_end cuts the tile at the key `end`.
    """
    at = start_n
    first = start_n
    row_end = end
    if PAGE > 0:
        if PAGE % BLOCK_N == 0:
            source += page * stride_page
            first = start_n % PAGE
            row_end = end - start_n + first
        else:
            token = (start_n + tl.arange(0, BLOCK_N)) % PAGE
            at = page * stride_page + token.to(tl.int64) * stride_row
    return source, at, first, row_end
