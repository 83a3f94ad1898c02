"""Compiles launches in parallel and times them on the GPU, for autotune.py."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .launch import Launch

REPLAYS = 7
TARGET_US = 2000.0
"""Short kernels are repeated inside one measurement until it takes about this long."""


class GpuDevice:
    """The current device."""

    def compile(self, launches: Sequence[Launch]) -> None:
        """Compile all in threads: most of the work is LLVM's and the assembler's, outside Python."""
        try:
            from triton.runtime._async_compile import AsyncCompileMode
        except ImportError:  # not in this Triton: each is compiled when it first runs
            return
        workers = max(1, min(16, os.cpu_count() or 1))
        with ThreadPoolExecutor(workers) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for launch in launches:
                launch.compile()

    def microseconds(self, launches: Sequence[Launch]) -> float:
        """Median of replays of a CUDA (HIP) graph, so that the host's time does not count."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            launches[0].run()
            once = self._elapsed(lambda: [launch.run() for launch in launches]) / len(launches)
            rounds = max(1, min(50, int(TARGET_US / max(once, 1.0) / len(launches))))
            graph = torch.cuda.CUDAGraph()
            # Other threads of the program may use the device meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                for _ in range(rounds):
                    for launch in launches:
                        launch.run()
            graph.replay()
            times = sorted(self._elapsed(graph.replay) for _ in range(REPLAYS))
        torch.cuda.current_stream().wait_stream(stream)
        return times[REPLAYS // 2] / (rounds * len(launches))

    def _elapsed(self, call: Any) -> float:
        """Microseconds between two events around a call."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1000
