"""Decode in compiled programs on Hopper: Inductor makes the descriptors of long caches, with sizes from symbols, too.

`make test-gpu`.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rocm_attn_compile import _torch_private
from rocm_attn_compile.testing import assert_as_accurate_as_eager

pytestmark = [pytest.mark.gpu, pytest.mark.hopper]

FACTOR = 4.0


def step(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def inputs(batch: int, kv_len: int, head_dim: int, spare: int = 128) -> tuple[torch.Tensor, ...]:
    """q, k and v; keys and values are parts of a static cache with room for `spare` more."""
    torch.manual_seed(kv_len)
    cache = (torch.randn(batch, 8, kv_len + spare, head_dim, device="cuda").bfloat16()[:, :, :kv_len] for _ in "kv")
    return torch.randn(batch, 32, 1, head_dim, device="cuda").bfloat16(), *cache


def check(compiled, tensors: tuple[torch.Tensor, ...]) -> None:
    with torch.no_grad():
        actual = compiled(*tensors).clone()
        eager, exact = step(*tensors), step(*(x.double() for x in tensors))
    assert_as_accurate_as_eager((actual,), (eager,), (exact,), factor=FACTOR)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("batch", "kv_len"), [(16, 2111), (2, 16390), (1, 2050), (1, 1000)], ids=str)
def test_static_sizes(batch: int, kv_len: int, head_dim: int, mode: str | None) -> None:
    compiled = torch.compile(step, backend="rocm_attn", fullgraph=True, dynamic=False, mode=mode)
    tensors = inputs(batch, kv_len, head_dim)
    _, codes = _torch_private.generated_code(lambda: check(compiled, tensors))
    assert codes and not any("torch.ops.rocm_attn.attention" in code for code in codes)
    is_long = batch * 32 * kv_len >= (2**16 if mode else 2**20)
    assert any("TensorDescriptor.from_tensor" in code for code in codes) == is_long
    for _ in range(3):  # the third is a replay where there are CUDA graphs
        check(compiled, tensors)


def test_symbols() -> None:
    compiled = torch.compile(step, backend="rocm_attn", fullgraph=True)

    def run(batch: int, kv_len: int) -> None:
        tensors = inputs(batch, kv_len, 128, spare=0)  # else strides would be symbols of their own
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 0)
        for tensor in tensors[1:]:
            torch._dynamo.mark_dynamic(tensor, 2)
        check(compiled, tensors)

    _, codes = _torch_private.generated_code(lambda: run(16, 2100))
    assert any("TensorDescriptor.from_tensor" in code for code in codes)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in ((3, 70), (2, 9001), (33, 640)):
            run(*sizes)
