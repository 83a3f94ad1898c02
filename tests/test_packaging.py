"""The wheel holds the kernels in their place, installing us touches nobody else, registration needs no import."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, *arguments: str, cwd: Path = ROOT) -> str:
    """What `code` prints in a fresh interpreter with `cwd` in front of its path, as for `python -c` and `python -m`."""
    result = subprocess.run([sys.executable, *arguments, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Our wheel, built from a copy of the sources without network or build isolation."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if tracked.returncode != 0:
        pytest.skip("needs a git checkout, to copy what belongs to the project and nothing else")
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run([*command, "-w", str(target)], cwd=target, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_has_every_module_in_its_place(wheel):
    shipped = {name for name in wheel.namelist() if name.endswith(".py")}
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rocm_attn_compile").rglob("*.py")}
    kernels = {"rocm_attn_compile/" + path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").rglob("*.py")}
    assert kernels, "no kernel sources found"
    missing = (package | kernels) - shipped
    assert not missing, f"add their packages to [tool.setuptools] packages in pyproject.toml: {sorted(missing)}"
    assert not shipped - package - kernels


def test_wheel_has_the_kernels_data_files(wheel):
    data = [path for path in (ROOT / "kernels").rglob("*") if path.suffix in (".json", ".hip", ".h")]
    missing = {"rocm_attn_compile/" + path.relative_to(ROOT).as_posix() for path in data} - set(wheel.namelist())
    assert not missing, f"add their kind to [tool.setuptools.package-data] in pyproject.toml: {sorted(missing)}"


def test_wheel_has_one_top_level_package(wheel):
    top = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}
    assert top == {"rocm_attn_compile"}


def test_wheel_is_pure_python_with_licence_and_entry_points(wheel):
    assert wheel.filename is not None and wheel.filename.endswith("-py3-none-any.whl")
    names = wheel.namelist()
    assert any(name.endswith("/LICENSE") for name in names)
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    text = wheel.read(entry_points).decode()
    assert "[torch_dynamo_backends]\nrocm_attn = rocm_attn_compile.compiler:rocm_attn" in text
    assert "rocm-attn = rocm_attn_compile.cli:main" in text


def test_nothing_required_could_replace_torch(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    lines = wheel.read(name).decode().split("\n\n")[0].splitlines()
    requirements = [Requirement(line.split(": ", 1)[1]) for line in lines if line.startswith("Requires-Dist: ")]
    assert requirements, "the extras are expected here"
    assert [str(r) for r in requirements if r.marker is None] == [], "the package itself must require nothing"
    # Extras, and what they require without an extra of their own, do not name torch or triton either.
    seen, queue = set(), [r.name.lower() for r in requirements]
    while queue:
        dependency = queue.pop()
        if dependency in seen:
            continue
        seen.add(dependency)
        try:
            required = metadata.requires(dependency) or []
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed here
        parsed = [Requirement(text) for text in required]
        queue += [r.name.lower() for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert not {"torch", "triton", "pytorch-triton", "pytorch-triton-rocm", "aiter", "amd-aiter"} & seen


def test_the_repository_root_on_the_path_hides_nobodys_kernels_or_triton():
    # The packaging trap: `python -c` and `python -m` put the working directory first.
    code = "import importlib.util as u; s = u.find_spec({!r}); print(s.origin if s else None)"
    for folder in (ROOT, ROOT / "kernels"):
        origin = run_python(code.format("triton"), cwd=folder)
        assert not origin.startswith(str(ROOT / "kernels")), f"triton comes from {origin} when run in {folder}"
    from_elsewhere = run_python(code.format("triton"), cwd=Path(sys.prefix))
    assert run_python(code.format("triton"), cwd=ROOT / "kernels") == from_elsewhere


def test_the_repository_root_on_the_path_leaves_hugging_faces_kernels_importable(tmp_path):
    code = "import sys; sys.path.append(sys.argv[1]); import kernels; print(kernels.__file__, kernels.answer)"
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from kernels.part import answer")
    (tmp_path / "kernels" / "part.py").write_text("answer = 42")
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == f"{tmp_path / 'kernels' / '__init__.py'} 42", result.stderr


def test_installing_us_makes_no_top_level_kernels():
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    assert not run_python(code, cwd=Path(sys.prefix)).startswith(str(ROOT / "kernels"))


def test_kernels_are_importable_under_our_name_only():
    code = "import rocm_attn_compile.kernels.triton as t, triton; print(*t.__path__); print(triton.__name__)"
    path, name = run_python(code, cwd=Path(sys.prefix)).splitlines()
    assert Path(path).name == "triton" and Path(path).parent.name == "kernels"
    assert name == "triton"
    assert not (ROOT / "kernels" / "triton" / "__init__.py").exists(), "it would shadow triton, see pyproject.toml"


def test_transformers_takes_nothing_of_ours_for_hugging_faces_kernels():
    pytest.importorskip("transformers")
    code = "from transformers.utils import is_kernels_available as f; print(f())"
    assert run_python(code) == run_python(code, cwd=Path(sys.prefix))


def test_backend_is_listed_without_importing_us():
    code = """
import sys, torch
assert "rocm_attn" in torch.compiler.list_backends(), torch.compiler.list_backends()
print([name for name in sys.modules if name.startswith("rocm_attn")])
"""
    assert run_python(code, cwd=Path(sys.prefix)) == "[]"


def test_backend_compiles_without_importing_us():
    code = """
import torch
def attention(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1), -1) @ v
q, k, v = (torch.randn(1, 2, n, 8) for n in (5, 7, 7))
compiled = torch.compile(attention, backend="rocm_attn", fullgraph=True)
torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))
import rocm_attn_compile
print(sum(site.replaced for report in rocm_attn_compile.reports() for site in report.sites))
"""
    assert run_python(code, cwd=Path(sys.prefix)) == "1"


def test_without_torch_the_error_says_what_to_do():
    code = """
import sys
sys.modules["torch"] = None  # import torch now raises ImportError
try:
    import rocm_attn_compile
except ImportError as error:
    print(error)
"""
    message = run_python(code, cwd=Path(sys.prefix))
    assert "torch" in message and "install" in message
