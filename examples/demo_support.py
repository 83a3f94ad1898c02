"""What demo.py needs besides the main job: progress while something takes long, timing, and a table."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show that `what` is going on and for how long: a spinner on a terminal, a line now and then elsewhere."""
    done = threading.Event()
    start = time.perf_counter()
    terminal = sys.stdout.isatty()

    def show() -> None:
        shown = 0.0
        while not done.wait(0.1 if terminal else 1.0):
            elapsed = time.perf_counter() - start
            if terminal:
                print(f"\r{'|/-'[int(elapsed * 5) % 3]} {what} {elapsed:.0f} s ", end="", flush=True)
            elif elapsed - shown >= 15:
                shown = elapsed
                print(f"  ... {what}: {elapsed:.0f} s", flush=True)

    if not terminal:
        print(f"{what} ...", flush=True)
    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if terminal:
            print("\r\033[K", end="")
        print(f"{what}: {time.perf_counter() - start:.1f} s", flush=True)


def synchronize(device: str) -> None:
    """Wait for the GPU, if `device` is one."""
    if device != "cpu":
        torch.accelerator.synchronize()


def seconds(function: Callable[[], Any], device: str) -> float:
    """How long one call takes."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text: the first column to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in [header, *rows]
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)
