"""Tunes every kernel that the workloads launch, and extends the table after each that was won."""

from __future__ import annotations

from pathlib import Path

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
    known = dict(tuning.table()) | (read_json(path) if path.is_file() else {})
    with Table(known).serving() as table:
        for workload, shape in run.cases():
            name = f"tune {workload.name} {dtype_name(run.dtypes[0])} {shape}"
            if run.options.only in name and name not in run.results.failed and run.in_time():
                _tune_case(run, name, workload, shape, table, proposed, path)


def _tune_case(
    run: Run,
    name: str,
    workload: Workload,
    shape: Shape,
    table: Table,
    proposed: dict[str, list[Config]],
    path: Path,
) -> None:
    dtype = run.dtypes[0]
    about = facts("tune", workload, shape, dtype)
    asked: dict[str, Config] = {}

    def ask() -> dict[str, list[str]]:
        inputs = checks.inputs_of(workload, shape, dtype, run.device)
        checks.served_by(workload, run.device)
        asked.update(table.asked_by(lambda: checks.outputs(workload, workload.ours, inputs)))
        return {"asked": list(asked)}

    run.results.forget(name)  # what is asked depends on the table, which has grown since
    run.record(name, ask, **about)
    done = {entry.get("key") for entry in run.results.value["entries"].values()}
    todo = [key for key in asked if key.split()[0] in proposed and key not in done]
    if not todo:
        return

    inputs = checks.inputs_of(workload, shape, dtype, run.device)
    layers = run.layers(workload, shape)
    wanted = checks.exact(workload, inputs)
    theirs = checks.outputs(workload, workload.plain, inputs)

    def check() -> None:
        ours = checks.outputs(workload, workload.ours, inputs)
        checks.compare(workload, shape.tokens, dtype, ours, theirs, wanted)

    def prepare():
        runner = layers.runner(workload.ours, run.timer)
        return lambda: layers.seconds(runner, run.timer)

    def another() -> bool:
        run.results.touch()
        return run.in_time()

    for key in todo:
        run.record(
            f"{name}: {key}",
            lambda key=key: tune(
                key,
                asked[key],
                proposed[key.split()[0]],
                check=check,
                prepare=prepare,
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
