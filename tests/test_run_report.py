"""A sweep's report: all of it in one page, and the same figures beside it."""

import csv
import json
import re

import pytest

from prunekit.cli import main
from prunekit.errors import InputError
from prunekit.experiment.analysis import read_run
from prunekit.experiment.claims import claims
from prunekit.report.run_page import write_run_report
from tests.runs import SPARSITIES, write_run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "made-up")


@pytest.fixture(scope="module")
def page(run_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    return write_run_report(read_run(run_folder), path)


def test_the_page_is_self_contained_and_follows_light_and_dark(page):
    text = page.read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"'](https?:|//)", text)
    assert "<script" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    names = set(re.findall(r"var\((--[\w-]+)", text))
    for name in names:
        assert text.count(f"{name}: ") >= 3, f"{name} has no value in light, dark and print"


def test_every_plot_is_there_and_every_axis_has_a_unit(page):
    figures = re.findall(r"<figcaption>(.*?)</figcaption>(.*?)</figure>", page.read_text(), re.S)
    assert [caption for caption, _ in figures] == [
        "Accuracy on arithmetic",
        "Loss on the target",
        "Loss on word-problems",
        "Answers to arithmetic that fail, by kind",
        "Before and after training",
        "Quality by measured speed",
        "Quality by measured memory",
        "Widths by layer",
        "Scores by layer, selectivity",
        "Scores by layer, wanda",
    ]
    units = r"\(%\)|\(% of problems\)|\(nats/token\)|measured\)|\(neurons\)|number, from|unit"
    for caption, svg in figures:
        texts = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
        assert sum(bool(re.search(units, t)) for t in texts) >= (1 if "training" in caption else 2)
        fixed = re.findall(r"(?:fill|stroke): (#\w+)", svg)
        assert not fixed, caption


def test_collapse_and_knee_are_marked(page):
    svg = re.search(r"Accuracy on arithmetic</figcaption>(.*?)</figure>", page.read_text(), re.S)[1]
    assert re.search(r">knee \d+ %: selective \(auto \+ sequential\)<", svg)
    assert "fill: var(--paper" in svg  # hollow


def test_claims_samples_provenance_and_protocol_are_on_the_page(page, run_folder):
    text = page.read_text().replace("\u00a0", " ")
    for claim in claims(read_run(run_folder)):
        assert claim.title in text
        assert claim.text.replace("<", "&lt;").replace("'", "&#39;") in text
    assert "17 + 25 =" in text
    assert text.count('<div class="answers">') == 4
    assert "made up, 2 threads" in text
    assert "&#34;name&#34;: &#34;made-up&#34;" in text


def test_csv_json_and_markdown_have_the_figures_of_the_run(page, run_folder):
    run = read_run(run_folder)
    rows = list(csv.DictReader(page.with_suffix(".csv").open()))
    facts = json.loads(page.with_suffix(".json").read_text())
    assert len(rows) == len(facts["models"]) == 1 + sum(len(p) for p in run.ways.values())
    for row, model in zip(rows, facts["models"], strict=True):
        assert float(row["accuracy arithmetic"]) == model["accuracy arithmetic"]
        assert row["model"] == model["model"]
    point = next(p for p in run.ways[next(iter(run.ways))] if p.sparsity == SPARSITIES[0])
    assert facts["models"][1]["accuracy arithmetic"] == point.accuracy["arithmetic"].value
    assert facts["models"][1]["accuracy arithmetic low"] == point.accuracy["arithmetic"].low
    text = page.with_suffix(".md").read_text()
    assert text.count("\n| ") == len(rows) + 2
    assert "**Selective removal beats random removal**" in text


def test_a_run_that_goes_on_without_tasks_or_speed_has_its_report_too(run_folder, tmp_path):
    part = tmp_path / "part"
    part.mkdir()
    (part / "run.json").write_text((run_folder / "run.json").read_text())
    rows = [json.loads(line) for line in (run_folder / "results.jsonl").read_text().splitlines()]
    for row in rows[:4]:
        row["tasks"] = {}
    rows[2] |= {"error": "it broke"}
    rows[3]["losses"]["target"] = None
    lines = "".join(json.dumps(row) + "\n" for row in rows[:4])
    (part / "results.jsonl").write_text(lines + '{"key": "to')
    text = write_run_report(read_run(part), tmp_path / "r.html").read_text()
    assert f"{len(rows) - 4} cells have not been run yet" in text
    assert "it broke" in text
    assert "Quality by measured speed" not in text
    assert "Speed was not measured." in text


def test_the_verb_writes_beside_the_run_by_default(run_folder, capsys):
    assert main(["report", str(run_folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["report"] == str(run_folder / "report.html")
    assert (run_folder / "report.csv").is_file()
    assert facts["headline"].startswith("The dense model solves 9")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no run\.json; expected a folder that `prunekit sweep`"):
        read_run(tmp_path)
