"""The quality benchmark: its cells, its table, and going on where it stopped."""

import argparse
import json

import pytest

from bench import quality


def cell(name, task, sparsity, rise, seed=0):
    return {"name": name, "task": task, "sparsity": sparsity, "rise": rise, "seed": seed}


def test_the_table_has_means_spread_and_the_best_first():
    cells = [
        cell("wanda + none", "code", 0.5, 0.25),
        cell("wanda + none", "math", 0.5, 0.75),
        cell("random + none", "code", 0.5, 1.0, seed=1),
        cell("random + none", "code", 0.5, 2.0, seed=2),
        cell("rms + none", "code", 0.5, 0.125),
        cell("rms + none", "math", 0.5, 0.125),
    ]
    rows = [line.split(" | ") for line in quality.table(cells).splitlines()[2:]]
    assert [row[0] for row in rows] == ["| rms + none", "| wanda + none", "| random + none"]
    assert rows[1][1:] == ["0.250", "0.750", "0.500 |"]
    assert rows[2][1:] == ["1.500 (1.00 to 2.00)", "", " |"]


def test_knees_need_every_task_and_average_what_all_were_measured_at():
    name = quality.KNEES[0]
    cells = [
        cell(name, "code", 0.1, 0.02) | {"reached": 0.1},
        cell(name, "code", 0.2, 0.08) | {"reached": 0.2},
        cell(name, "math", 0.2, 0.08) | {"reached": 0.2},
        cell(quality.KNEES[1], "math", 0.2, 0.08) | {"reached": 0.2},
    ]
    rows = quality.knees(cells).splitlines()[2:]
    assert rows == [f"| {name} | 14.8 % | 12.2 % | 12.2 % |"]


def test_slow_repairs_meet_only_criteria_that_come_close():
    found = quality.variants(["wanda", "rms", "random"], ["none", "sequential"], [0.5])
    ways = [(v.criterion, v.compensate, v.seed) for v in found]
    drawn = [("random", "none", seed) for seed in quality.SEEDS]
    assert ways == [("wanda", "none", 0), ("rms", "none", 0), *drawn, ("wanda", "sequential", 0)]


def test_rows_that_calibrate_are_not_held_out(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(5)))
    first, last = quality.split(str(path), 3, 2)
    assert [e.text for e in first.examples] == ["row 0", "row 1", "row 2"]
    assert [e.text for e in last.examples] == ["row 3", "row 4"]
    with pytest.raises(SystemExit, match="5 rows, needs 6"):
        quality.split(str(path), 4, 2)


def test_budget_is_a_way_of_its_own_for_the_criterion_that_prices_widths():
    found = quality.variants(
        ["wanda", quality.BUDGETED], ["sequential", "distill"], [0.5], ["uniform", "budget"], 7
    )
    ways = [(v.name, v.allocation, v.steps) for v in found]
    assert ways == [
        ("wanda + sequential", "uniform", None),
        ("reconstruction_fisher + sequential", "uniform", None),
        ("reconstruction_fisher + sequential (budget)", "budget", None),
        ("wanda + distill", "uniform", 7),
        ("reconstruction_fisher + distill", "uniform", 7),
        ("reconstruction_fisher + distill (budget)", "budget", 7),
    ]


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path, monkeypatch, folder):
    path = tmp_path / "c.jsonl"
    rows = ({"prompt": f"w{i} w2", "completion": " w3 w4 w5"} for i in range(6))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = argparse.Namespace(
        model=str(folder),
        out=tmp_path,
        criterion=["wanda"],
        compensate=["none"],
        sparsity=[0.3],
        allocation=["uniform"],
        distill_steps=None,
        calibration=4,
        held_out=2,
    )
    quality.measure({"code": str(path)}, options)
    options.criterion = ["wanda", "rms"]
    quality.measure({"code": str(path)}, options)
    found = list(quality.measured(tmp_path / "results.jsonl"))
    assert [c["criterion"] for c in found] == ["wanda", "rms"]
    assert all(c["rise"] == c["loss"] - c["dense"] for c in found)
    assert "<svg" in quality.plot(found)


def test_the_plot_has_a_line_a_way_and_none_of_widths_that_differ(monkeypatch):
    seen = {}
    monkeypatch.setattr(quality, "loss_by_sparsity", lambda lines, dense: seen.update(lines))
    criterion, repair = quality.PLOTTED[0]
    cell = {"criterion": criterion, "compensate": repair, "seed": 0, "reached": 0.5, "dense": 1.0}
    even = cell | {"name": f"{criterion} + {repair}", "loss": 1.5}
    quality.plot([even, cell | {"name": f"{criterion} + {repair} (budget)", "loss": 1.4}])
    assert seen == {f"{criterion} + {repair}": [quality.Point(0.5, 1.5)]}
