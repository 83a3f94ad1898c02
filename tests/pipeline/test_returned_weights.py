"""Weights that something else than the product with V reads are a second result of the op, where nothing is trained."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pipeline_harness import INF, SCALE, B, D, H, M, N, Pipeline, check, codes, qkv, rand, reports, sites, square
from torch import nn

from rocm_attn_compile.testing import count_calls

OP = "rocm_attn.attention_with_weights"


def weights(q, k):
    return (q @ k.mT * SCALE).softmax(-1)


# --- who reads them ---


def returned(q, k, v):
    p = weights(q, k)
    return p @ v, p


def averaged_over_heads(q, k, v):
    p = weights(q, k)
    return p @ v, p.mean(1)


def averaged_before_the_product(q, k, v):
    p = weights(q, k)
    mean = p.mean(1)
    return p @ v, mean


def entropy(q, k, v):
    p = weights(q, k)
    return p @ v, -(p * p.log()).sum(-1)


def as_huggingface(q, k, v):
    p = F.softmax(q @ k.mT * SCALE, dim=-1, dtype=torch.float32).to(q.dtype)
    p = F.dropout(p, p=0.1, training=False)
    return (p @ v).transpose(1, 2).contiguous(), p


def before_the_cast(q, k, v):
    p = F.softmax(q @ k.mT * SCALE, dim=-1, dtype=torch.float32)
    return p.to(q.dtype) @ v, p


def as_bart(q, k, v):
    flat = [t.reshape(-1, *t.shape[2:]) for t in (q, k, v)]
    p = torch.bmm(flat[0] * SCALE, flat[1].mT).softmax(-1)
    shown = p.view(*q.shape[:3], -1)
    p = shown.view(-1, *p.shape[1:])
    return torch.bmm(p, flat[2]).view(*q.shape[:3], -1), shown


def by_hand(q, k, v):
    s = q @ k.mT * SCALE
    e = (s - s.amax(-1, keepdim=True)).exp()
    p = e / e.sum(-1, keepdim=True)
    return p @ v, p


def heads_last(q, k, v):
    p = torch.einsum("bhmd,bhnd->bmnh", q, k).mul(SCALE).softmax(2)
    return torch.einsum("bmnh,bhne->bmhe", p, v), p


def detached_and_kept(q, k, v):
    p = weights(q, k)
    return p @ v, p.detach().amax(-1)


def rolled_out(q, k, v):
    p = weights(q, k)
    return p @ v, p.mean(1).mT @ p.mean(1)


# --- what is written to afterwards ---


def scaled_in_place(q, k, v):
    p = weights(q, k)
    out = p @ v
    p.mul_(2.0)
    return out, p


def written_through_a_view(q, k, v):
    p = weights(q, k)
    view = p[0]
    out = p @ v
    view.zero_()
    return out, p, view


def zeroed_after_use(q, k, v):
    p = weights(q, k)
    out = p @ v
    p.zero_()
    return out, p


def masked_in_place(q, k, v):
    p = (q @ k.mT).masked_fill(EVEN, -INF).softmax(-1)
    p.masked_fill_(EVEN, 0.0)
    return p @ v, p


EVEN = torch.arange(N) % 2 == 0


@pytest.mark.parametrize(
    "function",
    [
        *(returned, averaged_over_heads, averaged_before_the_product, entropy, as_huggingface, before_the_cast),
        *(as_bart, by_hand, heads_last, detached_and_kept, rolled_out, scaled_in_place, written_through_a_view),
        zeroed_after_use,
    ],
)
def test_readers(function):
    pipeline = check(function, calls=1)
    assert count_calls(pipeline.graphs[0])[OP] == 1
    assert count_calls(pipeline.graphs[0]).keys().isdisjoint(["softmax", ".softmax", ".matmul", "_operator.matmul"])


@pytest.mark.parametrize("function", [returned, averaged_before_the_product, as_bart])
def test_sizes_that_are_symbols(function):
    check(function, calls=1, dynamic=True)


@pytest.mark.parametrize("function", [as_huggingface, before_the_cast])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(function, dtype):
    def make():
        return tuple(t.to(torch.float64 if torch.get_default_dtype() == torch.float64 else dtype) for t in qkv())

    check(function, make, calls=1)


def test_under_autocast():
    check(returned, calls=1, around=lambda: torch.autocast("cpu", torch.bfloat16))


def test_no_grad_and_parameters():
    layer = nn.Linear(D, D)

    def function(q, k, v):
        with torch.no_grad():
            return returned(layer(q), layer(k), v)

    with torch.no_grad():
        check(lambda q, k, v: returned(q * 2, k, v), calls=1)
    layer.double()  # the harness runs it in float64, too
    check(function, lambda: tuple(t.double() for t in qkv()), calls=1)


# --- masks, biases and the like ---


def with_scores(change, normalise=lambda p: p):
    def function(q, k, v, *more):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        p = normalise(change(q @ k.mT * SCALE, *more).softmax(-1))
        return p @ v, p

    return function


def causal_mask(s):
    return torch.ones(s.shape[-2:], dtype=torch.bool).tril()


def alibi(s):
    distance = (torch.arange(M)[:, None] - torch.arange(M)).abs()
    return s - distance * torch.tensor([0.5, 0.25, 0.125], dtype=s.dtype)[:, None, None]


def window(s):
    offset = torch.arange(M)[:, None] - torch.arange(M)
    return s.masked_fill((offset < 0) | (offset > 2), -INF)


def padding():
    return torch.tensor([[1] * M, [0] * 3 + [1] * (M - 3)]).bool()[:, None, None]


def lowest(s):
    return torch.finfo(s.dtype).min


MASKS = {
    "causal": (with_scores(lambda s: s.masked_fill(~causal_mask(s), -INF)), square),
    "window": (with_scores(window), square),
    "cap": (with_scores(lambda s: 2.0 * torch.tanh(s / 2.0)), square),
    "alibi": (with_scores(alibi), square),
    "bias": (with_scores(lambda s, bias: s + bias), lambda: (*square(), rand(1, H, M, M))),
    "padding": (with_scores(lambda s, keep: s.masked_fill(~keep, lowest(s))), lambda: (*square(), padding())),
    "added_padding": (with_scores(lambda s, keep: s + (~keep) * lowest(s)), lambda: (*square(), padding())),
    "groups": (
        with_scores(lambda s: s.masked_fill(~causal_mask(s), -INF)),
        lambda: (rand(B, 6, M, D), rand(B, 2, M, D), rand(B, 2, M, D)),
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_and_biases(name):
    function, make = MASKS[name]
    check(function, make, calls=1)
    check(function, make, calls=1, verify=True)


def no_keys():
    """The second sequence keeps none; beside it left padding."""
    return torch.tensor([[1] * M, [0] * M]).bool()[:, None, None]


def zeroed(p):
    return p.nan_to_num(0.0)


EMPTY = {
    "nan": (lambda s, keep: s.masked_fill(~keep, -INF), lambda p: p),
    "nan_added": (lambda s, keep: s + torch.where(keep, 0.0, -INF).to(s.dtype), lambda p: p),
    "zero": (lambda s, keep: s.masked_fill(~keep, -INF), zeroed),
    "mean": (lambda s, keep: s.masked_fill(~keep, lowest(s)), lambda p: p),
    "mean_added": (lambda s, keep: s + torch.where(keep, 0.0, lowest(s)).to(s.dtype), lambda p: p),
}


@pytest.mark.parametrize("name", EMPTY)
def test_rows_without_a_key(name):
    check(with_scores(*EMPTY[name]), lambda: (*square(), no_keys()), calls=1)


def test_weights_that_are_zeroed_only_on_the_way_to_v():
    def function(q, k, v, keep):
        p = (q @ k.mT).masked_fill(~keep, -INF).softmax(-1)
        return p.nan_to_num(0.0) @ v, p

    check(function, lambda: (*square(), no_keys()), calls=1)
    assert sites()[0].data["returned_weights"] == "nan"
    assert sites()[0].data["mask"]["empty_rows"] == "zero"


def test_sinks_that_are_cut_off():
    def function(q, k, v, sinks):
        s = torch.cat([q @ k.mT, sinks.view(1, H, 1, 1).expand(B, H, M, 1)], -1)
        p = s.softmax(-1)[..., :-1]
        return p @ v, p

    check(function, lambda: (*square(), rand(H)), calls=1)


def test_scores_raised_to_a_floor():
    def function(q, k, v):
        s = q @ k.mT
        p = (s - s.max()).clamp(min=-50000).softmax(-1)
        return p @ v, p

    check(function, calls=1)
    assert sites()[0].data["score_floor"] == -50000


def test_layers_that_are_equal_are_recognised_once():
    def function(q, k, v):
        kept = []
        for _ in range(4):
            p = weights(q, k)
            q = p @ v
            kept.append(p)
        return q, *kept

    check(function, square, calls=4)
    assert reports()[0].recognized["equal"] == 2


def test_the_report_says_so():
    check(returned, calls=1)
    assert "with its weights as a second result" in sites()[0].spec
    assert sites()[0].data["returned_weights"] == "impossible"


def test_compiled_by_inductor():
    check(as_huggingface, square, calls=1, lowering="inductor")


# --- what is refused ---


def used_at_two_places(q, k, v):
    p = F.softmax(q @ k.mT * SCALE, dim=-1, dtype=torch.float64)
    narrow = p.to(q.dtype)
    return narrow @ v, p, narrow


def two_values(q, k, v):
    p = weights(q, k)
    return p @ v + p @ (v * 2)


def values_made_of_them(q, k, v):
    p = weights(q, k)
    return p @ (v * p.mean())


def changed_in_place_between(q, k, v):
    p = (q @ k.mT).masked_fill(EVEN, -INF).softmax(-1)
    mean = p.mean(1)
    p.masked_fill_(EVEN, 0.0)
    return p @ v, mean


def dropped_afterwards(q, k, v):
    p = weights(q, k)
    return F.dropout(p, 0.5, training=True) @ v, p


def dropped_before(q, k, v):
    p = F.dropout(weights(q, k), 0.5, training=True)
    return p @ v, p


def straight_through(q, k, v):
    soft = weights(q, k)
    hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
    return (hard - soft.detach() + soft) @ v


@pytest.mark.parametrize(
    "function",
    [
        *(used_at_two_places, two_values, values_made_of_them, changed_in_place_between, straight_through),
        masked_in_place,
    ],
)
def test_left_alone(function):
    check(function, calls=0, refused="weights_used_elsewhere")


@pytest.mark.parametrize("function", [dropped_afterwards, dropped_before])
def test_dropout_is_left_alone(function):
    pipeline = Pipeline()
    torch.compile(function, backend=pipeline)(*qkv())
    assert (pipeline.calls, codes()) == (0, {"weights_used_elsewhere"})


@pytest.mark.parametrize("function", [returned, averaged_over_heads, as_bart])
def test_left_alone_in_training(function):
    check(function, calls=0, refused="weights_used_elsewhere", trains=True)


def test_with_the_column_of_the_sinks():
    def function(q, k, v, sinks):
        p = torch.cat([q @ k.mT, sinks.view(1, H, 1, 1).expand(B, H, M, 1)], -1).softmax(-1)
        return p[..., :-1] @ v, p

    check(function, lambda: (*square(), rand(H)), calls=0, refused="weights_used_elsewhere")


def test_without_the_sinks_that_rescale_the_result():
    def function(q, k, v, sinks):
        s = q @ k.mT
        p = s.softmax(-1)
        return (p @ v) * (s.logsumexp(-1) - sinks.view(1, -1, 1)).sigmoid().unsqueeze(-1), p

    check(function, lambda: (*square(), rand(H)), calls=0, refused="weights_used_elsewhere")


def test_verify_looks_at_the_weights(monkeypatch):
    from rocm_attn_compile.ops import returned_weights

    right = returned_weights.unfused
    monkeypatch.setattr(returned_weights, "unfused", lambda call: (right(call)[0], right(call)[1] * 1.001))
    check(returned, calls=0, refused="verify_failed", verify=True)
