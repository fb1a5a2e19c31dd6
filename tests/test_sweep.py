"""Sweeps: the same table whatever interrupts them, from one calibration and one dense model."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import prunekit as pk
from prunekit.cli import main
from prunekit.corpus import Corpus, Example, from_texts
from prunekit.errors import InputError
from prunekit.evaluate import evaluate_loss
from prunekit.experiment import speed as speed_module
from prunekit.experiment import study as study_module
from prunekit.experiment import trained
from prunekit.experiment.analysis import read_run
from prunekit.experiment.cells import cells_of
from prunekit.experiment.ledger import NAME, Ledger, read_rows
from prunekit.experiment.material import read_material, split
from prunekit.experiment.protocol import Source, protocol_of
from prunekit.experiment.study import STATS
from prunekit.experiment.sweep import sweep
from prunekit.experiment.twin import twin
from prunekit.integrations.loading import load, load_tokenizer
from prunekit.tasks import evaluate_task, read_task
from tests.models import tiny_model
from tests.sweeps import GRIDS, bare, tiny_protocol


@pytest.fixture(scope="module")
def given(folder, tmp_path_factory):
    return tiny_protocol(folder, tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """The rows of that protocol, run without interruption."""
    return sweep(protocol_of(given), tmp_path_factory.mktemp("whole") / "run", quiet=True)


def test_a_sweeps_cells_are_those_of_the_library_step_by_step(given, tmp_path):
    protocol = protocol_of(given)
    rows = sweep(protocol, tmp_path / "run", quiet=True)
    assert [row["error"] for row in rows] == [""] * 10
    assert rows == read_rows(tmp_path / "run" / NAME)
    model, tokenizer = load(given["model"]), load_tokenizer(given["model"])
    material = read_material(protocol, tokenizer)
    stats = pk.calibrate(
        model, tokenizer, material.target, material.distractors, gram=True, quiet=True
    )
    row = next(r for r in rows if r["cell"]["compensate"] == "lstsq" and r["widths"] == [48, 48])
    plan = pk.plan(pk.score(stats, model, "wanda"), 0.5, multiple_of=16)
    pk.prune(model, plan, stats=stats, compensate="lstsq")
    for name, corpus in material.losses.items():
        assert (
            evaluate_loss(model, tokenizer, corpus, quiet=True).loss == row["losses"][name]["loss"]
        )
    assert row["sparsity"] == 0.5
    assert set(row["losses"]) == {"target", "other.jsonl"}
    one, two = (r for r in rows if r["cell"]["strategy"] == "random" and r["sparsity"] == 0.5)
    assert one["losses"] != two["losses"]


def test_the_dense_model_outlives_its_twins_unchanged(tokenizer):
    model = tiny_model("llama_bias")
    before = {name: p.clone() for name, p in model.named_parameters()}
    corpus = from_texts(f"w{i} w{i + 1} w{i + 2}" for i in range(40))
    stats = pk.calibrate(model, tokenizer, corpus, gram=True, quiet=True)
    plan = pk.plan(pk.score(stats, model, "wanda"), 0.5, multiple_of=16)
    for method in ("none", "bias", "lstsq", "sequential"):
        copy = pk.prune(twin(model), plan, stats=stats, compensate=method)
        assert copy.config.intermediate_size == 48
        shared = {id(p) for p in model.parameters()}
        assert sum(id(p) in shared for p in copy.parameters()) >= 2 * 4 + 1
        assert model.config.intermediate_size == 96
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_is_there_is_refused_or_resumed_and_calibrated_once(
    given, whole, tmp_path, monkeypatch
):
    out, protocol = tmp_path / "run", protocol_of(given)
    seen = []

    def stop(row):
        seen.append(row)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(protocol, out, quiet=True, report=stop)
    with pytest.raises(InputError, match="has results; pass --resume"):
        sweep(protocol, out, quiet=True)
    calls = []
    monkeypatch.setattr(study_module, "calibrate", lambda *a, **k: calls.append(a))
    more = []
    rows = sweep(protocol, out, resume=True, quiet=True, report=more.append)
    assert len(more) == 10 - 4
    assert calls == []
    assert bare(rows) == bare(whole)
    changed = protocol_of(given | {"max_length": 5})
    with pytest.raises(InputError, match="was begun with another max_length"):
        sweep(changed, out, resume=True, quiet=True)
    grown = protocol_of(
        given | {"grids": [*GRIDS, {"sparsities": [0.35]} | GRIDS[2] | {"sparsities": [0.35]}]}
    )
    assert len(sweep(grown, out, resume=True, quiet=True)) == 11


def test_cells_that_need_more_statistics_have_the_calibration_done_anew(given, tmp_path):
    plain = given | {"grids": [GRIDS[2]]}
    sweep(protocol_of(plain), tmp_path / "run", quiet=True)
    before = pk.NeuronStats.load(tmp_path / "run" / STATS)
    assert before.target[0].gram is None
    grown = protocol_of(given | {"grids": [GRIDS[2], GRIDS[0]]})
    rows = sweep(grown, tmp_path / "run", resume=True, quiet=True)
    assert [row["error"] for row in rows] == [""] * 6
    assert pk.NeuronStats.load(tmp_path / "run" / STATS).target[0].gram is not None


def test_a_finished_sweep_loads_no_model(given, tmp_path, monkeypatch):
    rows = sweep(protocol_of(given), tmp_path / "run", quiet=True)
    monkeypatch.setattr(study_module, "made_model", None)
    assert sweep(protocol_of(given), tmp_path / "run", resume=True, quiet=True) == rows


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_a_sweep_killed_at_a_random_moment_and_resumed_gives_the_same_table(
    given, whole, tmp_path, seed
):
    path, out = tmp_path / "p.yaml", tmp_path / "run"
    path.write_text(json.dumps(given))  # JSON is YAML
    command = [sys.executable, "-m", "prunekit", "sweep", str(path), "--out", str(out), "--quiet"]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while child.poll() is None and not (out / "run.json").is_file():
        time.sleep(0.01)
    time.sleep(random.Random(seed).random() * 0.6)
    child.send_signal(signal.SIGKILL)
    child.wait()
    rows = sweep(protocol_of(given), out, resume=True, quiet=True)
    assert bare(rows) == bare(whole)
    assert sorted(row["key"] for row in read_rows(out / NAME)) == sorted(r["key"] for r in whole)


def test_ctrl_c_says_what_is_kept(given, whole, tmp_path, capsys, monkeypatch):
    real = study_module.Study.run
    cells = iter(range(100))

    def run(self, cell, key):
        if next(cells) == 3:
            raise KeyboardInterrupt
        return real(self, cell, key)

    monkeypatch.setattr(study_module.Study, "run", run)
    (tmp_path / "p.yaml").write_text(json.dumps(given))
    arguments = ["sweep", str(tmp_path / "p.yaml"), "--out", str(tmp_path / "run"), "--quiet"]
    assert main(arguments) == 128 + signal.SIGINT
    said = "prunekit sweep: SIGINT: 3 cells were run now and are kept; --resume goes on\n"
    assert capsys.readouterr().err == said
    monkeypatch.setattr(study_module.Study, "run", real)
    assert bare(sweep(protocol_of(given), tmp_path / "run", resume=True, quiet=True)) == bare(whole)


def test_a_torn_last_line_is_left_out_and_written_anew(tmp_path):
    path = tmp_path / NAME
    path.write_text('{"key": "a"}\n{"key": "b"}\n{"key": "c", "los')
    assert [row["key"] for row in read_rows(path)] == ["a", "b"]
    with Ledger(tmp_path) as ledger:
        assert [row["key"] for row in ledger.rows] == ["a", "b"]
        ledger.append({"key": "d"})
    assert path.read_text() == '{"key": "a"}\n{"key": "b"}\n{"key": "d"}\n'
    path.write_bytes(b'{"key": "a"}\n\0\0\0\n')  # blocks that never came
    assert [row["key"] for row in read_rows(path)] == ["a"]
    path.write_text('{"key": "a"}')  # whole, but not ended: not known to be
    assert read_rows(path) == []


def test_a_line_that_is_broken_in_the_middle_is_refused_with_its_number(tmp_path):
    (tmp_path / NAME).write_text('{"key": "a"}\n{"key\n{"key": "c"}\n')
    with pytest.raises(InputError, match=rf"{NAME}:2: is no row of results"):
        read_rows(tmp_path / NAME)


def test_two_sweeps_do_not_write_to_one_folder(tmp_path):
    with Ledger(tmp_path), pytest.raises(InputError, match="another process writes to it"):
        Ledger(tmp_path)


def test_a_cell_that_cannot_be_made_is_told_and_the_others_go_on(
    given, tmp_path, capsys, monkeypatch
):
    real = study_module.prune

    def prune(model, plan, *, stats, compensate):
        if compensate == "bias":
            raise InputError("compensate bias: no slot")
        return real(model, plan, stats=stats, compensate=compensate)

    monkeypatch.setattr(study_module, "prune", prune)
    grids = [{"sparsities": [0.3], "criteria": ["wanda"], "compensations": ["bias", "none"]}]
    path = tmp_path / "p.yaml"
    path.write_text(json.dumps(given | {"grids": grids}))
    arguments = ["sweep", str(path), "--out", str(tmp_path / "run"), "--quiet", "--json"]
    assert main(arguments) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["error"] for row in rows] == ["", "compensate bias: no slot", ""]
    assert read_run(tmp_path / "run").errors[0][0]["compensate"] == "bias"


def test_tasks_are_solved_and_what_was_answered_is_kept(given, whole, tmp_path):
    model, tokenizer = load(given["model"]), load_tokenizer(given["model"])
    task = read_task(given["tasks"][0]["spec"], limit=6)
    found = evaluate_task(model, tokenizer, task, max_new_tokens=4, quiet=True)
    row = whole[0]["tasks"][task.name]
    assert row["correct"] == [int(right) for right in found.correct]
    assert row["failures"] == found.failures
    assert [g["text"] for g in row["generations"]] == [g.text for g in found.generations[:4]]
    assert [g["prompt"] for g in row["generations"]] == [p.prompt for p in task.problems[:4]]
    assert all(bool(g["failure"]) != g["correct"] for g in row["generations"])
    assert len({json.dumps(row["tasks"][task.name]["generations"]) for row in whole}) > 3


def test_answers_are_kept_by_cell_until_the_row_is_written(given, tmp_path, monkeypatch):
    files, real = [], study_module.evaluate_task

    def evaluate_task(*arguments, resume, **options):
        result = real(*arguments, resume=resume, **options)
        assert resume.read_text()
        files.append(resume.name)
        return result

    monkeypatch.setattr(study_module, "evaluate_task", evaluate_task)
    grids = {"grids": [GRIDS[2]]}
    rows = sweep(protocol_of(given | grids), tmp_path / "run", quiet=True)
    assert files == [f"{row['key']}-0.jsonl" for row in rows]
    assert not (tmp_path / "run" / "partial").exists()


def test_a_recovery_trains_a_copy_and_leaves_the_pruned_model_as_it_was(
    given, tmp_path, monkeypatch
):
    seen = []

    def recover(model, tokenizer, data, *, method, steps, teacher, quiet, **options):
        seen.append((method, steps, teacher, len(data.examples)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return model

    monkeypatch.setattr(trained, "recover", recover)
    grids = [GRIDS[0] | {"recover_at": [0.5], "compensations": ["none"]}]
    plain = sweep(
        protocol_of(given | {"grids": [grids[0] | {"recover_at": []}]}), tmp_path / "a", quiet=True
    )
    more = {"grids": grids, "recovery": {"method": "full", "steps": 3}}
    rows = sweep(protocol_of(given | more), tmp_path / "b", quiet=True)
    assert [row["cell"]["recovery"] for row in rows] == ["", "", "", "full"]
    assert [row["losses"] for row in rows[:3]] == [row["losses"] for row in plain]
    assert rows[3]["losses"] != rows[2]["losses"]
    assert seen == [("full", 3, None, 32)]


def test_a_model_is_made_once_and_kept_by_what_it_was_made_from(given, tmp_path, monkeypatch):
    made = []

    def recover(model, tokenizer, data, *, method, folder, resume, **options):
        assert resume
        folder.mkdir(parents=True)
        made.append((method, len(data.examples)))
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(2)
        return model

    monkeypatch.setattr(trained, "recover", recover)
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    make = {"method": "full", "corpus": {"source": given["target"], "rows": 12}}
    protocol = protocol_of(given | {"make": make, "grids": [GRIDS[0] | {"sparsities": [0.5]}]})
    rows = sweep(protocol, tmp_path / "a", quiet=True)
    again = sweep(protocol, tmp_path / "b", quiet=True)
    assert made == [("full", 12)]
    (kept,) = (tmp_path / "cache" / "models").iterdir()
    assert (kept / "config.json").is_file()
    assert bare(rows) == bare(again)
    sweep(protocol_of(given | {"make": make | {"steps": 2}}), tmp_path / "c", quiet=True)
    assert len(made) == 2


def test_speed_and_memory_are_measured_once_a_width(given, tmp_path):
    measure = {"speed": True, "memory": True, "prompt": 8, "generate": 2, "rounds": 1}
    grids = [GRIDS[1] | {"sparsities": [0.5]}]
    out = tmp_path / "run"
    sweep(protocol_of(given | {"grids": grids, "measure": measure}), out, quiet=True)
    widths = json.loads((out / "speed.json").read_text())["widths"]
    assert set(widths) == {"96", "48"}
    for width, each in widths.items():
        assert each["tg"]["tokens_per_s"] > 0
        assert each["memory"]["peak_bytes"] > 0
        assert each["sparsity"] == (0.5 if width == "48" else 0.0)
    assert widths["48"]["disk"] < widths["96"]["disk"]


def test_groups_that_do_not_fit_together_are_timed_on_one_clock(given, tmp_path, monkeypatch):
    seen = []

    def timed(models, protocol):
        slower = len(seen) + 1  # the second group finds a machine half as fast
        seen.append(list(models))
        rates = {name: 96 / int(name) * 10 / slower for name in models}
        facts = {"test": "tg2", "low": 1 / slower, "high": 2 / slower}
        return [
            facts | {"model": name, "tokens_per_s": rate, "speedup": 96 / int(name)}
            for name, rate in rates.items()
        ]

    monkeypatch.setattr(speed_module, "_timed", timed)
    monkeypatch.setattr(speed_module, "_free_bytes", lambda: 0)
    protocol = protocol_of(given | {"grids": [GRIDS[1]], "measure": {"memory": False}})
    model, out = tiny_model("llama"), tmp_path
    speed_module.measure_widths(model, None, protocol, cells_of(protocol), out)
    assert seen == [["96", "80"], ["96", "48"]]
    widths = json.loads((out / "speed.json").read_text())["widths"]
    assert widths["96"]["tg"]["tokens_per_s"] == 10
    assert widths["48"]["tg"] == {"tokens_per_s": 20, "low": 1, "high": 2, "speedup": 2}
    monkeypatch.setattr(speed_module, "_free_bytes", lambda: 1 << 40)
    speed_module.measure_widths(model, None, protocol, cells_of(protocol), out)
    assert seen[2] == ["96", "80", "48"]


def test_a_corpus_is_split_evenly_and_too_few_rows_are_refused():
    corpus = Corpus("c", tuple(Example(str(i)) for i in range(10)))
    kept, rest = split(corpus, 0.2)
    assert [e.text for e in rest.examples] == ["4", "9"]
    assert [e.text for e in kept.examples] == ["0", "1", "2", "3", "5", "6", "7", "8"]
    with pytest.raises(InputError, match="got 4 rows; expected enough to hold"):
        split(Corpus("c", corpus.examples[:4]), 0.2)


def test_columns_may_be_called_otherwise(tmp_path, tokenizer):
    from prunekit.experiment.material import corpus_of

    path = tmp_path / "gsm.jsonl"
    path.write_text('{"question": "w3 w4 ", "answer": "w5"}\n{"question": "w6 ", "answer": "w7"}\n')
    source = Source(str(path), rows=1, prompt="question", completion="answer")
    assert corpus_of(source, tokenizer).examples == (Example("w3 w4 w5", 6),)
    alone = Source(str(path), prompt="question")
    assert [e.text for e in corpus_of(alone, tokenizer).examples] == ["w3 w4 ", "w6 "]
    with pytest.raises(InputError, match=r"gsm.jsonl:1: no column prose; have question, answer"):
        corpus_of(Source(str(path), prompt="prose"), tokenizer)
