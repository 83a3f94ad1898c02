"""Hand-written masks as models spell them: the proved form is exact at every index, and is the form intended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import sympy
import torch
from mask_harness import Captured, Recorded, assert_exact, context_of, expression, parts_of

from rocm_attn_compile.recognize.mask import (
    AdditiveMask,
    ClosedForm,
    mask_in_words,
    prove_additive,
    prove_drop,
    prove_keep,
)

NEGATIVE_INFINITY = float("-inf")
PADDING = torch.ones(2, 11, dtype=torch.long)
PADDING[0, :3] = 0
PADDING[1, 9:] = 0
LENGTHS = torch.tensor([4, 11])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 7, 7, 7]])


@dataclass
class Case:
    """A mask function of `x` with q_len 9 (or 11) and kv_len 11, its meaning, and what must be proved of it."""

    function: Callable
    meaning: str  # "keep", "drop", "add"
    args: tuple
    parts: set[str]
    band: tuple[Any, Any] | None = None  # (lower, upper) as functions of (M, N), or numbers
    rows: bool | None = None  # every_row_keeps_a_key


CASES: dict[str, Case] = {}


def case(meaning: str, parts: str, *args: Any, band: tuple | None = None, rows: bool | None = None) -> Callable:
    def register(function: Callable) -> Callable:
        CASES[function.__name__] = Case(function, meaning, args, set(parts.split()), band, rows)
        return function

    return register


def positions(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(x.shape[0])[:, None], torch.arange(y.shape[0])[None, :]


# --- causal in many spellings; x has M rows, y has N ---


@case("add", "band", band=(None, 0), rows=True)
def triu_of_infinity(x, y):
    return torch.triu(torch.full((x.shape[0], y.shape[0]), NEGATIVE_INFINITY), diagonal=1)


@case("keep", "band", band=(None, 0), rows=True)
def tril_of_ones(x, y):
    return torch.ones(x.shape[0], y.shape[0], dtype=torch.bool).tril()


@case("keep", "band", band=(None, lambda m, n: n - m))
def tril_bottom_right(x, y):
    m, n = x.shape[0], y.shape[0]
    return torch.ones(m, n, dtype=torch.bool).tril(n - m)


@case("drop", "band", band=(None, 0), rows=True)
def tril_equals_zero(x, y):
    return torch.tril(torch.ones(x.shape[0], y.shape[0])).view(1, 1, x.shape[0], y.shape[0]) == 0


@case("drop", "band", band=(None, 0), rows=True)
def triu_as_bool(x, y):
    return torch.triu(torch.ones(x.shape[0], y.shape[0]), 1).bool()


@case("keep", "band", band=(None, 0), rows=True)
def arange_comparison(x, y):
    q, k = positions(x, y)
    return k <= q


@case("keep", "band", band=(None, 0), rows=True)
def arange_not_greater(x, y):
    q, k = positions(x, y)
    return ~(k > q)


@case("keep", "band", band=(None, 0), rows=True)
def difference_is_not_negative(x, y):
    q, k = positions(x, y)
    return (q - k) >= 0


@case("keep", "band", band=(None, -1), rows=False)
def strictly_below(x, y):
    q, k = positions(x, y)
    return k < q


@case("add", "band", band=(None, 0), rows=True)
def where_zero_or_infinity(x, y):
    return torch.where(torch.ones(x.shape[0], y.shape[0]).tril().bool(), 0.0, NEGATIVE_INFINITY)


@case("add", "band", band=(None, 0), rows=True)
def masked_fill_in_place(x, y):
    mask = torch.full((x.shape[0], y.shape[0]), torch.finfo(torch.float32).min)
    mask.masked_fill_(torch.arange(y.shape[0]) < (torch.arange(x.shape[0]) + 1).view(x.shape[0], 1), 0)
    return mask


@case("add", "band", band=(None, 0), rows=True)
def one_minus_tril_times_fill(x, y):
    return (1.0 - torch.tril(torch.ones(x.shape[0], y.shape[0]))) * -1e9


@case("add", "band", band=(None, 0), rows=True)
def log_of_tril(x, y):
    return torch.log(torch.tril(torch.ones(x.shape[0], y.shape[0])))


@case("add", "band", band=(None, 0), rows=True)
def square_subsequent(x, y):
    return torch.nn.Transformer.generate_square_subsequent_mask(x.shape[0])


@case("keep", "band", band=(None, 0), rows=True)
def cumsum_positions(x, y):
    q = torch.ones(1, x.shape[0], dtype=torch.long).cumsum(-1) - 1
    k = torch.ones(1, y.shape[0], dtype=torch.long).cumsum(-1) - 1
    return k[:, None, None, :] <= q[:, None, :, None]


@case("keep", "band", band=(None, 0), rows=True)
def int32_positions(x, y):
    return torch.arange(y.shape[0], dtype=torch.int32)[None] <= torch.arange(x.shape[0], dtype=torch.int32)[:, None]


@case("keep", "band", band=(None, 2), rows=True)
def cat_of_blocks(x, y):
    m, n = x.shape[0], y.shape[0]
    return torch.cat([torch.ones(m, 2, dtype=torch.bool), torch.ones(m, n - 2, dtype=torch.bool).tril()], 1)


@case("keep", "band", band=(None, 2), rows=True)
def padded_tril(x, y):
    m, n = x.shape[0], y.shape[0]
    return torch.nn.functional.pad(torch.ones(m, n - 2, dtype=torch.bool).tril(), (2, 0), value=True)


@case("keep", "band", band=(None, 0), rows=True)
def sliced_from_a_larger_mask(x, y):
    m, n = x.shape[0], y.shape[0]
    return torch.ones(32, 32, dtype=torch.bool).tril()[None, None, :m, :n]


@case("keep", "band", band=(None, lambda m, n: n - m))
def last_rows_of_a_larger_mask(x, y):
    m, n = x.shape[0], y.shape[0]
    return torch.ones(n, n, dtype=torch.bool).tril()[n - m : n, :n]


# --- windows: every off-by-one is a different mask ---


def window_case(name: str, function: Callable, lower: int, upper: int | None = 0) -> None:
    CASES[name] = Case(function, "keep", (), {"band"}, (lower, upper), None)


def window_self_included(w: int) -> Callable:
    def mask(x, y):
        q, k = positions(x, y)
        return (k <= q) & (k > q - w)

    return mask


def window_of_distance(w: int) -> Callable:
    def mask(x, y):
        q, k = positions(x, y)
        return (q - k >= 0) & (q - k <= w)

    return mask


def window_on_both_sides(w: int) -> Callable:
    def mask(x, y):
        q, k = positions(x, y)
        return (q - k).abs() <= w

    return mask


for _w in (3, 4, 5):
    window_case(f"window_{_w}_self_included", window_self_included(_w), 1 - _w)
    window_case(f"window_of_distance_{_w}", window_of_distance(_w), -_w)
window_case("window_both_sides", window_on_both_sides(3), -3, 3)


@case("keep", "band", band=(-3, 0))
def tril_and_triu(x, y):
    ones = torch.ones(x.shape[0], y.shape[0], dtype=torch.bool)
    return ones.tril() & ones.triu(-3)


@case("add", "band", band=(-4, 0))
def window_by_difference_of_trils(x, y):
    ones = torch.ones(x.shape[0], y.shape[0])
    return ((ones.tril() - ones.tril(-5)) - 1.0) * 1e30


# --- limits per row ---


@case("keep", "kv_start kv_end band")
def chunked_causal(x, y):
    q, k = positions(x, y)
    return (q // 4 == k // 4) & (k <= q)


@case("keep", "kv_start kv_end")
def block_diagonal(x, y):
    q, k = positions(x, y)
    return torch.div(q, 3, rounding_mode="floor") == torch.div(k, 3, rounding_mode="floor")


@case("keep", "kv_end", rows=True)
def prefix_language_model(x, y):
    q, k = positions(x, y)
    return (k <= q) | (k < 5)


@case("keep", "kv_end", LENGTHS, rows=True)
def prefix_per_sequence(x, y, lengths):
    q, k = positions(x, y)
    return (k <= q)[None, None] | (k < lengths[:, None, None, None])


@case("keep", "kv_end", rows=True)
def prefix_by_slice_assignment(x, y):
    m, n = x.shape[0], y.shape[0]
    mask = torch.zeros(m, n, dtype=torch.bool)
    mask[:, :5] = True
    mask[5:, 5:] = torch.ones(m - 5, n - 5, dtype=torch.bool).tril()
    return mask


@case("keep", "kv_end", LENGTHS)
def sequence_lengths(x, y, lengths):
    k = torch.arange(y.shape[0])
    return (k[None] < lengths[:, None])[:, None, None, :]


@case("keep", "kv_end", torch.tensor(6))
def static_cache_position(x, y, start):
    q = torch.arange(x.shape[0]) + start
    return torch.arange(y.shape[0])[None, :] <= q[:, None]


@case("keep", "kv_end", torch.tensor([3, 4, 5, 6, 7, 8, 9, 10, 10]))
def static_cache_position_tensor(x, y, cache_position):
    return torch.arange(y.shape[0])[None, :] <= cache_position[: x.shape[0], None]


@case("keep", "kv_start kv_end", torch.tensor(6))
def static_cache_window(x, y, start):
    q = (torch.arange(x.shape[0]) + start)[:, None]
    k = torch.arange(y.shape[0])[None]
    return (k <= q) & (k > q - 4)


# --- padding ---


@case("keep", "band key", PADDING)
def causal_and_int_padding(x, y, padding):
    q, k = positions(x, y)
    return (k <= q)[None, None] & (padding[:, None, None, :] == 1)


@case("keep", "band key", PADDING.bool())
def causal_and_bool_padding(x, y, padding):
    q, k = positions(x, y)
    return (k <= q)[None, None] & padding[:, None, None, : y.shape[0]]


@case("add", "key", PADDING.bool())
def padding_times_fill(x, y, padding):
    return (1.0 - padding[:, None, None, :].float()) * torch.finfo(torch.float32).min


@case("add", "key", PADDING)
def padding_filled(x, y, padding):
    return torch.zeros(2, 1, 1, y.shape[0]).masked_fill(padding[:, None, None, :] == 0, NEGATIVE_INFINITY)


@case("add", "band key", PADDING)
def padding_expanded_to_bool(x, y, padding):
    m, n = x.shape[0], y.shape[0]
    lowest = torch.finfo(torch.float32).min
    causal = torch.full((m, n), lowest).triu(1)
    inverted = (1.0 - padding[:, None, None, :].expand(2, 1, m, n).to(torch.float32)).bool()
    return causal[None, None].expand(2, 1, m, n).masked_fill(inverted, lowest)


@case("keep", "key kv_end", PADDING.bool())
def padding_on_both_sides(x, y, padding):
    return (padding[:, : x.shape[0], None] & padding[:, None, :])[:, None]


@case("keep", "key", PADDING)
def key_padding_by_product(x, y, padding):
    return (padding * padding)[:, None, None, :].to(torch.bool)


@case("keep", "ids", DOCUMENTS)
def documents(x, y, ids):
    return (ids[:, : x.shape[0], None] == ids[:, None, :])[:, None]


@case("keep", "ids band", DOCUMENTS)
def documents_and_causal(x, y, ids):
    q, k = positions(x, y)
    return ((ids[:, : x.shape[0], None] == ids[:, None, :]) & (k <= q))[:, None]


@case("keep", "ids key", DOCUMENTS)
def documents_without_padding_id(x, y, ids):
    return ((ids[:, : x.shape[0], None] == ids[:, None, :]) & (ids[:, None, :] != 0))[:, None]


@case("keep", "kv_start kv_end", LENGTHS)
def chunked_with_left_padding(x, y, left):
    q, k = (p[None, None] for p in positions(x, y))
    left = left[:, None, None, None]
    return (k - left) // 4 == (q - left) // 4


# --- nothing, everything, something else ---


@case("keep", "", rows=True)
def everything(x, y):
    q, k = positions(x, y)
    return (k >= 0) & (q < x.shape[0])


@case("drop", "kv_end", rows=False)
def nothing(x, y):
    q, k = positions(x, y)
    return (q + k) >= 0


@case("keep", "residual band")
def causal_with_holes(x, y):
    q, k = positions(x, y)
    return (k <= q) & ((q * k) % 3 != 1)


@case("keep", "key band")
def strided_keys(x, y):
    q, k = positions(x, y)
    return (k <= q) & (k % 3 == 0)


@case("keep", "residual band")
def two_windows(x, y):
    q, k = positions(x, y)
    return ((k <= q) & (k > q - 2)) | (k >= q + 4)


@case("keep", "kv_end", rows=True)
def rows_that_see_all(x, y):
    q, k = positions(x, y)
    return (k <= q) | (q == 3)


@case("keep", "kv_start")
def first_key_per_row(x, y):
    q, k = positions(x, y)
    return torch.minimum(q * 2, k) == q * 2


def lengths_for(name: str) -> tuple[int, int]:
    square = name == "square_subsequent"
    return (11, 11) if square else (9, 11)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CASES)
def test_mask(name, dynamic):
    spec = CASES[name]
    m, n = lengths_for(name)
    trace = Captured if dynamic else Recorded  # Dynamo takes most of the time; once per mask is enough
    captured = trace(spec.function, torch.zeros(m, 3), torch.zeros(n, 5), *spec.args, dynamic=dynamic)
    index, context = context_of(captured)
    form, kept = prove(spec.meaning, captured, index, context)
    assert isinstance(form, ClosedForm), form
    assert_exact(form, captured, kept)
    assert parts_of(form) == spec.parts, form
    if spec.band is not None:
        sizes = (context.q_len, context.kv_len)
        expected = [x(*sizes) if callable(x) else x for x in spec.band]
        for found, wanted in zip((form.band_lower, form.band_upper), expected):
            # Compared as numbers: with dynamic=True the window is a symbol too.
            assert number(found, captured) == number(wanted, captured), form
    if spec.rows is not None:
        assert form.every_row_keeps_a_key() == spec.rows
    assert mask_in_words(form)


def number(x: Any, captured: Captured) -> int | None:
    return None if x is None else expression(sympy.sympify(x), captured.symbols, captured)


def prove(meaning: str, captured: Captured, index: list, context: Any) -> tuple[Any, torch.Tensor]:
    if meaning == "keep":
        return prove_keep(captured.value, index, context), captured.real
    if meaning == "drop":
        return prove_drop(captured.value, index, context), ~captured.real
    result = prove_additive(captured.value, index, context)
    assert isinstance(result, AdditiveMask), result
    return result.keep, captured.real == 0
