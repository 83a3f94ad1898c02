"""Options: ours and Inductor's told apart, validated, and overridden by variables."""

import os
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from rocm_attn_compile import _torch_private
from rocm_attn_compile.env import SELECTION_VARIABLES, RocmAttnWarning
from rocm_attn_compile.options import _PARSERS, OPTION_VARIABLES, Options, guard_environment, split_options

GIVEN = {
    "attention_backend": "TRITON_ATTN",
    "arch": "gfx942",
    "block_size": 16,
    "strict": True,
    "fuel": 0,
    "dump_dir": "/somewhere",
    "disable": True,
    "verify": True,
    "autotune": True,
    "inline": False,
}


def split(options=None, **environ):
    return split_options(options, environ)


def test_nothing_given():
    assert split() == (Options(), {})
    assert split({}) == (Options(), {})


def test_every_option_bare_prefixed_and_with_dashes():
    assert set(GIVEN) == {field.name for field in fields(Options)} == set(_PARSERS)
    assert split(GIVEN) == (Options(**GIVEN), {})
    assert split({f"rocm_attn.{name}": value for name, value in GIVEN.items()}) == (Options(**GIVEN), {})
    assert split({name.replace("_", "-"): value for name, value in GIVEN.items()}) == (Options(**GIVEN), {})


def test_none_is_not_given():
    assert split({"attention_backend": None, "arch": None, "fuel": None, "block_size": None, "dump_dir": None}) == (
        Options(),
        {},
    )


def test_arch_is_normalized_and_paths_are_text():
    assert split({"arch": "gfx942:sramecc+:xnack-"})[0].arch == "gfx942"
    assert split({"dump_dir": Path("/a/b")})[0].dump_dir == "/a/b"


def test_inductors_options_pass_through_unchanged():
    inductor = {"max_autotune": True, "triton.cudagraphs": False, "epilogue-fusion": True}
    assert split({**inductor, "strict": True}) == (Options(strict=True), inductor)


def test_our_names_are_not_inductors():
    assert not {field.name for field in fields(Options)} & set(_torch_private.inductor_option_names())


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("attention_backen", "attention_backend"),
        ("backend", "attention_backend"),
        ("rocm_attn.stric", "strict"),
        ("archs", "arch"),
        ("max_autotun", "max_autotune"),
        ("triton.cudagraph", "triton.cudagraphs"),
        ("epilogue_fusio", "epilogue_fusion"),
    ],
)
def test_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(ValueError, match="unknown option") as caught:
        split({key: True})
    assert repr(key) in str(caught.value)
    assert repr(nearest) in str(caught.value).split("Options of rocm_attn")[0]


def test_unknown_key_without_a_near_one_lists_ours():
    with pytest.raises(ValueError, match="unknown option 'zzzzzzzz'") as caught:
        split({"zzzzzzzz": 1})
    for field in fields(Options):
        assert field.name in str(caught.value)
    with pytest.raises(ValueError, match=r"unknown option 'rocm_attn\.max_autotune'"):
        split({"rocm_attn.max_autotune": True})


@pytest.mark.parametrize(
    "options",
    [
        {"attention_backend": 1},
        {"arch": "mi300"},
        {"arch": 942},
        {"block_size": 0},
        {"block_size": "16"},
        {"block_size": True},
        {"fuel": -1},
        {"fuel": 1.0},
        {"strict": 1},
        {"strict": "yes"},
        {"strict": None},
        {"disable": "0"},
        {"dump_dir": 3},
    ],
    ids=str,
)
def test_wrong_values(options):
    (key,) = options
    with pytest.raises(ValueError, match=key):
        split(options)


def test_wrong_type_of_an_inductor_option():
    with pytest.raises(ValueError, match="max_autotune"):
        split({"max_autotune": 3})


def test_given_twice():
    assert split({"strict": True, "rocm_attn.strict": True})[0].strict
    with pytest.raises(ValueError, match="given twice"):
        split({"strict": True, "rocm_attn.strict": False})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("strict", "1", True),
        ("strict", "TRUE", True),
        ("disable", "1", True),
        ("disable", "0", False),
        ("verify", "1", True),
        ("fuel", "3", 3),
        ("fuel", "0", 0),
        ("dump_dir", "/x", "/x"),
    ],
)
def test_variables(name, text, value):
    variable = OPTION_VARIABLES[name]
    assert getattr(split(**{variable: text})[0], name) == value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert getattr(split({name: value}, **{variable: text})[0], name) == value


def test_variable_wins_with_a_warning():
    with pytest.warns(RocmAttnWarning, match=r"ROCM_ATTN_FUEL=2 overrides options\['fuel'\]=5"):
        options, _ = split({"fuel": 5}, ROCM_ATTN_FUEL="2")
    assert options.fuel == 2
    with pytest.warns(RocmAttnWarning, match="ROCM_ATTN_STRICT=0"):
        assert split({"strict": True}, ROCM_ATTN_STRICT="0")[0].strict is False


def test_empty_variable_is_not_set():
    assert split({"fuel": 5}, **dict.fromkeys(OPTION_VARIABLES.values(), ""))[0] == Options(fuel=5)


@pytest.mark.parametrize(
    ("variable", "text"), [("ROCM_ATTN_STRICT", "yes"), ("ROCM_ATTN_FUEL", "-1"), ("ROCM_ATTN_FUEL", "x")]
)
def test_meaningless_variable_is_an_error(variable, text):
    with pytest.raises(ValueError, match=f"{variable}={text}"):
        split(**{variable: text})


def test_os_environ_is_read_each_time(monkeypatch):
    monkeypatch.setenv("ROCM_ATTN_DISABLE", "1")
    assert split_options(None)[0].disable
    monkeypatch.delenv("ROCM_ATTN_DISABLE")
    assert not split_options(None)[0].disable


@pytest.mark.parametrize("variable", [*SELECTION_VARIABLES, *OPTION_VARIABLES.values()])
@pytest.mark.parametrize("reader", ["fast", "portable"])
def test_compiled_code_is_for_the_environment_it_was_compiled_in(monkeypatch, variable, reader):
    if reader == "portable":

        class Environ(dict):
            pass

        monkeypatch.setattr("rocm_attn_compile.options.os.environ", Environ(os.environ))
    compilations = []

    def backend(gm, inputs):
        guard_environment()
        compilations.append(os.environ.get(variable))
        return gm.forward

    def function(x):
        return x + 1

    x = torch.ones(2)
    torch.compile(function, backend=backend)(x)
    monkeypatch.setitem(os.environ, variable, "1")
    for _ in range(2):
        torch.compile(function, backend=backend)(x)
    monkeypatch.delitem(os.environ, variable)
    torch.compile(function, backend=backend)(x)
    assert compilations == [None, "1"]
