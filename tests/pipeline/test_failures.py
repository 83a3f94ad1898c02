"""A defect of ours never stops the user's program: the graph stays as it was, and one warning asks to report it."""

from __future__ import annotations

import pytest
import torch
from pipeline_harness import Pipeline, attend, causal, check, qkv, reports, sites, square
from torch._dynamo.exc import BackendCompilerFailed

import rocm_attn_compile.pipeline
import rocm_attn_compile.recognize.attention
import rocm_attn_compile.rewrite.replace
from rocm_attn_compile.backends.select import StrictError
from rocm_attn_compile.env import RocmAttnWarning


def two(q, k, v):
    """Two attentions and a write that must stay, whatever fails."""
    mask = torch.zeros(q.shape[-2], k.shape[-2])
    mask.masked_fill_(~causal(q.shape[-2]), -1.0)
    return attend(q, k, v), attend(k, q, v, causal(q.shape[-2])) + mask[0, -1]


def name_of(parameter):
    return parameter if isinstance(parameter, str) else ""


def fail(*args, **kwargs):
    raise KeyError("on purpose")


def fail_second(function):
    """Like `function`, but the second call fails."""
    calls = []

    def wrapper(*args, **kwargs):
        calls.append(0)
        return fail() if len(calls) == 2 else function(*args, **kwargs)

    return wrapper


def after(function):
    """Fail when the work is done, so that half of it is in the graph."""

    def wrapper(*args, **kwargs):
        function(*args, **kwargs)
        fail()

    return wrapper


EVERYTHING = [
    # before anything is changed
    (rocm_attn_compile.pipeline, "expand", lambda f: fail),
    (rocm_attn_compile.pipeline, "capture", lambda f: fail),
    (rocm_attn_compile.pipeline, "recognize", lambda f: fail),
    # when both sites are rewritten
    (rocm_attn_compile.rewrite.replace, "remove_dead", lambda f: fail),
    (rocm_attn_compile.rewrite.replace, "remove_dead", after),
    (rocm_attn_compile.pipeline, "_place", fail_second),
]


@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("module", "name", "failing"), EVERYTHING, ids=name_of)
def test_graph_is_left_as_it_was(monkeypatch, module, name, failing, trains):
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing(getattr(module, name)))
        with pytest.warns(RocmAttnWarning, match=r"internal error .*on purpose.*please report") as warned:
            check(two, square, calls=0, refused={"internal_error"} if sites_are_known(name) else None, trains=trains)
    assert len([w for w in warned if w.category is RocmAttnWarning]) == 1
    (report,) = reports()
    assert "internal_error" in report.notes[-1]
    assert not any(site.replaced for site in report.sites)


def sites_are_known(name):
    return name in ("remove_dead", "_place")


ONE_SITE_NAMES = ("recognize_site", "prove_masks", "emit_masks", "from_layout")
ONE_SITE = [
    (rocm_attn_compile.recognize.attention, "recognize_site"),
    (rocm_attn_compile.recognize.attention, "prove_masks"),
    (rocm_attn_compile.rewrite.replace, "emit_masks"),
    (rocm_attn_compile.rewrite.replace, "from_layout"),
]


@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("module", "name"), ONE_SITE, ids=name_of)
def test_other_sites_are_not_concerned(monkeypatch, module, name, trains):
    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail_second(getattr(module, name)))
        with pytest.warns(RocmAttnWarning, match=r"internal error .*on purpose.*please report") as warned:
            check(two, square, calls=1, refused="internal_error", trains=trains)
    assert len([w for w in warned if w.category is RocmAttnWarning]) == 1
    good, bad = sites()
    assert good.replaced and not bad.replaced
    assert [reason.code for reason in bad.reasons] == ["internal_error"]
    assert bad.source.startswith(attend.__code__.co_filename)


@pytest.mark.filterwarnings("ignore:internal error")
@pytest.mark.parametrize(("module", "name"), [EVERYTHING[1][:2], *ONE_SITE], ids=name_of)
def test_strict_does_not_go_on(monkeypatch, module, name):
    """Who asks for all or nothing gets the error itself."""
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(BackendCompilerFailed, match="on purpose") as caught:
        torch.compile(attend, backend=Pipeline(strict=True))(*qkv())
    assert isinstance(caught.value.inner_exception, StrictError if name in ONE_SITE_NAMES else KeyError)
