"""Run functions in other processes, several at a time, each with a limit of processor time.

The processes are started afresh: where PyTorch was built for a GPU, forks that use autograd abort.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

Key = TypeVar("Key")
_PATIENCE = 20
"""A process that waits is ended after so many times its limit: other work on the machine must not count."""


class _Child:
    """A process that does one thing after the other; `begin` gives it one, its `pipe` has the result."""

    def __init__(self, prepare: Callable[[], None], timeout: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._log = Path(tempfile.mkstemp(suffix=".log")[1])
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, str(self._log), prepare, timeout)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.key: Any = None
        self.started = time.monotonic()

    def begin(self, key: Any, function: Callable[[], dict[str, Any]]) -> None:
        self.key, self.started = key, time.monotonic()
        self.pipe.send(function)

    def result(self) -> tuple[dict[str, Any], bool]:
        """The result that has come, and whether the process still lives."""
        try:
            return self.pipe.recv(), True
        except EOFError:
            self.process.join()
            said = self._log.read_text(errors="replace").strip()[-300:]
            code = self.process.exitcode or 0
            status = "timeout" if -code in (9, 24) else "died"  # SIGKILL, SIGXCPU
            self.end()
            return {"status": status, "error": f"exit status {code}; {said}"}, False

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self._log.unlink(missing_ok=True)


def in_children(
    functions: Iterable[tuple[Key, Callable[[], dict[str, Any]]]],
    *,
    prepare: Callable[[], None],
    jobs: int,
    timeout: int,
    seconds: float | None = None,
) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Results of the functions as they come; one that fails gives a dict with "status" and "error".

    Args:
        functions: Pairs of a key and a function of plain data, which can be pickled.
        prepare: Called first in each process.
        jobs: Processes at a time.
        timeout: Seconds of processor time that each function may use.
        seconds: After so long no more are started, and what still runs is given up without a result.
    """
    waiting = iter(functions)
    deadline = float("inf") if seconds is None else time.monotonic() + seconds
    idle: list[_Child] = []
    busy: list[_Child] = []
    try:
        while True:
            while len(busy) < jobs and time.monotonic() < deadline and (task := next(waiting, None)) is not None:
                child = idle.pop() if idle else _Child(prepare, timeout)
                child.begin(*task)
                busy.append(child)
            if not busy or time.monotonic() > deadline:
                return
            ready = multiprocessing.connection.wait([child.pipe for child in busy], timeout=1.0)
            for child in [child for child in busy if child.pipe in ready]:
                busy.remove(child)
                found, lives = child.result()
                if lives:
                    idle.append(child)
                yield child.key, found
            for child in busy:
                if time.monotonic() > child.started + _PATIENCE * timeout:
                    child.process.kill()
    finally:
        for child in (*idle, *busy):
            child.end()


def _serve(pipe: Any, log: str, prepare: Callable[[], None], timeout: int) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    prepare()
    while True:
        try:
            function = pipe.recv()
        except EOFError:
            return
        usage = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(usage.ru_utime + usage.ru_stime) + timeout
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        try:
            found = function()
        except Exception as error:
            found = {"status": "harness error", "error": repr(error)[:1500]}
        pipe.send(found)
