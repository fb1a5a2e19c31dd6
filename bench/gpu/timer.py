"""How long a run takes: by events on a GPU, by the wall clock in a rehearsal without one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

Run = Callable[[], object]

_LEAST_FLUSH = 256 << 20
_FLUSHES = 16  # so long that the host has launched the run before the first event passes


class Timer(Protocol):
    """Times single runs from cold caches, and captures runs so that no host slows them."""

    def seconds(self, run: Run) -> float:
        """Return how long one run takes that finds none of its inputs in a cache."""

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Run, torch.Tensor]:
        """Return what repeats a run on the same memory, and the output that it writes."""

    def alive(self) -> bool:
        """Whether the device still answers; after an illegal access it does not."""


class WallTimer:
    """For a rehearsal on the CPU: no cache is flushed, and a capture is the run itself."""

    def seconds(self, run: Run) -> float:
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Run, torch.Tensor]:
        output = run()
        return lambda: output.copy_(run()), output

    def alive(self) -> bool:
        return True


class CudaTimer:
    """CUDA events around a run, whose L2 a write of twice its size has filled with other things."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties("cuda").L2_cache_size
        self._other = torch.empty(max(2 * cache, _LEAST_FLUSH), dtype=torch.uint8, device="cuda")
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def seconds(self, run: Run) -> float:
        for _ in range(_FLUSHES):
            self._other.zero_()
        self._begin.record()
        run()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) * 1e-3

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Run, torch.Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what a first run does, compiling above all, cannot be
            for _ in range(3):  # captured
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run()

        def replay(_keeps: Run = run) -> None:  # alive what the graph reads
            graph.replay()

        return replay, output

    def alive(self) -> bool:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True


def timer_for(device: torch.device) -> Timer:
    """Return events for a GPU, the wall clock for a CPU."""
    return CudaTimer() if device.type == "cuda" else WallTimer()
