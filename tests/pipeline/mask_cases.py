"""Masks that are proved, and biases: what is kept, or added, and the tensor that it reads."""

from __future__ import annotations

import torch
from pipeline_harness import B, H

WINDOW = 16


def positions(q, k, bottom_right=False):
    rows, columns = q.shape[-2], k.shape[-2]
    offset = columns - rows if bottom_right else 0
    i, j = torch.arange(rows, device=q.device), torch.arange(columns, device=q.device)
    return i[:, None] + offset, j[None, :]


def top_left(q, k, extra):
    i, j = positions(q, k)
    return j <= i


def bottom_right(q, k, extra):
    i, j = positions(q, k, bottom_right=True)
    return j <= i


def window(size):
    """`size` keys, the query's own included, as transformers counts."""

    def keep(q, k, extra):
        i, j = positions(q, k)
        return (j <= i) & (i - j < size)

    return keep


def window_to_the_left(q, k, extra):
    """WINDOW keys beside the query's own, as flash attention counts."""
    i, j = positions(q, k)
    return (j <= i) & (i - j <= WINDOW)


def window_by_distance(q, k, extra):
    i, j = positions(q, k)
    return (i - j).abs() <= WINDOW


def chunked(q, k, extra):
    i, j = positions(q, k)
    return (i // WINDOW == j // WINDOW) & (j <= i)


def prefix(q, k, lengths):
    i, j = positions(q, k)
    return ((j <= i) | (j < lengths[:, None, None]))[:, None]


def documents(q, k, ids):
    i, j = positions(q, k)
    return ((ids[:, :, None] == ids[:, None, :]) & (j <= i))[:, None]


def padding_bool(q, k, mask):
    return mask.bool()[:, None, None, :]


def padding_int(q, k, mask):
    return mask[:, None, None, :] != 0


def padding_int_and_window(q, k, mask):
    return padding_int(q, k, mask) & window(WINDOW)(q, k, None)


def padding_float(q, k, mask):
    return mask.float()[:, None, None, :] > 0.5


def lengths_and_causal(q, k, lengths):
    i, j = positions(q, k)
    return ((j < lengths[:, None, None]) & (j <= i))[:, None]


def documents_lengths_and_window(q, k, ids):
    return documents(q, k, ids) & (ids != 9)[:, None, None, :] & window(WINDOW)(q, k, None)


def of_length(value):
    return lambda n: torch.full((B,), value)


def ones(n):
    return torch.ones(B, n, dtype=torch.long)


def document_ids(n):
    return torch.arange(n).div(50, rounding_mode="floor").expand(B, n).contiguous()


MASKS = {
    "causal_top_left": (top_left, None),
    "causal_bottom_right": (bottom_right, None),
    "window_smaller": (window(WINDOW - 1), None),
    "window": (window(WINDOW), None),
    "window_larger": (window(WINDOW + 1), None),
    "window_to_the_left": (window_to_the_left, None),
    "window_by_distance": (window_by_distance, None),
    "chunked": (chunked, None),
    "prefix": (prefix, of_length(7)),
    "documents": (documents, document_ids),
    "padding_bool": (padding_bool, ones),
    "padding_int": (padding_int, ones),
    "padding_int_and_window": (padding_int_and_window, ones),
    "padding_float": (padding_float, ones),
    "lengths_and_causal": (lengths_and_causal, of_length(100)),
    "documents_lengths_and_window": (documents_lengths_and_window, document_ids),
}
"""Name -> what is kept, and a maker of the tensor that it reads, of a length."""


def alibi(q, k, slopes):
    i, j = positions(q, k)
    return (slopes[:, None, None] * (j - i)).to(q.dtype)


def alibi_of_keys(q, k, slopes):
    """As MPT writes it; Bloom and Falcon count the keys that are no padding."""
    _, j = positions(q, k)
    return (slopes[:, None, None] * j).to(q.dtype)


def alibi_in_both_directions(q, k, slopes):
    """As encoders and x-transformers write it."""
    i, j = positions(q, k)
    return (slopes[:, None, None] * -(j - i).abs()).to(q.dtype)


def t5(q, k, table):
    i, j = positions(q, k)
    return table[(j - i).clamp(-8, 8) + 8].permute(2, 0, 1)[None].to(q.dtype)


def swin(q, k, table):
    """Relative positions in a window of two dimensions, from an index that is looked up."""
    i, j = positions(q, k)
    index = (i // 32 - j // 32).clamp(-2, 2) + 2 + 5 * ((i % 32 - j % 32).clamp(-1, 1) + 1)
    bias = table[index.reshape(-1)].view(q.shape[-2], k.shape[-2], -1)
    return bias.permute(2, 0, 1).contiguous().unsqueeze(0).to(q.dtype)


def slopes(n):
    return torch.pow(2.0, -(torch.arange(1, H + 1) * (8 / H)))


def table(rows):
    return lambda n: torch.linspace(-1, 1, rows * H).sin().view(rows, H)


BIASES = {
    "alibi": (alibi, slopes),
    "alibi_of_keys": (alibi_of_keys, slopes),
    "alibi_in_both_directions": (alibi_in_both_directions, slopes),
    "t5": (t5, table(17)),
    "swin": (swin, table(17)),
}
