"""A benchmark as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunekit.report.bench_plots import speedups, time_by_part
from prunekit.report.bench_table import Line, columns_and_cells, how, sentences
from prunekit.report.page import Table, render


def write_bench_page(
    path: str | Path, lines: Sequence[Line], facts: Mapping[str, Any], rounds: int
) -> Path:
    """Write the page.

    Args:
        path: the file to write.
        lines: the rows, in the order of the table.
        facts: provenance. rounds: of the measurement.

    Raises:
        InputError: the file cannot be written.
    """
    columns, cells = columns_and_cells(lines)
    plots = {}
    for test in dict.fromkeys(line.row.test for line in lines):
        ours = [line for line in lines if line.row.test == test]
        what = "prefill" if test.startswith("pp") else "decoding"
        plots[f"{what} ({test}): speed-up"] = speedups(ours)
        known = [line for line in ours if line.row.parts is not None]
        if known:
            plots[f"{what} ({test}): where the time goes"] = time_by_part(known)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    shown = {name: value for name, value in facts.items() if not isinstance(value, dict | list)}
    return render(
        path,
        "bench.html.j2",
        title="prunekit bench",
        table=Table(columns, cells, how(facts, rounds)),
        plots=plots,
        sentences=sentences(lines),
        facts=shown | {"versions": versions},
    )
