"""`prunekit report`: a sweep's results as a page to read and to print."""

from __future__ import annotations

from pathlib import Path

from prunekit.cli.output import Output
from prunekit.config import ReportConfig
from prunekit.experiment.analysis import read_run
from prunekit.files import check_output_file

CONFIG = ReportConfig
EXAMPLES = """  prunekit report mini-math
  prunekit report mini-math -o report.html"""


def run(config: ReportConfig, output: Output) -> int:
    """Read the run, and write the page and its data."""
    from prunekit.report.run_page import headline, write_run_report

    page = check_output_file(config.output or Path(config.run) / "report.html")
    found = read_run(config.run)
    write_run_report(found, page)
    beside = [str(page.with_suffix(suffix)) for suffix in (".csv", ".json", ".md")]
    output.line(f"{headline(found)}\nreport: {page}\nbeside: {', '.join(beside)}")
    output.json({"report": str(page), "beside": beside, "headline": headline(found)})
    return 0
