"""Equal sites are recognised once, with what recognition in full finds; what only looks equal is recognised in full."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from again_harness import Both, layers
from look_alikes import LOOK_ALIKES, LookAlike
from recorder import Recorder
from spellings import SPELLINGS, Spelling, inputs_of

import rocm_attn_compile
from rocm_attn_compile import pipeline
from rocm_attn_compile.capture.questions import Questions
from rocm_attn_compile.recognize.pairing import Pairing, look_of

B, H, M, D = 2, 3, 13, 8


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=lambda s: s.name)
def test_three_layers_of_a_spelling(spelling: Spelling):
    both = Both()
    arguments = [tuple(inputs_of(spelling, torch.float32, torch.float32, spelling.trains)) for _ in range(3)]
    torch.compile(layers(*[spelling.function] * 3), backend=both, fullgraph=True)(*arguments)
    assert both.counts["equal"] == 2 * both.counts["in_full"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=lambda s: s.name)
def test_three_layers_of_a_spelling_with_symbolic_sizes(spelling: Spelling):
    both = Both()
    arguments = [tuple(inputs_of(spelling, torch.float32, torch.float32, False)) for _ in range(3)]
    torch.compile(layers(*[spelling.function] * 3), backend=both, fullgraph=True, dynamic=True)(*arguments)
    assert both.counts["equal"] == 2 * both.counts["in_full"] > 0


@pytest.mark.parametrize("look_alike", LOOK_ALIKES.values(), ids=lambda x: x.name)
def test_three_look_alikes(look_alike: LookAlike):
    both = Both()
    torch.compile(layers(*[look_alike.function] * 3), backend=both, fullgraph=True)(
        *[look_alike.make() for _ in range(3)]
    )
    assert set(both.codes) == ({look_alike.code} if look_alike.code else set())


# --- what differs in one thing ---


def rand(*shape: int, **kwargs) -> torch.Tensor:
    return torch.randn(*shape, **kwargs)


def attend(x, scale=0.3, keep=None, dim=-1, after=lambda p: p):
    x = x.sin()  # as in a model, where q, k, v are results of something
    scores = x @ x.mT * scale
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)
    return after(scores.softmax(dim)) @ x


def causal(window=M):
    i, j = torch.arange(M)[:, None], torch.arange(M)[None, :]
    return (j <= i) & (i - j < window)


def scales(x, y):
    return attend(attend(attend(x), 0.4))


def minus_zero(x, y):
    """0.0 and -0.0 are equal to Python, and to an attention; -0.0 is still not taken for 0.0."""
    return [(x @ x.mT * 0.3 + shift).softmax(-1) @ x for shift in (0.0, -0.0, 0.0)]


def windows(x, y):
    """Gemma 2 and its kin: layers take turns."""
    near, all_before = causal(5), causal()
    for keep in (near, all_before, near, all_before):
        x = attend(x, keep=keep)
    return x


def own_windows(x, y):
    for window in (5, M, 5, M):
        x = attend(x, keep=causal(window))
    return x


def fills(x, y):
    return [(x @ x.mT).masked_fill(~causal(), fill).softmax(-1) @ x for fill in (-math.inf, -1e4, -1e9, -math.inf)]


def dtypes(x, y):
    return attend(attend(x).to(torch.bfloat16)).float()


def head_counts(x, y):
    y = attend(x).transpose(1, 2).reshape(B, M, 2, -1).transpose(1, 2)
    return attend(y)


def strides(x, y):
    return attend(x), attend(x.mT.contiguous().mT)


def softmax_axes(x, y):
    return attend(x), attend(x, dim=-2), attend(x)


def weights_read_twice(x, y):
    seen = []
    out = attend(attend(x, after=lambda p: (seen.append(p.sum()), p)[1]))
    return out, seen


def weights_returned_by_two(x, y):
    seen = []
    out = attend(attend(attend(x, after=lambda p: (seen.append(p), p)[1]), after=lambda p: (seen.append(p), p)[1]))
    return out, seen


def scores_read_by_one(x, y):
    scores = x @ x.mT
    first = scores.softmax(-1) @ x
    return first, scores.amax(), (first @ first.mT).softmax(-1) @ first


def keys_swapped(x, y):
    """Each reads two tensors in other places, or one of them only."""
    x, y = x.sin().cos(), (x + y).sin().cos()
    return [(a @ b.mT).softmax(-1) @ c for a, b, c in ((x, y, y), (y, x, x), (x, x, x), (x, y, x))]


def written_in_between(x, y):
    cache = y.clone()
    out = []
    for i in range(3):
        out.append((x @ cache.mT).softmax(-1) @ cache)
        if i == 1:
            cache[:, :, 2] = 1.0
    return out


def mask_written_in_between(x, y):
    keep = causal()
    out = [attend(x, keep=keep)]
    keep[:, 1] = False
    return [*out, attend(x, keep=keep), attend(x, keep=keep)]


def no_grad_inside(x, y):
    out = attend(x)
    with torch.no_grad():
        detached = attend(x)
    return out, detached, attend(x)


def gradients_of_one(x, y):
    return attend(x), attend(y), attend(x.detach())


def dropouts(x, y):
    return [attend(x, after=lambda p, rate=rate: F.dropout(p, rate)) for rate in (0.0, 0.5, 0.5, 0.1)]


def biases(x, y):
    """A mask in closed form, and a tensor of the same look of which nothing is known."""
    closed = torch.zeros(M, M).masked_fill(~causal(), -math.inf)
    return [(x @ x.mT + bias).softmax(-1) @ x for bias in (closed, y[0, 0, :, :1] * y[0, 1, :, :1].mT, closed)]


def own_padding(x, y):
    """Equal but for what the mask reads: the proof is translated, too."""
    y = y.sin()
    for _ in range(3):
        y = y.sin()
        x = attend(x, keep=((y[:, 0, :, 0] > 0.1) | (torch.arange(M) == 0))[:, None, None, :])
    return x


def own_documents(x, y):
    y = y.sin()
    for _ in range(3):
        y = y.sin()
        ids = (y[:, 0, :, 0] * 3).long()
        x = attend(x, keep=(ids[:, None, :, None] == ids[:, None, None, :]) & causal())
    return x


def sdpa_and_by_hand(x, y):
    return attend(x), F.scaled_dot_product_attention(x, x, x), F.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.mark.parametrize(
    ("function", "in_full", "of"),
    [
        (scales, 2, 3),
        (minus_zero, 2, 3),
        (windows, 2, 4),
        (own_windows, 2, 4),
        (fills, 3, 4),
        (dtypes, 2, 2),
        (head_counts, 2, 2),
        (strides, 2, 2),
        (softmax_axes, 2, 3),
        (weights_read_twice, 2, 2),
        (weights_returned_by_two, 3, 3),
        (scores_read_by_one, 2, 2),
        (keys_swapped, 4, 4),
        (written_in_between, 2, 3),
        (mask_written_in_between, 2, 3),
        (no_grad_inside, 2, 3),
        (gradients_of_one, 2, 3),
        (dropouts, 3, 4),
        (biases, 2, 3),
        (own_padding, 1, 3),
        (own_documents, 1, 3),
        (sdpa_and_by_hand, 3, 3),
    ],
)
def test_what_differs_is_recognised_in_full(function: Callable, in_full: int, of: int):
    x, y = rand(B, H, M, D, requires_grad=True), rand(B, H, M, D)
    both = Both()
    torch.compile(function, backend=both, fullgraph=True)(x, y)
    assert (both.counts["in_full"], len(both.found)) == (in_full, of)
    if function is dropouts:
        return
    torch._dynamo.reset()
    recorder = Recorder(lowering="aot_eager")
    actual = torch.compile(function, backend=recorder, fullgraph=True)(x, y)
    torch.testing.assert_close(actual, function(x, y), rtol=2e-2, atol=2e-2)
    (report,) = rocm_attn_compile.reports()
    assert report.recognized == {"in_full": in_full, "equal": of - in_full}
    assert recorder.calls == sum(site.replaced for site in report.sites) > 0


# --- how much is asked, and how often ---


def gpt(x, count):
    for _ in range(count):
        x = F.gelu(attend(x, keep=causal())) + x
    return x


@pytest.mark.parametrize("count", [3, 12])
def test_equal_layers_are_recognised_once(count):
    torch.compile(gpt, backend=Recorder(lowering="eager"), fullgraph=True)(rand(B, H, M, D), count)
    (report,) = rocm_attn_compile.reports()
    assert report.recognized == {"in_full": 1, "equal": count - 1}
    assert f"recognized in full: 1; equal to one of these: {count - 1}" in str(report)


def test_a_site_is_asked_about_itself_and_not_about_the_layers_below(monkeypatch):
    """Each layer has another scale, so that each is recognised in full: none is asked more than the first."""
    asked: list[int] = []

    class Counting(pipeline.Sites):
        def _remember(self, site):
            asked.append(len(site.record.answers))

    monkeypatch.setattr(pipeline, "Sites", Counting)

    def model(x):
        for i in range(8):
            x = F.gelu(attend(x, 0.1 * (i + 1), causal())) + x
        return x

    torch.compile(model, backend=Recorder(lowering="eager"), fullgraph=True)(rand(B, H, M, D))
    assert len(asked) == 8
    assert max(asked) <= asked[0] + 1  # whether its mask is one that is proved already


def test_checkpointed_layers_are_equal_too():
    """Each is a graph of its own inside the graph."""
    from torch.utils.checkpoint import checkpoint

    def model(x):
        for _ in range(3):
            x = checkpoint(lambda x: attend(x, keep=causal()), x, use_reentrant=False)
        return x

    torch.compile(model, backend=Recorder(), fullgraph=True)(rand(B, H, M, D, requires_grad=True))
    (report,) = rocm_attn_compile.reports()
    assert [site.replaced for site in report.sites] == [True] * 3
    assert report.recognized == {"in_full": 1, "equal": 2}


def without_times(report: rocm_attn_compile.report.Report) -> dict:
    return {k: v for k, v in report.to_dict().items() if k not in ("graph", "timings", "recognized")}


@pytest.mark.parametrize("function", [windows, weights_returned_by_two, sdpa_and_by_hand, biases])
def test_the_report_is_that_of_recognition_in_full(function, monkeypatch):
    x, y = rand(B, H, M, D), rand(B, H, M, D)
    torch.compile(function, backend=Recorder(lowering="eager"), fullgraph=True)(x, y)
    torch._dynamo.reset()
    monkeypatch.setattr(pipeline, "Sites", lambda: None)
    torch.compile(function, backend=Recorder(lowering="eager"), fullgraph=True)(x, y)
    once, each = rocm_attn_compile.reports()
    assert each.recognized["equal"] == 0
    assert without_times(once) == without_times(each)


# --- the parts ---


def pairing() -> Pairing:
    return Pairing(look_of)


def test_answers_fit_only_what_is_the_same():
    nan = float("nan")
    same = [(0.5, 0.5), (nan, nan), ([1, (None, "a")], [1, (None, "a")]), (torch.float32, torch.float32)]
    same += [({"a": 1}, {"a": 1}), (torch.device("cpu"), torch.device("cpu"))]
    different = [(0.0, -0.0), (1, 1.0), (1, True), ([1], (1,)), ([1], [1, 2]), ({"a": 1}, {"b": 1}), (None, False)]
    different += [(torch.float32, torch.float64), (object(), object())]
    assert all(pairing().fits(*pair) for pair in same)
    assert not any(pairing().fits(*pair) for pair in different)


def test_what_is_asked_inside_is_asked_outside_too():
    questions, log = Questions(), []

    def ask(reader, x):
        log.append(x)
        return x + 1

    with questions.recorded() as outer:
        with questions.recorded() as inner:
            assert questions.ask(ask, None, 1) == questions.ask(ask, None, 1) == 2
        with questions.unrecorded():
            questions.ask(ask, None, 5)
        questions.ask(ask, None, 1)
    assert list(inner.answers.values()) == list(outer.answers.values()) == [2]
    assert log == [1, 5]
    assert questions.record is None
