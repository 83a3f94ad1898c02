"""The examples and the code blocks of README and docs run and say what their text claims."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def run_example(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the example prints when it is run as a script."""
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def difference(output: str) -> float:
    """The difference to eager that the example printed."""
    found = re.search(r"largest difference to eager: (\S+)", output)
    assert found, output
    return float(found.group(1))


def replaced() -> tuple[int, int]:
    """Attention sites replaced, and all, in what this process compiled since the test began."""
    import rocm_attn_compile

    sites = [site for report in rocm_attn_compile.reports() for site in report.sites]
    return sum(site.replaced for site in sites), len(sites)


def test_hello(capsys):
    output = run_example("01_hello.py", capsys)
    assert difference(output) < 1e-5
    assert replaced() == (1, 1)
    assert "causal" in output


def test_explain(capsys):
    output = run_example("02_explain.py", capsys)
    assert "2 attention site(s), 1 replaced" in output
    assert re.search("^left alone: .*02_explain.py:\\d+ softmax_axis$", output, re.MULTILINE)


def test_llama(capsys):
    pytest.importorskip("transformers")
    output = run_example("03_llama.py", capsys)
    assert difference(output) < 1e-5
    assert replaced() == (2, 2)
    assert len(re.findall("causal, key padding \\(proved.*; TRITON_ATTN$", output, re.MULTILINE)) == 2


def test_training(capsys):
    output = run_example("04_training.py", capsys)
    losses = re.findall(r"loss (\S+) eagerly, (\S+) compiled", output)
    assert len(losses) == 4
    for eager, compiled in losses:
        assert float(compiled) == pytest.approx(float(eager), rel=1e-4)
    assert float(losses[-1][1]) < 0.5 < float(losses[0][1])
    assert replaced() == (1, 1)


def test_demo_quick_and_its_exit_status():
    pytest.importorskip("transformers")
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--quick", "--layers=1", "--tokens=4", "--no-inductor"]
    result = subprocess.run([*command, "--device=cpu"], capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 of 2 attention sites in 2 graphs replaced" in result.stdout
    assert result.stdout.rstrip().endswith("OK")


def test_demo_notices_wrong_results(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    demo = runpy.run_path(str(EXAMPLES / "demo.py"))
    exact = demo["Result"](torch.randn(1, 5, 9).double(), torch.randn(3, 9).double(), [1, 2, 3])
    eager = demo["Result"](exact.prompt_logits.float(), exact.token_logits.float(), [1, 2, 3])
    assert demo["check"]("same", eager, eager, exact)
    wrong_logits = demo["Result"](eager.prompt_logits * 1.001, eager.token_logits, [1, 2, 3])
    assert not demo["check"]("wrong logits", wrong_logits, eager, exact)
    wrong_token = demo["Result"](eager.prompt_logits, eager.token_logits, [1, 5, 3])
    assert not demo["check"]("wrong token", wrong_token, eager, exact)


def python_blocks() -> list:
    """Every ```python block of every page, as a parameter."""
    blocks = []
    for page in PAGES:
        for number, block in enumerate(
            re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        ):
            blocks.append(pytest.param(block, id=f"{page.name}-{number + 1}"))
    return blocks


@pytest.mark.parametrize("block", python_blocks())
def test_code_blocks_of_the_pages_run(block, capsys, monkeypatch):
    module = types.ModuleType("code_block")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where Dynamo of torch 2.12 imports it from
    exec(compile(block, "code block", "exec"), vars(module))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_make_targets_named_in_the_pages_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE))
        assert named <= targets, f"{page.name} names {named - targets}"
