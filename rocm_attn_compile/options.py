"""What `torch.compile(..., options={...})` accepts: our options, split from Inductor's."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from . import _torch_private
from .env import SELECTION_VARIABLES, RocmAttnWarning, normalize_arch

PREFIX = "rocm_attn."


@dataclass(frozen=True)
class Options:
    """Our options. Keys of `options={...}` are the field names, bare or as "rocm_attn.<name>".

    Attributes:
        attention_backend: Name of the backend to use, such as "TRITON_ATTN"; the same choice as
            `VLLM_ATTENTION_BACKEND`, which wins where both are set. None follows the documented rules.
        arch: Target architecture such as "gfx942" where no such GPU is there; `ROCM_ATTN_ARCH` wins over it.
        block_size: Page size of the KV cache, which the rules for MLA depend on; None is 16.
        strict: A site that its chosen backend cannot take is an error that lists all reasons, not a fallback.
        fuel: Replace at most this many sites per graph, to find the one that makes a difference; None is no limit.
        dump_dir: Folder for the graphs before and after and the report of every compilation; None writes nothing.
        disable: Replace nothing: every graph goes to Inductor as it is.
        verify: Run every site both ways at compile time, on random tensors of the real shapes and strides and on
            adversarial masks, and leave it alone if the results or gradients differ. For debugging: it takes the
            memory and the time of the old code.
        autotune: Measure launch configurations of the kernels on the GPU while compiling, and keep what is found on
            disk (`ROCM_ATTN_CACHE`); None does so in the modes "max-autotune" and "max-autotune-no-cudagraphs".
        inline: Let Inductor see what the op does on the device, where that can be written down, and call it directly.
            False keeps every attention one opaque call of `rocm_attn::attention` in the compiled program.
    """

    attention_backend: str | None = None
    arch: str | None = None
    block_size: int | None = None
    strict: bool = False
    fuel: int | None = None
    dump_dir: str | None = None
    disable: bool = False
    verify: bool = False
    autotune: bool | None = None
    inline: bool = True


OPTION_VARIABLES = {
    "strict": "ROCM_ATTN_STRICT",
    "fuel": "ROCM_ATTN_FUEL",
    "dump_dir": "ROCM_ATTN_DUMP_DIR",
    "disable": "ROCM_ATTN_DISABLE",
    "verify": "ROCM_ATTN_VERIFY",
}
"""Options a variable sets from outside the program; set and not empty, the variable wins. `ROCM_ATTN_ARCH` and
`VLLM_ATTENTION_BACKEND` are read with the environment (env.py), because reports say where their value came from."""


def split_options(
    options: Mapping[str, Any] | None, environ: Mapping[str, str] | None = None
) -> tuple[Options, dict[str, Any]]:
    """Separate our options from Inductor's and apply the `ROCM_ATTN_*` variables.

    Args:
        options: As given to `torch.compile`; None is empty.
        environ: Read instead of `os.environ`, for tests.

    Returns:
        Ours, validated, and the rest, which Inductor accepts.

    Raises:
        ValueError: Unknown key (the nearest known ones are named), wrong type or value, ours or Inductor's, or a
            variable with a value that means nothing.
    """
    environ = os.environ if environ is None else environ
    ours: dict[str, Any] = {}
    inductor: dict[str, Any] = {}
    for key, value in (options or {}).items():
        name = str(key).removeprefix(PREFIX).replace("-", "_")
        if name not in _PARSERS:
            inductor[key] = value
            continue
        parsed = _PARSERS[name](value, f"options[{key!r}]")
        if name in ours and ours[name] != parsed:
            raise ValueError(f"option {name!r} is given twice: as {ours[name]!r} and as {parsed!r}; give it once")
        ours[name] = parsed
    _check_inductor(inductor)
    for name, variable in OPTION_VARIABLES.items():
        if text := environ.get(variable):
            value = _PARSERS[name](_from_text(name, text), f"{variable}={text}")
            if name in ours and ours[name] != value:
                warnings.warn(
                    f"{variable}={text} overrides options[{name!r}]={ours[name]!r}: the environment wins",
                    RocmAttnWarning,
                    stacklevel=3,
                )
            ours[name] = value
    return Options(**ours), inductor


TUNING_MODES = ("max-autotune", "max-autotune-no-cudagraphs")


def follow_mode(options: Options, mode: str | None) -> Options:
    """The options with what `torch.compile(mode=...)` decides where they leave it open."""
    return replace(options, autotune=True) if options.autotune is None and mode in TUNING_MODES else options


def guard_environment() -> None:
    """Make the graph that Dynamo is compiling valid only while the variables that decided about it stay as they are.

    Dynamo keeps compiled code per backend object and options; without this, `torch.compile` after a change of the
    environment would go on with the old code.
    """
    get, keys = _environ_reader()
    now = tuple(map(get, keys))
    names = ", ".join((*SELECTION_VARIABLES, *OPTION_VARIABLES.values()))
    _torch_private.add_guard(lambda: tuple(map(get, keys)) == now, f"rocm_attn: unchanged environment ({names})")


def _environ_reader() -> tuple[Callable[[Any], Any], tuple]:
    """A fast getter and its keys: this runs before every call, and `os.environ.get` converts text each time."""
    names = (*SELECTION_VARIABLES, *OPTION_VARIABLES.values())
    try:
        data, encode = os.environ._data, os.environ.encodekey  # type: ignore[attr-defined]
        return data.get, tuple(map(encode, names))
    except AttributeError:  # not CPython's os.environ
        return os.environ.get, names


def _check_inductor(options: dict[str, Any]) -> None:
    known = _torch_private.inductor_option_names()
    for key in options:
        if str(key).replace("-", "_") not in known:
            raise ValueError(_unknown(str(key), known))
    try:
        _torch_private.check_inductor_options(options)
    except RuntimeError as error:  # a wrong type; names were checked above
        raise ValueError(f"Inductor rejects an option: {error}") from error


def _unknown(key: str, inductor_names: list[str]) -> str:
    ours = [field.name for field in fields(Options)]
    near_ours = difflib.get_close_matches(key.removeprefix(PREFIX), ours, n=1, cutoff=0.5)
    near_inductor = [] if key.startswith(PREFIX) else difflib.get_close_matches(key, inductor_names, n=2, cutoff=0.5)
    near = [repr(name) for name in near_ours] + [f"Inductor's {name!r}" for name in near_inductor]
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    return (
        f"unknown option {key!r}{hint} Options of rocm_attn are {', '.join(ours)}; every other key must be one of "
        f"Inductor's (torch._inductor.list_options())"
    )


def _from_text(name: str, text: str) -> Any:
    """A variable's text as the value its option would have; text that is no such value is left to the parser."""
    if name in ("strict", "disable", "verify"):
        return {"1": True, "true": True, "0": False, "false": False}.get(text.lower(), text)
    return int(text) if name == "fuel" and text.isdigit() else text


def _text(value: Any, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where} must be a string or None, got {value!r}")
    return value


def _arch(value: Any, where: str) -> str | None:
    text = _text(value, where)
    return None if text is None else normalize_arch(text, where)


def _path(value: Any, where: str) -> str | None:
    return str(value) if isinstance(value, Path) else _text(value, where)


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{where} must be True or False (0 or 1 as a variable), got {value!r}")
    return value


def _count(minimum: int) -> Callable[[Any, str], int | None]:
    def parse(value: Any, where: str) -> int | None:
        # bool is an int in Python, and True as a count is always a mistake
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= minimum):
            return value
        raise ValueError(f"{where} must be an integer of at least {minimum} or None, got {value!r}")

    return parse


_PARSERS: dict[str, Callable[[Any, str], Any]] = {
    "attention_backend": _text,
    "arch": _arch,
    "block_size": _count(1),
    "strict": _flag,
    "fuel": _count(0),
    "dump_dir": _path,
    "disable": _flag,
    "verify": _flag,
    "autotune": lambda value, where: None if value is None else _flag(value, where),
    "inline": _flag,
}
