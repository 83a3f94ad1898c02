"""Graphs of real models: everything is executed, nothing surprising, in time linear in the nodes."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rocm_attn_compile.capture import capture

transformers = pytest.importorskip("transformers")


def llama(attention):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation=attention,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2(attention):
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_implementation=attention
    )
    return transformers.GPT2LMHeadModel(config).eval()


IN_CI = {("llama", "eager", True, True), ("llama", "sdpa", None, False), ("gpt2", "eager", None, True)}
CASES = [
    pytest.param(
        build,
        attention,
        dynamic,
        padded,
        marks=() if (build.__name__, attention, dynamic, padded) in IN_CI else pytest.mark.slow,
    )
    for build, attention, dynamic, padded in itertools.product(
        [llama, gpt2], ["eager", "sdpa"], [None, True], [False, True]
    )
]


@pytest.mark.parametrize(("build", "attention", "dynamic", "padded"), CASES)
def test_transformers(captured, build, attention, dynamic, padded):
    model = build(attention)
    tokens = torch.randint(0, 64, (2, 9))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    options = {"attention_mask": mask} if padded else {}
    with torch.no_grad():
        seen = captured(lambda x: model(x, use_cache=False, **options).logits, tokens, dynamic=dynamic, fullgraph=False)
    assert [entry for entry in seen.trace.not_executed if entry[1] != "functorch"] == []
    assert seen.new_guards == []
    assert seen.names.count("sdpa" if attention == "sdpa" else "_softmax") == 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out, self.up = (
            nn.LayerNorm(64),
            nn.Linear(64, 192),
            nn.Linear(64, 64),
            nn.Linear(64, 64),
        )

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = (t.view(b, n, 4, -1).transpose(1, 2) for t in self.qkv(self.norm(x)).split(d, -1))
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        p = (q @ k.transpose(-1, -2) * 0.25).masked_fill(~mask, float("-inf")).softmax(-1)
        x = x + self.out((p @ v).transpose(1, 2).reshape(b, n, d))
        return x + self.up(F.gelu(x))


def test_cost_is_linear_in_layers(captured):
    """Counts are exact; the time bound is several times what this takes, to catch a return to quadratic."""
    costs = {}
    for layers in (3, 12):
        torch._dynamo.reset()
        seen = captured(nn.Sequential(*(Block() for _ in range(layers))), torch.randn(2, 64, 64))
        start = time.process_time()
        trace = capture(seen.graph_module, seen.example_inputs)
        costs[layers] = len(trace.values), time.process_time() - start
    few, many = costs[3][0], costs[12][0]
    per_layer = (many - few) // 9
    assert (many - few) % 9 == 0 and per_layer < 60
    assert costs[12][1] < 3.0


def test_nodes_holding_is_indexed(captured):
    seen = captured(nn.Sequential(*(Block() for _ in range(12))), torch.randn(2, 64, 64))
    trace = seen.trace
    last = len(trace.order)
    start = time.process_time()
    found = sum(len(trace.nodes_holding(value, last)) for value in trace.values)
    assert found >= len(trace.tensors) and time.process_time() - start < 1.0
