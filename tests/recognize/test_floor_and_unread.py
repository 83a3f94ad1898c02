"""Scores raised to the lowest number where rows may be empty, and what is left of weights that nobody reads."""

from __future__ import annotations

import pytest
import torch
from recorder import Recorder
from spellings import SPELLINGS, inputs_of, square

import rocm_attn_compile
from rocm_attn_compile.testing import assert_as_accurate_as_eager


def test_empty_rows_stay_uniform_when_their_fill_is_raised():
    """Without gradients `clamp` changes nothing in a row of nothing but the lowest number."""
    q, k, v = square()
    lengths = torch.tensor([0, 4])

    def attention(q, k, v):
        keep = torch.arange(k.shape[-2]) < lengths[:, None, None, None]
        lowest = torch.finfo(q.dtype).min
        mask = torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, lowest)
        return (q @ k.mT + mask).clamp(min=lowest).softmax(-1) @ v

    recorder = Recorder(lowering="eager")
    actual = torch.compile(attention, backend=recorder, fullgraph=True)(q, k, v)
    assert recorder.calls == 1
    exact = attention(q.double(), k.double(), v.double())
    assert_as_accurate_as_eager(actual, attention(q, k, v), exact)
    torch.testing.assert_close(actual[0], v[0].mean(-2, keepdim=True).expand_as(v[0]))


@pytest.mark.parametrize("name", ["wavlm_weights_returned_and_not_read", "mean_of_the_weights_not_read"])
def test_no_softmax_is_left_for_weights_that_nobody_reads(name: str):
    spelling = SPELLINGS[name]
    recorder = Recorder(lowering="eager")
    torch.compile(spelling.function, backend=recorder, fullgraph=True)(
        *inputs_of(spelling, torch.float32, torch.float32, False)
    )
    (report,) = rocm_attn_compile.reports()
    assert [site.replaced for site in report.sites] == [True]
    (graph_module,) = recorder.graphs
    assert not [node for node in graph_module.graph.nodes if "softmax" in str(node.target)]
