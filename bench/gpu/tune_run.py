"""Tunes every kernel that the workloads launch, and extends the table after each that was won."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch

from bench.gpu import checks
from bench.gpu.run import Run, dtype_name, facts
from bench.gpu.shapes import Shape
from bench.gpu.tune import Table, candidates, tune
from bench.gpu.workloads import Workload
from prunekit.errors import InputError
from prunekit.files import read_json, write_json
from prunekit_kernels import tuning
from prunekit_kernels.tuning import Config


def table_path(run: Run) -> Path:
    """Return the table that is extended: kernels/tuned.json on a GPU, unless another was named.

    Raises:
        InputError: a rehearsal would write into kernels/tuned.json.
    """
    default = tuning.TABLE if run.device.type == "cuda" else run.options.out / "tuned.json"
    path = run.options.tuned or default
    if run.device.type != "cuda" and path.resolve() == tuning.TABLE.resolve():
        raise InputError(f"--tuned: {path} is for what GPUs measured; a CPU needs another file")
    return path


def tune_all(run: Run) -> None:
    """Tune at every shape of the models, in the order of their worth."""
    path, proposed = table_path(run), candidates(run.options.candidates)
    kernels = run.options.kernels or proposed
    if unknown := set(kernels) - set(proposed):
        raise InputError(
            f"--kernels: got {min(unknown)}, expected of {', '.join(sorted(proposed))}"
        )
    proposed = {kernel: proposed[kernel] for kernel in kernels}
    known = dict(tuning.table()) | (read_json(path) if path.is_file() else {})
    with tuning.serving(Table(known)) as table:
        for workload, shape in run.cases():
            name = f"tune {workload.name} {dtype_name(run.dtypes[0])} {shape}"
            if run.wanted(name) and name not in run.results.failed:
                _tune_case(run, name, workload, shape, table, proposed, path)


class _Case:
    """What tuning a workload at a shape needs: its inputs, and the results they should give."""

    def __init__(self, run: Run, workload: Workload, shape: Shape):
        self.run, self.workload, self.shape, self.dtype = run, workload, shape, run.dtypes[0]
        checks.served_by(workload, run.device)
        self.inputs = checks.inputs_of(workload, shape, self.dtype, run.device)
        self.exact = checks.exact(workload, self.inputs)
        self.theirs = checks.outputs(workload, workload.plain, self.inputs)
        self.layers = run.layers(workload, shape)

    def ours(self) -> list[torch.Tensor]:
        return checks.outputs(self.workload, self.workload.ours, self.inputs)

    def check(self) -> None:
        given = self.workload, self.shape.tokens, self.dtype
        checks.compare(*given, self.ours(), self.theirs, self.exact)

    def prepare(self) -> Callable[[], float]:
        runner = self.layers.runner(self.workload.ours, self.run.timer)
        return lambda: self.layers.seconds(runner, self.run.timer)


def _tune_case(
    run: Run,
    name: str,
    workload: Workload,
    shape: Shape,
    table: Table,
    proposed: dict[str, list[Config]],
    path: Path,
) -> None:
    about = facts("tune", workload, shape, run.dtypes[0])
    cases: list[_Case] = []
    asked: dict[str, Config] = {}

    def ask() -> dict[str, list[str]]:
        case = _Case(run, workload, shape)
        asked.update(table.asked_by(case.ours))
        cases.append(case)
        return {"asked": list(asked)}

    def another() -> bool:
        run.results.touch()
        return run.in_time()

    run.results.forget(name)  # what is asked depends on the table, which has grown since
    run.record(name, ask, **about)
    done = {entry.get("key") for entry in run.results.value["entries"].values()}
    for case, key in itertools.product(cases, asked):
        kernel = key.split()[0]
        if kernel not in proposed or key in done:
            continue
        run.record(
            f"{name}: {key}",
            lambda case=case, key=key, kernel=kernel: tune(
                key,
                asked[key],
                proposed[kernel],
                check=case.check,
                prepare=case.prepare,
                alive=run.timer.alive,
                another=another,
                rounds=run.options.rounds,
            ),
            key=key,
            **about,
        )
        entry = run.results.value["entries"].get(f"{name}: {key}", {})
        if entry.get("chosen"):
            table[key] = entry["chosen"]
            write_json(path, dict(sorted(table.items())))
