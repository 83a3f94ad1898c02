"""The `impl` string of the op: which backend, and a hash of everything its result may depend on.

PyTorch's compile caches key on the graph, in which the op is only a name; the op's code, its kernels and the choice
behind it are not in the key. The hash puts them there, for the forward and the backward graph.
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from ..env import Environment, package_version
from ..ops.impl import MARK

HASHED_PACKAGES = ("rocm_attn_compile.ops", "rocm_attn_compile.kernels")
"""Packages whose sources decide what the op computes without being visible in the graph."""

_SUFFIXES = {".py", ".json", ".hip", ".h"}


def implementation_tag(name: str, env: Environment, inline: bool) -> str:
    """`"<name>@<hash>"`, equal only if backend, sources, target and every flag are equal.

    Args:
        name: Of the chosen backend.
        env: Of this compilation.
        inline: Marks the op as one that compilers see through where they can: `"<name>@<hash>+inline"`.
    """
    parts = (
        name,
        package_version(),
        sources_digest(),
        env.arch,
        env.device_arch,
        env.block_size,
        str(env.aiter),
        astuple(env.flags),
    )
    return f"{name}@{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}" + (MARK if inline else "")


@lru_cache(maxsize=1)
def sources_digest() -> str:
    """Hash of our op and kernel sources; once per process, which runs the sources it started with."""
    digest = hashlib.sha256()
    for folder in _folders():
        # Sorted, and by relative path: the digest must not depend on where we are installed.
        for path in sorted(folder.rglob("*")):
            if path.suffix in _SUFFIXES and path.is_file():
                digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
                digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def _folders() -> list[Path]:
    folders = []
    for package in HASHED_PACKAGES:
        spec = find_spec(package)
        if spec is not None:
            folders += [Path(location) for location in spec.submodule_search_locations or []]
    return folders
