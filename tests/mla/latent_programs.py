"""Spellings of latent attention (MLA), each a function, a maker of its inputs and the op that it becomes.

Letters: B batch, H heads, M q_len, N kv_len, P nope, R rope, C kv_lora_rank, E v_head_dim, X hidden size; all differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pipeline_harness import INF, rand
from torch import Tensor

B, H, M, P, R, C, E, X = 2, 3, 7, 6, 4, 12, 5, 10
N = 40
SCALE = 0.31

EXPANDED, ABSORBED, RUNTIME = "mla_prefill", "mla_decode", "mla"


@dataclass(frozen=True)
class Program:
    """One spelling.

    Attributes:
        op: What stands in the graph with static sizes and without gradients.
        trains: It may be trained; then it becomes `mla_prefill`.
        dynamic: With `dynamic=True` its sizes stay symbols; then it becomes `mla`, if it is not written absorbed.
    """

    name: str
    function: Callable[..., Tensor]
    make: Callable[[], tuple]
    op: str
    trains: bool
    dynamic: bool


PROGRAMS: dict[str, Program] = {}


def program(op: str, make: Callable[[], tuple], trains: bool = True, dynamic: bool = True):
    def register(function):
        PROGRAMS[function.__name__] = Program(function.__name__, function, make, op, trains, dynamic)
        return function

    return register


def w(*shape: int) -> Tensor:
    return rand(*shape) * shape[-1] ** -0.5


def rotated(x: Tensor) -> Tensor:
    """A rotary embedding in the half-split style, by position along dimension -2."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)[:, None] * 0.3
    cos, sin = torch.cos(angle), torch.sin(angle)
    left, right = x[..., :half], x[..., half:]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def prefill() -> tuple:
    """x, w_q, w_kv_a, w_kv_b."""
    return rand(B, M, X), w(H * (P + R), X), w(C + R, X), w(H * (P + E), C)


def step(batch: int = B) -> tuple:
    """x of one token, w_q, w_kv_a, w_kv_b, cached latents and rotated keys."""
    weights = w(H * (P + R), X), w(C + R, X), w(H * (P + E), C)
    return (rand(batch, 1, X), *weights, rand(batch, N, C), rand(batch, N, R))


def queries(x: Tensor, w_q: Tensor) -> tuple[Tensor, Tensor]:
    q = F.linear(x, w_q).view(x.shape[0], x.shape[1], -1, P + R).transpose(1, 2)
    q_nope, q_pe = q.split([P, R], -1)
    return q_nope, rotated(q_pe)


def latents(x: Tensor, w_kv_a: Tensor) -> tuple[Tensor, Tensor]:
    c, k_pe = F.linear(x, w_kv_a).split([C, R], -1)
    return rms(c), rotated(k_pe)


def expanded(c: Tensor, w_kv_b: Tensor) -> tuple[Tensor, Tensor]:
    kv = F.linear(c, w_kv_b).view(c.shape[0], c.shape[1], -1, P + E).transpose(1, 2)
    k_nope, v = kv.split([P, E], -1)
    return k_nope, v


def causal(scores: Tensor) -> Tensor:
    q_len, kv_len = scores.shape[-2:]
    keep = torch.ones(q_len, kv_len, dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~keep, -INF)


def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True) -> Tensor:
    scores = q @ k.transpose(-1, -2) * SCALE
    return (causal(scores) if is_causal else scores).softmax(-1) @ v


# --- expanded, prefill ---


@program(EXPANDED, prefill)
def concatenated(x, w_q, w_kv_a, w_kv_b):
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    k_nope, v = expanded(c, w_kv_b)
    k = torch.cat([k_nope, k_pe[:, None].expand(-1, k_nope.shape[1], -1, -1)], -1)
    return attend(torch.cat([q_nope, q_pe], -1), k, v)


@program(EXPANDED, prefill)
def concatenated_sdpa(x, w_q, w_kv_a, w_kv_b):
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    k_nope, v = expanded(c, w_kv_b)
    k = torch.cat([k_nope, k_pe[:, None].expand(-1, k_nope.shape[1], -1, -1)], -1)
    return F.scaled_dot_product_attention(torch.cat([q_nope, q_pe], -1), k, v, is_causal=True, scale=SCALE)


@program(EXPANDED, prefill)
def rope_first(x, w_q, w_kv_a, w_kv_b):
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    k_nope, v = expanded(c, w_kv_b)
    k = torch.cat([k_pe[:, None].expand(-1, k_nope.shape[1], -1, -1), k_nope], -1)
    return attend(torch.cat([q_pe, q_nope], -1), k, v)


@program(EXPANDED, prefill)
def written_into_slices(x, w_q, w_kv_a, w_kv_b):
    """DeepSeek V2's published code."""
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    k_nope, v = expanded(c, w_kv_b)
    q = k_pe.new_empty(*q_nope.shape[:-1], P + R)
    q[:, :, :, :P] = q_nope
    q[:, :, :, P:] = q_pe
    k = k_pe.new_empty(*k_nope.shape[:-1], P + R)
    k[:, :, :, :P] = k_nope
    k[:, :, :, P:] = k_pe[:, None]
    return attend(q, k, v)


@program(EXPANDED, prefill)
def copied_into_slices(x, w_q, w_kv_a, w_kv_b):
    """transformers 5."""
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    k_nope, v = expanded(c, w_kv_b)
    k = k_nope.new_empty(*k_nope.shape[:-1], P + R)
    k[..., :P].copy_(k_nope)
    k[..., P:].copy_(k_pe[:, None].expand(-1, k_nope.shape[1], -1, -1))
    return attend(torch.cat([q_nope, q_pe], -1), k, v)


@program(EXPANDED, prefill)
def two_einsums(x, w_q, w_kv_a, w_kv_b):
    """Scores added, as DeepSeek's inference code writes them, keys expanded by einsum."""
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    weight = w_kv_b.view(H, P + E, C)
    k_nope = torch.einsum("btc,hdc->bthd", c, weight[:, :P])
    v = torch.einsum("btc,hdc->bthd", c, weight[:, P:])
    scores = torch.einsum("bhsd,bthd->bhst", q_nope, k_nope) + torch.einsum("bhsr,btr->bhst", q_pe, k_pe)
    return torch.einsum("bhst,bthd->bshd", causal(scores * SCALE).softmax(-1), v)


@program(EXPANDED, lambda: (*prefill()[:3], w(H * P, C), w(H * E, C)))
def two_weights(x, w_q, w_kv_a, w_uk, w_uv):
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    k_nope = F.linear(c, w_uk).unflatten(-1, (H, P)).transpose(1, 2)
    v = (c @ w_uv.T).view(*c.shape[:2], H, E).permute(0, 2, 1, 3)
    k = torch.cat([k_nope, k_pe.unsqueeze(1).expand(-1, H, -1, -1)], -1)
    return attend(torch.cat([q_nope, q_pe], -1), k, v)


@program(EXPANDED, prefill)
def split_before_the_heads(x, w_q, w_kv_a, w_kv_b):
    """All heads' k_nope, then all heads' v."""
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    k_nope, v = F.linear(c, w_kv_b).split([H * P, H * E], -1)
    k_nope, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in (k_nope, v))
    k = torch.cat([k_nope, k_pe.unsqueeze(1).expand(-1, H, -1, -1)], -1)
    return attend(torch.cat([q_nope, q_pe], -1), k, v)


@program(EXPANDED, lambda: (*prefill()[:3], w(2 * H * P, C)))
def unbound(x, w_q, w_kv_a, w_kv_b):
    """v_head_dim is qk_nope_head_dim, and both are a dimension of two."""
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    k_nope, v = F.linear(c, w_kv_b).view(*c.shape[:2], 2, H, P).transpose(1, 3).unbind(2)
    k = torch.cat([k_nope, k_pe.unsqueeze(1).expand(-1, H, -1, -1)], -1)
    return attend(torch.cat([q_nope, q_pe], -1), k, v)


@program(EXPANDED, lambda: (rand(B, M, X), w(8, X), w(H * (P + R), 8), *prefill()[2:]))
def with_q_lora_and_yarn(x, w_q_a, w_q_b, w_kv_a, w_kv_b):
    """The scale of the scores is what YaRN makes of it, whatever the widths are."""
    mscale = 0.1 * 0.707 * 3.689 + 1.0
    (q_nope, q_pe), (c, k_pe) = queries(rms(F.linear(x, w_q_a)), w_q_b), latents(x, w_kv_a)
    k_nope, v = expanded(c, w_kv_b)
    q = torch.cat([q_nope, q_pe], -1) * ((P + R) ** -0.5 * mscale * mscale)
    k = torch.cat([k_nope, k_pe[:, None].expand(-1, k_nope.shape[1], -1, -1)], -1)
    return causal(q @ k.mT).softmax(-1) @ v


@program(EXPANDED, lambda: (rand(B, M, X), w(P + R, X), w(C + R, X), w(P + E, C)))
def one_head(x, w_q, w_kv_a, w_kv_b):
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    k_nope, v = expanded(c, w_kv_b)
    k = torch.cat([k_nope, k_pe[:, None]], -1)
    return attend(torch.cat([q_nope, q_pe], -1), k, v)


@program(EXPANDED, lambda: (*prefill(), torch.tensor([[0] * 2 + [1] * (M - 2), [1] * M])), dynamic=False)
def padded_with_additive_mask(x, w_q, w_kv_a, w_kv_b, keep):
    """As transformers' eager attention: one float mask for causality and padding."""
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    k_nope, v = expanded(c, w_kv_b)
    k = torch.cat([k_nope, k_pe[:, None].expand(-1, k_nope.shape[1], -1, -1)], -1)
    position = torch.arange(x.shape[1])
    allowed = (position <= position[:, None]) & keep[:, None, None].bool()
    mask = torch.where(allowed, 0.0, torch.finfo(x.dtype).min).to(x.dtype)
    scores = torch.cat([q_nope, q_pe], -1) @ k.mT * SCALE + mask
    return scores.softmax(-1, dtype=torch.float32).to(x.dtype) @ v


@program(EXPANDED, lambda: (rand(M, X), *prefill()[1:]), dynamic=False)
def without_a_batch(x, w_q, w_kv_a, w_kv_b):
    """The heads are the first axis of everything."""
    q_nope, q_pe = F.linear(x, w_q).view(-1, H, P + R).transpose(0, 1).split([P, R], -1)
    c, k_pe = latents(x, w_kv_a)
    k_nope, v = F.linear(c, w_kv_b).view(-1, H, P + E).transpose(0, 1).split([P, E], -1)
    q, k = torch.cat([q_nope, rotated(q_pe)], -1), torch.cat([k_nope, k_pe.expand(H, -1, -1)], -1)
    return attend(q, k, v)


# --- expanded, one token on a latent cache ---


def one_token(x, w_q, w_kv_b, c, k_pe, keep=None):
    q_nope, q_pe = queries(x, w_q)
    k_nope, v = expanded(c, w_kv_b)
    k = torch.cat([k_nope, k_pe[:, None].expand(-1, k_nope.shape[1], -1, -1)], -1)
    scores = torch.cat([q_nope, q_pe], -1) @ k.mT * SCALE
    return (scores if keep is None else scores.masked_fill(~keep, -INF)).softmax(-1) @ v


@program(ABSORBED, step)
def grown_cache(x, w_q, w_kv_a, w_kv_b, c_cache, pe_cache):
    c, k_pe = latents(x, w_kv_a)
    return one_token(x, w_q, w_kv_b, torch.cat([c_cache, c], 1), torch.cat([pe_cache, k_pe], 1))


@program(ABSORBED, lambda: (*step(), torch.tensor([25])), trains=False)
def static_cache(x, w_q, w_kv_a, w_kv_b, c_cache, pe_cache, position):
    c, k_pe = latents(x, w_kv_a)
    c_cache.index_copy_(1, position, c)
    pe_cache.index_copy_(1, position, k_pe)
    return one_token(x, w_q, w_kv_b, c_cache, pe_cache, torch.arange(c_cache.shape[1]) <= position)


@program(ABSORBED, step, trains=False, dynamic=False)
def joint_cache_written_by_slices(x, w_q, w_kv_a, w_kv_b, c_cache, pe_cache):
    """One buffer of C + R columns."""
    cache = torch.cat([c_cache, pe_cache], -1)
    cache[:, 30:31] = torch.cat(latents(x, w_kv_a), -1)
    c, k_pe = cache[:, :31].split([C, R], -1)
    return one_token(x, w_q, w_kv_b, c, k_pe)


@program(ABSORBED, lambda: (rand(B, 1, X), w(H * P, X), w(H * (P + E), C), rand(B, N, C)), trains=False)
def no_rope(x, w_q, w_kv_b, c):
    q = F.linear(x, w_q).view(x.shape[0], x.shape[1], H, P).transpose(1, 2)
    k, v = expanded(c, w_kv_b)
    return attend(q, k, v, is_causal=False)


@program(ABSORBED, lambda: (*step(1),))
def batch_of_one(x, w_q, w_kv_a, w_kv_b, c, k_pe):
    return one_token(x, w_q, w_kv_b, c, k_pe)


def pages(width: int = C + R) -> tuple:
    table = torch.tensor([[3, 0, 5], [2, -1, 4]])
    return rand(B, 1, X), w(H * (P + R), X), w(H * (P + E), C), rand(7, 16, width), table, torch.tensor([37, 20])


def written_so_far(length: int, lens: Tensor) -> Tensor:
    return (torch.arange(length) < lens[:, None])[:, None, None]


@program(ABSORBED, pages, trains=False, dynamic=False)
def paged(x, w_q, w_kv_b, cache, table, lens):
    rows = cache[table].view(x.shape[0], -1, C + R)
    c, k_pe = rows[..., :C], rows[..., C:]
    return one_token(x, w_q, w_kv_b, c, k_pe, written_so_far(rows.shape[1], lens))


def two_paged_caches(num_blocks: int = 7) -> tuple:
    """Of the latents and of the rotated keys, read by one table."""
    x, w_q, w_kv_b, cache, table, lens = pages()
    return x, w_q, w_kv_b, cache[..., :C].clone(), rand(num_blocks, 16, R), table, lens


@program(ABSORBED, two_paged_caches, trains=False)
def paged_in_two(x, w_q, w_kv_b, c_cache, pe_cache, table, lens):
    c, k_pe = (cache[table].flatten(1, 2) for cache in (c_cache, pe_cache))
    return one_token(x, w_q, w_kv_b, c, k_pe, written_so_far(c.shape[1], lens))


# --- absorbed ---


@program(ABSORBED, step, trains=False, dynamic=False)
def deepseek_absorbed(x, w_q, w_kv_a, w_kv_b, kv_cache, pe_cache):
    """DeepSeek's inference code: two caches written by slice assignment, two einsums added, W_uv at the end."""
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    bsz, end = x.shape[0], 34
    weight = w_kv_b.view(H, -1, C)
    q_nope = torch.einsum("bhsd,hdc->bshc", q_nope, weight[:, :P])
    kv_cache[:bsz, end - 1 : end] = c
    pe_cache[:bsz, end - 1 : end] = k_pe
    scores = torch.einsum("bshc,btc->bsht", q_nope, kv_cache[:bsz, :end])
    scores = (scores + torch.einsum("bhsr,btr->bsht", q_pe, pe_cache[:bsz, :end])) * SCALE
    scores = scores.softmax(dim=-1, dtype=torch.float32).type_as(x)
    out = torch.einsum("bsht,btc->bshc", scores, kv_cache[:bsz, :end])
    return torch.einsum("bshc,hdc->bshd", out, weight[:, -E:])


@program(ABSORBED, lambda: (rand(B, H, M, C + R), rand(B, N, C + R)), trains=False, dynamic=False)
def one_product(q, cache):
    """MQA with head_dim C + R, of which the first C are the values."""
    kv = cache[:, None]
    return attend(q, kv, kv[..., :C], is_causal=False)


@program(ABSORBED, lambda: (rand(B, H, M, C + R), rand(B, N, C + R)), trains=False, dynamic=False)
def one_product_rope_first_sdpa(q, cache):
    k = cache[:, None].expand(-1, q.shape[1], -1, -1)
    return F.scaled_dot_product_attention(q, k, k[..., R:], scale=SCALE)


def two_caches() -> tuple:
    return rand(B, H, M, C), rand(B, H, M, R), rand(B, N, C), rand(B, N, R)


@program(ABSORBED, two_caches, trains=False, dynamic=False)
def joined_caches(q_latent, q_pe, c, k_pe):
    kv = torch.cat([c, k_pe], -1)
    scores = torch.einsum("bhmd,bnd->bhmn", torch.cat([q_latent, q_pe], -1), kv) * SCALE
    return torch.einsum("bhmn,bnc->bhmc", scores.softmax(-1), c)


@program(ABSORBED, lambda: (rand(B, H, 1, C + R), *pages()[3:]), trains=False, dynamic=False)
def paged_one_product(q, cache, table, lens):
    kv = cache[table].flatten(1, 2)[:, None]
    scores = (q @ kv.mT * SCALE).masked_fill(~written_so_far(kv.shape[2], lens), -INF)
    return scores.softmax(-1) @ kv[..., :C]


def one_query() -> tuple:
    return rand(B, 1, H, C), rand(B, 1, H, R), *two_caches()[2:]


@program(ABSORBED, lambda: (*one_query(), torch.tensor([31, 0])), trains=False, dynamic=False)
def absorbed_step_with_a_length(q_latent, q_pe, c, k_pe, lens):
    scores = torch.einsum("bshc,btc->bsht", q_latent, c) + torch.einsum("bshr,btr->bsht", q_pe, k_pe)
    keep = (torch.arange(c.shape[1]) < lens[:, None])[:, None, None]
    return torch.einsum("bsht,btc->bshc", (scores * SCALE).masked_fill(~keep, -INF).softmax(-1), c)


# --- absorbed, and its weights are in the graph: any form can be used ---


@program(EXPANDED, prefill)
def deepseek_absorbed_prompt(x, w_q, w_kv_a, w_kv_b):
    """DeepSeek's inference code on a prompt."""
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    weight = w_kv_b.view(H, -1, C)
    q_nope = torch.einsum("bhsd,hdc->bshc", q_nope, weight[:, :P])
    scores = torch.einsum("bshc,btc->bhst", q_nope, c) + torch.einsum("bhsr,btr->bhst", q_pe, k_pe)
    out = torch.einsum("bhst,btc->bshc", causal(scores * SCALE).softmax(-1), c)
    return torch.einsum("bshc,hdc->bshd", out, weight[:, -E:]).flatten(2)


@program(EXPANDED, lambda: (*prefill()[:3], w(H, C, P), w(H, C, E)))
def absorbed_by_matmul(x, w_q, w_kv_a, w_uk, w_uv):
    """One product over [c | k_pe], and weights that lie the other way around."""
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    q = torch.cat([q_nope @ w_uk.mT, q_pe], -1)
    kv = torch.cat([c, k_pe], -1)[:, None]
    return attend(q, kv, kv[..., :C]) @ w_uv


@program(ABSORBED, lambda: (rand(B, 2, X), *step()[1:]), trains=False)
def absorbed_speculation(x, w_q, w_kv_a, w_kv_b, c, k_pe):
    """Two tokens on a long cache: as it is written."""
    q_nope, q_pe = queries(x, w_q)
    weight = w_kv_b.view(H, -1, C)
    scores = (q_nope @ weight[:, :P]) @ c[:, None].mT
    scores = (scores + q_pe @ k_pe[:, None].mT) * SCALE
    return (scores.softmax(-1) @ c[:, None]) @ weight[:, P:].mT
