"""Biases that are products, too, as relative positions of queries are: which product is the scores?"""

from __future__ import annotations

import torch

from rocm_attn_compile.testing import compile_and_capture

HEIGHT, WIDTH, ROWS, COLUMNS = 3, 4, 2, 5


def mvit(q, k, v, rows, columns):
    """As timm's MViTv2 writes it: two biases, one after the other."""
    s = (q * 0.3) @ k.mT
    by_place = q.unflatten(2, (HEIGHT, WIDTH))
    by_row = torch.einsum("byhwc,hkc->byhwk", by_place, rows)
    by_column = torch.einsum("byhwc,wkc->byhwk", by_place, columns)
    pairs = s[:, :, 0:, 0:].view(*s.shape[:2], HEIGHT, WIDTH, ROWS, COLUMNS)
    s[:, :, 0:, 0:] = (pairs + by_row[..., None] + by_column[..., None, :]).view(s.shape)
    return s.softmax(-1) @ v


def test_two_biases_that_are_products_beside_the_scores():
    torch.manual_seed(0)
    shapes = [(2, 3, 12, 8), (2, 3, 10, 8), (2, 3, 10, 6), (HEIGHT, ROWS, 8), (WIDTH, COLUMNS, 8)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    compiled = compile_and_capture(mvit, *tensors, lowering="aot_eager")
    assert compiled.num_attention_calls == 1
    assert compiled.sites[0].data["has_bias"]
    want = mvit(*tensors)
    torch.testing.assert_close(compiled.result, want)
    weight = torch.linspace(-1, 1, want.numel(), dtype=torch.float64).view(want.shape)
    got = torch.autograd.grad(compiled.result, tensors, weight)
    torch.testing.assert_close(got, torch.autograd.grad(want, tensors, weight))
