"""A benchmark's table says what is what, and its sentences why."""

import pytest

from prunekit.measure.amdahl import Bound
from prunekit.measure.comparison import Throughput
from prunekit.measure.parts import Parts
from prunekit.report import bench_table
from prunekit.report.bench_plots import speedups, time_by_part
from prunekit.report.bench_table import Line, columns_and_cells, flat, sentences


def line(model, engine="transformers", test="tg8", dtype="bf16", **more):
    interval = (0.9, 1.1)
    row = Throughput(model, test, 1, 10.0, 9.0, 11.0, 1.0, (9.0, 11.0), interval, engine, dtype)
    return Line(
        Throughput(**{**vars(row), **more}), parameters=10**6, bytes=2 * 10**6, peak_bytes=None
    )


def test_engines_are_named_where_they_differ():
    one, both = [line("a")], [line("a"), line("a", engine="llama.cpp")]
    assert "engine" not in columns_and_cells(one)[0]
    columns, cells = columns_and_cells(both)
    assert [row[columns.index("engine")] for row in cells] == ["transformers", "llama.cpp"]
    assert all(len(row) == len(columns) for row in cells)


def test_a_row_for_machines_says_the_mlps_share():
    assert flat(line("a"))["mlp_share"] is None
    assert flat(line("a", parts=Parts(3.0, 1.0, 0.5, 0.5)))["mlp_share"] == pytest.approx(0.6)


def test_a_dtype_that_the_processor_emulates_is_named_once(monkeypatch):
    monkeypatch.setattr(bench_table.torch.cuda, "is_available", lambda: False)
    parts, bound = Parts(3.0, 1.0, 0.5, 0.5), Bound(1.2, 0.9, "why not")
    lines = [line("a", parts=parts), line("b", parts=parts, bound=bound), line("c", dtype="fp32")]
    for can, first in ((False, "bf16: this processor"), (True, "b, bf16, tg8, batch 1: why not")):
        monkeypatch.setattr(bench_table, "multiplies", lambda dtype, can=can: can)
        said = sentences(lines)
        assert said[0].startswith(first)
        assert len(said) == 2 - can


def test_plots_tell_their_bars_apart():
    lines = [line("dense"), line("small", bound=Bound(1.2, 0.9, "")), line("small", "llama.cpp")]
    text = speedups(lines)
    assert "small, transformers" in text
    assert "small, llama.cpp" in text
    assert "the removed weights allow" in text
    compiled = [line("dense", parts=Parts(3.0, 0.0, 0.0, 1.0))]
    assert "everything else" in time_by_part(compiled)
    assert "norms" in time_by_part([line("dense", parts=Parts(3.0, 1.0, 0.0, 1.0))])
