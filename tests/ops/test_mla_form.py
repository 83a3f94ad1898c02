"""The cost rule of latent attention's two forms, on sizes where the answer is known."""

from __future__ import annotations

import pytest

from rocm_attn_compile.ops.mla_form import prefers_absorbed

DEEPSEEK = (128, 64, 512, 128)  # P, R, C, E


def test_decode_is_absorbed():
    for num_heads in (1, 16, 128):
        for kv_len in (64, 4096, 131072):
            for q_len in (1, 2, 4):
                assert prefers_absorbed(q_len, kv_len, num_heads, *DEEPSEEK)


def test_a_prompt_is_expanded():
    for num_heads in (1, 16, 128):
        for length in (512, 4096, 32768):
            assert not prefers_absorbed(length, length, num_heads, *DEEPSEEK, band_upper=0)
            assert not prefers_absorbed(length, length, num_heads, *DEEPSEEK)


@pytest.mark.parametrize("num_heads", [16, 128])
def test_there_is_one_crossover(num_heads):
    """Of a chunk of queries against a long cache: absorbed up to some length, never again after it."""
    answers = [
        prefers_absorbed(q_len, 16384, num_heads, *DEEPSEEK, band_upper=16384 - q_len) for q_len in range(1, 1024)
    ]
    crossover = answers.index(False)
    assert all(answers[:crossover])
    assert not any(answers[crossover:])
    # C * (P + E) products for a key against 2C - P - E more for a pair: 171 queries, if only products count.
    assert 100 <= crossover <= 300


def test_the_band_counts():
    """A window spares products, but not the expansion of all keys."""
    sizes = (400, 16384, 128, *DEEPSEEK)
    assert not prefers_absorbed(*sizes)
    assert prefers_absorbed(*sizes, band_lower=-128, band_upper=0)


def test_a_latent_as_wide_as_a_head_costs_nothing_to_absorb():
    assert prefers_absorbed(64, 4096, 16, 128, 0, 64, 128)
