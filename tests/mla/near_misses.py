"""What comes near latent attention and is none the MLA ops compute: it stays a plain attention, with a reason.

Each is a function, a maker of its inputs, the code of the note (None: it is not even near) and whether it trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from latent_programs import (
    SCALE,
    B,
    C,
    E,
    H,
    M,
    N,
    P,
    R,
    X,
    attend,
    causal,
    expanded,
    latents,
    prefill,
    queries,
    rms,
    rotated,
    step,
    two_caches,
    w,
)
from pipeline_harness import rand
from torch import Tensor


@dataclass(frozen=True)
class NearMiss:
    name: str
    function: Callable[..., Tensor]
    make: Callable[[], tuple]
    code: str | None
    trains: bool


NEAR_MISSES: dict[str, NearMiss] = {}


def near_miss(code: str | None, make: Callable[[], tuple] = prefill, trains: bool = False):
    def register(function):
        NEAR_MISSES[function.__name__] = NearMiss(function.__name__, function, make, code, trains)
        return function

    return register


def joined(k_nope: Tensor, k_pe: Tensor) -> Tensor:
    return torch.cat([k_nope, k_pe[:, None].expand(-1, k_nope.shape[1], -1, -1)], -1)


# --- another structure ---


@near_miss("latent_pe_per_head", lambda: (*prefill(), w(H * R, X)))
def rotary_key_per_head(x, w_q, w_kv_a, w_kv_b, w_pe):
    (q_nope, q_pe), (c, _) = queries(x, w_q), latents(x, w_kv_a)
    k_nope, v = expanded(c, w_kv_b)
    k_pe = rotated(F.linear(x, w_pe).view(B, M, H, R).transpose(1, 2))
    return attend(torch.cat([q_nope, q_pe], -1), torch.cat([k_nope, k_pe], -1), v)


@near_miss("latent_not_linear", lambda: (*prefill(), rand(B, H, M, E)))
def values_from_elsewhere(x, w_q, w_kv_a, w_kv_b, v):
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    return attend(torch.cat([q_nope, q_pe], -1), joined(expanded(c, w_kv_b)[0], k_pe), v)


@near_miss("latent_differs", lambda: (*prefill(), w(H * E, X)))
def values_from_the_hidden_states(x, w_q, w_kv_a, w_kv_b, w_v):
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    v = F.linear(x, w_v).view(B, M, H, E).transpose(1, 2)
    return attend(torch.cat([q_nope, q_pe], -1), joined(expanded(c, w_kv_b)[0], k_pe), v)


@near_miss("latent_differs", lambda: (*prefill(), rand(B, M, C)))
def two_latents(x, w_q, w_kv_a, w_kv_b, other):
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    return attend(torch.cat([q_nope, q_pe], -1), joined(expanded(c, w_kv_b)[0], k_pe), expanded(other, w_kv_b)[1])


@near_miss("latent_differs")
def silu_of_the_latent_for_the_keys(x, w_q, w_kv_a, w_kv_b):
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    return attend(torch.cat([q_nope, q_pe], -1), joined(expanded(F.silu(c), w_kv_b)[0], k_pe), expanded(c, w_kv_b)[1])


@near_miss("latent_differs", trains=True)
def latents_of_other_tokens(x, w_q, w_kv_a, w_kv_b):
    """The values are those of the token before."""
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    k_nope, v = expanded(c, w_kv_b)[0], expanded(c.roll(1, 1), w_kv_b)[1]
    return attend(torch.cat([q_nope, q_pe], -1), joined(k_nope, k_pe), v)


@near_miss("latent_differs")
def latents_of_another_batch(x, w_q, w_kv_a, w_kv_b):
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    k_nope, v = expanded(c, w_kv_b)[0], expanded(c.flip(0), w_kv_b)[1]
    return attend(torch.cat([q_nope, q_pe], -1), joined(k_nope, k_pe), v)


@near_miss("latent_not_linear", trains=True)
def norm_of_the_expanded_keys(x, w_q, w_kv_a, w_kv_b):
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    k_nope, v = expanded(c, w_kv_b)
    return attend(torch.cat([q_nope, q_pe], -1), joined(rms(k_nope), k_pe), v)


@near_miss("latent_not_linear")
def gelu_of_the_expanded_values(x, w_q, w_kv_a, w_kv_b):
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    k_nope, v = expanded(c, w_kv_b)
    return attend(torch.cat([q_nope, q_pe], -1), joined(k_nope, k_pe), F.gelu(v))


@near_miss("latent_bias", lambda: (*prefill(), rand(H * (P + E))), trains=True)
def bias_in_the_expansion(x, w_q, w_kv_a, w_kv_b, bias):
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    kv = F.linear(c, w_kv_b, bias).view(B, M, H, P + E).transpose(1, 2)
    return attend(torch.cat([q_nope, q_pe], -1), joined(kv[..., :P], k_pe), kv[..., P:])


@near_miss("latent_bias", lambda: (*prefill(), rand(H * (P + E))))
def bias_by_addmm(x, w_q, w_kv_a, w_kv_b, bias):
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    kv = torch.addmm(bias, c.reshape(-1, C), w_kv_b.t()).view(B, M, H, P + E).transpose(1, 2)
    return attend(torch.cat([q_nope, q_pe], -1), joined(kv[..., :P], k_pe), kv[..., P:])


@near_miss("latent_weight_varies", lambda: (*prefill()[:3], w(B, H, P + E, C)))
def weights_of_each_batch(x, w_q, w_kv_a, w_kv_b):
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    kv = torch.einsum("btc,bhdc->bhtd", c, w_kv_b)
    return attend(torch.cat([q_nope, q_pe], -1), joined(kv[..., :P], k_pe), kv[..., P:])


@near_miss("latent_per_head", lambda: (*prefill()[:3], rand(B, H, M, C), w(P + E, C)))
def latent_of_each_head(x, w_q, w_kv_a, c, w_kv_b):
    (q_nope, q_pe), (_, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    kv = c @ w_kv_b.T
    return attend(torch.cat([q_nope, q_pe], -1), joined(kv[..., :P], k_pe), kv[..., P:])


@near_miss("latent_sliced", lambda: (*step(), rand(B, 30, R)))
def expanded_and_then_cut_along_the_keys(x, w_q, w_kv_a, w_kv_b, c, _, k_pe):
    (q_nope, q_pe) = queries(x, w_q)
    k_nope, v = expanded(c, w_kv_b)
    return attend(torch.cat([q_nope, q_pe], -1), joined(k_nope[:, :, :30], k_pe), v[:, :, :30], is_causal=False)


@near_miss("latent_cache_expanded", lambda: (*step()[:4], rand(B, H, N, P + R), rand(B, H, N, E)))
def cache_of_expanded_keys(x, w_q, w_kv_a, w_kv_b, k_cache, v_cache):
    """As transformers 4 caches it."""
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    k_nope, v = expanded(c, w_kv_b)
    k, v = torch.cat([k_cache, joined(k_nope, k_pe)], 2), torch.cat([v_cache, v], 2)
    return attend(torch.cat([q_nope, q_pe], -1), k, v, is_causal=False)


@near_miss("latent_cache_expanded", lambda: (*step()[:4], rand(B, N, H, P + R), rand(B, N, H, E)))
def cache_of_expanded_keys_in_place(x, w_q, w_kv_a, w_kv_b, k_cache, v_cache):
    """DeepSeek's inference code, naive."""
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    k_nope, v = expanded(c, w_kv_b)
    k_cache[:, 30:31] = joined(k_nope, k_pe).transpose(1, 2)
    v_cache[:, 30:31] = v.transpose(1, 2)
    q = torch.cat([q_nope, q_pe], -1)
    scores = torch.einsum("bhsd,bthd->bhst", q, k_cache[:, :31]) * SCALE
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v_cache[:, :31])


@near_miss("latent_cache_expanded", lambda: (*step()[:4], rand(B, H, N, P + R), rand(B, H, N, E), torch.tensor([9])))
def static_cache_of_expanded_keys(x, w_q, w_kv_a, w_kv_b, k_cache, v_cache, position):
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    k_nope, v = expanded(c, w_kv_b)
    k_cache.index_copy_(2, position, joined(k_nope, k_pe))
    v_cache.index_copy_(2, position, v)
    return attend(torch.cat([q_nope, q_pe], -1), k_cache, v_cache, is_causal=False)


# --- absorbed ---


@near_miss("latent_training", two_caches, trains=True)
def absorbed_training(q_latent, q_pe, c, k_pe):
    scores = torch.einsum("bhmc,bnc->bhmn", q_latent, c) + torch.einsum("bhmr,bnr->bhmn", q_pe, k_pe)
    return torch.einsum("bhmn,bnc->bhmc", (scores * SCALE).softmax(-1), c)


@near_miss("latent_pe_per_head", lambda: (*two_caches()[:3], rand(B, H, N, R)))
def absorbed_rotary_key_per_head(q_latent, q_pe, c, k_pe):
    scores = torch.einsum("bhmc,bnc->bhmn", q_latent, c) + torch.einsum("bhmr,bhnr->bhmn", q_pe, k_pe)
    return torch.einsum("bhmn,bnc->bhmc", (scores * SCALE).softmax(-1), c)


@near_miss(None, lambda: (*two_caches(), rand(B, N, C)))
def absorbed_values_from_elsewhere(q_latent, q_pe, c, k_pe, v):
    scores = torch.einsum("bhmc,bnc->bhmn", q_latent, c) + torch.einsum("bhmr,bnr->bhmn", q_pe, k_pe)
    return torch.einsum("bhmn,bnc->bhmc", (scores * SCALE).softmax(-1), v)


@near_miss("latent_not_linear", two_caches)
def absorbed_values_scaled_after_they_are_repeated(q_latent, q_pe, c, k_pe):
    scores = torch.einsum("bhmc,bnc->bhmn", q_latent, c) + torch.einsum("bhmr,bnr->bhmn", q_pe, k_pe)
    return (scores * SCALE).softmax(-1) @ (c[:, None].expand(-1, H, -1, -1) * 0.5)


@near_miss(None, two_caches)
def absorbed_values_of_other_rows(q_latent, q_pe, c, k_pe):
    scores = torch.einsum("bhmc,bnc->bhmn", q_latent, c) + torch.einsum("bhmr,bnr->bhmn", q_pe, k_pe)
    return torch.einsum("bhmn,bnc->bhmc", (scores * SCALE).softmax(-1), c.flip(1))


@near_miss(None, lambda: (*two_caches()[:2], rand(B, N + 3, C), two_caches()[3]))
def absorbed_values_of_shifted_rows(q_latent, q_pe, cache, k_pe):
    """Both are ranges of one cache, but not the same rows."""
    scores = torch.einsum("bhmc,bnc->bhmn", q_latent, cache[:, :N]) + torch.einsum("bhmr,bnr->bhmn", q_pe, k_pe)
    return torch.einsum("bhmn,bnc->bhmc", (scores * SCALE).softmax(-1), cache[:, 3:])


@near_miss(None, lambda: (rand(B, H, M, 8), rand(B, 8, 8)))
def absorbed_values_transposed(q, c):
    """kv_len is the rank: only the labels tell rows from columns."""
    return torch.einsum("bhmn,bcn->bhmc", torch.einsum("bhmc,bnc->bhmn", q, c).softmax(-1), c)


# --- ordinary attention ---


@near_miss(None, lambda: (rand(B, M, X), w(H * P, X), w(H * (P + E), C), rand(B, M, C)))
def prefill_without_a_rotary_half(x, w_q, w_kv_b, c):
    """The prefill form of it is plain attention."""
    q = F.linear(x, w_q).view(B, M, H, P).transpose(1, 2)
    return attend(q, *expanded(c, w_kv_b))


@near_miss(None, lambda: (rand(B, 1, 12), rand(B, N, 12), w(H * 4, 12), w(2 * H * 4, 12)), trains=True)
def multi_head_attention(x, states, w_q, w_kv):
    """Keys and values are linear maps of hidden states, which are no smaller than they are."""
    q = F.linear(x, w_q).view(B, 1, H, 4).transpose(1, 2)
    k, v = F.linear(states, w_kv).view(B, N, 2, H, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return attend(q, k, v, is_causal=False)


@near_miss(None, lambda: (rand(B, M, X), w(H * 4, X), w(4, X), w(4, X)))
def multi_query_attention(x, w_q, w_k, w_v):
    q = rotated(F.linear(x, w_q).view(B, M, H, 4).transpose(1, 2))
    k, v = rotated(F.linear(x, w_k)), F.linear(x, w_v)
    return attend(q, k[:, None], v[:, None])


# --- features that the MLA ops do not take ---


def featured(x, w_q, w_kv_a, w_kv_b, change, drop=0.0):
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    k_nope, v = expanded(c, w_kv_b)
    scores = change(torch.cat([q_nope, q_pe], -1) @ joined(k_nope, k_pe).mT * SCALE)
    return F.dropout(scores.softmax(-1), drop) @ v


@near_miss("latent_attn_bias", lambda: (*prefill(), rand(H, M, M)), trains=True)
def with_a_bias(x, w_q, w_kv_a, w_kv_b, bias):
    return featured(x, w_q, w_kv_a, w_kv_b, lambda scores: causal(scores + bias))


@near_miss("latent_soft_cap", trains=True)
def with_a_soft_cap(x, w_q, w_kv_a, w_kv_b):
    return featured(x, w_q, w_kv_a, w_kv_b, lambda scores: causal(5.0 * torch.tanh(scores / 5.0)))


@near_miss("latent_segment_ids", lambda: (*prefill(), torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0] * 4 + [1] * 3])))
def with_packed_documents(x, w_q, w_kv_a, w_kv_b, ids):
    same = (ids[:, :, None] == ids[:, None])[:, None]
    return featured(x, w_q, w_kv_a, w_kv_b, lambda scores: scores.masked_fill(~same, -1e30))


@near_miss("latent_attn_mask", lambda: (*prefill(), torch.rand(B, 1, M, M) > 0.3))
def with_an_opaque_mask(x, w_q, w_kv_a, w_kv_b, keep):
    return featured(x, w_q, w_kv_a, w_kv_b, lambda scores: scores.masked_fill(~keep, -1e30))


@near_miss("latent_sinks", lambda: (*prefill(), rand(H)))
def with_sinks(x, w_q, w_kv_a, w_kv_b, sinks):
    (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
    k_nope, v = expanded(c, w_kv_b)
    scores = causal(torch.cat([q_nope, q_pe], -1) @ joined(k_nope, k_pe).mT * SCALE)
    scores = torch.cat([scores, sinks[:, None, None].expand(B, H, M, 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v


@near_miss("latent_tensor_scale", lambda: (*prefill(), rand(M, 1).abs() + 0.5))
def with_a_scale_per_query(x, w_q, w_kv_a, w_kv_b, factor):
    return featured(x, w_q, w_kv_a, w_kv_b, lambda scores: causal(scores * factor))


def with_dropout(x, w_q, w_kv_a, w_kv_b):
    """Random, so it is not among the rest."""
    return featured(x, w_q, w_kv_a, w_kv_b, causal, drop=0.3)


@near_miss("latent_detached", step, trains=True)
def detached_expansion(x, w_q, w_kv_a, w_kv_b, c, k_pe):
    with torch.no_grad():
        k_nope, v = expanded(c, w_kv_b)
    q_nope, q_pe = queries(x, w_q)
    return attend(torch.cat([q_nope, q_pe], -1), joined(k_nope, k_pe), v, is_causal=False)
