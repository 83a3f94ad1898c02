"""Builds the C++ part on first use, outside the source tree, once per content of the sources and kind of processor."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .structures import declare

SOURCES = Path(__file__).parent / "src"
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
"""No fast-math, no contraction: the arithmetic is the point."""


def compiler() -> str:
    """The C++ compiler: $CXX, else g++ or clang++.

    Raises:
        RuntimeError: There is none.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    raise RuntimeError(
        "the AMD GPU simulator (tools/gcnsim) is built on first use and needs a C++20 compiler, and found none: "
        "install g++ 10 or newer (Debian and Ubuntu: apt install g++), or name one in CXX"
    )


def cache_folder() -> Path:
    """$GCNSIM_CACHE, else a folder of the user's in the cache directory."""
    if "GCNSIM_CACHE" in os.environ:
        return Path(os.environ["GCNSIM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rocm_attn_compile" / "gcnsim"


def _processor() -> str:
    """What -march=native depends on: the processor's feature flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def build() -> Path:
    """The shared library, built if it is not there yet. Safe to call from several processes at once.

    Raises:
        RuntimeError: No compiler, or it fails; with its message.
    """
    cxx = compiler()
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout
    flags = (*FLAGS, *(("-march=native",) if platform.machine() in ("x86_64", "AMD64") else ()))
    key = hashlib.sha256("\0".join([version, *flags, _processor()]).encode())
    for path in sorted(SOURCES.iterdir()):
        key.update(path.name.encode() + path.read_bytes())
    library = cache_folder() / f"gcnsim-{key.hexdigest()[:20]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock, tempfile.TemporaryDirectory(dir=library.parent) as work:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test workers start together; one builds, the others wait for it
        if library.exists():
            return library
        objects = [Path(work) / f"{path.stem}.o" for path in sorted(SOURCES.glob("*.cpp"))]

        def run(*arguments: Any) -> None:
            done = subprocess.run([cxx, *flags, *map(str, arguments)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"building the AMD GPU simulator failed:\n{done.stderr}")

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(lambda each: run("-c", SOURCES / f"{each.stem}.cpp", "-o", each), objects))
        run("-shared", *objects, "-o", Path(work) / "out.so")
        os.replace(Path(work) / "out.so", library)
    return library


@functools.cache
def library() -> Any:
    """The library, loaded."""
    loaded = ctypes.CDLL(str(build()))
    declare(loaded)
    return loaded


@functools.cache
def mnemonics() -> frozenset[str]:
    """All mnemonics that are implemented, without encoding suffixes."""
    return frozenset(library().gcnsim_mnemonics().decode().split())
