"""Every kind of mask that transformers' masking_utils emits, with and without padding, packing and caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mask_harness import Captured, assert_exact, context_of, expression, parts_of

from rocm_attn_compile.recognize.mask import AdditiveMask, ClosedForm, is_hard, prove_additive, prove_keep

transformers = pytest.importorskip("transformers")
masking = pytest.importorskip("transformers.masking_utils")

LENGTH = 10
LEFT_PADDING = torch.ones(2, LENGTH, dtype=torch.long)
LEFT_PADDING[1, :3] = 0
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])


def config_of(implementation: str, **options: Any) -> Any:
    config = transformers.LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, vocab_size=32)
    config._attn_implementation = implementation
    for name, option in options.items():
        setattr(config, name, option)
    return config


def mask_function(factory: str, implementation: str, **options: Any) -> Any:
    """The mask a model builds: `f(embeds, padding, position_ids)`."""
    config = config_of(implementation, **options)
    create = getattr(masking, factory)

    def build(embeds, padding, position_ids):
        if factory.startswith("create_bidirectional"):
            return create(config, embeds, padding)
        return create(config, embeds, padding, None, position_ids)

    return build


KINDS = {
    "causal": ("create_causal_mask", {}),
    "window": ("create_sliding_window_causal_mask", {"sliding_window": 4}),
    "chunked": ("create_chunked_causal_mask", {"attention_chunk_size": 4}),
    "bidirectional": ("create_bidirectional_mask", {}),
    "bidirectional_window": ("create_bidirectional_sliding_window_mask", {"sliding_window": 3}),
}
# What is proved of each, without and with padding.
WITHOUT_PADDING = {
    "causal": {"band"},
    "window": {"band"},
    "chunked": {"band", "kv_start", "kv_end"},
    "bidirectional_window": {"band"},
}
WITH_PADDING = {
    "causal": {"band", "key"},
    "window": {"band", "key"},
    "chunked": {"band", "key", "kv_start", "kv_end"},
    "bidirectional": {"key"},
    "bidirectional_window": {"band", "key"},
}
BANDS = {"causal": (None, 0), "window": (-3, 0), "chunked": (None, 0), "bidirectional_window": (-3, 3)}


def prove(captured: Captured) -> tuple[ClosedForm, torch.Tensor]:
    index, context = context_of(captured)
    if captured.real.dtype == torch.bool:
        form = prove_keep(captured.value, index, context)
        assert isinstance(form, ClosedForm), form
        return form, captured.real
    result = prove_additive(captured.value, index, context)
    assert isinstance(result, AdditiveMask), result
    assert result.fill is None or (result.fill == torch.finfo(captured.real.dtype).min)
    assert result.fill is None or is_hard(result.fill, captured.real.dtype)
    return result.keep, captured.real == 0


def check(captured: Captured, expected: set[str], band: tuple | None = None) -> ClosedForm:
    form, kept = prove(captured)
    assert_exact(form, captured, kept)
    assert parts_of(form) == expected, form
    if band is not None:
        found = [
            None if x is None else expression(x, captured.symbols, captured) for x in (form.band_lower, form.band_upper)
        ]
        assert tuple(found) == band
    return form


# (implementation, dynamic): the float masks are the bool masks behind one `where`, so one way of tracing is enough.
MODES = [("sdpa", False), ("sdpa", True), ("eager", False)]


@pytest.mark.parametrize(("implementation", "dynamic"), MODES)
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_mask_kind(kind, padded, implementation, dynamic):
    factory, options = KINDS[kind]
    function = mask_function(factory, implementation, **options)
    arguments = (torch.zeros(2, LENGTH, 16), LEFT_PADDING if padded else None, None)
    if not padded and (kind == "bidirectional" or (kind == "causal" and implementation == "sdpa")):
        assert function(*arguments) is None  # F.sdpa's own is_causal, or nothing: there is no mask to prove
        return
    captured = Captured(function, *arguments, dynamic=dynamic)
    expected = (WITH_PADDING if padded else WITHOUT_PADDING)[kind]
    if kind == "chunked" and dynamic:
        # The chunk size is an int of unknown sign then: chunk numbers are read as tensors and compared.
        expected = expected - {"kv_start", "kv_end"} | {"ids"}
    form = check(captured, expected, BANDS.get(kind))
    if not padded and not dynamic:
        assert form.every_row_keeps_a_key()
    if padded:
        assert not form.every_row_keeps_a_key()  # a row of padding may keep nothing


@pytest.mark.parametrize(("implementation", "dynamic"), MODES)
@pytest.mark.parametrize("kind", ["causal", "window"])
def test_packed_sequences_are_segments_and_a_band(kind, implementation, dynamic):
    factory, options = KINDS[kind]
    function = mask_function(factory, implementation, **options)
    captured = Captured(function, torch.zeros(2, LENGTH, 16), None, PACKED, dynamic=dynamic)
    check(captured, {"ids", "band"}, BANDS[kind])


def cached_mask(factory: str, implementation: str, static: bool, seen: int, **options: Any) -> Any:
    """The mask a model builds with a cache that holds `seen` tokens."""
    config = config_of(implementation, **options)
    if static:
        cache = transformers.StaticCache(config=config, max_cache_len=12)
        cache.early_initialization(batch_size=2, num_heads=2, head_dim=8, dtype=torch.float32, device="cpu")
    else:
        cache = transformers.DynamicCache(config=config)
    for layer in range(2 if seen else 0):
        cache.update(torch.zeros(2, 2, seen, 8), torch.zeros(2, 2, seen, 8), layer)
    create = getattr(masking, factory)

    def build(embeds, padding):
        return create(config, embeds, padding, cache, None)

    return build


@pytest.mark.parametrize(("implementation", "dynamic"), MODES)
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize(("seen", "length"), [(0, 6), (5, 1), (5, 3)], ids=["prefill", "decode", "chunked_prefill"])
def test_static_cache_limits_the_keys_by_a_tensor(seen, length, padded, implementation, dynamic):
    function = cached_mask("create_causal_mask", implementation, True, seen)
    padding = LEFT_PADDING[:, : seen + length] if padded else None
    captured = Captured(function, torch.zeros(2, length, 16), padding, dynamic=dynamic)
    expected = {"kv_end", "key"} if padded else {"kv_end"}
    # The padding mask ends before the cache does: with a single query that is a limit on the diagonal.
    check(captured, expected | {"band"} if padded and length == 1 else expected)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic_cache", "static_cache"])
def test_window_over_a_cache(static, padded, dynamic):
    function = cached_mask("create_sliding_window_causal_mask", "sdpa", static, 5, sliding_window=4)
    padding = LEFT_PADDING[:, :8] if padded else None
    captured = Captured(function, torch.zeros(2, 3, 16), padding, dynamic=dynamic)
    check(captured, {"band", "key"} if padded else {"band"}, (0, 3))


def test_causal_over_a_dynamic_cache_is_aligned_at_the_bottom_right():
    function = cached_mask("create_causal_mask", "sdpa", False, 5)
    captured = Captured(function, torch.zeros(2, 3, 16), None, dynamic=True)
    form = check(captured, {"band"}, (None, 5))
    assert form.every_row_keeps_a_key()


def test_blocks_that_see_each_other_stay_dense_but_limit_the_text_rows():
    blocks = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, -1, -1]] * 2)
    config = config_of("sdpa")

    def build(embeds):
        return masking.create_causal_mask(config, embeds, None, None, None, block_sequence_ids=blocks)

    form = check(Captured(build, torch.zeros(2, LENGTH, 16)), {"residual", "kv_end"})
    assert [note.code for note in form.notes] == ["mask_general"]


LAYERS = {
    "full_attention": {"band"},
    "sliding_attention": {"band"},
    "chunked_attention": {"band", "kv_start", "kv_end"},
    "compressed_sparse_attention": {"band"},
    "heavily_compressed_attention": {"band"},
    "minimax_m3_sparse": {"band"},
    "indexed_attention": {"band"},
    "hybrid": {"band"},
    "hybrid_sliding": {"band"},
}
"""Kinds of layers of which `create_masks_for_generate` knows, and what is proved of their masks."""
RECURRENT = ("linear_attention", "conv")


def masks_for_generate(layer_types: list[str], kind: str, padded: bool) -> Any:
    """The mask of one kind of layer, among those that are made for all."""
    config = config_of("sdpa", layer_types=layer_types, sliding_window=4, attention_chunk_size=4)

    def build(embeds, padding):
        return masking.create_masks_for_generate(config, embeds, padding, None)[kind]

    return build, torch.zeros(2, LENGTH, 16), LEFT_PADDING if padded else None


def test_every_kind_of_layer_is_here():
    assert {*LAYERS, *RECURRENT} == {*masking.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING}


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["static", "dynamic"])
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("layer", LAYERS)
def test_masks_for_generate(layer, padded, dynamic):
    kind = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}.get(layer, layer)
    build, *arguments = masks_for_generate([layer, "conv"], kind, padded)
    if not padded and layer in ("full_attention", "minimax_m3_sparse", "hybrid", "hybrid_sliding"):
        assert build(*arguments) is None  # F.sdpa's own is_causal
        return
    expected = LAYERS[layer] | ({"key"} if padded else set())
    if layer == "chunked_attention" and dynamic:
        expected = expected - {"kv_start", "kv_end"} | {"ids"}
    check(Captured(build, *arguments, dynamic=dynamic), expected)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 4}, {"attention_chunk_size": 4}], ids=str)
def test_masks_for_generate_of_equal_layers(options):
    config = config_of("sdpa", **options)

    def build(embeds, padding):
        return masking.create_masks_for_generate(config, embeds, padding, None)

    expected = {"band", "key"} | ({"kv_start", "kv_end"} if "attention_chunk_size" in options else set())
    check(Captured(build, torch.zeros(2, LENGTH, 16), LEFT_PADDING), expected)


@pytest.mark.parametrize("layer", [*RECURRENT, "hybrid", "hybrid_sliding"])
def test_recurrent_layers_get_the_padding_and_no_mask_of_pairs(layer):
    build, embeds, padding = masks_for_generate([layer], layer if layer in RECURRENT else "linear_attention", True)
    assert torch.equal(build(embeds, padding), padding)
    assert torch.equal(build(embeds[:, -3:], padding), padding[:, -3:])  # more tokens for a cache
    assert build(embeds[:, -1:], padding) is None
    assert build(embeds, None) is None
    compiled = torch.compile(lambda e, p: build(e, p), backend="eager", fullgraph=True)
    assert torch.equal(compiled(embeds, torch.ones_like(padding)), torch.ones_like(padding))
