"""Rows that keep no key: result and gradients of the compiled program are eager's, NaN where eager has NaN, in float64.

Eager has four outcomes, by what is put into the scores (-inf or a finite number) and how (instead of a score, or added
to it). They differ in the gradients only by whether the scores of such a row get one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from recorder import Recorder
from torch import Tensor

import rocm_attn_compile

B, H, D = 2, 2, 4
LOWEST = torch.finfo(torch.float64).min
FILLS = [pytest.param(-math.inf, id="inf"), pytest.param(LOWEST, id="finfo_min")]
MASKED: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "masked_fill": lambda scores, keep, fill: scores.masked_fill(~keep, fill),
    "where": lambda scores, keep, fill: torch.where(keep, scores, fill),
    "added": lambda scores, keep, fill: scores + torch.zeros(keep.shape, dtype=scores.dtype).masked_fill(~keep, fill),
}
SOFTMAX: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: scores.softmax(-1),
    "shifted": lambda scores: _normalised((scores - scores.amax(-1, keepdim=True)).exp()),
    "unshifted": lambda scores: _normalised(scores.exp()),
}


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


class Mask(NamedTuple):
    """What a program makes its mask of, and how; q_len and kv_len."""

    source: Callable[[], Tensor]
    keep: Callable[[Tensor], Tensor]
    lengths: tuple[int, int] = (5, 7)


def _causal(q_len: int, kv_len: int, diagonal: int = 0) -> Tensor:
    return torch.ones(q_len, kv_len, dtype=torch.bool).tril(diagonal)


def _some_rows_empty() -> Tensor:
    """`(B, H, 5, 7)`, rows empty in one head of one batch entry only."""
    mask = torch.rand(B, H, 5, 7) < 0.6
    mask[..., 0] = True
    mask[1, 0, 1:3] = False
    return mask


MASKS = {
    "padding": Mask(lambda: torch.arange(7) < torch.tensor([[4], [0]]), lambda m: m[:, None, None, :]),
    "left_padding_causal": Mask(
        lambda: torch.arange(7) >= torch.tensor([[0], [3]]), lambda m: m[:, None, None, :] & _causal(7, 7), (7, 7)
    ),
    "band": Mask(lambda: torch.zeros(1), lambda m: _causal(7, 5, -2), (7, 5)),
    "opaque": Mask(_some_rows_empty, lambda m: m),
}


def _leaves(mask: Mask) -> list[Tensor]:
    torch.manual_seed(1)
    q_len, kv_len = mask.lengths
    shapes = ((B, H, q_len, D), (B, H, kv_len, D), (B, H, kv_len, D))
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def _run(function: Callable[..., Tensor], leaves: list[Tensor], *others: Tensor) -> tuple[Tensor, ...]:
    """The result and the gradients of all leaves."""
    out = function(*leaves, *others)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    return (out.detach(), *torch.autograd.grad(out, leaves, weight))


def _check(function: Callable[..., Tensor], leaves: list[Tensor], *others: Tensor, mode: str) -> tuple[Tensor, ...]:
    """Compare with eager (NaN included), one op of that mode; returns eager's result and gradients."""
    want = _run(function, leaves, *others)
    recorder = Recorder()
    got = _run(torch.compile(function, backend=recorder, fullgraph=True), leaves, *others)
    assert recorder.calls == 1, "\n".join(map(str, rocm_attn_compile.reports()))
    op = torch.ops.rocm_attn.attention.default
    (call,) = (node for graph in recorder.graphs for node in graph.graph.find_nodes(op="call_function", target=op))
    assert call.kwargs["empty_rows"] == mode
    torch.testing.assert_close(got, want, equal_nan=True)
    return want


def _mode(masked: str, fill: float, softmax: str) -> str:
    # Without a maximum subtracted, a row of finite fills is 0 / 0.
    value = "nan" if math.isinf(fill) or softmax == "unshifted" else "mean"
    return f"{value}_added" if masked == "added" else value


PRODUCT = [
    (name, *rest)
    for name, *rest in itertools.product(MASKS, MASKED, (-math.inf, LOWEST), SOFTMAX)
    # How the mask is proved has no bearing on hand-written softmaxes: a proved and an opaque one will do.
    if rest[-1] == "softmax"
    or name == "padding"
    or (name == "opaque" and (rest[-1], rest[0]) != ("unshifted", "added"))
]


def _id(case: tuple[str, str, float, str]) -> str:
    name, masked, fill, softmax = case
    return f"{name}-{masked}-{'inf' if math.isinf(fill) else 'finfo_min'}-{softmax}"


@pytest.mark.parametrize(
    ("name", "masked", "fill", "softmax"),
    [
        pytest.param(*case, id=_id(case))
        for case in PRODUCT
        if case[::3] != ("opaque", "unshifted") or case[1] != "added"
    ],
)
def test_result_and_gradients(name: str, masked: str, fill: float, softmax: str):
    mask = MASKS[name]

    def attention(q: Tensor, k: Tensor, v: Tensor, source: Tensor) -> Tensor:
        scores = MASKED[masked](q @ k.mT * 0.5, mask.keep(source), fill)
        return SOFTMAX[softmax](scores) @ v

    mode = _mode(masked, fill, softmax)
    # What is added without a closed form stays a bias, whatever it holds; so the op is told to expect -inf.
    in_graph = "nan_added" if (name, masked) == ("opaque", "added") else mode
    out, dq, dk, dv = _check(attention, _leaves(mask), mask.source(), mode=in_graph)
    # What eager does, so that the comparison above is known to have seen it.
    assert out.isnan().any() == dv.isnan().any() == mode.startswith("nan")
    assert dq.isnan().any() == dk.isnan().any() == (mode == "nan_added")
    assert not out.isnan().all()


@pytest.mark.parametrize("fill", FILLS)
def test_a_float_mask_of_unknown_contents(fill: float):
    """It stays a bias: its rows of -inf are empty rows, its rows of finite numbers are softmaxed as they are."""

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT * 0.5 + bias).softmax(-1) @ v

    leaves = _leaves(MASKS["opaque"])
    bias = torch.zeros(B, H, 5, 7, dtype=torch.float64).masked_fill(~_some_rows_empty(), fill).requires_grad_()
    _, dq, dk, _, dbias = _check(attention, [*leaves, bias], mode="nan_added")
    assert dq.isnan().any() == dk.isnan().any() == dbias.isnan().any() == math.isinf(fill)


@pytest.mark.parametrize("masked", ["masked_fill", "added"])
def test_grouped_heads_and_soft_cap(masked: str):
    """The CPU path in separate operations, and NaN of one query head in the key/value head it shares."""
    mask = MASKS["opaque"]

    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        k, v = k.repeat_interleave(H, 1), v.repeat_interleave(H, 1)
        scores = torch.tanh(q @ k.mT * 0.25) * 2.0
        return MASKED[masked](scores, keep, -math.inf).softmax(-1) @ v

    q, k, v = (t.detach() for t in _leaves(mask))
    leaves = [t.clone().requires_grad_() for t in (q, k[:, :1], v[:, :1])]
    _check(attention, leaves, mask.source(), mode=_mode(masked, -math.inf, "softmax"))


@pytest.mark.parametrize("fill", FILLS)
def test_unshifted_softmax_with_a_bias_is_refused(fill: float):
    """exp without the maximum subtracted is 0 / 0 on a row of very low biases, where the op would be uniform."""

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        e = (q @ k.mT * 0.5 + bias).exp()
        return (e / e.sum(-1, keepdim=True)) @ v

    leaves = [t.detach() for t in _leaves(MASKS["opaque"])]
    bias = torch.zeros(B, H, 5, 7, dtype=torch.float64).masked_fill(~_some_rows_empty(), fill)
    recorder = Recorder(lowering="eager")
    got = torch.compile(attention, backend=recorder, fullgraph=True)(*leaves, bias)
    assert recorder.calls == 0
    assert [r.code for r in rocm_attn_compile.reports()[0].sites[0].reasons] == ["unshifted_softmax"]
    torch.testing.assert_close(got, attention(*leaves, bias), rtol=0, atol=0, equal_nan=True)
