"""Make the development environment: `python3 tools/make_venv.py --venv .venv`. The Makefile calls it.

A torch that the calling interpreter can import (a ROCm build, say) is used as it is and never replaced; only
without one is torch installed. Needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINNED = ("torch", "triton", "pytorch-triton", "pytorch-triton-rocm", "torchvision", "torchaudio")

FIND_TORCH = """
import pathlib, torch
print(torch.__version__, torch.version.hip, pathlib.Path(torch.__file__).parents[1])
"""
FIND_TRITON = "import triton; print(triton.__version__)"
FIND_PINNED = f"""
from importlib import metadata
for name in {PINNED!r}:
    try:
        print(f"{{name}}=={{metadata.version(name)}}")
    except metadata.PackageNotFoundError:
        pass
"""


def main() -> int:
    """Create or update the environment; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the environment")
    parser.add_argument("--torch", default="torch==2.13.0", help="what to install if there is no torch")
    parser.add_argument("--triton", default="triton==3.7.1", help="the same for triton, on Linux x86-64")
    parser.add_argument("--extras", default="test,lint", help="our optional dependencies to install")
    args = parser.parse_args()

    if sys.version_info < (3, 10):  # noqa: UP036 - the caller may be any Python
        print(f"Python 3.10 or newer is needed, this is {platform.python_version()}; use make PYTHON=python3.12, say.")
        return 1

    outer = ask(Path(sys.executable), FIND_TORCH)
    python = args.venv / "bin" / "python"
    if not python.exists():
        say(f"creating {args.venv}" + (f" on top of torch {outer.split()[0]} of {sys.executable}" if outer else ""))
        try:
            venv.create(args.venv, system_site_packages=bool(outer), with_pip=True)
        except subprocess.CalledProcessError:
            print("Python's venv module could not install pip: on Debian and Ubuntu, apt install python3-venv.")
            return 1
        if outer and not ask(python, FIND_TORCH):
            # The caller is itself a virtual environment: venv looks behind it, at the base interpreter.
            see_packages_of(python, outer.split(maxsplit=2)[2])

    pip(python, "install", "--quiet", "setuptools>=77", "wheel")
    if not ask(python, FIND_TORCH):
        say(f"installing {args.torch}")
        pip(python, "install", args.torch)
    version, hip, _ = ask(python, FIND_TORCH).split(maxsplit=2)
    # The CPU build of torch comes without triton, which the kernel tests interpret and cross-compile with.
    # A ROCm torch brings its own; one from the index would not fit it.
    on_linux_x86 = (platform.system(), platform.machine()) == ("Linux", "x86_64")
    if hip == "None" and on_linux_x86 and not ask(python, FIND_TRITON):
        say(f"installing {args.triton}")
        pip(python, "install", "--quiet", args.triton)

    say(f"installing rocm_attn_compile (editable) with [{args.extras}]; torch {version} stays as it is")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(ask(python, FIND_PINNED))
        pip(python, "install", "--quiet", "--no-build-isolation", "-c", constraints, "-e", f"{ROOT}[{args.extras}]")

    assert ask(python, FIND_TORCH).split()[0] == version, "pip replaced torch although it was constrained"
    if not version.startswith(("2.11.", "2.12.", "2.13.")):
        say(f"note: this is torch {version}; 2.11 to 2.13 are the versions this project is made for")
    return 0


def say(text: str) -> None:
    """Print one line of progress at once."""
    print(f"[venv] {text}", flush=True)


def ask(python: Path, code: str) -> str:
    """What `code` prints under `python`, or "" if it fails. Runs elsewhere, so that nothing here is imported."""
    result = subprocess.run(
        [str(python.absolute()), "-c", code], cwd=tempfile.gettempdir(), capture_output=True, text=True, check=False
    )
    return result.stdout.strip() if result.returncode == 0 else ""


def pip(python: Path, *args: str | Path) -> None:
    """Run pip; its own message is the error message."""
    result = subprocess.run([str(python.absolute()), "-m", "pip", *map(str, args)], check=False)
    if result.returncode != 0:
        sys.exit(f"pip {' '.join(map(str, args))} failed, see above")


def see_packages_of(python: Path, site_packages: str) -> None:
    """Let the environment of `python` also import what lies in `site_packages`, after its own packages."""
    own = ask(python, "import sysconfig; print(sysconfig.get_path('purelib'))")
    (Path(own) / "outer_environment.pth").write_text(site_packages + os.linesep)


if __name__ == "__main__":
    sys.exit(main())
