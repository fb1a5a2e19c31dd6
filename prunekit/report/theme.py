"""How plots look: colours that follow the page from light to dark, drawn without a display."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# matplotlib draws with these, and the page's style sheet says what they become. The colours of the
# series are told apart by the colour-blind too (Okabe and Ito), and serve where no style sheet is.
INK, FAINT, PAPER = "#010203", "#040506", "#fcfdfe"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#7a3e9d")
MARKERS = "osD^vPX"
_VARIABLES = {INK: "currentColor", FAINT: "var(--faint, #d0d4d9)"}
_VARIABLES |= {PAPER: "var(--paper, #ffffff)"}
_VARIABLES |= {colour: f"var(--series-{i}, {colour})" for i, colour in enumerate(SERIES)}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "prunekit",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": f"cycler('color', {list(SERIES)})",
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
_LABEL, _ROW = 8, 11  # points: the size of a mark's text, and from one row of marks to the next


@contextmanager
def drawing(width: float = 6.4, height: float = 4.2) -> Iterator[Figure]:
    """A figure in the house's style, of so many inches."""
    with rc_context(_STYLE):
        yield Figure(figsize=(width, height))


def svg(figure: Figure) -> str:
    """The figure as SVG text that takes its colours from the page around it."""
    text = io.StringIO()
    with rc_context(_STYLE):
        options = {"bbox_inches": "tight", "metadata": {"Date": None}, "transparent": True}
        figure.savefig(text, format="svg", **options)
    found = text.getvalue()[text.getvalue().index("<svg") :]
    return re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], found)


def legend_below(axes: Axes, *, columns: int = 2, below: float = 0.16) -> None:
    """A legend under the axes, where no point can lie: so much of their height below them."""
    place = {"loc": "upper left", "bbox_to_anchor": (0.0, -below)}
    axes.legend(**place, ncols=columns, columnspacing=1.2)


def mark(axes: Axes, places: dict[float, str]) -> None:
    """Fine vertical lines with a text above each; texts that would touch go up a row."""
    rows: list[float] = []  # where the last text of each row ends, in points
    figure = axes.get_figure()
    scale = 72 / figure.dpi
    for x in sorted(places):
        axes.axvline(x, color=FAINT, linewidth=1, zorder=0)
        centre = axes.transData.transform((x, 0))[0] * scale
        half = 0.33 * _LABEL * len(places[x])
        row = next((i for i, end in enumerate(rows) if centre - half > end + 4), len(rows))
        rows[row : row + 1] = [centre + half]
        where = {"xy": (x, 1), "xycoords": ("data", "axes fraction"), "fontsize": _LABEL}
        offset = {"xytext": (0, 3 + _ROW * row), "textcoords": "offset points"}
        axes.annotate(places[x], **where, **offset, ha="center", va="bottom")
