"""Run functions in forked processes, several at a time, each with a limit of processor time."""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

Key = TypeVar("Key")
_PATIENCE = 20
"""A process that waits is ended after so many times its limit: other work on the machine must not count."""


@dataclass
class _Child:
    key: Any
    process: int
    started: float
    parts: list[bytes] = field(default_factory=list)


def in_children(
    functions: Iterable[tuple[Key, Callable[[], dict[str, Any]]]],
    *,
    jobs: int,
    timeout: int,
    seconds: float | None = None,
) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Results of the functions as they come; one that fails gives a dict with "status" and "error".

    Args:
        functions: Pairs of a key and a function of plain data.
        jobs: Processes at a time.
        timeout: Seconds of processor time that each may use.
        seconds: After so long no more are started, and what still runs is given up without a result.
    """
    waiting = iter(functions)
    deadline = float("inf") if seconds is None else time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        running: dict[int, _Child] = {}
        while True:
            while len(running) < jobs and time.monotonic() < deadline and (task := next(waiting, None)) is not None:
                descriptor, process = _start(task[1], timeout)
                running[descriptor] = _Child(task[0], process, time.monotonic())
                selector.register(descriptor, selectors.EVENT_READ)
            if not running:
                return
            for event, _ in selector.select(timeout=1.0):
                part = os.read(event.fd, 1 << 16)
                running[event.fd].parts.append(part)
                if not part:
                    selector.unregister(event.fd)
                    os.close(event.fd)
                    child = running.pop(event.fd)
                    yield child.key, _result(child)
            for child in running.values():
                if time.monotonic() > min(child.started + _PATIENCE * timeout, deadline):
                    os.kill(child.process, signal.SIGKILL)
            if time.monotonic() > deadline:
                for child in running.values():
                    os.waitpid(child.process, 0)
                return


def _start(function: Callable[[], dict[str, Any]], timeout: int) -> tuple[int, int]:
    read, write = os.pipe()
    sys.stderr.flush()
    sys.stdout.flush()
    process = os.fork()
    if process:
        os.close(write)
        return read, process
    os.close(read)
    resource.setrlimit(resource.RLIMIT_CPU, (timeout, timeout))
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    try:
        text = json.dumps(function())
    except BaseException as error:
        text = json.dumps({"status": "harness error", "error": repr(error)[:1500]})
    with os.fdopen(write, "w") as pipe:
        pipe.write(text)
    os._exit(0)


def _result(child: _Child) -> dict[str, Any]:
    _, status = os.waitpid(child.process, 0)
    text = b"".join(child.parts)
    if text:
        return json.loads(text)
    ended = status & 0x7F
    return {"status": "timeout" if ended in (signal.SIGKILL, signal.SIGXCPU) else "died", "error": f"signal {ended}"}
