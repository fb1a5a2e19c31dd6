"""The report is one file that needs nothing else, and draws every point it was given."""

import re

from prunekit.experiment.off_task import Spent
from prunekit.report.page import Table, write_report
from prunekit.report.plots import Point, loss_by_sparsity, loss_by_speed, loss_off_task

LINES = {
    "ours": [Point(0.5, 1.4, 60.0), Point(0.2, 1.1, 45.0)],
    "random": [Point(0.2, 9.0, 45.0)],
}
DENSE = Point(0.0, 1.0, 40.0)


def test_plots_name_their_lines_axes_and_units():
    by_sparsity, by_speed = loss_by_sparsity(LINES, DENSE), loss_by_speed(LINES, DENSE)
    for svg in (by_sparsity, by_speed):
        assert svg.startswith("<svg")
        for text in ("ours", "random", "dense", "held-out loss (nats/token)"):
            assert f">{text}<" in svg
    assert ">MLP neurons removed<" in by_sparsity
    assert ">decode speed, batch 1 (tokens/s, measured)<" in by_speed
    assert sorted(re.findall(r">(20|50)%<", by_speed)) == ["20", "50"]  # once a speed


def places(svg, pattern):
    """Where the texts that match stand: (x, y, characters)."""
    found = re.finditer(rf'x="([\d.]+)" y="([\d.]+)"[^>]*>({pattern})<', svg)
    return [(float(m[1]), float(m[2]), len(m[3])) for m in found]


def test_no_two_marks_touch_however_close_their_speeds():
    speeds = (40.0, 40.3, 40.6, 44.0, 44.1, 60.0)
    points = [Point(0.1 + 0.1 * i, 1.2, speed) for i, speed in enumerate(speeds)]
    marks = places(loss_by_speed({"ours": points}, DENSE), r"\d0%")
    assert len(marks) == 6
    for i, (x, y, n) in enumerate(marks):
        for other_x, other_y, m in marks[:i]:
            apart = abs(x - other_x) > 0.3 * 8 * (n + m) or abs(y - other_y) >= 9
            assert apart, (x, y, other_x, other_y)


def test_plots_take_their_colours_from_the_page():
    svg = loss_by_sparsity(LINES, DENSE)
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
    fixed = {c for c in colours if not re.match(r"none|currentColor|var\(--", c)}
    assert not fixed
    assert "var(--series-0, #0072b2)" in colours


def test_the_page_is_self_contained_and_escapes_what_it_is_given(tmp_path):
    path = write_report(
        tmp_path / "r.html",
        title="A <b>title</b>",
        lead="lead",
        table=Table(("model", "loss"), [("x < y", "1.0")], "note"),
        plots={"Loss": loss_by_sparsity(LINES, DENSE)},
        facts={"device": "a & b"},
    )
    page = path.read_text()
    assert "A &lt;b&gt;title&lt;/b&gt;" in page
    assert "x &lt; y" in page
    assert "a &amp; b" in page
    assert not re.search(r"(src|href)\s*=\s*[\"']https?:", page)
    assert "<script" not in page
    assert "@import" not in page


def test_the_trade_off_labels_the_knob_and_every_model():
    knobs = (1.0, 0.2, 0.1), (0.0, 0.1, 0.9), (0.37, 0.15, 0.3)
    line = [Spent("wanda + lstsq", 0.35, *values) for values in knobs]
    svg = loss_off_task([*line, Spent("selectivity", 0.35, 0.0, 5.0, 6.0)])
    for text in ("wanda + lstsq", "selectivity", "rise of the off-task loss (nats/token)"):
        assert f">{text}<" in svg
    assert svg.count(">0.37<") == 1
