"""prunekit's own suite: both ways take turns, and the page says what was found."""

import json

from bench import suite
from prunekit.ops import registry


def test_each_case_runs_both_ways_in_turn(monkeypatch):
    seen = []
    case = lambda: seen.append(registry._forced)  # noqa: E731
    rows = suite.measure({"a": case}, rounds=8, limit_s=1e9)
    assert seen == [None, "reference"] * 9
    assert [row.case for row in rows] == ["a"]


def test_no_round_begins_after_the_limit_but_for_the_least():
    seen = []
    suite.measure({"a": lambda: seen.append(1)}, rounds=25, limit_s=0)
    assert len(seen) == 2 * (1 + suite.LEAST)


def test_speed_up_is_the_median_of_the_rounds_ratios():
    found = suite.row("a", [1.0, 2.0, 4.0], [2.0, 2.0, 2.0])
    assert (found.ms, found.reference_ms, found.speedup) == (2.0, 2.0, 1.0)
    assert "| a | 2.00 | 1.00 – 4.00 | 2.00 | 2.00 – 2.00 | 1.00 × | 0.50 – 2.00 |" in suite.table(
        [found]
    )


def test_the_page_and_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(suite.SUITES, "operations", lambda: {"nothing": lambda: None})
    monkeypatch.setattr(suite, "audit", lambda: (False, "FAILED a budget"))
    given = ["--suite", "operations", "--rounds", "7", "--out", str(tmp_path)]
    assert suite.main(given) == 1
    page = (tmp_path / "suite.md").read_text()
    assert "| nothing |" in page
    assert "FAILED a budget" in page
    assert not json.loads((tmp_path / "suite.json").read_text())["audit_kept"]
    assert suite.main([*given, "--no-audit"]) == 0
