"""The report page: everything inside one HTML file, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from prunekit import files

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("prunekit.report", "."),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


# A number and its unit stay on one line.
_TEMPLATES.filters["whole"] = lambda text: text.replace(" %", "\u00a0%")


@dataclass(frozen=True)
class Table:
    """A table of a report: its columns, its rows as text, and what to know when reading it."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def write_report(
    path: str | Path,
    *,
    title: str,
    lead: str,
    table: Table,
    plots: dict[str, str],
    facts: dict[str, Any],
) -> Path:
    """Write one self-contained HTML page.

    Args:
        path: the file to write.
        title, lead: heading, and the sentences under it.
        table: the results.
        plots: SVG text by caption.
        facts: provenance, name to value, printed at the foot.

    Raises:
        InputError: the file cannot be written.
    """
    given = {"title": title, "lead": lead, "table": table, "plots": plots, "facts": facts}
    return render(path, "page.html.j2", **given)


def render(path: str | Path, template: str, **given: Any) -> Path:
    """Write what a template of this package makes of some values.

    Raises:
        InputError: the file cannot be written.
    """
    text = _TEMPLATES.get_template(template).render(**given)
    with files.replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)
