"""How fast a workload is against its rivals: all from cold caches, in turn, in one process."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import asdict
from typing import Any

import torch

from bench.gpu.checks import inputs_of
from bench.gpu.peaks import Peak, rates
from bench.gpu.shapes import Shape
from bench.gpu.timer import Run, Timer
from bench.gpu.workloads import Function, Workload
from prunekit.measure.timing import Summary, summarise

_STEADY = 0.05  # three runs in a row that differ by less are warm
_MOST_WARMUPS = 50
_MOST_WARMUP_S = 0.5


class Layers:
    """A workload's inputs on the device: one set, or as many layers as no cache holds."""

    def __init__(self, workload: Workload, shape: Shape, dtype, device, layer_bytes: int):
        self.workload = workload
        count = 1
        if workload.layered:
            count = max(2, -(-layer_bytes // workload.moved(shape, dtype.itemsize)))
        self.inputs = [inputs_of(workload, shape, dtype, device, seed) for seed in range(count)]

    def runner(self, function: Function, timer: Timer) -> Run:
        """Return what runs a function over all layers; as one graph where they are several."""

        def run():
            for inputs in self.inputs:
                result = self.workload.run(function, inputs)
            return result

        run()  # compiles, and raises what it has to raise
        return timer.capture(run)[0] if self.workload.layered else run

    def seconds(self, run: Run, timer: Timer) -> float:
        """Return the seconds a layer."""
        return timer.seconds(run) / len(self.inputs)


def warm_up(seconds: Callable[[], float]) -> int:
    """Run until three runs in a row take the same time; return how many runs it took."""
    taken: list[float] = []
    while len(taken) < _MOST_WARMUPS and sum(taken) < _MOST_WARMUP_S:
        taken.append(seconds())
        last = taken[-3:]
        if len(last) == 3 and max(last) <= (1 + _STEADY) * min(last):
            break
    return len(taken)


def race(seconds: dict[Hashable, Callable[[], float]], rounds: int) -> dict[Hashable, Summary]:
    """Warm every contender up, then time each once a round."""
    for once in seconds.values():
        warm_up(once)
    taken: dict[Hashable, list[float]] = {name: [] for name in seconds}
    for _ in range(rounds):
        for name, once in seconds.items():
            taken[name].append(once())
    return {name: summarise(values) for name, values in taken.items()}


def contenders(workload: Workload, compiler: str, modes: list[str]) -> dict[str, Function]:
    """Return the functions to time by name: ours, torch, torch compiled, and the rivals."""
    found = {"ours": workload.ours, "torch": workload.plain}
    if workload.compiled:
        torch._dynamo.reset()  # or shapes seen before would make this one's code a general one
        for mode in modes:
            name = "torch.compile" if mode == "default" else f"torch.compile {mode}"
            options = {"mode": mode} if compiler == "inductor" else {}
            found[name] = torch.compile(workload.plain, backend=compiler, dynamic=False, **options)
    return found | workload.rivals


def measure(
    shape: Shape,
    layers: Layers,
    timer: Timer,
    functions: dict[str, Function],
    rounds: int,
    peak: Peak | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Time every contender; one that fails, other than ours, is left out with its error."""
    once, refused = {}, {}
    for name, function in functions.items():
        try:
            run = layers.runner(function, timer)
        except Exception as error:
            if name == "ours" or not timer.alive():
                raise
            refused[name] = f"{type(error).__name__}: {error}"[:500]
            continue
        once[name] = lambda run=run: layers.seconds(run, timer)
    workload = layers.workload
    moved, flops = workload.moved(shape, dtype.itemsize), workload.flops(shape)
    return {
        "layers": len(layers.inputs),
        "rounds": rounds,
        "bytes": moved,
        "flops": flops,
        "contenders": {
            name: asdict(summary) | rates(summary.median, moved, flops, peak)
            for name, summary in race(once, rounds).items()
        },
        "refused": refused,
    }
