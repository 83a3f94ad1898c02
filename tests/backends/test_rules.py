"""The documented rules against an independent statement of them: tables, tried on every combination."""

import itertools

import pytest

from rocm_attn_compile.backends import BACKENDS, rules
from rocm_attn_compile.env import Flags

ARCHS = (None, "gfx906", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201", "sm_90")
IS_GFX9 = {"gfx90a": 1, "gfx942": 1, "gfx950": 1}
BOOLEANS = ("use_aiter", "use_aiter_mha", "use_aiter_unified", "use_aiter_mla", "prefill_decode")

# With nothing named. Columns: USE_AITER, UNIFIED, MHA, gfx9, PREFILL_DECODE; "." is either.
GENERAL_TABLE = {
    "11...": "ROCM_AITER_UNIFIED_ATTN",
    "1011.": "ROCM_AITER_FA",
    "10101": "ROCM_ATTN",
    "10100": "TRITON_ATTN",
    "100.1": "ROCM_ATTN",
    "100.0": "TRITON_ATTN",
    "0...1": "ROCM_ATTN",
    "0...0": "TRITON_ATTN",
}
# Columns: block size is 1, USE_AITER, USE_AITER_MLA, gfx9, AITER installed.
MLA_TABLE = {
    "1....": "ROCM_AITER_MLA",
    "01111": "ROCM_AITER_MLA",
    "00...": "TRITON_MLA",
    "010..": "TRITON_MLA",
    "0110.": "TRITON_MLA",
    "01110": "TRITON_MLA",
}
# A name -> what (general on gfx9, general elsewhere, MLA with block size 1, MLA otherwise) gives; "=" is the name.
NAMED_TABLE = {
    "TRITON_ATTN": ("=", "=", ValueError, ValueError),
    "ROCM_ATTN": ("=", "=", ValueError, ValueError),
    "FLEX_ATTENTION": ("=", "=", ValueError, ValueError),
    "ROCM_AITER_UNIFIED_ATTN": ("=", "=", ValueError, ValueError),
    "ROCM_AITER_FA": ("=", ValueError, ValueError, ValueError),
    "TRITON_MLA": (RuntimeError, RuntimeError, ValueError, "="),
    "ROCM_AITER_MLA": (RuntimeError, RuntimeError, "=", "="),
    "ROCM_AITER_TRITON_MLA": (RuntimeError, RuntimeError, "=", "="),
    "FLASH_ATTN": (RuntimeError, RuntimeError, ValueError, ValueError),
    "TORCH_SDPA": (RuntimeError, RuntimeError, ValueError, ValueError),
    "": (ValueError,) * 4,
    "triton_attn": (ValueError,) * 4,
    "Triton_Attn": (ValueError,) * 4,
    " TRITON_ATTN": (ValueError,) * 4,
    "TRITON_ATTN_VLLM_V1": (ValueError,) * 4,
    "AUTO": (ValueError,) * 4,
}


def look_up(table, *columns):
    """The one row that fits; a table with two or no fitting rows is a wrong statement."""
    bits = "".join(str(int(column)) for column in columns)
    rows = [value for row, value in table.items() if all(r in (".", b) for r, b in zip(row, bits))]
    assert len(rows) == 1, (bits, rows)
    return rows[0]


def every_flags(name=None):
    for values in itertools.product((False, True), repeat=len(BOOLEANS)):
        yield Flags(attention_backend=name, **dict(zip(BOOLEANS, values)))


def every_situation():
    return itertools.product(every_flags(), ARCHS, (None, 1, 16, 64), (False, True))


def test_unnamed_general():
    tried = 0
    for flags, arch, block_size, aiter in every_situation():
        expected = look_up(
            GENERAL_TABLE,
            flags.use_aiter,
            flags.use_aiter_unified,
            flags.use_aiter_mha,
            IS_GFX9.get(arch, 0),
            flags.prefill_decode,
        )
        name, sentence = rules.documented_choice(flags, arch, "attention", block_size, aiter)
        assert name == expected, (flags, arch, block_size, aiter)
        assert sentence.startswith(f"{name}: ")
        order = rules.enabled_order(flags, arch, "attention", block_size, aiter)
        assert order[0] == expected
        assert order[-2:] == ("TRITON_ATTN", "FLEX_ATTENTION")
        tried += 1
    assert tried == 32 * len(ARCHS) * 4 * 2


def test_unnamed_mla():
    for flags, arch, block_size, aiter in every_situation():
        expected = look_up(
            MLA_TABLE, block_size == 1, flags.use_aiter, flags.use_aiter_mla, IS_GFX9.get(arch, 0), aiter
        )
        name, sentence = rules.documented_choice(flags, arch, "mla", block_size, aiter)
        assert name == expected, (flags, arch, block_size, aiter)
        assert sentence.startswith(f"{name}: ")
        order = rules.enabled_order(flags, arch, "mla", block_size, aiter)
        assert order[0] == expected
        assert order[-3:] == ("TRITON_MLA", "TRITON_ATTN", "FLEX_ATTENTION")


@pytest.mark.parametrize("name", NAMED_TABLE, ids=repr)
def test_named(name):
    for flags, arch, kind, block_size, aiter in itertools.product(
        every_flags(name), ARCHS, ("attention", "mla"), (None, 1, 16), (False, True)
    ):
        column = (2 if block_size == 1 else 3) if kind == "mla" else (0 if arch in IS_GFX9 else 1)
        expected = NAMED_TABLE[name][column]
        arguments = (flags, arch, kind, block_size, aiter)
        if expected == "=":
            chosen, sentence = rules.documented_choice(*arguments)
            assert chosen == name, arguments
            assert "VLLM_ATTENTION_BACKEND" in sentence
        else:
            with pytest.raises(Exception) as caught:
                rules.documented_choice(*arguments)
            assert type(caught.value) is expected, arguments


def test_messages_say_what_to_do():
    with pytest.raises(ValueError, match="Invalid value 'triton_attn' for VLLM_ATTENTION_BACKEND") as caught:
        rules.documented_choice(Flags("triton_attn"), None, "attention", None, False)
    for backend in BACKENDS:
        assert backend.name in str(caught.value)
    assert "Did you mean 'TRITON_ATTN'" in str(caught.value)
    with pytest.raises(ValueError, match=r"only supported on gfx9.*gfx1100"):
        rules.documented_choice(Flags("ROCM_AITER_FA"), "gfx1100", "attention", None, True)
    with pytest.raises(ValueError, match="is not MLA type"):
        rules.documented_choice(Flags("TRITON_ATTN"), None, "mla", None, False)
    with pytest.raises(ValueError, match="does not support block size 1"):
        rules.documented_choice(Flags("TRITON_MLA"), None, "mla", 1, False)
    with pytest.raises(RuntimeError, match=r"TRITON_MLA is not supported on ROCm.*not MLA"):
        rules.documented_choice(Flags("TRITON_MLA"), None, "attention", None, False)
    with pytest.raises(ValueError, match=r'options\["attention_backend"\]'):
        rules.documented_choice(Flags("X"), None, "attention", None, False, source='options["attention_backend"]')


def test_every_declared_backend_is_a_name_of_the_rules():
    assert {backend.name for backend in BACKENDS} == set(rules.NAMES) - {"ROCM_AITER_TRITON_MLA"}
    assert not set(rules.NAMES) & set(rules.OTHER_PLATFORMS)
