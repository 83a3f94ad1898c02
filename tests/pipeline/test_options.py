"""What a user can ask for, and the errors, warnings, files and logs that come back."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from pipeline_harness import Pipeline, attend, codes, qkv, reports, sites
from torch._dynamo.exc import BackendCompilerFailed

from rocm_attn_compile.backends.select import BackendUnavailableError, StrictError
from rocm_attn_compile.env import RocmAttnWarning


def compiled_with(lowering: str = "eager", **options):
    pipeline = Pipeline(lowering, **options)
    return torch.compile(attend, backend=pipeline, fullgraph=True), pipeline


def three(q, k, v):
    return attend(q, k, v), attend(q, k, v + 1), attend(q, k, v + 2)


# --- through torch.compile, into Inductor ---


@pytest.mark.parametrize("arguments", [{}, {"options": {"max_autotune": False, "epilogue_fusion": True, "fuel": 3}}])
def test_backend_by_name(arguments):
    inputs = qkv()
    compiled = torch.compile(attend, backend="rocm_attn", fullgraph=True, **arguments)
    torch.testing.assert_close(compiled(*inputs), attend(*inputs))
    assert [site.backend for site in sites()] == ["TRITON_ATTN"]
    (report,) = reports()
    assert report.options["fuel"] == arguments.get("options", {}).get("fuel")


PROGRAM = """
    import torch
    assert "rocm_attn" in torch.compiler.list_backends()
    import sys
    def attend(q, k, v):
        return (q @ k.mT).softmax(-1) @ v
    inputs = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    compiled = torch.compile(attend, backend="rocm_attn", mode="reduce-overhead", options=None, dynamic=False)
    torch.testing.assert_close(compiled(*inputs), attend(*inputs))
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v)
    module = Attention()
    module.compile(backend="rocm_attn")
    torch.testing.assert_close(module(*inputs), attend(*inputs))
    if hasattr(torch.compiler, "set_default_backend"):
        torch.compiler.set_default_backend("rocm_attn")
        torch.testing.assert_close(torch.compile(lambda *a: attend(*a) + 1)(*inputs), attend(*inputs) + 1)
        assert len(sys.modules["rocm_attn_compile"].reports()) == 3
    replaced = [site.replaced for report in sys.modules["rocm_attn_compile"].reports() for site in report.sites]
    assert replaced == [True] * len(replaced), replaced
    print("sites", len(replaced))
"""


def test_without_importing_us():
    """By its name only, in a fresh process: torch.compile, module.compile, the default backend; `mode` is accepted."""
    command = [sys.executable, "-P", "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    expected = 3 if hasattr(torch.compiler, "set_default_backend") else 2
    assert done.stdout.split() == ["sites", str(expected)]


def test_modes_are_checked_by_torch():
    with pytest.raises((RuntimeError, BackendCompilerFailed), match="Unrecognized mode=fastest"):
        torch.compile(attend, backend="rocm_attn", mode="fastest")(*qkv())


# --- errors reach the user with our text ---


@pytest.mark.parametrize(
    ("options", "nearest"),
    [({"atention_backend": "TRITON_ATTN"}, "attention_backend"), ({"max_autotun": True}, "max_autotune")],
)
def test_unknown_option(options, nearest):
    with pytest.raises(BackendCompilerFailed, match=f"unknown option.*did you mean.*{nearest}") as caught:
        torch.compile(attend, backend="rocm_attn", options=options)(*qkv())
    assert isinstance(caught.value.inner_exception, ValueError)


def test_invalid_backend_in_the_environment(monkeypatch):
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "TRITON_ATN")
    compiled, _ = compiled_with()
    with pytest.raises(BackendCompilerFailed, match=r"TRITON_ATN\b") as caught:
        compiled(*qkv())
    assert isinstance(caught.value.inner_exception, ValueError)
    assert "TRITON_ATTN" in str(caught.value)


def test_explicit_backend_whose_hardware_is_missing(monkeypatch):
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "ROCM_AITER_FA")
    compiled, _ = compiled_with(arch="gfx942")
    with pytest.raises(BackendCompilerFailed, match=r"ROCM_AITER_FA.*cannot run here") as caught:
        compiled(*qkv())
    assert isinstance(caught.value.inner_exception, BackendUnavailableError)


def test_the_program_runs_once_the_mistake_is_repaired(monkeypatch):
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "NONSENSE")
    compiled, pipeline = compiled_with()
    inputs = qkv()
    with pytest.raises(BackendCompilerFailed):
        compiled(*inputs)
    monkeypatch.delenv("VLLM_ATTENTION_BACKEND")
    torch.testing.assert_close(compiled(*inputs), attend(*inputs))
    assert pipeline.calls == 1


# --- fallback and strict ---


def test_fallback_warns_once_and_says_why():
    pipeline = Pipeline("eager", attention_backend="FLEX_ATTENTION")
    with pytest.warns(RocmAttnWarning, match="TRITON_ATTN instead of FLEX_ATTENTION") as warned:
        torch.compile(three, backend=pipeline)(*qkv())
    assert len([w for w in warned if issubclass(w.category, RocmAttnWarning)]) == 1
    assert pipeline.calls == 3
    for site in sites():
        assert (site.replaced, site.backend) == (True, "TRITON_ATTN")
        assert {"not_built", "head_dim"} <= {reason.code for reason in site.reasons}
        assert "FLEX_ATTENTION" in site.choice[0]


@pytest.mark.filterwarnings("ignore:attention runs on")
def test_strict_lists_all_reasons_of_all_sites():
    pipeline = Pipeline("eager", attention_backend="FLEX_ATTENTION", strict=True)
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(three, backend=pipeline)(*qkv())
    error = caught.value.inner_exception
    assert isinstance(error, StrictError)
    assert len(error.problems) == 3
    assert {"not_built", "head_dim"} <= {reason.code for reason in error.reasons}
    for reason in error.reasons:
        assert reason.text in str(caught.value)
    assert len(reports()) == 1, "the report of what failed is kept"


def test_strict_is_satisfied_by_the_default():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled, pipeline = compiled_with(strict=True)
        compiled(*qkv())
    assert pipeline.calls == 1


def test_strict_and_an_attention_that_cannot_be_proved():
    def two_values(q, k, v):
        weights = (q @ k.mT).softmax(-1)
        return weights @ v + weights @ (2 * v)

    with pytest.raises(BackendCompilerFailed, match="weights_used_elsewhere"):
        torch.compile(two_values, backend=Pipeline("eager", strict=True))(*qkv())


def test_strict_does_not_mind_other_softmaxes():
    pipeline = Pipeline("eager", strict=True)
    torch.compile(lambda q, k, v: attend(q, k, v).softmax(-1), backend=pipeline)(*qkv())
    assert pipeline.calls == 1
    assert len(reports()[0].look_alikes) == 1


# --- the other options ---


@pytest.mark.parametrize("fuel", [0, 1, 2, 5])
def test_fuel(fuel):
    pipeline = Pipeline("eager", fuel=fuel)
    inputs = qkv()
    torch.testing.assert_close(torch.compile(three, backend=pipeline)(*inputs), three(*inputs))
    assert pipeline.calls == min(fuel, 3)
    assert [site.replaced for site in sites()] == [i < fuel for i in range(3)]
    assert codes() == ({"no_fuel"} if fuel < 3 else set())


def test_disable(monkeypatch):
    compiled, pipeline = compiled_with(disable=True)
    inputs = qkv()
    torch.testing.assert_close(compiled(*inputs), attend(*inputs), rtol=0, atol=0)
    assert (pipeline.calls, sites()) == (0, [])
    monkeypatch.setenv("ROCM_ATTN_DISABLE", "1")
    other, pipeline = compiled_with()
    torch.testing.assert_close(other(*inputs), attend(*inputs), rtol=0, atol=0)
    assert pipeline.calls == 0


def test_arch():
    pipeline = Pipeline("eager", arch="gfx942:sramecc+:xnack-")
    torch.compile(attend, backend=pipeline)(*qkv())
    (report,) = reports()
    assert (report.environment["arch"], report.environment["arch_source"]) == ("gfx942", "option")
    (site,) = report.sites
    assert "arch" not in {reason.code for reason in site.rejected["ROCM_AITER_FA"]}


def without_comments(text):
    return "\n".join(line for line in text.splitlines() if not line.strip().startswith("#"))


def test_dump_dir(tmp_path):
    pipeline = Pipeline("eager", dump_dir=str(tmp_path / "new"))
    torch.compile(attend, backend=pipeline)(*qkv())
    files = {path.name.split(".", 1)[1]: path.read_text() for path in (tmp_path / "new").iterdir()}
    assert set(files) == {"before.py", "after.py", "report.json", "report.txt"}
    assert "rocm_attn.attention" not in files["before.py"] and "softmax(" in without_comments(files["before.py"])
    assert "rocm_attn.attention" in files["after.py"] and "softmax(" not in without_comments(files["after.py"])
    assert json.loads(files["report.json"])["sites"][0]["replaced"] is True
    assert files["report.txt"] == str(reports()[0])


def test_depyf_writes_the_rewritten_graph(tmp_path):
    depyf = pytest.importorskip("depyf")
    inputs = qkv()
    with depyf.prepare_debug(str(tmp_path)):
        torch.compile(attend, backend=Pipeline("aot_eager"))(*inputs)
    texts = [path.read_text() for path in tmp_path.rglob("*ROCm_Attention_Rewritten_Graph*.py")]
    assert texts and all("rocm_attn.attention" in text for text in texts)


# --- logs ---


@pytest.fixture
def messages(monkeypatch):
    """Records of our logger, at the level that TORCH_LOGS="+rocm_attn_compile" sets."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("rocm_attn_compile")
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    logger.addHandler(handler)
    logging.Logger.manager._clear_cache()
    yield records
    logger.removeHandler(handler)
    logging.Logger.manager._clear_cache()


def test_log(messages):
    torch.compile(attend, backend=Pipeline("eager"))(*qkv())
    info = [record.getMessage() for record in messages if record.levelno == logging.INFO]
    assert info == ["graph 0/0: 1 attention site: 1 TRITON_ATTN"]
    debug = "\n".join(record.getMessage() for record in messages if record.levelno == logging.DEBUG)
    assert str(reports()[0]) in debug
    assert "ROCm_Attention_Rewritten_Graph" in debug and "rocm_attn.attention" in debug


LOGGED = """
    import torch
    def attend(q, k, v):
        return (q @ k.mT).softmax(-1) @ v
    torch._dynamo.config.suppress_errors = False
    torch.compile(attend, backend="rocm_attn", options={"disable": False})(*[torch.randn(1, 2, 5, 8) for _ in range(3)])
"""


def test_torch_logs():
    """The variable of PyTorch shows our logger by its name, with no registration."""
    for value, expected in (("rocm_attn_compile", False), ("+rocm_attn_compile", True)):
        environ = {**os.environ, "TORCH_LOGS": value}
        command = [sys.executable, "-P", "-c", textwrap.dedent(LOGGED)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environ)
        assert done.returncode == 0, done.stderr
        assert "graph 0/0: 1 attention site: 1 TRITON_ATTN" in done.stderr
        assert ("ROCm_Attention_Rewritten_Graph" in done.stderr) == expected
        assert ("replaced by TRITON_ATTN" in done.stderr) == expected
