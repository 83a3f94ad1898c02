"""What tuning found, on disk: one JSON file per GPU model, Triton version and state of the kernel sources.

A file that cannot be read counts as empty, and is replaced. It is written whole under another name and then renamed,
and what other processes have added meanwhile is kept.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

CACHE_VARIABLE = "ROCM_ATTN_CACHE"


def cache_folder() -> Path:
    """`$ROCM_ATTN_CACHE`, or rocm_attn in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rocm_attn"


class TunedStore(MutableMapping[str, Any]):
    """The entries of one file. Read when it is made; every change is written at once.

    If the folder cannot be written to, entries live as long as this object, and a warning is logged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries = self._read()

    def __getitem__(self, key: str) -> Any:
        return self._entries[key]

    def __setitem__(self, key: str, entry: Any) -> None:
        self._entries[key] = entry
        self._write({key: entry}, set())

    def __delitem__(self, key: str) -> None:
        del self._entries[key]
        self._write({}, {key})

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _read(self) -> dict[str, Any]:
        try:
            entries = json.loads(self.path.read_text())["entries"]
            if not isinstance(entries, dict):
                raise ValueError(f"entries are {type(entries).__name__}")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is not what tuning writes (%s); it counts as empty", self.path, error)
            return {}
        return entries

    def _write(self, changed: dict[str, Any], removed: set[str]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                entries = {**self._read(), **changed}
                text = json.dumps({"entries": {k: v for k, v in entries.items() if k not in removed}}, indent=1)
                descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem)
                with os.fdopen(descriptor, "w") as file:
                    file.write(text)
                os.replace(name, self.path)
        except OSError as error:
            log.warning("what tuning found cannot be stored: %s", error)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process at a time. Where the system has no such locks, two may lose each other's entries, no more."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
