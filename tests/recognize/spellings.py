"""How real models write attention: one function each, every one to be replaced by the op.

A spelling is registered with a maker of its float32 inputs; sizes differ from one another so that no axis can be taken
for another by accident. Letters: B 2, H 6 (kv heads 3 or 2), M 10, N 14, D 8, E 12 unless the spelling needs M == N.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

B, H, K, M, N, D, E = 2, 6, 3, 10, 14, 8, 12


@dataclass(frozen=True)
class Spelling:
    name: str
    function: Callable[..., Tensor]
    make: Callable[[], tuple]
    trains: bool = True
    dynamic: bool = True
    """Recognised with `dynamic=True` too, where even head counts are symbols; where not, the report says why."""


SPELLINGS: dict[str, Spelling] = {}


def spelling(make: Callable[[], tuple], **kwargs):
    def register(function):
        SPELLINGS[function.__name__] = Spelling(function.__name__, function, make, **kwargs)
        return function

    return register


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape)


def bhsd(heads: int = H, kv_heads: int | None = None, q_len: int = M, kv_len: int = N, dv: int = E):
    kv = kv_heads or heads
    return rand(B, heads, q_len, D), rand(B, kv, kv_len, D), rand(B, kv, kv_len, dv)


def square():
    return bhsd(q_len=M, kv_len=M)


def flat(*tensors: Tensor):
    return tuple(t.flatten(0, 1) for t in tensors)


def bshd():
    return tuple(t.transpose(1, 2).contiguous() for t in bhsd())


SCALE = 1 / math.sqrt(D)


# --- plain products ---


@spelling(bhsd)
def textbook_div(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), -1) @ v


@spelling(bhsd)
def textbook_mul(q, k, v):
    return ((q @ k.mT) * SCALE).softmax(-1) @ v


@spelling(bhsd)
def commuted_scale(q, k, v):
    return (SCALE * torch.matmul(q, k.transpose(2, 3))).softmax(dim=3).matmul(v)


@spelling(bhsd)
def no_scale_t5(q, k, v):
    return F.softmax(torch.matmul(q, k.transpose(3, 2)).float(), dim=-1).type_as(q) @ v


@spelling(bhsd)
def scale_on_q(q, k, v):
    return torch.softmax((q * SCALE) @ k.mT, -1) @ v


@spelling(bhsd)
def scale_on_k(q, k, v):
    return torch.softmax(q @ (k / math.sqrt(D)).mT, -1) @ v


@spelling(bhsd)
def scale_split_quarter(q, k, v):
    root = D**-0.25
    return torch.softmax((q * root) @ (k * root).mT, -1) @ v


@spelling(bhsd)
def scale_twice(q, k, v):
    return torch.softmax((q * 0.5) @ k.mT / 3.0 * 2.0, -1) @ v


@spelling(bhsd)
def negated_twice(q, k, v):
    return torch.softmax(-((-q) @ k.mT) * SCALE, -1) @ v


@spelling(bhsd)
def tensor_scale_constant(q, k, v):
    return torch.softmax((q @ k.mT) / torch.tensor(math.sqrt(D)), -1) @ v


@spelling(bhsd)
def gpt2_full_scale(q, k, v):
    w = q @ k.transpose(-1, -2)
    w = w / torch.full([], v.size(-1) ** 0.5, dtype=w.dtype, device=w.device)
    return F.softmax(w, dim=-1) @ v


@spelling(lambda: (*bhsd(), rand(H, 1, 1)))
def swinv2_cosine(q, k, v, logit_scale):
    attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return (attn * logit_scale.clamp(max=4.6).exp()).softmax(-1) @ v


@spelling(lambda: (*bhsd(), rand(1)))
def scalar_parameter_scale(q, k, v, temperature):
    return ((q @ k.mT) * temperature).softmax(-1) @ v


# --- einsum ---


@spelling(bhsd)
def einsum_bhqd(q, k, v):
    a = torch.einsum("bhqd,bhkd->bhqk", q * SCALE, k).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", a, v)


@spelling(bshd)
def einsum_bqhd(q, k, v):
    a = F.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE, dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", a, v).reshape(B, M, H * E)


@spelling(bshd)
def einsum_swapped_operands(q, k, v):
    a = torch.einsum("bkhd,bqhd->bhqk", k, q).mul(SCALE).softmax(-1)
    return torch.einsum("bkhd,bhqk->bqhd", v, a)


@spelling(lambda: (rand(B, H, M, D), rand(B, N, D), rand(B, N, E)))
def falcon_multi_query_3d(q, k, v):
    a = torch.einsum("bhqd,bkd->bhqk", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bhqk,bkd->bhqd", a, v)


@spelling(lambda: (rand(M, B, H, D), rand(N, B, H, D), rand(N, B, H, E)))
def einsum_sbhd(q, k, v):
    a = torch.einsum("ibhd,jbhd->bhij", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bhij,jbhd->ibhd", a, v)


@spelling(lambda: (rand(M, B, H, D), rand(N, B, H, D), rand(N, B, H, E)))
def xlnet_key_before_heads(q, k, v):
    a = torch.einsum("ibnd,jbnd->bnij", q, k) * SCALE
    return torch.einsum("bnij,jbnd->ibnd", a.softmax(dim=3), v)


# --- 3-D, packed, transposed layouts ---


@spelling(lambda: flat(*bhsd()))
def bmm_3d(q, k, v):
    return torch.bmm(F.softmax(torch.bmm(q * SCALE, k.transpose(1, 2)), -1), v)


@spelling(lambda: flat(*bhsd()))
def opt_bmm_reshaped(q, k, v):
    a = torch.bmm(q * SCALE, k.transpose(1, 2)).view(B, H, M, N).softmax(-1).view(B * H, M, N)
    return torch.bmm(a, v).view(B, H, M, E).transpose(1, 2).reshape(B, M, H * E)


@spelling(lambda: (*flat(*bhsd()), rand(M, N)))
def baddbmm_bias(q, k, v, bias):
    return torch.bmm(torch.baddbmm(bias.expand(B * H, M, N), q, k.mT, beta=1.0, alpha=SCALE).softmax(-1), v)


@spelling(lambda: flat(*bhsd()))
def diffusers_baddbmm_empty(q, k, v):
    scores = torch.baddbmm(torch.empty(B * H, M, N, dtype=q.dtype), q, k.mT, beta=0, alpha=SCALE)
    return torch.bmm(scores.softmax(-1), v)


@spelling(lambda: (*flat(*bhsd()), rand(B * H, 1, N)))
def bloom_baddbmm_alibi(q, k, v, alibi):
    scores = alibi.baddbmm(batch1=q, batch2=k.mT, beta=1.0, alpha=SCALE).view(B, H, M, N)
    return torch.bmm(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype).view(B * H, M, N), v)


@spelling(lambda: (rand(B, M, 48), rand(144, 48)))
def gpt2_packed_split(x, w):
    q, k, v = F.linear(x, w).split(48, dim=2)
    q, k, v = (t.view(B, M, H, D).transpose(1, 2) for t in (q, k, v))
    s = q @ k.transpose(-1, -2) * SCALE
    keep = torch.tril(torch.ones(M, M)).view(1, 1, M, M)
    s = s.masked_fill(keep == 0, float("-inf"))
    return (F.softmax(s, -1) @ v).transpose(1, 2).contiguous().view(B, M, 48)


@spelling(lambda: (rand(B, M, 48), rand(144, 48)))
def timm_qkv_unbind(x, w):
    q, k, v = F.linear(x, w).reshape(B, M, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    a = ((q * SCALE) @ k.transpose(-2, -1)).softmax(dim=-1)
    return (a @ v).transpose(1, 2).reshape(B, M, 48)


@spelling(lambda: (rand(B, M, 48), rand(144, 48)))
def lucidrains_chunk_rearrange(x, w):
    q, k, v = (t.reshape(B, M, H, D).permute(0, 2, 1, 3) for t in F.linear(x, w).chunk(3, dim=-1))
    dots = torch.einsum("b h i d, b h j d -> b h i j", q, k) * SCALE
    out = torch.einsum("b h i j, b h j d -> b h i d", dots.softmax(-1), v)
    return out.permute(0, 2, 1, 3).reshape(B, M, H * D)


@spelling(lambda: (rand(B, M, H * 3 * D),))
def neox_interleaved_qkv(qkv):
    q, k, v = qkv.view(B, M, H, 3 * D).transpose(1, 2).chunk(3, dim=-1)
    return torch.softmax(q @ k.mT * SCALE, -1) @ v


@spelling(lambda: (rand(B, H, M, D), rand(B, H, D, N), rand(B, H, N, E)))
def key_stored_transposed(q, k_t, v):
    return torch.softmax(torch.matmul(q, k_t) * SCALE, -1) @ v


@spelling(bhsd)
def scores_transposed(q, k, v):
    p = (k @ q.transpose(-1, -2) * SCALE).softmax(-2)
    return (v.transpose(-1, -2) @ p).transpose(-1, -2)


@spelling(lambda: (rand(B, 48, 4, 5), rand(144, 48, 1, 1)))
def diffusion_conv_qkv(x, w):
    q, k, v = F.conv2d(x, w).reshape(B, 3, H, D, 20).unbind(1)
    a = torch.einsum("bhdn,bhdm->bhnm", q * SCALE, k).softmax(-1)
    return torch.einsum("bhnm,bhdm->bhdn", a, v).reshape(B, 48, 4, 5)


@spelling(lambda: (rand(B, 24, 20), rand(B, 24, 20), rand(B, 24, 20)))
def vae_single_head_channels_first(q, k, v):
    w = torch.bmm(q.permute(0, 2, 1), k) * (24**-0.5)
    return torch.bmm(v, w.softmax(dim=2).permute(0, 2, 1))


@spelling(lambda: (rand(M, B, H, D), rand(N, B, H, D), rand(N, B, H, E)), dynamic=False)
def megatron_sbhd(q, k, v):
    q, k, v = (t.reshape(t.shape[0], B * H, -1).transpose(0, 1) for t in (q, k, v))
    s = torch.empty(B * H, M, N, dtype=q.dtype).copy_(torch.bmm(q, k.transpose(1, 2))) * SCALE
    p = s.view(B, H, M, N).softmax(-1)
    return torch.bmm(p.view(B * H, M, N), v).transpose(0, 1).reshape(M, B, H * E)


@spelling(lambda: (rand(B, 8, 8, 48), rand(144, 48), rand(H, 16, 16)))
def swin_shifted_windows(x, w, relative):
    windows = x.view(B, 2, 4, 2, 4, 48).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 48)
    q, k, v = F.linear(windows, w).reshape(-1, 16, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    a = (q * SCALE) @ k.transpose(-2, -1) + relative.unsqueeze(0)
    mask = torch.zeros(4, 16, 16, dtype=x.dtype)
    mask[1:3, :8, 8:] = -100.0
    a = (a.view(B, 4, H, 16, 16) + mask.unsqueeze(1).unsqueeze(0)).view(-1, H, 16, 16)
    return (a.softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, 48)


@spelling(lambda: tuple(rand(B, H, 3, 7, D) for _ in range(3)))
def axial_rows_5d(q, k, v):
    return torch.einsum("bhrqd,bhrkd->bhrqk", q, k).mul(SCALE).softmax(-1).matmul(v)


@spelling(lambda: tuple(rand(B, 3, 7, H, D) for _ in range(3)))
def video_time_attention(q, k, v):
    a = torch.einsum("btshd,bushd->bshtu", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bshtu,bushd->btshd", a, v)


@spelling(lambda: (rand(M, D), rand(N, D), rand(N, E)))
def two_dimensional(q, k, v):
    return torch.softmax(q @ k.T * SCALE, dim=1) @ v


@spelling(lambda: (rand(B, H, 14, D), rand(B, H, 10, D), rand(B, H, E, 14)))
def values_channels_first(k, q, v_t):
    return v_t @ (k @ q.mT * SCALE).softmax(-2)


@spelling(lambda: (*square(), rand(B, H, M)))
def one_vector_along_queries_and_keys(q, k, v, x):
    return (q @ k.mT + x.unsqueeze(-1) + x.unsqueeze(-2)).softmax(-1) @ v


@spelling(lambda: (rand(B, M, D),))
def one_tensor_for_q_k_and_v(x):  # non-local block
    return torch.softmax(x @ x.mT * SCALE, -1) @ x


@spelling(bhsd)
def products_by_mul_and_sum(q, k, v):
    s = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) * SCALE
    return (s.softmax(-1).unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


@spelling(lambda: (rand(B, M, 48), rand(B, N, 48), rand(B, N, 48)))
def nn_transformer_style_heads_in_batch(q, k, v):
    q, k, v = (t.transpose(0, 1).contiguous().view(t.shape[1], B * H, D).transpose(0, 1) for t in (q, k, v))
    return torch.bmm(torch.bmm(q / math.sqrt(D), k.transpose(1, 2)).softmax(-1), v)


# --- grouped and multi-query ---


@spelling(lambda: bhsd(kv_heads=K))
def llama_repeat_kv(q, k, v):
    def repeat(x):
        return x[:, :, None, :, :].expand(B, K, H // K, N, x.shape[-1]).reshape(B, H, N, x.shape[-1])

    w = torch.matmul(q, repeat(k).transpose(2, 3)) * SCALE
    return torch.matmul(F.softmax(w, dim=-1, dtype=torch.float32).to(q.dtype), repeat(v)).transpose(1, 2).contiguous()


@spelling(lambda: bhsd(kv_heads=K))
def values_scaled_before_they_are_repeated(q, k, v):
    """MiMo-V2-Flash."""
    v = v * 0.707
    k, v = (x[:, :, None].expand(B, K, H // K, N, -1).reshape(B, H, N, -1) for x in (k, v))
    return (q @ k.mT * SCALE).softmax(-1) @ v


@spelling(lambda: bhsd(kv_heads=K))
def values_scaled_after_they_are_repeated(q, k, v):
    k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1) * 0.707
    return (q @ k.mT * SCALE).softmax(-1) @ v


@spelling(lambda: bhsd(kv_heads=K))
def repeat_interleave(q, k, v):
    k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)
    return torch.softmax(q @ k.mT * SCALE, -1) @ v


@spelling(lambda: bhsd(kv_heads=K))
def tiled_heads(q, k, v):  # query head h reads kv head h % K
    k, v = k.repeat(1, H // K, 1, 1), v.repeat(1, H // K, 1, 1)
    return torch.softmax(q @ k.mT * SCALE, -1) @ v


@spelling(lambda: bhsd(kv_heads=K))
def grouped_query_5d(q, k, v):
    s = torch.einsum("bkgqd,bkjd->bkgqj", q.reshape(B, K, H // K, M, D), k) * SCALE
    return torch.einsum("bkgqj,bkjd->bkgqd", s.softmax(-1), v).reshape(B, H, M, E)


@spelling(lambda: bhsd(kv_heads=K))
def grouped_query_unsqueezed(q, k, v):
    s = q.view(B, K, H // K, M, D) @ k.unsqueeze(2).mT * SCALE
    return (s.softmax(-1) @ v.unsqueeze(2)).view(B, H, M, E)


@spelling(lambda: bhsd(kv_heads=1))
def multi_query_broadcast(q, k, v):
    return torch.softmax(q @ k.mT * SCALE, -1) @ v


@spelling(lambda: (rand(B, H, M, D), rand(B, M, D), rand(B, M, E)))
def santacoder_multi_query_folded(q, k, v):
    s = torch.bmm(q.transpose(1, 2).reshape(B, M * H, D), k.mT) * SCALE
    out = torch.bmm(s.view(B, M, H, M).softmax(-1).view(B, M * H, M), v)
    return out.view(B, M, H, E)


@spelling(lambda: (rand(B, H, 1, D), rand(B, K, N, D), rand(B, K, N, E)))
def decode_grouped(q, k, v):
    k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
    return torch.softmax(q @ k.mT * SCALE, -1) @ v


@spelling(lambda: (rand(1, H, M, D), rand(B, H, N, D), rand(B, H, N, E)))
def perceiver_shared_queries(q, k, v):
    return torch.softmax(q @ k.mT * SCALE, -1) @ v


# --- softmax islands and hand-written softmax ---


@spelling(bhsd)
def float32_island(q, k, v):
    return F.softmax(q @ k.mT * SCALE, dim=-1, dtype=torch.float32).to(q.dtype) @ v


@spelling(bhsd)
def gptj_float32_scores(q, k, v):
    s = torch.matmul(q.to(torch.float32), k.to(torch.float32).transpose(-1, -2)) / math.sqrt(D)
    return torch.matmul(F.softmax(s, dim=-1).to(v.dtype), v)


@spelling(bhsd)
def everything_in_float32(q, k, v):
    out = torch.softmax(q.float() @ k.float().mT * SCALE, -1) @ v.float()
    return out.to(q.dtype)


@spelling(bhsd)
def exp_sum(q, k, v):
    s = q @ k.mT * SCALE
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


@spelling(bhsd)
def exp_sum_with_max_values(q, k, v):
    s = q @ k.mT * SCALE
    e = torch.exp(s - torch.max(s, dim=-1, keepdim=True)[0])
    return torch.matmul(e / torch.sum(e, dim=-1, keepdim=True), v)


@spelling(bhsd)
def max_subtracted_before_softmax(q, k, v):
    s = q @ k.mT * SCALE
    return (s - s.max(dim=-1, keepdim=True).values).softmax(-1) @ v


@spelling(bhsd)
def exp_log_softmax(q, k, v):
    return F.log_softmax(q @ k.mT * SCALE, -1).exp() @ v


@spelling(bhsd)
def exp_minus_logsumexp(q, k, v):
    s = q @ k.mT * SCALE
    return torch.exp(s - torch.logsumexp(s, -1, keepdim=True)) @ v


@spelling(bhsd)
def exp_minus_logsumexp_unsqueezed(q, k, v):
    s = q @ k.mT * SCALE
    return torch.exp(s - torch.logsumexp(s, -1)[..., None]) @ v


@spelling(bhsd)
def softmax_module(q, k, v):
    return torch.nn.Softmax(dim=-1)(q @ k.mT * SCALE) @ v


# --- masks, biases, caps ---


@spelling(square)
def causal_masked_fill(q, k, v):
    s = (q @ k.mT * SCALE).masked_fill(torch.ones(M, M, dtype=torch.bool).triu(1), float("-inf"))
    return s.softmax(-1) @ v


@spelling(square)
def causal_where_finfo_min(q, k, v):
    keep = torch.ones(M, M, dtype=torch.bool).tril()
    s = torch.where(keep, q @ k.mT * SCALE, torch.finfo(q.dtype).min)
    return s.softmax(-1) @ v


@spelling(lambda: (*bhsd(), torch.rand(M, N) < 0.7))
def filled_with_a_tensor_made_like_the_scores(q, k, v, adjacency):
    """Graph attention."""
    s = q @ k.mT * SCALE
    return torch.where(adjacency, s, -9e15 * torch.ones_like(s)).softmax(-1) @ v


@spelling(square)
def causal_additive_inf(q, k, v):
    mask = torch.full((M, M), float("-inf"), dtype=q.dtype).triu(1)
    return torch.softmax(q @ k.mT * SCALE + mask, -1) @ v


@spelling(square)
def causal_generated_by_nn_transformer(q, k, v):
    return (
        torch.softmax(torch.nn.Transformer.generate_square_subsequent_mask(M, dtype=q.dtype) + q @ k.mT * SCALE, -1) @ v
    )


@spelling(square)
def mask_made_like_the_scores(q, k, v):
    s = q @ k.mT * SCALE
    drop = torch.ones_like(s, dtype=torch.bool).triu(1)
    return (s + torch.zeros_like(s).masked_fill(drop, -math.inf)).softmax(-1) @ v


@spelling(square)
def inplace_scale_and_mask(q, k, v):
    s = torch.matmul(q, k.permute(0, 1, 3, 2))
    s *= SCALE
    s.masked_fill_(torch.ones(M, M, dtype=torch.bool).triu_(1), float("-inf"))
    return s.softmax(-1) @ v


@spelling(bhsd)
def causal_bottom_right(q, k, v):
    keep = torch.ones(M, N, dtype=torch.bool).tril(N - M)
    return (q @ k.mT * SCALE).masked_fill(~keep, -math.inf).softmax(-1) @ v


@spelling(square)
def sliding_window(q, k, v):
    i = torch.arange(M, device=q.device)
    distance = i[:, None] - i[None, :]
    s = (q @ k.mT * SCALE).masked_fill((distance < 0) | (distance >= 4), -math.inf)
    return s.softmax(-1) @ v


@spelling(lambda: (*bhsd(), torch.arange(N)[None, :] < torch.tensor([[9], [14]])))
def key_padding(q, k, v, keep):
    return (q @ k.mT * SCALE).masked_fill(~keep[:, None, None, :], -math.inf).softmax(-1) @ v


@spelling(lambda: (*bhsd(), (torch.arange(N)[None, :] < torch.tensor([[9], [14]])).long()))
def bert_extended_mask(q, k, v, attention_mask):
    extended = (1.0 - attention_mask[:, None, None, :].to(q.dtype)) * -10000.0
    return torch.softmax(q @ k.mT / math.sqrt(D) + extended, dim=-1) @ v


@spelling(lambda: (*bhsd(), rand(H, M, N)))
def additive_bias(q, k, v, bias):
    return torch.softmax(bias + q @ k.mT * SCALE, -1) @ v


@spelling(lambda: (*bhsd(), torch.rand(B, 1, M, N) < 0.8))
def bool_mask_added(q, k, v, mask):
    """True counts as 1, and nothing is masked: a mistake of the model's, as in Grounding DINO's text backbone."""
    return ((q @ k.mT + mask) * SCALE).softmax(-1) @ v


@spelling(lambda: (*bhsd(), rand(1, H, M, N)))
def bias_then_scaled(q, k, v, bias):
    return torch.softmax((q @ k.mT + bias) / math.sqrt(D), -1) @ v


@spelling(lambda: (*bhsd(), rand(32, H)))
def t5_relative_bias(q, k, v, table):
    relative = torch.arange(N, device=q.device)[None, :] - torch.arange(M, device=q.device)[:, None]
    bucket = relative.clamp(-15, 16) + 15
    return F.softmax((q @ k.mT + table[bucket].permute(2, 0, 1)).float(), dim=-1).type_as(q) @ v


@spelling(lambda: (*bhsd(), rand(H)))
def alibi_slopes(q, k, v, slopes):
    distance = torch.arange(N, device=q.device)[None, :] - torch.arange(M, device=q.device)[:, None]
    return torch.softmax(q @ k.mT * SCALE + slopes.view(H, 1, 1) * distance, -1) @ v


@spelling(bhsd)
def gemma2_soft_cap(q, k, v):
    s = q @ k.mT * SCALE
    s = torch.tanh(s / 5.0) * 5.0
    return F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype) @ v


@spelling(lambda: (*square(), rand(H, 1, M)))
def soft_cap_and_bias_scaled(q, k, v, bias):
    s = 5.0 * torch.tanh((q @ k.mT) * (SCALE / 5.0))
    s = (s + bias) * -0.5
    return s.masked_fill(torch.ones(M, M, dtype=torch.bool).triu(1), -torch.inf).softmax(-1) @ v


@spelling(lambda: (*square(), rand(B, 1, M, M)))
def float64_softmax_with_mask(q, k, v, mask):
    """The op runs in float64: in float32 the fill would be -inf, and the gradients less exact than eager's."""
    fill = torch.zeros_like(mask, dtype=torch.float64).masked_fill(mask < 0, torch.finfo(torch.float64).min)
    return ((q @ k.mT).double() * SCALE + fill).softmax(-1).to(v.dtype) @ v


@spelling(square)
def soft_cap_and_causal(q, k, v):
    s = 5.0 * torch.tanh((q @ k.mT) * (SCALE / 5.0))
    s = s + torch.full((M, M), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
    return s.softmax(-1) @ v


@spelling(lambda: (*bhsd(kv_heads=K), rand(H)))
def gpt_oss_sinks(q, k, v, sinks):
    k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
    s = torch.cat([q @ k.mT * SCALE, sinks.reshape(1, -1, 1, 1).expand(B, -1, M, -1)], dim=-1)
    s = s - s.max(dim=-1, keepdim=True).values
    return F.softmax(s, dim=-1, dtype=s.dtype)[..., :-1] @ v


@spelling(lambda: (*bhsd(kv_heads=K), rand(B, M, H), rand(1, H, M, N)))
def inkling_sinks_per_query(q, k, v, sinks, position_bias):
    k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
    mask = torch.full((M, N), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1 + N - M)
    s = q @ k.mT * SCALE + position_bias + mask
    s = torch.cat([s, sinks.transpose(1, 2).unsqueeze(-1)], dim=-1).float()
    return F.softmax(s, dim=-1)[..., :-1].to(q.dtype) @ v


@spelling(lambda: (*bhsd(), rand(M)))
def sinks_of_the_queries_first_and_capped(q, k, v, sinks):
    s = 3.0 * torch.tanh(q @ k.mT * SCALE / 3.0)
    return torch.cat([sinks[:, None].expand(B, H, M, 1), s], -1).softmax(-1)[..., 1:] @ v


@spelling(lambda: (*bhsd(), rand(H)))
def x_transformers_sinks_first(q, k, v, sinks):
    s = torch.cat([sinks.reshape(1, -1, 1, 1).expand(B, -1, M, -1), q @ k.mT * SCALE], dim=-1)
    return s.softmax(-1)[..., 1:] @ v


@spelling(square)
def zero_dropout(q, k, v):
    return F.dropout((q @ k.mT * SCALE).softmax(-1), 0.0, training=True) @ v


@spelling(square)
def evaluated_dropout(q, k, v):
    return F.dropout((q @ k.mT * SCALE).softmax(-1), 0.3, training=False) @ v


@spelling(lambda: (*bhsd(), rand(B, H, M, 4), rand(B, 1, N, 4)))
def mla_two_products(q, k, v, q_rope, k_rope):
    return torch.softmax((q @ k.mT + q_rope @ k_rope.mT) * 0.3, -1) @ v


@spelling(lambda: (*bshd(), rand(B, M, H, 4), rand(B, N, 4)))
def deepseek_two_einsums(q, k, v, q_pe, k_pe):
    s = (torch.einsum("bshd,bthd->bsht", q, k) + torch.einsum("bshr,btr->bsht", q_pe, k_pe)) * 0.3
    return torch.einsum("bsht,bthd->bshd", s.softmax(dim=-1, dtype=torch.float32).type_as(q), v)


# --- F.scaled_dot_product_attention ---


@spelling(bhsd)
def sdpa_plain(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@spelling(bhsd)
def sdpa_causal_rectangular(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@spelling(square)
def sdpa_causal_scaled(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)


@spelling(lambda: (*bhsd(), rand(M, N) > -0.5))
def sdpa_bool_mask(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(lambda: (*bhsd(), rand(B, 1, M, N)))
def sdpa_float_mask(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(lambda: bhsd(kv_heads=K))
def sdpa_enable_gqa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@spelling(lambda: bhsd(kv_heads=K))
def sdpa_repeated_kv(q, k, v):
    k, v = (t[:, :, None].expand(B, K, 2, N, t.shape[-1]).reshape(B, H, N, t.shape[-1]) for t in (k, v))
    return F.scaled_dot_product_attention(q, k.contiguous(), v.contiguous()).transpose(1, 2).reshape(B, M, H * E)


@spelling(lambda: tuple(rand(B, 3, H, s, D) for s in (M, N, N)))
def sdpa_5d(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@spelling(lambda: (rand(H, M, D), rand(H, N, D), rand(H, N, D)))
def sdpa_3d(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


# --- running them ---


def inputs_of(spelling: Spelling, dtype: torch.dtype, rounded_to: torch.dtype, trains: bool) -> list:
    torch.manual_seed(0)
    return [
        t.to(rounded_to).to(dtype).requires_grad_(trains) if isinstance(t, Tensor) and t.is_floating_point() else t
        for t in spelling.make()
    ]


def results_of(function, inputs: list, trains: bool) -> tuple[Tensor, ...]:
    """Output and, in training, the gradients that exist."""
    out = function(*inputs)
    if not trains:
        return (out,)
    torch.manual_seed(1)
    weight = torch.randn(out.shape).to(torch.bfloat16).to(out.dtype)
    leaves = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    return (out, *(g for g in torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True) if g is not None))


# --- weights that are masked once more after the softmax ---


@spelling(square)
def causal_masked_before_and_after(q, k, v):
    drop = torch.ones(M, M, dtype=torch.bool).triu(1)
    return (q @ k.mT * SCALE).masked_fill(drop, -math.inf).softmax(-1).masked_fill(drop, 0.0) @ v


@spelling(square)
def causal_masked_after_by_where(q, k, v):
    keep = torch.ones(M, M, dtype=torch.bool).tril()
    return torch.where(keep, torch.where(keep, q @ k.mT * SCALE, -math.inf).softmax(-1), 0.0) @ v


@spelling(square)
def causal_multiplied_after(q, k, v):
    keep = torch.ones(M, M, dtype=q.dtype).tril()
    return (((q @ k.mT * SCALE) + (1.0 - keep) * torch.finfo(q.dtype).min).softmax(-1) * keep) @ v


@spelling(lambda: (*square(), rand(H, M, M), torch.rand(B, M, M) < 0.8))
def cpmant_masked_before_and_after(q, k, v, position_bias, mask):
    mask = mask | torch.eye(M, dtype=torch.bool, device=mask.device)
    s = q @ k.mT / math.sqrt(D) + position_bias.tanh()  # bounded, as what a table of parameters gives
    s = torch.masked_fill(s, mask.view(B, 1, M, M) == torch.tensor(False), torch.finfo(s.dtype).min)
    return torch.masked_fill(s.softmax(-1), mask.view(B, 1, M, M) == torch.tensor(False), 0.0) @ v


@spelling(lambda: (rand(M, B, H, D), rand(M, B, H, D), rand(M, B, H, D)))
def xlnet_mask_subtracted(q, k, v):
    drop = torch.triu(torch.ones(M, M, dtype=q.dtype), 1)[:, :, None, None]
    s = torch.einsum("ibnd,jbnd->bnij", q, k) * SCALE - 1e30 * torch.einsum("ijbn->bnij", drop)
    return torch.einsum("bnij,jbnd->ibnd", s.softmax(dim=3), v)


@spelling(lambda: (*bhsd(H, K), rand(H)))
def granite_sinks_rescale_the_output(q, k, v, sinks):
    k, v = (t[:, :, None].expand(-1, -1, H // K, -1, -1).flatten(1, 2) for t in (k, v))
    s = q @ k.mT * SCALE
    factor = (torch.logsumexp(s, dim=-1) - sinks.view(1, -1, 1)).to(torch.float32).sigmoid()
    p = F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype)
    return ((p @ v) * factor.unsqueeze(-1).to(q.dtype)).transpose(1, 2).contiguous()


# --- weights that the layer returns and nobody reads ---


@spelling(lambda: (rand(M, B, H * D), rand(3 * H * D, H * D), rand(H * D, H * D), rand(B * H, M, M)))
def wavlm_weights_returned_and_not_read(x, in_proj, out_proj, position_bias):
    out, weights = F.multi_head_attention_forward(
        x, x, x, H * D, H, in_proj, None, None, None, False, 0.0, out_proj, None,
        training=False, need_weights=True, attn_mask=position_bias,
    )  # fmt: skip
    weights[:, None].broadcast_to(B, H, M, M)
    return out


@spelling(bhsd)
def mean_of_the_weights_not_read(q, k, v):
    p = (q @ k.mT * SCALE).softmax(-1)
    (p.mean(1, keepdim=True) * 2.0).log().flatten(1)
    return p @ v


# --- scores raised to the lowest number ---


@spelling(square)
def xglm_causal_mask_then_maximum(q, k, v):
    lowest = torch.finfo(q.dtype).min
    mask = torch.full((M, M), lowest, dtype=q.dtype).triu(1)
    s = (q @ k.mT * SCALE).view(B, H, M, M) + mask
    s = torch.max(s, torch.full((), lowest)).flatten(0, 1)
    return torch.bmm(s.softmax(-1), v.flatten(0, 1)).view(B, H, M, -1)


@spelling(square)
def infinite_causal_mask_then_clamp(q, k, v):
    drop = torch.ones(M, M, dtype=torch.bool).triu(1)
    s = (q @ k.mT * SCALE).masked_fill(drop, -math.inf)
    return s.clamp_min(torch.finfo(q.dtype).min).softmax(-1) @ v
