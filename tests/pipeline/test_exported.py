"""`torch.export`, then `torch.compile`: the exported program is ATen, and its attentions are found as well."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pipeline_harness import M, Pipeline, attend, causal, codes, square
from torch import nn


class ByHand(nn.Module):
    def forward(self, q, k, v):
        return attend(q, k, v, causal(M))


class BySdpa(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("module", [ByHand(), BySdpa()], ids=["by_hand", "sdpa"])
def test_exported_program(module, decomposed):
    program = torch.export.export(module, square())
    if decomposed:
        program = program.run_decompositions({})
    inputs = square()
    pipeline = Pipeline("aot_eager")
    got = torch.compile(program.module(), backend=pipeline, fullgraph=True)(*inputs)
    torch.testing.assert_close(got, module(*inputs))
    assert (pipeline.calls, codes()) == (1, set())
