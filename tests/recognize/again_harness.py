"""Recognise a captured graph twice, each site in full and equal sites once, and hold what was found side by side."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from rocm_attn_compile import _torch_private, pipeline
from rocm_attn_compile.capture import capture, expand
from rocm_attn_compile.capture.trace import Trace, Value
from rocm_attn_compile.reasons import Reason
from rocm_attn_compile.recognize import Sites, counts, recognize
from rocm_attn_compile.recognize.axes import Atom, resolve
from rocm_attn_compile.recognize.labels import Labels
from rocm_attn_compile.recognize.live import LiveUsers
from rocm_attn_compile.recognize.mask.classify import ClosedForm
from rocm_attn_compile.recognize.region import LookAlike, Region
from rocm_attn_compile.recognize.translation import OF_A_SITE, Translation


class Both:
    """A Dynamo backend that compares and leaves the graph as it is.

    Attributes:
        counts: "in_full" and "equal", of all graphs.
        codes: Of the look-alikes.
        found: What was found with equal sites recognised once.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(in_full=0, equal=0)
        self.codes: list[str] = []
        self.found: list[Region | LookAlike] = []

    def __call__(self, graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable:
        expand(graph_module)
        trace = capture(graph_module, example_inputs, _torch_private.current_shape_env())
        traces = list(pipeline._with_nested(trace))
        pipeline._recognize_all(traces)  # head sizes become numbers
        each = [recognize(one) for one in traces]
        sites = Sites()
        once = [recognize(one, sites) for one in traces]
        for one, (regions, others), (regions_once, others_once) in zip(traces, each, once):
            assert len(regions) == len(regions_once) and len(others) == len(others_once)
            for want, got in zip((*regions, *others), (*regions_once, *others_once)):
                _Same(one)(want, got, "")
            self.codes += [other.reason.code for other in others]
        self.found += [item for regions, others in once for item in (*regions, *others)]
        self.counts.update(counts(item for regions, others in once for item in (*regions, *others)))
        return graph_module.forward


class _Same:
    """Asserts that two findings about one site are equal, but for what atoms are called."""

    def __init__(self, trace: Trace) -> None:
        self._atoms: dict[Atom, Atom] = {}
        self._back: dict[Atom, Atom] = {}
        self._first = Translation(_First(LiveUsers(trace)))

    def __call__(self, want: Any, got: Any, at: str) -> None:
        assert type(want) is type(got), at
        if isinstance(want, Value):
            assert want is got, at
        elif isinstance(want, (list, tuple)):
            if any(isinstance(x, Atom) for x in (*want, *got)):
                want, got = resolve(want), resolve(got)
            assert len(want) == len(got), at
            for i, pair in enumerate(zip(want, got)):
                self(*pair, f"{at}[{i}]")
        elif isinstance(want, Atom):
            assert self._atoms.setdefault(want, got) is got and self._back.setdefault(got, want) is want, at
            assert want.size == got.size, at
        elif isinstance(want, Labels):
            self([[value, dims] for value, dims in want.items()], [[*item] for item in got.items()], at)
        elif isinstance(want, ClosedForm):
            # Of two tensors that are computed alike either one may be read.
            assert self._first(want) == self._first(got), at
            assert want.every_row_keeps_a_key() == got.every_row_keeps_a_key(), at
        elif isinstance(want, Reason):
            assert want.code == got.code, at
            # Notes are not reported. Of two tensors that are computed alike either one may be named.
            assert at.startswith(".notes") or _without_numbers(want.text) == _without_numbers(got.text), at
        elif isinstance(want, OF_A_SITE):
            for field in dataclasses.fields(want):
                if field.name != "equal_to":
                    self(getattr(want, field.name), getattr(got, field.name), f"{at}.{field.name}")
        else:
            assert want == got or repr(want) == repr(got), f"{at}: {want} is not {got}"


def _without_numbers(text: str) -> str:
    return re.sub(r"%\d+:", "%:", text)


class _First(dict):
    """Each value -> the first one that is computed alike."""

    def __init__(self, live: LiveUsers) -> None:
        super().__init__()
        self._live = live

    def __missing__(self, value: Value) -> Value:
        return self._live.proofs.first(value)


def layers(*functions: Callable) -> Callable:
    """A program of one call after the other, each with a tuple of arguments of its own."""

    def program(*arguments):
        return tuple(function(*own) for function, own in zip(functions, arguments))

    return program
