"""What is around the op: fused by Inductor, without copies of q, k, v, masks or results, and without graph breaks."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from pipeline_harness import SCALE, B, D, H, attend, causal, qkv, rand

from rocm_attn_compile import _torch_private
from rocm_attn_compile.testing import assert_as_accurate_as_eager, peak_memory

M, N = 36, 40
"""Beside fewer than 16 keys ATen's kernel is given a mask of zeros, see ops/cpu.py."""


class Code:
    """One graph as Inductor wrote it."""

    def __init__(self, text: str) -> None:
        self.kernels = re.findall(r"^(cpp_fused_\w+) = async_compile", text, re.MULTILINE)
        body = text[text.index("def call(") : text.index("runner = ")]
        self.lines = [line.strip() for line in body.splitlines() if not line.strip().startswith("#")]

    @property
    def buffers(self) -> list[str]:
        """Shapes of everything allocated, op results excepted."""
        return [m.group(1) for line in self.lines if (m := re.search(r"= empty_strided_cpu\((\([\d, ]+\))", line))]

    def calls(self, name: str) -> list[str]:
        return [line for line in self.lines if f"{name}(" in line or f"{name}.default(" in line]


OPAQUE = "torch.ops.rocm_attn.attention"
INLINED = "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu"


def code_of(function, *inputs, inline: bool = False) -> Code:
    """The inference code, neither compiled nor run; with the op as one call, as on a GPU, or written out."""
    compiled = torch.compile(function, backend="rocm_attn", fullgraph=True, options={"inline": inline})
    with torch.no_grad():
        _, texts = _torch_private.generated_code(compiled, *inputs, runs=False)
    return Code(texts[0])


def join(out):
    return out.transpose(1, 2).reshape(B, M, -1)


# --- a whole block, compiled and run ---


WEIGHT = torch.randn(H * D, 3 * H * D, generator=torch.Generator().manual_seed(0)) * (H * D) ** -0.5


def block(x, weight):
    projected = (torch.tanh(x) * 2.0) @ weight
    q, k, v = projected.view(B, M, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    return F.gelu(join(attend(q, k, v, causal(M)))) + x


@pytest.mark.parametrize(("inline", "call"), [(False, OPAQUE), (True, INLINED)], ids=["call", "inlined"])
def test_pointwise_work_is_fused_into_one_kernel_before_and_one_after(inline, call):
    x = rand(B, M, H * D)
    compiled = torch.compile(block, backend="rocm_attn", fullgraph=True, options={"inline": inline})
    with torch.no_grad():
        result, (text,) = _torch_private.generated_code(compiled, x, WEIGHT)
        assert_as_accurate_as_eager(result, block(x, WEIGHT), block(x.double(), WEIGHT.double()))
    code = Code(text)
    assert len(code.kernels) == 2
    assert "tanh" in code.kernels[0] and "mul" in code.kernels[0]
    assert "gelu" in code.kernels[1] and "add" in code.kernels[1]
    assert len(code.calls("extern_kernels.mm")) == len(code.calls(call)) == 1
    # tanh(x) * 2 and the projection; the result of the last kernel overwrites that of the attention
    assert code.buffers == [f"({B}, {M}, {H * D})", f"({B * M}, {3 * H * D})"]


@pytest.mark.slow
def test_training_block():
    def gradient(function, x, weight):
        return torch.autograd.grad(function(x, weight).square().sum(), (x, weight))

    inputs = rand(B, M, H * D).requires_grad_(), WEIGHT.clone().requires_grad_()
    compiled = torch.compile(block, backend="rocm_attn", fullgraph=True)
    exact = gradient(block, *(t.detach().double().requires_grad_() for t in inputs))
    assert_as_accurate_as_eager(gradient(compiled, *inputs), gradient(block, *inputs), exact)


# --- how q, k and v arrive: as views of what the projection wrote ---


def heads(t, count=H):
    return t.view(B, M, count, D).transpose(1, 2)


def packed_unbind(x):
    return join(attend(*x.view(B, M, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0), causal(M)))


def packed_split(x):
    return join(attend(*map(heads, x.split(H * D, -1)), causal(M)))


def packed_chunk_sdpa(x):
    return join(F.scaled_dot_product_attention(*map(heads, x.chunk(3, -1)), is_causal=True))


def packed_einsum(x):
    q, k, v = x.view(B, M, 3, H, D).unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(B, M, -1)


def packed_in_half_softmax(x):
    q, k, v = map(heads, x.split(H * D, -1))
    weights = F.softmax(q @ k.mT * SCALE, dim=-1, dtype=torch.float32).to(q.dtype)
    return join(F.dropout(weights, 0.1, training=False) @ v)


@pytest.mark.parametrize(
    "function", [packed_unbind, packed_split, packed_chunk_sdpa, packed_einsum, packed_in_half_softmax]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_projection_goes_in_and_the_joined_heads_come_out_without_a_copy(function, dtype):
    stride = (M * 3 * H * D, D, 3 * H * D, 1)
    # Written out, small attentions in half precision are matrix products, as in eager code.
    for inline, name in ((False, OPAQUE), (True, INLINED)) if dtype == torch.float32 else ((False, OPAQUE),):
        code = code_of(function, rand(B, M, 3 * H * D).to(dtype), inline=inline)
        assert code.kernels == code.buffers == []
        (call,) = code.calls(name)
        for part in range(3):
            assert f"reinterpret_tensor(arg0_1, {(B, H, M, D)}, {stride}, {part * H * D})" in call


def test_video_windows_in_five_dimensions():
    def function(x):
        q, k, v = x.view(B, 2, M // 2, 3, H, D).permute(3, 0, 1, 4, 2, 5)
        return ((q @ k.mT * SCALE).softmax(-1) @ v).permute(0, 1, 3, 2, 4).reshape(B, 2, M // 2, -1)

    for inline in (False, True):
        code = code_of(function, rand(B, M, 3 * H * D), inline=inline)
        assert code.kernels == code.buffers == []


def expanded_heads(k, groups):
    return k[:, :, None].expand(B, -1, groups, M, D).reshape(B, -1, M, D)


def repeated_heads(k, groups):
    return k.repeat_interleave(groups, 1)


@pytest.mark.parametrize("widen", [expanded_heads, repeated_heads])
def test_grouped_heads_are_not_repeated(widen):
    def function(x):
        q, k, v = x.split([4 * D, 2 * D, 2 * D], -1)
        k, v = (widen(heads(t, 2), 2) for t in (k, v))
        return join(attend(heads(q, 4), k, v, causal(M)))

    code = code_of(function, rand(B, M, 8 * D))
    assert code.kernels == code.buffers == []
    (call,) = code.calls(OPAQUE)
    assert call.count(f"reinterpret_tensor(arg0_1, {(B, 2, M, D)}") == 2


def test_transposed_key_cache_is_not_transposed_back():
    def function(q, kt, v):
        return join((q @ kt * SCALE).softmax(-1) @ v)

    code = code_of(function, rand(B, H, M, D), rand(B, H, D, N), rand(B, H, N, D))
    assert code.kernels == code.buffers == []
    (call,) = code.calls(OPAQUE)
    assert f"reinterpret_tensor(arg1_1, {(B, H, N, D)}, {(H * D * N, D * N, 1, N)}, 0)" in call


# --- masks ---


def test_proved_mask_is_not_materialised():
    """The mask that transformers builds, of shape (B, 1, M, M), becomes a causal bound and one bool per key."""

    def function(x, attention_mask):
        q, k, v = map(heads, x.split(H * D, -1))
        lowest = torch.finfo(x.dtype).min
        mask = torch.full((M, M), lowest).triu(1)[None, None].expand(B, 1, M, M).clone()
        padding = (mask == 0) & (attention_mask[:, None, None, :] == 0)
        return join((q @ k.mT * SCALE + mask.masked_fill(padding, lowest)).softmax(-1) @ v)

    code = code_of(function, rand(B, M, 3 * H * D), torch.ones(B, M, dtype=torch.long))
    assert code.buffers == [f"({B}, {M})"]
    assert len(code.kernels) == 1
    (call,) = code.calls(OPAQUE)
    assert "band_upper=0" in call


def test_nothing_of_the_size_of_the_scores_is_allocated():
    length = 512
    q, k, v = qkv(length, length)
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, causal(length)), backend="rocm_attn", fullgraph=True)
    with torch.no_grad():
        compiled(q, k, v)
        peak = peak_memory(lambda: compiled(q, k, v))
    scores = B * H * length * length * q.element_size()
    assert peak < scores / 4
