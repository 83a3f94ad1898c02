"""No tensor over all pairs is left in the memory of a rewritten program, but for biases, which are not expanded.

The program is measured without its kernel: on the CPU, ATen's is given most masks as one float tensor of all pairs.
Triton's kernels are not: tests/gpu/test_mask_memory.py measures them, and what can be is measured here, too.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.fx as fx
from mask_cases import BIASES, MASKS, top_left
from pipeline_harness import SCALE, B, D, H, Pipeline, rand, reports, sites

from rocm_attn_compile.testing import assert_as_accurate_as_eager, peak_memory

LENGTH = 512
PAIRS = LENGTH * LENGTH


class WithoutKernel(fx.Interpreter):
    """Runs a rewritten graph; the op gives uninitialised tensors."""

    def call_function(self, target, args, kwargs):
        if target is torch.ops.rocm_attn.attention.default:
            q, v = args[0], args[2]
            return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
        return super().call_function(target, args, kwargs)


class Measured(Pipeline):
    """`skips_kernels` turns the kernels of the compiled program off."""

    skips_kernels = False

    def __call__(self, graph_module, example_inputs):
        run = super().__call__(graph_module, example_inputs)
        return lambda *args: WithoutKernel(graph_module).run(*args) if self.skips_kernels else run(*args)


def peaks(attention, inputs, dynamic) -> tuple[int, int]:
    """Bytes that the rewritten program needs without its kernel, and that eager needs; both are right."""
    pipeline = Measured("eager")
    compiled = torch.compile(attention, backend=pipeline, fullgraph=True, dynamic=dynamic)
    exact = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs]
    with torch.no_grad():
        assert_as_accurate_as_eager(compiled(*inputs), attention(*inputs), attention(*exact))
        pipeline.skips_kernels = True
        peak = peak_memory(lambda: compiled(*inputs))
        eager = peak_memory(lambda: attention(*inputs))
    (site,) = sites()
    assert site.replaced and not site.data["mask"]["has_attn_mask"], "\n".join(map(str, reports()))
    assert len(pipeline.graphs) == 1  # the measured run compiled nothing
    return peak, eager


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", MASKS)
def test_no_mask_of_all_pairs_is_in_memory(name, dynamic):
    keep, make = MASKS[name]

    def attention(q, k, v, extra):
        return (q @ k.mT * SCALE).masked_fill(~keep(q, k, extra), -math.inf).softmax(-1) @ v

    kv_len = LENGTH + 32 if make is None else LENGTH
    inputs = rand(B, H, LENGTH, D), rand(B, H, kv_len, D), rand(B, H, kv_len, D), make and make(LENGTH)
    peak, eager = peaks(attention, inputs, dynamic)
    assert eager > B * H * PAIRS * 4
    assert peak < PAIRS  # bytes: a bool mask for one head of one sequence would take them


TRANSFORMERS_MASKS = {
    "causal": ("create_causal_mask", {}),
    "window": ("create_sliding_window_causal_mask", {"sliding_window": 16}),
    "chunked": ("create_chunked_causal_mask", {"attention_chunk_size": 16}),
    "bidirectional": ("create_bidirectional_mask", {}),
    "bidirectional_window": ("create_bidirectional_sliding_window_mask", {"sliding_window": 16}),
}


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("kind", TRANSFORMERS_MASKS)
def test_no_mask_of_transformers_is_in_memory(kind, padded):
    """Float masks of the lowest number, for attention by hand."""
    masking = pytest.importorskip("transformers.masking_utils")
    factory, options = TRANSFORMERS_MASKS[kind]
    config = pytest.importorskip("transformers").LlamaConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=32
    )
    config._attn_implementation = "eager"
    for name, option in options.items():
        setattr(config, name, option)
    positions = [] if factory.startswith("create_bidirectional") else [None, None]

    def attention(q, k, v, embeds, padding):
        mask = getattr(masking, factory)(config, embeds, padding, *positions)
        return (q @ k.mT * SCALE + (0.0 if mask is None else mask)).softmax(-1) @ v

    padding = torch.ones(B, LENGTH, dtype=torch.long)
    padding[0, LENGTH // 2 :] = 0
    inputs = (*(rand(B, H, LENGTH, D) for _ in range(3)), torch.zeros(B, LENGTH, 16), padding if padded else None)
    peak, _ = peaks(attention, inputs, None)
    assert peak < PAIRS  # bytes: a bool mask for one head of one sequence would take them


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", [name for name in BIASES if "alibi" not in name])
def test_biases_are_not_expanded(name, dynamic):
    """A table of positions is not repeated for a sequence."""
    batch = 8
    bias, make = BIASES[name]

    def attention(q, k, v, extra):
        scores = q @ k.mT * SCALE + bias(q, k, extra)
        return scores.masked_fill(~top_left(q, k, None), -math.inf).softmax(-1) @ v

    q, k, v = (rand(batch, H, LENGTH, D).bfloat16() for _ in range(3))
    peak, eager = peaks(attention, (q, k, v, make(LENGTH)), dynamic)
    assert eager > batch * H * PAIRS * 2
    # The table's numbers and the positions by which they are looked up, int64, some at a time.
    assert peak < (2 * H + 4 * 8) * PAIRS


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["alibi", "alibi_of_keys", "alibi_in_both_directions"])
def test_alibi_is_one_number_per_head(name, dtype, dynamic):
    bias, make = BIASES[name]

    def attention(q, k, v, extra):
        scores = q @ k.mT * SCALE + bias(q, k, extra)
        if name != "alibi_in_both_directions":
            scores = scores.masked_fill(~top_left(q, k, None), -math.inf)
        return scores.softmax(-1) @ v

    q, k, v = (rand(B, H, LENGTH, D).to(dtype) for _ in range(3))
    peak, eager = peaks(attention, (q, k, v, make(LENGTH)), dynamic)
    assert eager > B * H * PAIRS * dtype.itemsize
    assert peak < PAIRS


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_a_bias_with_fills_is_taken_apart(dynamic):
    """As Falcon has it: positions that count the tokens, and the lowest number where a key is dropped."""

    def attention(q, k, v, tokens):
        # Slopes of an input might be as low as the fill, where the mask multiplies them.
        slopes = 2.0 ** -torch.arange(1, H + 1)
        places = ((tokens.cumsum(-1) - 1) * tokens)[:, None, None, :]
        keep = top_left(q, k, None) & (tokens != 0)[:, None, None, :]
        bias = (slopes[:, None, None].bfloat16() * places).to(q.dtype).masked_fill(~keep, torch.finfo(q.dtype).min)
        return (q @ k.mT * SCALE + bias).softmax(-1) @ v

    tokens = torch.ones(B, LENGTH, dtype=torch.long)
    tokens[0, :7] = 0
    inputs = (*(rand(B, H, LENGTH, D) for _ in range(3)), tokens)
    peak, eager = peaks(attention, inputs, dynamic)
    assert eager > B * H * PAIRS * 4
    assert peak < PAIRS


@pytest.mark.parametrize(
    ("name", "heads"), [("window", 3), ("padding_bool", 1), ("padding_int", 1), ("causal_top_left", 1)]
)
def test_a_call_needs_less_memory_than_the_scores(name, heads):
    """Less than the scores of `heads` of the B * H heads, with ATen's kernel, to which a window is a tensor."""
    keep, make = MASKS[name]

    def attention(q, k, v, extra):
        return (q @ k.mT * SCALE).masked_fill(~keep(q, k, extra), -math.inf).softmax(-1) @ v

    inputs = (*(rand(B, H, LENGTH, D) for _ in range(3)), make and make(LENGTH))
    pipeline = Pipeline("eager")
    compiled = torch.compile(attention, backend=pipeline, fullgraph=True)
    with torch.no_grad():
        compiled(*inputs)
        peak = peak_memory(lambda: compiled(*inputs))
    assert pipeline.calls == 1
    assert peak < heads * PAIRS * 4
