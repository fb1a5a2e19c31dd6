"""One run of the benchmark in this process: what is done, in which order, until time is up."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from bench.gpu import checks, speed
from bench.gpu.environment import card_state, environment
from bench.gpu.peaks import peak_of
from bench.gpu.results import MEASURED, REHEARSED, TUNED, Results, safe_name
from bench.gpu.shapes import SUITES, Shape
from bench.gpu.supervise import LOST
from bench.gpu.timer import timer_for
from bench.gpu.workloads import ALL, WORKLOADS, Workload
from prunekit.measure.provenance import device_name
from prunekit.ops import force_backend
from prunekit.ops.registry import OPERATIONS


def results_path(options: argparse.Namespace) -> Path:
    """Return where a run writes: tuning beside the figures, a rehearsal under its own name."""
    name = "rehearsal" if options.device == "cpu" else safe_name(device_name())
    return options.out / ("tuning" if options.tune else "") / f"{name}.json"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def facts(kind: str, workload: Workload, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """Return what describes an entry of the results."""
    return {
        "kind": kind,
        "workload": workload.name,
        "op": workload.op,
        "dtype": dtype_name(dtype),
        **vars(shape),
    }


class Run:
    """The state of a run: device, timer, results, and how much time is left.

    Attributes:
        dtypes: those that are checked; the first is the one that is timed.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device = torch.device(options.device)
        on_gpu = self.device.type == "cuda"
        self.dtypes = ALL if on_gpu else ALL[1:]  # Triton's interpreter gets bf16 wrong
        self.suite = SUITES[options.shapes]
        self.timer = timer_for(self.device)
        self.environment = environment(self.device, options.arguments, options.revision)
        self.left_out: list[str] = []
        share, shares = map(int, (options.share or "0/1").split("/"))
        self._mine = itertools.cycle(i == share for i in range(shares))
        self._deadline = options.deadline or time.time() + options.budget_s
        kind = (TUNED if options.tune else MEASURED) if on_gpu else REHEARSED
        header = {"kind": kind, "environment": self.environment}
        self.results = Results(results_path(options), header, resume=options.resume)

    def wanted(self, name: str) -> bool:
        """Whether an entry of this name was asked for."""
        return any(part in name for part in self.options.only)

    def in_time(self) -> bool:
        """Whether something new may be begun."""
        return time.time() < self._deadline

    def serving(self, op: str) -> AbstractContextManager[None]:
        """On a CPU, have Triton's interpreter serve what has a Triton kernel."""
        interpreted = self.device.type == "cpu" and "triton" in getattr(
            OPERATIONS.get(op), "backends", ()
        )
        return force_backend("triton" if interpreted else None)

    def record(self, name: str, entry: Callable[[], dict[str, Any]], **facts: Any) -> None:
        """Do one thing and write it down, unless it was done, is not asked for, or is too late."""
        if not self.wanted(name) or name in self.results or not next(self._mine):
            return
        if not self.in_time():
            self.left_out.append(name)
            return
        with self.serving(facts["op"]):
            self.results.record(name, entry, **facts)
        print(f"{name}: {_line(self.results.value['entries'][name])}", flush=True)
        if not self.timer.alive():
            sys.exit(LOST)

    def cases(self) -> Iterator[tuple[Workload, Shape]]:
        """Every workload at every shape of the models, the most telling first."""
        models = self.suite.models.items()
        for rank in range(max(len(widths) for _, (_, widths) in models)):
            for workload in WORKLOADS:
                for model, (hidden, widths) in models:
                    if rank >= len(widths) or (workload.pruned_only and rank == 0):
                        continue
                    for tokens in workload.tokens[: self.suite.variety]:
                        tokens = min(tokens, self.suite.tokens)
                        yield workload, Shape(model, tokens, hidden, widths[rank], widths[0])

    def layers(self, workload: Workload, shape: Shape) -> speed.Layers:
        """Return a workload's inputs as they are timed."""
        dtype, size = self.dtypes[0], self.suite.layer_bytes
        return speed.Layers(workload, shape, dtype, self.device, size)

    def finish(self) -> int:
        """Write down what was left out, tell what failed, and return the exit status."""
        self.results.update(
            left_out=self.left_out, card_after=card_state(self.device), finished=True
        )
        failed = self.results.failed
        print(
            f"{self.results.path}: {len(self.results.value['entries'])} entries, "
            f"{len(failed)} failed, {len(self.left_out)} left out for want of time"
        )
        for name in failed:
            print(f"FAILED {name}: {self.results.value['entries'][name]['error'].splitlines()[-1]}")
        return 1 if failed else 0


def _line(entry: dict[str, Any]) -> str:
    """An entry in a line, for whoever watches."""
    if "error" in entry:
        return f"FAILED {entry['error'].splitlines()[-1][:150]}"
    times = {name: c["median"] * 1e3 for name, c in entry.get("contenders", {}).items()}
    if times:
        return ", ".join(f"{name} {ms:.4f} ms" for name, ms in times.items())
    return str(entry["chosen"]) if entry.get("chosen") else "ok"


def check_all(run: Run) -> None:
    """Check every operation in every dtype at odd shapes, and decoding in a graph and compiled."""
    for shape in run.suite.odd:
        for workload in WORKLOADS:
            for dtype in run.dtypes:
                run.record(
                    f"check {workload.name} {dtype_name(dtype)} {shape}",
                    lambda w=workload, s=shape, d=dtype: checks.check(w, s, d, run.device),
                    **facts("check", workload, shape, dtype),
                )

    decode, dtype = WORKLOADS[0], run.dtypes[0]
    hidden, widths = next(iter(run.suite.models.values()))
    for tokens in (1, 8):
        shape = Shape("graph", tokens, hidden, widths[1], widths[0])
        run.record(
            f"check {decode.name} in a graph {dtype_name(dtype)} {shape}",
            lambda s=shape: checks.check_graph(decode, s, dtype, run.device, run.timer),
            **facts("check", decode, shape, dtype),
        )
    for tokens in (1, 33):
        shape = Shape("CompactMLP", tokens, hidden, widths[1], widths[0])
        run.record(
            f"check {decode.name} compiled whole {dtype_name(dtype)} {shape}",
            lambda s=shape: checks.check_module(s, dtype, run.device, run.options.compiler),
            **facts("check", decode, shape, dtype),
        )


def _modes(run: Run) -> list[str]:
    slow = ["max-autotune-no-cudagraphs"] if run.options.max_autotune else []
    return ["default", *slow]


def compile_all(run: Run) -> None:
    """Run every contender once at every shape, untimed: what they compile stays on disk."""
    dtype = run.dtypes[0]

    def entry(workload: Workload, shape: Shape) -> dict[str, Any]:
        inputs = checks.inputs_of(workload, shape, dtype, run.device)
        for function in speed.contenders(workload, run.options.compiler, _modes(run)).values():
            workload.run(function, inputs)
        return {}

    for workload, shape in run.cases():
        run.record(
            f"compile {workload.name} {shape}",
            lambda w=workload, s=shape: entry(w, s),
            **facts("compile", workload, shape, dtype),
        )


def measure_all(run: Run) -> None:
    """Time every operation at every shape at which it is right."""
    dtype, modes = run.dtypes[0], _modes(run)
    peak = peak_of(run.environment["device"])

    def entry(workload: Workload, shape: Shape) -> dict[str, Any]:
        checked = checks.check(workload, shape, dtype, run.device)
        functions = speed.contenders(workload, run.options.compiler, modes)
        layers = run.layers(workload, shape)
        timed = speed.measure(shape, layers, run.timer, functions, run.options.rounds, peak, dtype)
        return checked | timed

    for workload, shape in run.cases():
        run.record(
            f"speed {workload.name} {dtype_name(dtype)} {shape}",
            lambda w=workload, s=shape: entry(w, s),
            **facts("speed", workload, shape, dtype),
        )
