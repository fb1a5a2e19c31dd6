"""What the verbs print: rich tables for people, one JSON document with --json."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


class Output:
    """Results on stdout: tables and lines for people, or JSON collected into one document."""

    def __init__(self, *, as_json: bool):
        self.as_json = as_json
        self.console = Console(highlight=False, soft_wrap=True)
        if not self.console.is_terminal:  # a pipe or a log has no width to fit into
            self.console.width = 200

    def line(self, text: str = "") -> None:
        """Print a line for people."""
        if not self.as_json:
            self.console.print(text, markup=False)

    def note(self, text: str) -> None:
        """Print a line on stderr, whatever the form of the result."""
        print(f"prunekit: {text}", file=sys.stderr)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print a table for people; the first column is left-aligned, the others right."""
        if self.as_json:
            return
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            header_style="bold",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*map(str, row))
        self.console.print(table)

    def rows(self, form: str, rows: Sequence[dict[str, Any]]) -> None:
        """Print rows of the same keys as md, csv or jsonl, unless JSON was asked for."""
        if self.as_json:
            return
        if form == "jsonl":
            for row in rows:
                print(json.dumps(row, ensure_ascii=False))
            return
        if form == "csv":
            writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            return
        for cells in (list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)):
            print("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")

    def json(self, value: Any) -> None:
        """Print the result as JSON, if that was asked for."""
        if self.as_json:
            print(json.dumps(value, indent=2, ensure_ascii=False))


def count(value: float) -> str:
    """Parameters or tokens, readably: 135.0M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:g}"


def megabytes(value: float) -> str:
    """Bytes as MB (10⁶), the unit of disks."""
    return f"{value / 1e6:,.1f} MB"
