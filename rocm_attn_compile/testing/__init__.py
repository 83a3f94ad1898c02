"""Helpers for tests of attention rewrites, ours and yours: how exact is exact enough, and what is in a graph."""

from rocm_attn_compile.testing.compare import (
    Accuracy,
    Float64Everywhere,
    accuracy,
    assert_as_accurate_as_eager,
    assert_same_computation,
    to_float64,
)
from rocm_attn_compile.testing.graphs import Compiled, compile_and_capture, count_attention_calls, count_calls
from rocm_attn_compile.testing.huggingface import cache_for, cache_of
from rocm_attn_compile.testing.memory import peak_memory
from rocm_attn_compile.testing.rounding import RoundedAgain

__all__ = [
    "Accuracy",
    "Compiled",
    "Float64Everywhere",
    "RoundedAgain",
    "accuracy",
    "assert_as_accurate_as_eager",
    "assert_same_computation",
    "cache_for",
    "cache_of",
    "compile_and_capture",
    "count_attention_calls",
    "count_calls",
    "peak_memory",
    "to_float64",
]
