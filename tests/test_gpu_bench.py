"""`make gpu-bench` before it meets a GPU: every step of it on the CPU, with tiny shapes."""

import itertools
import json
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench.gpu import model
from bench.gpu.__main__ import main, parse
from bench.gpu.checks import check, inputs_of
from bench.gpu.environment import parse_smi
from bench.gpu.page import (
    MARKERS,
    MODEL_MARKERS,
    NOT_MEASURED,
    PAGE,
    RESULTS,
    ROOT,
    load,
    models,
    section,
)
from bench.gpu.peaks import peak_of, rates
from bench.gpu.results import MEASURED, REHEARSED, Results, WrongError, safe_name
from bench.gpu.run import Run
from bench.gpu.shapes import SUITES, Shape
from bench.gpu.speed import race, warm_up
from bench.gpu.supervise import LOST, supervise
from bench.gpu.tune import Table, candidates, tune
from bench.gpu.workloads import WORKLOADS, plain_act_stats
from bench.markers import between
from prunekit.errors import InputError
from prunekit.ops.registry import OPERATIONS
from prunekit_kernels import tuning

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

CPU = torch.device("cpu")
ODD = Shape("odd", 9, 16, 12, 24)
BY_NAME = {workload.name: workload for workload in WORKLOADS}


def options(folder, *more):
    rehearsal = "--device=cpu", "--shapes=tiny", "--rounds=2", "--compiler=aot_eager"
    return [*rehearsal, f"--out={folder}", *more]


def rehearse(folder, *more):
    """Go through a run in this process; return its exit status and its file."""
    code = main([*options(folder, *more), "--worker"])
    return code, next(Path(folder).rglob("rehearsal.json"))


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    torch.manual_seed(0)
    return rehearse(tmp_path_factory.mktemp("results"))


def entries_of(path):
    return json.loads(path.read_text())["entries"]


def test_a_rehearsal_goes_through_every_step(rehearsal):
    code, path = rehearsal
    value = json.loads(path.read_text())
    entries = value["entries"].values()
    assert {n: e["error"] for n, e in value["entries"].items() if "error" in e} == {}
    assert code == 0
    assert value["running"] is None
    assert value["left_out"] == []

    for workload in WORKLOADS:
        mine = [e for e in entries if e["workload"] == workload.name]
        checked = [(e["model"], e["dtype"]) for e in mine if e["kind"] == "check"]
        assert {"float16", "float32"} == {d for model, d in checked if model == "odd"}
        timed = [e for e in mine if e["kind"] == "speed"]
        assert {e["width"] for e in timed} == ({16} if workload.pruned_only else {16, 32})
        for entry in timed:
            assert {"ours", "torch"} <= set(entry["contenders"])
            assert workload.compiled == ("torch.compile" in entry["contenders"])
            for c in entry["contenders"].values():
                assert 0 < c["low"] <= c["median"] <= c["high"]
                assert c["gb_s"] == pytest.approx(entry["bytes"] / c["median"] / 1e9)
        served = {e["backend"] for e in mine if "backend" in e}
        if "triton" in OPERATIONS[workload.kernel or workload.op].backends:
            assert served == {"triton"}
    around = {e["model"] for e in entries if e["workload"] == "decode"}
    assert {"graph", "CompactMLP"} <= around


def test_decoding_cycles_through_layers(rehearsal):
    decoded = [e for e in entries_of(rehearsal[1]).values() if e["workload"] == "decode"]
    layers = {e["width"]: e["layers"] for e in decoded if e["kind"] == "speed"}
    assert layers[16] == 2 * layers[32] == 4


def test_tuning_extends_a_table_of_its_own(tmp_path):
    committed = tuning.TABLE.read_text()
    code, path = rehearse(
        tmp_path, "--tune", "--candidates=2", "--only=tune gram float16 tiny T=17 16x16"
    )
    assert code == 0
    tuned = [e for e in entries_of(path).values() if "key" in e]
    assert [e["key"].split()[0] for e in tuned] == ["gram_update"]
    for entry in tuned:
        tried = [t["config"] for t in entry["trials"]] + [r["config"] for r in entry["rejected"]]
        proposed = candidates(2)[entry["key"].split()[0]]
        assert sorted(map(str, tried)) == sorted(str(c) for c in proposed if c != entry["default"])
    chosen = {e["key"]: e["chosen"] for e in tuned if e["chosen"]}
    table = tmp_path / "tuned.json"
    assert (json.loads(table.read_text()) if table.exists() else {}) == chosen
    assert tuning.TABLE.read_text() == committed
    assert not isinstance(tuning.table(), Table)


def test_a_rehearsal_writes_neither_results_nor_the_kernels_table(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(["--device=cpu"])
    assert "a rehearsal needs a folder of its own" in capsys.readouterr().err
    code, path = rehearse(tmp_path, "--tune", f"--tuned={tuning.TABLE}")
    assert code == 2
    assert "is for what GPUs measured; a CPU needs another file" in capsys.readouterr().err
    assert entries_of(path) == {}


def test_in_processes_of_its_own(tmp_path):
    """The supervisor, a process that compiles ahead, and the worker."""
    arguments = options(tmp_path, "--only=check rows", "--compilers=1")
    run = subprocess.run([sys.executable, "-m", "bench.gpu", *arguments], cwd=ROOT)
    assert run.returncode == 0
    value = json.loads((tmp_path / "rehearsal.json").read_text())
    assert len(value["entries"]) == 4
    assert value["kind"] == REHEARSED
    assert value["environment"]["command"].startswith("python -m bench.gpu --device=cpu")
    assert "--worker" not in value["environment"]["command"]


def test_what_there_is_no_time_for_is_named(tmp_path):
    code, path = rehearse(tmp_path, "--only=check rows", "--budget-s=-1")
    value = json.loads(path.read_text())
    assert code == 0
    assert value["entries"] == {}
    assert len(value["left_out"]) == 4


def test_shares_are_disjoint_and_whole(tmp_path):
    shares = [
        set(entries_of(rehearse(tmp_path / str(i), "--only=check rows", f"--share={i}/2")[1]))
        for i in range(2)
    ]
    assert [len(share) for share in shares] == [2, 2]
    assert not shares[0] & shares[1]


@pytest.mark.parametrize("workload", [w for w in WORKLOADS if w.compiled], ids=lambda w: w.name)
def test_torch_compiles_the_plain_form_whole(workload):
    """Or the rival would be a slower program than torch.compile can make."""
    torch._dynamo.reset()
    inputs = inputs_of(workload, ODD, torch.float32, CPU)
    compiled = torch.compile(workload.plain, backend="eager", fullgraph=True)
    workload.run(compiled, inputs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_run(capsys):
    assert main([]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


# What a check has to catch.

SHIFTED = replace(BY_NAME["columns"], ours=lambda x, index: x[:, (index + 1) % x.shape[1]])
UNWRITTEN = replace(BY_NAME["rows"], ours=lambda x, index: x.new_empty(len(index), x.shape[1]))
CUT = replace(BY_NAME["rows"], ours=lambda x, index: x[index[:-1]])


def without_a_row(gate, up):
    h, prompts, *sums = plain_act_stats(gate, up)
    return h, prompts - h[-1:].abs(), *sums


RUNS = itertools.count()


def drifting(*tensors):
    return BY_NAME["decode"].plain(*tensors) * (1 + 2.5e-7 * (next(RUNS) % 2))


@pytest.mark.parametrize(
    ("workload", "why"),
    [
        (SHIFTED, "picked: error"),
        (UNWRITTEN, "picked: error nan"),
        (CUT, r"has shape \(11, 16\), expected \(12, 16\)"),
        (replace(BY_NAME["activation with statistics"], ours=without_a_row), "prompt_abs: error"),
        (
            replace(BY_NAME["decode"], ours=drifting),
            "two runs on the same input differ",
        ),
    ],
    ids=["wrong", "unwritten", "cut", "a row left out", "different bits"],
)
def test_a_check_catches(workload, why):
    with pytest.raises(WrongError, match=why):
        check(workload, ODD, torch.float32, CPU)


def test_a_missing_operation_is_a_failure(tmp_path):
    run = Run(parse(options(tmp_path)))
    gone = replace(BY_NAME["rows"], op="gather_diagonals")
    run.record("gone", lambda: check(gone, ODD, torch.float32, CPU), op=gone.op)
    assert run.finish() == 1
    error = entries_of(tmp_path / "rehearsal.json")["gone"]["error"]
    assert "prunekit.ops has no gather_diagonals" in error


# Tuning.


class Toy:
    """An operation whose host code chooses how long it takes, and whether it is right."""

    def __call__(self):
        default = {"MS": 3}
        self.config = tuning.choose("toy", "interpreter", torch.float16, 5, 7, default=default)
        if "FAILS" in self.config:
            raise RuntimeError("out of resource: shared memory")
        time.sleep(self.config["MS"] * 1e-3)

    def check(self):
        self()
        if "WRONG" in self.config:
            raise WrongError("y: error 1")

    def prepare(self):
        def once():
            begun = time.perf_counter()
            self()
            return time.perf_counter() - begun

        return once


def tune_toy(proposed, **more):
    toy = Toy()
    with tuning.serving(Table({})) as table:
        ((key, default),) = table.asked_by(toy).items()
        assert key == "toy interpreter float16 8x7"
        arguments = {"alive": lambda: True, "another": lambda: True, "rounds": 5} | more
        return tune(key, default, proposed, check=toy.check, prepare=toy.prepare, **arguments)


def test_tuning_keeps_the_fastest_that_is_right():
    right = [{"MS": 9}, {"MS": 0.5}, {"MS": 3}, {"MS": 2}]
    found = tune_toy([{"MS": 0, "WRONG": 1}, {"FAILS": 1}, *right])
    assert found["default"] == {"MS": 3}
    assert found["chosen"] == {"MS": 0.5}
    assert found["finalists"] == [{"MS": 0.5}, {"MS": 2}]
    assert [r["config"] for r in found["rejected"]] == [{"MS": 0, "WRONG": 1}, {"FAILS": 1}]
    assert "is wrong: y: error 1" in found["error"]
    assert "shared memory" not in found["error"]


def test_tuning_leaves_a_default_that_is_not_beaten():
    found = tune_toy([{"MS": 9}, {"MS": 6}])
    assert found["chosen"] is None
    assert "error" not in found


def test_tuning_stops_when_time_is_up():
    enough = iter([True, False, False])
    found = tune_toy([{"MS": 1}, {"MS": 0}, {"MS": 0.1}], another=lambda: next(enough))
    assert found["chosen"] == {"MS": 1}
    assert found["untried"] == 2


def test_a_candidate_that_kills_the_device_ends_the_process():
    with pytest.raises(RuntimeError, match="left the device unusable"):
        tune_toy([{"FAILS": 1}], alive=lambda: False)


def test_inner_kernels_come_before_the_path_that_leads_to_them():
    def run():
        for kernel in ("path", "inner"):
            tuning.choose(kernel, "sm_90", torch.bfloat16, 1, 8, default={})

    with tuning.serving(Table({})) as table:
        asked = list(table.asked_by(run))
    assert asked == ["inner sm_90 bfloat16 1x8", "path sm_90 bfloat16 1x8"]


# Timing and arithmetic.


def test_warm_up_ends_when_three_runs_agree():
    times = iter([0.05, 0.03, 0.01, 0.0101, 0.0102, 0.02])
    assert warm_up(lambda: next(times)) == 5
    assert next(times) == 0.02
    assert warm_up(lambda: 0.4) == 2  # slow runs are not repeated for long


def test_a_race_takes_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) or 1.0 for name in "ab"}
    assert race(runs, 3)["a"].median == 1.0
    assert order[-6:] == list("ababab")


def test_rates():
    h100 = peak_of("NVIDIA H100 80GB HBM3")
    bound_by_memory = rates(2e-3, moved=3_350_000_000, flops=10**9, peak=h100)
    assert bound_by_memory["share"] == pytest.approx(0.5)
    assert bound_by_memory["gb_s"] == pytest.approx(1675)
    bound_by_arithmetic = rates(1e-3, moved=1000, flops=494_700_000_000, peak=h100)
    assert bound_by_arithmetic["share"] == pytest.approx(0.5)
    assert rates(1.0, 1, 1, peak_of("NVIDIA GeForce"))["share"] is None
    assert peak_of("NVIDIA H200").bandwidth == 4.8e12
    assert peak_of("NVIDIA A100-SXM4-40GB").bandwidth == 1.555e12
    assert peak_of("NVIDIA A100-SXM4-80GB").bandwidth == 2.039e12


def test_a_card_is_found_by_its_uuid():
    row = "GPU-{}, 580.159.04, 345 MHz, 1980 MHz, 2619 MHz, 70.5 W, 700.00 W, 31"
    both = "\n".join(row.format(u) for u in ("aa", "bb")).replace("580", "1", 1)
    assert parse_smi(both, "bb")["driver_version"] == "580.159.04"
    assert parse_smi(both, "") == {}
    assert parse_smi(row.format("aa"), "")["power.limit"] == "700.00 W"
    assert parse_smi("No devices were found", "") == {}


def test_cases_begin_with_what_is_most_telling(tmp_path):
    run = Run(parse(options(tmp_path)))
    run.suite = SUITES["models"]
    cases = [(workload.name, str(shape)) for workload, shape in run.cases()]
    assert cases[0] == ("decode", "Qwen2.5-1.5B T=1 1536x8960")
    assert len(set(cases)) == len(cases)
    assert not [s for name, s in cases if name in ("rows", "columns", "layer") and "8960" in s]
    half = cases.index(("decode", "Qwen2.5-1.5B T=1 1536x4480"))
    assert half < cases.index(("decode", "Qwen2.5-1.5B T=1 1536x7168"))


# Whatever kills a run, the rest is measured.


def test_results_are_whole_after_each_entry_and_taken_up_again(tmp_path):
    path = tmp_path / "r.json"
    seen = []

    def look():
        seen.append(json.loads(path.read_text()))
        return {"x": 1}

    results = Results(path, {"kind": "k"}, resume=False)
    results.record("first", look, op="o")
    results.record("second", lambda: 1 / 0, op="o")
    assert seen[0]["running"] == {"name": "first", "op": "o"}
    again = Results(path, {"kind": "other"}, resume=True)
    assert again.value["kind"] == "k"
    assert "first" in again
    assert again.failed == ["second"]
    assert again.value["entries"]["second"]["error"].startswith("ZeroDivisionError")


WORKER = """
    import json, os, pathlib, signal, sys, time
    path = pathlib.Path({path!r})
    if "--resume" in sys.argv:
        value = json.loads(path.read_text())
        value["entries"]["after"] = {{}}
        value["finished"] = True
        path.write_text(json.dumps(value))
        sys.exit(1)
    running = {{"name": "doomed", "op": "o"}}
    value = {{"finished": False, "running": running, "entries": {{"before": {{}}}}}}
    path.write_text(json.dumps(value))
    {end}
"""


@pytest.mark.parametrize(
    ("end", "why"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process ended with status -11"),
        ("time.sleep(60)", "nothing happened for 1 s; killed"),
    ],
    ids=["dies", "hangs"],
)
def test_a_run_goes_on_after(end, why, tmp_path):
    path, script = tmp_path / "r.json", tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER.format(path=str(path), end=end)))
    assert supervise([sys.executable, "-S", str(script)], path, patience_s=1.0) == 1
    value = json.loads(path.read_text())
    assert value["running"] is None
    assert value["entries"] == {"before": {}, "doomed": {"op": "o", "error": why}, "after": {}}


def test_a_worker_that_lost_its_gpu_is_started_again(tmp_path):
    path, script = tmp_path / "r.json", tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER.format(path=str(path), end=f"sys.exit({LOST})")))
    assert supervise([sys.executable, "-S", str(script)], path, patience_s=10.0) == 1
    assert "after" in json.loads(path.read_text())["entries"]


def test_a_worker_that_fails_between_entries_is_not_started_again(tmp_path):
    path, script = tmp_path / "r.json", tmp_path / "worker.py"
    end = "path.write_text(path.read_text().replace(json.dumps(running), 'null')); sys.exit(1)"
    script.write_text(textwrap.dedent(WORKER.format(path=str(path), end=end)))
    assert supervise([sys.executable, "-S", str(script)], path, patience_s=10.0) == 1
    assert json.loads(path.read_text())["entries"] == {"before": {}}


def test_a_worker_that_never_began_is_not_started_again(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("{}")  # of an earlier run
    assert supervise([sys.executable, "-S", "-c", "import sys; sys.exit(3)"], path, 10.0) == 3
    assert path.read_text() == "{}"


# The page.


def test_the_page_is_made_of_the_committed_results():
    page = PAGE.read_text()
    assert page == between(page, MARKERS, section(RESULTS))
    assert page == between(page, MODEL_MARKERS, models(RESULTS / "models"))
    assert (NOT_MEASURED in page) == (not list(RESULTS.glob("*.json")))


def test_a_whole_model_rehearses_on_the_cpu(tmp_path):
    small = "--models", "tiny", "--rounds", "1", "--prompt", "16", "--context", "8"
    assert model.main(["--device", "cpu", *small, "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.json")
    value = json.loads(path.read_text())
    assert value["kind"] == REHEARSED
    with pytest.raises(InputError, match="is a rehearsal on a CPU"):
        models(tmp_path)
    path.write_text(json.dumps(value | {"kind": MEASURED}))
    rows = [line.split(" | ") for line in models(tmp_path).splitlines() if " | tiny | " in line]
    assert [(row[0], row[2]) for row in rows] == [
        (f"| {test}", width)
        for width in ("128", "64")
        for test in ("decode 1", "decode 8", "prefill 16")
    ]
    assert all((row[6] == "–") == row[0].startswith("| prefill") for row in rows)


def test_a_rehearsal_is_no_result(rehearsal):
    with pytest.raises(InputError, match="is a rehearsal on a CPU, expected results of kind 'gpu'"):
        section(rehearsal[1].parent)


def measured(rehearsal, folder, change=lambda value: None):
    """The rehearsal's file under a false name, to see how a GPU's would be shown."""
    value = json.loads(rehearsal[1].read_text())
    value["kind"] = MEASURED
    change(value)
    path = folder / "card.json"
    path.write_text(json.dumps(value))
    return value, section(folder)


def rows_of(text):
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row for row in cells[1:]}


def test_the_table_shows_the_narrowest_width_against_dense_and_rivals(rehearsal, tmp_path):
    value, text = measured(rehearsal, tmp_path)
    rows = rows_of(text)
    assert set(rows) == {workload.name for workload in WORKLOADS}
    narrow = value["entries"]["speed prefill float16 tiny T=17 16x16"]["contenders"]
    dense = value["entries"]["speed prefill float16 tiny T=17 16x32"]["contenders"]
    ours = narrow["ours"]["median"]
    assert rows["prefill"][1:5] == ["17", "tiny", "16", f"{ours * 1e3:.4g}"]
    assert rows["prefill"][6] == f"{dense['ours']['median'] / ours:.2f} ×"
    assert rows["prefill"][7] == f"{narrow['torch']['median'] / ours:.2f} ×"
    fastest = min((c["median"], name) for name, c in narrow.items() if name != "ours")
    assert rows["prefill"][8] == f"{fastest[0] / ours:.2f} × ({fastest[1]})"
    assert rows["rows"][6] == "–"
    assert value["environment"]["versions"]["torch"] in text


def test_the_table_gives_no_figures_of_what_fails_a_check(rehearsal, tmp_path):
    def fail(value):
        value["entries"]["check prefill float16 odd T=1 13x19"]["error"] = "y: error 1"

        for name, why in (("gram", "bench.gpu.results.WrongError: 1"), ("columns", "no memory")):
            entry = next(e for n, e in value["entries"].items() if f"speed {name}" in n)
            entry["error"] = why
            entry.pop("contenders")

    rows = rows_of(measured(rehearsal, tmp_path, fail)[1])
    assert rows["prefill"][4] == "fails its check"
    assert "×" not in " ".join(rows["prefill"])
    assert rows["gram"][4] == "fails its check"  # at another width than the one that is shown
    assert rows["columns"][4] == "failed"
    assert "×" in " ".join(rows["decode"])


def test_results_of_another_layout_are_refused(rehearsal, tmp_path):
    with pytest.raises(InputError, match="has schema 0, expected 1; measure again"):
        measured(rehearsal, tmp_path, lambda value: value.update(schema=0))
    with pytest.raises(InputError, match="is a file of unknown kind"):
        (tmp_path / "card.json").write_text("{}")
        load(tmp_path / "card.json")


def test_a_device_names_a_file():
    assert safe_name("NVIDIA H100 80GB HBM3") == "NVIDIA-H100-80GB-HBM3"
