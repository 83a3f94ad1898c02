"""The shape of the code base: which module may import which, how long a file may be, what is public."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rocm_attn_compile"

# A module imports from its own row and the rows above it, never from below. docs/contributing.md explains the rows.
ROWS: list[set[str]] = [
    {"spec", "reasons", "symbolic", "options", "env", "_torch_private", "_version"},
    {"ops", "kernels"},
    {"capture", "normalize"},
    {"recognize"},
    {"backends"},
    {"rewrite", "lower"},
    {"pipeline", "report", "report_text"},
    {"compiler", "explain", "cli", "cli_kernels", "integrations", "testing", "__init__", "__main__"},
]
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}

MAX_LINES = 300
LONGER_FILES: dict[str, tuple[int, str]] = {  # path: (limit, why it is one file); no limit above 550 in the package
    "rocm_attn_compile/_torch_private.py": (550, "the one door: a thin function per private name, no logic"),
}
MAX_LINES_KERNELS = 700  # a kernel is one function with many flags; splitting it hides what it does

# What the package may say of torch without going through _torch_private: documented names, the types of ops (which
# have no public name), and the tree utilities that all of PyTorch's ecosystem uses.
ALLOWED_UNDERSCORE = {"_ops", "_check", "_check_value", "_check_index", "_check_type", "_assert", "_pytree"}


def package_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def module_of(path: Path) -> str:
    """The dotted name inside the package: "recognize.mask.emit", or "__init__" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """`(line, first component)` of every import of our own modules, also inside functions and under TYPE_CHECKING."""
    package = "rocm_attn_compile"
    parents = path.relative_to(PACKAGE.parent).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{prefix}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == package:
                yield node.lineno, "__init__"
            elif name.startswith(package + "."):
                first = name.split(".")[1]
                is_module = (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").exists() or first == "kernels"
                yield node.lineno, first if is_module else "__init__"


def test_every_module_has_a_row():
    present = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed")
    }
    assert present <= set(ROW_OF), f"say in ROWS where they belong: {present - set(ROW_OF)}"


@pytest.mark.parametrize("path", package_files(), ids=lambda path: module_of(path))
def test_imports_point_upwards(path):
    own = module_of(path).split(".")[0]
    wrong = [
        f"line {line}: {own} (row {ROW_OF[own]}) imports {name} (row {ROW_OF[name]})"
        for line, name in imported_modules(path)
        if ROW_OF[name] > ROW_OF[own]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_import_reader_sees_all_kinds(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "rocm_attn_compile")
    (tmp_path / "rocm_attn_compile" / "ops").mkdir(parents=True)
    for name in ("report", "spec"):
        (tmp_path / "rocm_attn_compile" / f"{name}.py").touch()
    module = tmp_path / "rocm_attn_compile" / "ops" / "x.py"
    module.write_text(
        "import rocm_attn_compile\n"
        "from ..report import a\n"
        "def f():\n    from rocm_attn_compile import spec\n"
        "from . import b\n"
        "import os\n"
    )
    assert sorted(imported_modules(module)) == [(1, "__init__"), (2, "report"), (4, "spec"), (5, "ops")]


@pytest.mark.parametrize("path", package_files(), ids=lambda path: module_of(path))
def test_private_torch_names_go_through_one_door(path):
    if module_of(path) == "_torch_private":
        return
    wrong = []
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "torch" and any(
                part.startswith("_") and not part.startswith("__") and part not in ALLOWED_UNDERSCORE for part in parts
            ):
                wrong.append(f"line {node.lineno}: {name}")
    assert not wrong, "give it a function in _torch_private.py, and that a test:\n" + "\n".join(wrong)


def test_every_private_torch_name_has_a_test():
    tree = ast.parse((PACKAGE / "_torch_private.py").read_text())
    entries = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            entries |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    tests = (ROOT / "tests" / "test_torch_private.py").read_text()
    untested = {name for name in entries if not name.startswith("_") and name not in tests}
    assert not untested, f"no test in tests/test_torch_private.py mentions {sorted(untested)}"


def test_recognition_reads_a_program_through_its_values():
    """What is read past `Value` and `LiveUsers` is on no record: sites would be taken for equal whatever it says."""
    may_see_graphs = {"recognize.attention", "recognize.live", "recognize.unseen"}
    seen = set()
    for path in package_files():
        if module_of(path).startswith("recognize"):
            looks_past = re.search(
                r"\bimport torch\.fx\b|\b(Trace|__dict__|vars|current_shape_env)\b", path.read_text()
            )
            seen |= {module_of(path)} if looks_past else set()
    assert seen == may_see_graphs


def test_files_are_short():
    too_long = []
    for folder, budget in ((PACKAGE, MAX_LINES), (ROOT / "kernels", MAX_LINES_KERNELS), (ROOT / "examples", MAX_LINES)):
        for path in folder.rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            lines = len(path.read_text().splitlines())
            limit = LONGER_FILES[name][0] if name in LONGER_FILES else budget
            if lines > limit:
                too_long.append(f"{name}: {lines} lines, {limit} allowed")
    assert not too_long, "one idea per file; split, or give a reason in LONGER_FILES:\n" + "\n".join(too_long)


def test_exceptions_to_the_length_are_needed_and_small():
    for name, (limit, reason) in LONGER_FILES.items():
        lines = len((ROOT / name).read_text().splitlines())
        assert reason
        assert MAX_LINES < lines <= limit <= 550, f"{name} has {lines} lines, its exception is for {limit}"


def test_importing_us_loads_no_optional_package():
    code = """
import sys
import torch
before = set(sys.modules)
import rocm_attn_compile
optional = {"triton", "transformers", "depyf", "rich", "aiter", "torch._inductor.compile_fx"}
print(sorted(optional & (set(sys.modules) - before)))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=sys.prefix, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_public_names():
    import rocm_attn_compile

    assert set(rocm_attn_compile.__all__) == {
        "Options",
        "RocmAttnWarning",
        "StrictError",
        "__version__",
        "explain",
        "reports",
        "reset_reports",
        "rocm_attn",
    }
    for name in rocm_attn_compile.__all__:
        assert getattr(rocm_attn_compile, name) is not None
