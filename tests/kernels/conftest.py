"""Fixtures that the kernels' tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def worker() -> Iterator[Any]:
    """One process for the file in which Triton's interpreter runs; see interpreter_worker.py."""
    # Here: a worker of pytest that runs no such file needs no triton.
    from interpreter_worker import InterpreterWorker

    process = InterpreterWorker()
    yield process
    process.close()
