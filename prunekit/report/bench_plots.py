"""A benchmark's plots, as SVG text."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from prunekit.report.bench_table import Line
from prunekit.report.theme import FAINT, INK, SERIES, drawing, legend_below, svg

_ROW, _LEGEND = 0.42, 0.62  # inches: a bar, and from the axes to the legend
_PARTS = {
    "mlp": "MLPs",
    "attention": "attention",
    "head": "output head",
    "rest": "norms, embedding, framework",
}


def _names(lines: Sequence[Line]) -> list[str]:
    """What tells the bars of one plot apart."""
    engines, dtypes = (len({getattr(x.row, n) for x in lines}) > 1 for n in ("engine", "dtype"))
    batches = len({line.row.batch for line in lines}) > 1
    return [
        x.row.model
        + f", {x.row.engine}" * engines
        + f", {x.row.dtype}" * dtypes
        + f", batch {x.row.batch}" * batches
        for x in lines
    ]


def speedups(lines: Sequence[Line]) -> str:
    """Measured speed-ups of one test with their intervals, and the bound of each as a line."""
    with drawing(height=1.4 + _ROW * len(lines)) as figure:
        axes = figure.add_subplot()
        places = range(len(lines))
        values = [x.row.speedup for x in lines]
        spread = [
            [x.row.speedup - x.row.speedup_interval[0] for x in lines],
            [x.row.speedup_interval[1] - x.row.speedup for x in lines],
        ]
        error = {"ecolor": INK, "capsize": 3, "elinewidth": 1}
        axes.barh(places, values, height=0.6, color=SERIES[0], xerr=spread, error_kw=error)
        bounds = [(y, x.row.bound.speedup) for y, x in enumerate(lines) if x.row.bound]
        for number, (y, bound) in enumerate(bounds):
            named = {"label": "bound: the removed weights allow"} if number == 0 else {}
            axes.plot([bound, bound], [y - 0.38, y + 0.38], color=SERIES[1], linewidth=2.5, **named)
        axes.axvline(1, color=INK, linewidth=1, linestyle="--")
        axes.set_yticks(places, _names(lines))
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("speed-up (×), measured, 95 % interval")
        axes.grid(visible=False, axis="y")
        if bounds:
            _legend(axes)
        return svg(figure)


def time_by_part(lines: Sequence[Line]) -> str:
    """Where the time of one test goes, in milliseconds a run."""
    with drawing(height=1.6 + _ROW * len(lines)) as figure:
        axes = figure.add_subplot()
        places, left = range(len(lines)), [0.0] * len(lines)
        alone = all(x.row.parts.attention == x.row.parts.head == 0 for x in lines)
        for (part, name), colour in zip(_PARTS.items(), SERIES, strict=False):
            values = [1e3 * getattr(x.row.parts, part) for x in lines]
            if not any(values):
                continue
            label = "everything else" if alone and part == "rest" else name
            options = {"height": 0.6, "color": colour, "label": label, "edgecolor": FAINT}
            axes.barh(places, values, left=left, linewidth=0.5, **options)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axes.set_yticks(places, _names(lines))
        axes.invert_yaxis()
        axes.set_xlabel("time of a run (ms)")
        axes.grid(visible=False, axis="y")
        _legend(axes)
        return svg(figure)


def _legend(axes: Axes) -> None:
    """Below the axis' label, however high the plot is."""
    height = axes.get_position().height * axes.get_figure().get_figheight()
    legend_below(axes, below=_LEGEND / height)
