"""The op on a KV cache: pages behind a block table, and float8 with scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rocm_attn_compile.ops as ops
from rocm_attn_compile.ops.kv_cache import FP8
from rocm_attn_compile.ops.reference import forward as reference
from rocm_attn_compile.testing import assert_as_accurate_as_eager

B, H, K, M, D, E, BLOCKS, SIZE, PER_ROW = 2, 6, 2, 3, 8, 12, 7, 4, 3


def paged(dtype: torch.dtype = torch.float32, cache_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Arguments of a call that reads pages; the table's negative numbers count from the end."""
    torch.manual_seed(0)
    cache_dtype = cache_dtype or dtype
    return {
        "q": torch.randn(B, H, M, D, dtype=dtype),
        "k": torch.randn(BLOCKS, SIZE, K, D).to(cache_dtype).transpose(1, 2),
        "v": torch.randn(BLOCKS, K, SIZE, E).to(cache_dtype),
        "block_table": torch.tensor([[3, 0, -1], [5, 2, 2]], dtype=torch.int32),
        "kv_end": torch.tensor([[5, 6, 7], [9, 10, 12]]),
        "softmax_scale": 0.3,
        "empty_rows": "impossible",
    }


def expected(arguments: dict[str, Any], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The op's meaning, key by key, in `dtype`."""
    table = arguments.get("block_table")
    tensors = []
    for name in ("k", "v"):
        cache = arguments[name].to(dtype)
        if table is None:
            rows = cache
        else:
            rows = torch.stack(
                [
                    torch.stack([cache[int(table[b, n // SIZE]), :, n % SIZE] for n in range(PER_ROW * SIZE)], 1)
                    for b in range(B)
                ]
            )
        scale = arguments.get(f"{name}_scale")
        tensors.append(rows if scale is None else rows * scale.to(dtype).view(-1, 1, 1))
    return reference(
        arguments["q"].to(dtype), *tensors, kv_end=arguments.get("kv_end"), softmax_scale=0.3, empty_rows="impossible"
    )[0]


@pytest.mark.parametrize("impl", ["", "REFERENCE"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages(impl: str, dtype: torch.dtype) -> None:
    arguments = paged(dtype)
    out, lse = ops.attention(**arguments, impl=impl)
    assert out.shape == (B, H, M, E)
    assert lse.shape == (B, H, M)
    assert_as_accurate_as_eager(out, expected(arguments, dtype), expected(arguments))


@pytest.mark.parametrize("impl", ["", "REFERENCE"])
@pytest.mark.parametrize("with_pages", [True, False], ids=["paged", "contiguous"])
@pytest.mark.parametrize("cache_dtype", FP8, ids=lambda dtype: str(dtype)[6:])
def test_float8(impl: str, with_pages: bool, cache_dtype: torch.dtype) -> None:
    arguments = paged(torch.bfloat16, cache_dtype)
    arguments.update(k_scale=torch.tensor([0.6, 1.7]), v_scale=torch.tensor([0.4]))
    if not with_pages:
        del arguments["block_table"], arguments["kv_end"]
        arguments.update(k=arguments["k"][:B], v=arguments["v"][:B])
    out, _ = ops.attention(**arguments, impl=impl)
    assert_as_accurate_as_eager(out, expected(arguments, torch.bfloat16), expected(arguments))


def test_gradients_flow_to_the_cache_and_its_scales() -> None:
    arguments = paged(torch.float64)
    arguments.update(k_scale=torch.tensor([0.6, 1.7]).double(), v_scale=torch.tensor([0.4]).double())
    names = ("q", "k", "v", "k_scale", "v_scale")
    leaves = [arguments[name].clone().requires_grad_() for name in names]
    got = torch.autograd.grad(ops.attention(**{**arguments, **dict(zip(names, leaves))})[0].square().sum(), leaves)
    others = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    want = torch.autograd.grad(expected({**arguments, **dict(zip(names, others))}).square().sum(), others)
    for name, a, b in zip(names, got, want):
        torch.testing.assert_close(a, b, msg=name)
    _, tangent = torch.func.jvp(
        lambda scale: ops.attention(**{**arguments, "k_scale": scale})[0],
        (arguments["k_scale"],),
        (torch.ones(2, dtype=torch.float64),),
    )
    _, wanted = torch.func.jvp(
        lambda scale: expected({**arguments, "k_scale": scale}),
        (arguments["k_scale"],),
        (torch.ones(2, dtype=torch.float64),),
    )
    torch.testing.assert_close(tangent, wanted)


def test_opcheck_and_compile() -> None:
    arguments = paged()
    tensors = [arguments.pop(name) for name in "qkv"]
    torch.library.opcheck(ops.attention, tensors, arguments)
    eager = ops.attention(*tensors, **arguments)
    for impl in ("", "TRITON_ATTN@x+inline"):
        compiled = torch.compile(lambda *args: ops.attention(*args, **arguments, impl=impl), fullgraph=True)  # noqa: B023
        for a, b in zip(compiled(*tensors), eager):
            torch.testing.assert_close(a, b)


BAD = {
    "no kv_end": ({"kv_end": None}, "needs kv_end"),
    "table of another batch": ({"block_table": torch.zeros(3, 3, dtype=torch.int32)}, "block_table is"),
    "table of floats": ({"block_table": torch.zeros(2, 3)}, "int32 or int64"),
    "other dtype without a scale": ({"k": paged(cache_dtype=torch.float8_e5m2)["k"]}, "a float8 with k_scale"),
    "half a cache": ({"v": paged()["v"][:-1]}, "v is"),
    "scale per channel": ({"k_scale": torch.ones(D)}, "k_scale is"),
    "scale of integers": ({"v_scale": torch.ones(K, dtype=torch.int64)}, "a float dtype"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name: str) -> None:
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        ops.attention(**{**paged(), **change})


def test_vmap_is_refused() -> None:
    arguments = paged()
    with pytest.raises(NotImplementedError, match="KV cache"):
        torch.vmap(lambda q: ops.attention(**{**arguments, "q": q})[0])(torch.randn(2, B, H, M, D))
