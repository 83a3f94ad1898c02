"""A second call with other tensors: launched without Triton's look at its arguments, and right (relaunch.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton

from rocm_attn_compile.kernels.triton.attention import attention_backward, attention_forward
from rocm_attn_compile.testing import assert_as_accurate_as_eager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("default_gpu"),
    pytest.mark.skipif(torch.version.hip is not None, reason="on AMD's GPUs launches go Triton's own way"),
]

SCALE = 0.1
SIZES = {"portable": (1, 4, 2, 300), "in Gluon, on Hopper": (8, 16, 4, 2048)}


def inputs(batch: int, heads: int, kv_heads: int, length: int, shift: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v, and the first key of each row, which begins `shift` numbers behind an aligned address."""
    tensors = [torch.randn(batch, count, length, 128, dtype=torch.bfloat16) for count in (heads, kv_heads, kv_heads)]
    starts = torch.randint(0, 200, (batch * length + shift,), dtype=torch.int32)[shift:].reshape(batch, length)
    return tensors, torch.minimum(starts, torch.arange(length, dtype=torch.int32), out=starts)


def ours(tensors: list[torch.Tensor], starts: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    settings: dict[str, Any] = {"softmax_scale": SCALE, "band_upper": 0, "empty_rows": "zero", "opaque": True}
    out, lse = attention_forward(*tensors, kv_start=starts, **settings)
    names = ("attn_bias", "attn_mask", "key_mask", "kv_end", "q_ids", "kv_ids", "sinks", "dropout_seed", "alibi_slopes")
    settings |= dict.fromkeys(names) | {"logits_soft_cap": None, "band_lower": None, "dropout_p": 0.0}
    found = attention_backward(
        grad, *tensors, kv_start=starts, out=out, lse=lse, output_mask=[True] * 3 + [False] * 2, **settings
    )
    return out, *found[:3]


def eager(tensors: list[torch.Tensor], starts: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The last sequence's first key/value head and its query heads."""
    group = tensors[0].shape[1] // tensors[1].shape[1]
    q, k, v = (x.detach().requires_grad_() for x in (tensors[0][-1, :group], tensors[1][-1, :1], tensors[2][-1, :1]))
    key = torch.arange(q.shape[1])
    keep = (key[None, :] <= key[:, None]) & (key[None, :] >= starts[-1][:, None])
    out = (q @ k.mT * SCALE).masked_fill(~keep, float("-inf")).softmax(-1) @ v
    return out, *torch.autograd.grad(out, (q, k, v), grad[-1, :group])


def check(tensors: list[torch.Tensor], starts: torch.Tensor) -> None:
    grad = torch.randn_like(tensors[0])
    out, dq, dk, dv = ours(tensors, starts, grad)
    group = tensors[0].shape[1] // tensors[1].shape[1]
    got = (out[-1, :group], dq[-1, :group], dk[-1, :1], dv[-1, :1])
    exact = eager([x.double() for x in tensors], starts, grad.double())
    assert_as_accurate_as_eager(got, eager(tensors, starts, grad), exact, factor=4.0)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_second_call(sizes: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kinds do not go through Triton's launcher; a row of numbers that is not aligned does, once."""
    calls: list[str] = []
    run = triton.JITFunction.run

    def counted(kernel: Any, *args: Any, **options: Any) -> Any:
        calls.append(kernel.__name__)
        return run(kernel, *args, **options)

    monkeypatch.setattr(triton.JITFunction, "run", counted)
    aligned, other = inputs(*sizes, shift=0), inputs(*sizes, shift=3)
    assert other[1].data_ptr() % 16 == 12
    check(*aligned)
    calls.clear()
    check(*inputs(*sizes, shift=0))
    assert calls == []
    check(*other)
    assert len(calls) >= 2, "what reads the numbers is compiled for their address"
    calls.clear()
    check(*inputs(*sizes, shift=3))
    check(*aligned)
    assert calls == []
