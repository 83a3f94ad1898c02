"""Memory: writes before, between and after the parts of an attention, shared storage, the layout of the result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pipeline_harness import INF, SCALE, B, D, H, M, N, Pipeline, attend, check, qkv, rand, reports, square

from rocm_attn_compile.testing import count_calls

CACHE_LEN = 12


def weights(q, k):
    return (q @ k.mT * SCALE).softmax(-1)


# --- written while the attention is under way ---


def large_qkv():
    """q, k and v too large to be copied for the sake of a rewrite."""
    return rand(2, 4, 128, 96), rand(2, 4, 160, 96), rand(2, 4, 160, 96)


def query_after_scores(q, k, v):
    p = weights(q, k)
    q.add_(1.0)
    return p @ v


def key_after_scores(q, k, v):
    p = weights(q, k)
    k.zero_()
    return p @ v


@pytest.mark.parametrize("function", [query_after_scores, key_after_scores])
def test_operand_overwritten_before_the_result(function):
    check(function, calls=1)  # a small one is copied in time
    check(function, large_qkv, calls=0, refused="value_unavailable")


def operands_scaled_in_place(q, k, v):
    """OpenFold and Google's Gemma write `q *= scale`: what q was before is gone, and is not needed."""
    q, k, v = q + 1.0, k + 1.0, v + 1.0
    q *= SCALE
    k.mul_(0.5)
    v.div_(3.0)
    return (q @ k.mT).softmax(-1) @ v


def test_large_operands_scaled_in_place():
    check(operands_scaled_in_place, large_qkv, calls=1)
    check(operands_scaled_in_place, large_qkv, calls=1, trains=True)


def inputs_scaled_in_place_between_two_attentions(q, k, v):
    q.mul_(SCALE)
    first = (q @ k.mT).softmax(-1) @ v
    q.mul_(2.0)
    return first, (q @ k.mT).softmax(-1) @ v


def test_inputs_scaled_in_place_between_two_attentions():
    check(inputs_scaled_in_place_between_two_attentions, large_qkv, calls=2)


def value_before_product(q, k, v):
    p = weights(q, k)
    v.mul_(2.0)
    return p @ v


def local_query_after_scores(q, k, v):
    q = q * 1.0
    p = weights(q, k)
    q.add_(1.0)
    return p @ v + q


def bias_after_scores(q, k, v):
    bias = q[..., :1].clone()
    p = (q @ k.mT * SCALE + bias).softmax(-1)
    bias.zero_()
    return p @ v + bias


def mask_after_scores(q, k, v):
    drop = torch.ones(M, N, dtype=torch.bool).triu(1)
    p = (q @ k.mT * SCALE).masked_fill(drop, -INF).softmax(-1)
    drop.fill_(False)
    return p @ v, drop.sum()


def halves_of_one_cache_assigned_one_after_the_other(q, k, v):
    """No node gives what a slice assignment writes: the view itself holds it."""
    cache = torch.stack([k, v], 1)
    keys, values = cache.select(1, 0), cache.select(1, 1)
    places = torch.tensor([4, 2])
    keys[:, :, places] = v[:, :, :2]
    values[:, :, places] = k[:, :, :2]
    return weights(q, keys) @ values


def result_copied_into_an_input(q, k, v):
    buffer = q
    buffer[:, :, 1:] = (weights(q, k) @ v)[:, :, 1:]
    return buffer.sum()


@pytest.mark.parametrize(
    "function",
    [
        value_before_product,
        local_query_after_scores,
        bias_after_scores,
        mask_after_scores,
        halves_of_one_cache_assigned_one_after_the_other,
        result_copied_into_an_input,
    ],
)
def test_writes_that_need_not_stop_the_rewrite(function):
    check(function, calls=1)


def scores_after_softmax(q, k, v):
    s = q @ k.mT
    p = s.softmax(-1)
    s.zero_()
    return p @ v + s.sum()


def weights_scaled_in_place(q, k, v):
    p = weights(q, k)
    p.mul_(2.0)
    return p @ v


def weights_partly_zeroed(q, k, v):
    p = weights(q, k)
    p[..., 0] = 0.0
    return p @ v


def weights_zeroed_after_use(q, k, v):
    p = weights(q, k)
    out = p @ v
    p.zero_()
    return out


def result_written(q, k, v):
    out = weights(q, k) @ v
    first = out[0]
    out.mul_(2.0)
    return out, first


def result_into_given_memory(q, k, v):
    return torch.matmul(weights(q, k), v, out=torch.empty_like(q))


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (scores_after_softmax, "scores_used_elsewhere"),
        (weights_scaled_in_place, "weights_changed"),
        (weights_partly_zeroed, "weights_used_elsewhere"),
        (result_into_given_memory, "output_hidden"),
    ],
)
def test_writes_that_stop_the_rewrite(function, code):
    check(function, calls=0, refused=code)


def test_weights_zeroed_after_use():
    check(weights_zeroed_after_use, calls=1)  # the op's own, which nobody reads any more


@pytest.mark.parametrize("trains", [False, True])
def test_a_result_that_is_written_and_seen_through_a_view(trains):
    check(result_written, calls=1, trains=trains)


def scores_in_place(q, k, v):
    s = q @ k.mT
    s *= SCALE
    s.masked_fill_(torch.ones(M, N, dtype=torch.bool).triu(1), -INF)
    return s.softmax(-1) @ v


@pytest.mark.parametrize("trains", [False, True])
def test_scores_written_in_place_are_followed(trains):
    pipeline = check(scores_in_place, calls=1, trains=trains)
    (graph,) = pipeline.graphs
    assert not [node for node in graph.graph.nodes if node.target == "masked_fill_"], "dead writes go with the site"


# --- writes that stay alive ---


def mask_filled_in_place(q, k, v):
    mask = torch.zeros(M, N)
    mask.masked_fill_(torch.ones(M, N, dtype=torch.bool).triu(1), -INF)
    return (q @ k.mT * SCALE + mask).softmax(-1) @ v, mask


def mask_assigned_by_slices(q, k, v):
    mask = torch.zeros(M, N)
    mask[:, N // 2 :] = -INF
    mask[M // 2 :, N // 2 :] = 0.0
    return (q @ k.mT * SCALE + mask).softmax(-1) @ v, mask


def static_cache(q, k, v, keys, values, position):
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v)
    return attend(q, keys, values, torch.arange(CACHE_LEN)[None] <= position[:, None])


def cache_written_after(q, k, v, keys, values, position):
    out = attend(q, keys, values)
    keys.index_copy_(2, position, k)
    values[:, :, 3] = v[:, :, 0]
    return out


def cache_written_between(q, k, v, keys, values, position):
    p = weights(q, keys)
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v)
    return p @ values


def token_and_cache():
    token = (rand(B, H, 1, D) for _ in range(3))
    return (*token, rand(B, H, CACHE_LEN, D), rand(B, H, CACHE_LEN, D), torch.tensor([5]))


@pytest.mark.parametrize(
    ("function", "make"),
    [
        (mask_filled_in_place, qkv),
        (mask_assigned_by_slices, qkv),
        (static_cache, token_and_cache),
        (cache_written_after, token_and_cache),
        (cache_written_between, token_and_cache),
    ],
)
def test_live_writes_stay(function, make):
    """FX's own dead-code elimination takes in-place methods for pure and would delete these."""
    check(function, make, calls=1)


# --- two inputs in one storage ---


def small_alias():
    q, k, v = qkv()
    return q, q[:], k, v


def large_alias():
    q, k, v = large_qkv()
    return q, q[:], k, v


def other_query_after_scores(base, q, k, v):
    p = weights(q, k)
    base.add_(1.0)
    return p @ v


def test_shared_storage_written_between():
    check(other_query_after_scores, small_alias, calls=1)
    check(other_query_after_scores, large_alias, calls=0, refused="value_unavailable")


def other_query_before(base, q, k, v):
    base.add_(1.0)
    return weights(q, k) @ v


def other_query_after(base, q, k, v):
    out = weights(q, k) @ v
    base.add_(1.0)
    return out


def other_value_between(base, q, k, v):
    p = weights(q, k)
    base.mul_(2.0)
    return p @ v


def alias_of_value():
    q, k, v = qkv()
    return v.view(-1), q, k, v


def other_mask_between(base, q, k, v, drop):
    s = (q @ k.mT * SCALE).masked_fill(drop, -INF)
    base.fill_(False)
    return s.softmax(-1) @ v, drop.sum()


def alias_of_mask():
    drop = torch.ones(M, N, dtype=torch.bool).triu(1)
    return drop[0], *qkv(), drop


@pytest.mark.parametrize(
    ("function", "make"),
    [
        (other_query_before, small_alias),
        (other_query_after, small_alias),
        (other_value_between, alias_of_value),
        (other_mask_between, alias_of_mask),
    ],
)
def test_shared_storage_is_followed(function, make):
    check(function, make, calls=1)


def test_inputs_that_share_storage_only_later():
    """Compiled for separate inputs, called with inputs that alias: q is still read before base is written."""
    pipeline = Pipeline()
    compiled = torch.compile(other_query_after_scores, backend=pipeline, fullgraph=True)
    compiled(rand(B, H, M, D), *qkv())
    assert pipeline.calls == 1
    torch.manual_seed(3)
    base, q, k, v = small_alias()
    want = other_query_after_scores(base.clone(), q.clone(), k, v)  # only base is written, after q was read
    torch.testing.assert_close(compiled(base, q, k, v), want)


# --- the layout of the result ---


def swapped(q, k, v):
    """Inputs that lie as (batch, length, heads, depth), as a projection makes them."""
    return tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))


def sdpa_of_swapped(q, k, v):
    return F.scaled_dot_product_attention(*swapped(q, k, v)).transpose(1, 2).view(B, M, H * D)


def joins_heads(q, k, v):
    return attend(q, k, v).view(B * H, M, D)


def both_orders(q, k, v):
    out = attend(q, k, v)
    return out.transpose(1, 2).reshape(B, M, H * D), out.view(B * H, M, D)


def transposed_product(q, k, v):
    """The VAE of Stable Diffusion: the result is (channels, position)."""
    out = torch.bmm(v.mT.flatten(0, 1), weights(q, k).mT.flatten(0, 1))
    return out.view(B, H, D, 2, M // 2)


def einsum_to_bqhd(q, k, v):
    return torch.einsum("bhqk,bhkd->bqhd", weights(q, k), v)


def plain(q, k, v):
    return attend(q, k, v)


@pytest.mark.parametrize(
    "function", [plain, joins_heads, both_orders, einsum_to_bqhd, sdpa_of_swapped, transposed_product]
)
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_views_and_strides_of_the_result_are_those_of_eager(function, dynamic):
    """`.view` needs the strides eager gives, in the graph and in whatever the caller does with the result."""
    check(function, calls=1, dynamic=dynamic)
    want = function(*qkv())
    pipeline = Pipeline("eager")
    got = torch.compile(function, backend=pipeline, dynamic=dynamic)(*qkv())
    for a, b in zip(got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,)):
        assert a.stride() == b.stride()


# --- numbers that dynamic=True turns into symbols ---


def with_scale(q, k, v, scale):
    return (q @ k.mT * scale).softmax(-1) @ v


@pytest.mark.parametrize("trains", [False, True])
def test_scale_as_a_dynamic_float(trains):
    check(with_scale, lambda: (*qkv(), 0.3), calls=1, dynamic=True, trains=trains)


def test_another_scale_compiles_again():
    pipeline = Pipeline()
    compiled = torch.compile(with_scale, backend=pipeline, dynamic=True)
    q, k, v = square()
    for scale in (0.3, 0.7, 0.3):
        torch.testing.assert_close(compiled(q, k, v, scale), with_scale(q, k, v, scale))
    assert pipeline.calls == 2
    # Dynamo gives up its first graph, with the scale as an input, when AOTAutograd makes the scale a number.
    assert [(report.graph, len(report.sites)) for report in reports()] == [("0/0", 1), ("0/1", 1)]


def test_an_attention_on_the_result_of_another_reads_that_result():
    """Behind its scale and views lies the product inside `matmul`, which no node holds: it was computed again."""

    def twice(q, k, v):
        return attend(attend(q, k, v) * 0.5, k, v)

    def twice_by_einsum(q, k, v):
        out = torch.einsum("bhmn,bhnd->bhmd", weights(q, k), v)
        return torch.einsum("bhmn,bhnd->bhmd", weights(out * 0.5, k), v)

    for function in (twice, twice_by_einsum):
        pipeline = check(function, trains=True, calls=2)
        left = count_calls(pipeline.graphs[0])
        assert not any("softmax" in name or "bmm" in name or "matmul" in name for name in left), left


def counted(q, k, v, position):
    keep = torch.arange(k.shape[2])[None, :] <= (torch.arange(q.shape[2]) + position)[:, None]
    out = (q @ k.mT * SCALE).masked_fill(~keep, -INF).softmax(-1) @ v
    position.add_(q.shape[2])
    return out


def test_a_position_that_is_counted_up_in_training():
    """AOTAutograd saves the position for the backward, makes the mask from it again, and finds it counted up."""
    found = []
    for function in (counted, torch.compile(counted, backend="rocm_attn", fullgraph=True)):
        torch.manual_seed(0)
        tensors = [torch.randn(B, H, n, D, dtype=torch.bfloat16, requires_grad=True) for n in (M, N, N)]
        position = torch.tensor(2)
        out = function(*tensors, position)
        found.append([out, *torch.autograd.grad(out, tensors, torch.ones_like(out)), position])
    for actual, expected in zip(*reversed(found)):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    (site,) = reports()[-1].sites
    assert [reason.code for reason in site.reasons] == ["mask_input_written"] and not site.replaced
    check(counted, lambda: (*qkv(), torch.tensor(2)), calls=1)  # without gradients it is replaced
