"""A sweep's plots, as SVG text; every one takes a run and draws what it has."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from prunekit.experiment.analysis import (
    COLLAPSED,
    TARGET,
    Pooled,
    Run,
    Way,
    collapsed,
    curve,
    tolerated,
)
from prunekit.experiment.knee import fitted_knee
from prunekit.experiment.statistics import Interval
from prunekit.report.plots import loss_axis
from prunekit.report.theme import (
    FAINT,
    INK,
    MARKERS,
    PAPER,
    SERIES,
    drawing,
    legend_below,
    mark,
    svg,
)

_KINDS = ("wrong", "unparsable", "empty", "repetition", "trap")
_APART = 0.0018  # by which the points of the ways are moved apart, so that their intervals show


def plain_ways(run: Run) -> dict[Way, Sequence[Pooled]]:
    """The ways without a recovery: selective ones first, then random, then reverse."""
    order = ("selective", "random", "reverse")
    found = [item for item in run.ways.items() if not item[0].recovery]
    return dict(sorted(found, key=lambda item: order.index(item[0].strategy)))


def _styles(run: Run) -> Iterator[tuple[Way, Sequence[Pooled], str, str, float]]:
    """(way, points, colour, marker, shift) of each line."""
    ways = plain_ways(run)
    middle = (len(ways) - 1) / 2
    for i, (way, points) in enumerate(ways.items()):
        yield way, points, SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)], _APART * (i - middle)


def accuracy_by_sparsity(run: Run, task: str) -> str:
    """Accuracy with 95 % intervals against the sparsity reached; collapse and knees marked."""

    def of(point: Pooled) -> Interval | None:
        return point.accuracy[task]

    with drawing(7.2, 4.6) as figure:
        axes = figure.add_subplot()
        dense = run.dense.accuracy[task]
        _lines(axes, run, of, task)
        axes.axhspan(0, COLLAPSED * dense.value, color=FAINT, alpha=0.45, linewidth=0, zorder=0)
        axes.axhline(dense.value, color=INK, linestyle="--", linewidth=1, label="dense")
        axes.set_ylim(-0.02, 1.02)
        axes.set_ylabel(f"accuracy on {task} (% of problems)")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        _sparsity_axis(axes)
        legend_below(axes)
        return svg(figure)


def loss_by_sparsity(run: Run, corpus: str) -> str:
    """The loss on a corpus with 95 % intervals against the sparsity reached."""

    def of(point: Pooled) -> Interval | None:
        return point.loss[corpus]

    points = [p for _, many, *_ in _styles(run) for p in many]
    known = [i.value for p in (run.dense, *points) if (i := of(p)) is not None]
    if not known or run.dense.loss[corpus] is None:
        return ""
    with drawing(7.2, 4.6) as figure:
        axes = figure.add_subplot()
        _lines(axes, run, of, marked=corpus == TARGET)
        dense = run.dense.loss[corpus].value
        axes.axhline(dense, color=INK, linestyle="--", linewidth=1, label="dense")
        loss_axis(axes, known)
        _sparsity_axis(axes)
        legend_below(axes)
        return svg(figure)


def _lines(
    axes: Axes,
    run: Run,
    of: Callable[[Pooled], Interval | None],
    task: str | None = None,
    *,
    marked: bool = True,
) -> None:
    """A line a way; where ``marked``, hollow where it has collapsed and with its knee."""
    for way, points, colour, marker, shift in _styles(run):
        known = [(p, i) for p in points if (i := of(p)) is not None]
        x = np.array([0.0, *(p.sparsity + shift for p, _ in known)])
        found = [of(run.dense), *(i for _, i in known)]
        y = np.array([i.value for i in found])
        spread = [[i.value - i.low for i in found], [i.high - i.value for i in found]]
        axes.plot(x, y, color=colour, linewidth=1.4, marker=marker, label=way.label)
        axes.errorbar(x[1:], y[1:], np.array(spread)[:, 1:], fmt="none", ecolor=colour, capsize=2.5)
        if not marked:
            continue
        broken = [k for k, (p, _) in enumerate(known, 1) if collapsed(p, run.dense, task)]
        hollow = {"markerfacecolor": PAPER, "linestyle": "none"}
        axes.plot(x[broken], y[broken], color=colour, marker=marker, **hollow)
        if way.strategy != "selective" or tolerated(run, points, task)[1] is None:
            continue  # a curve that stays within what is tolerated has no knee worth a line
        bend = fitted_knee(curve(run, points, task), falls=task is not None)
        if bend is not None:
            text = f"knee {100 * bend.at:.0f} %: {way.label}"
            axes.axvline(bend.at, color=colour, linestyle=":", linewidth=1.3, label=text)


def _sparsity_axis(axes: Axes) -> None:
    axes.set_xlabel("MLP neurons removed (%)")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
    axes.set_xlim(left=-0.01)


def failures(run: Run, task: str) -> str:
    """Answers that fail, by kind, stacked: a panel a way, a bar a sparsity, dense the first."""
    ways = {**plain_ways(run), **{w: p for w, p in run.ways.items() if w.recovery}}
    if not ways:
        return ""
    columns = min(3, len(ways))
    rows = -(-len(ways) // columns)
    with drawing(3.4 * columns, 2.9 * rows + 0.5) as figure:
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for axes, (way, points) in zip(panels.flat, ways.items(), strict=False):
            _stack(axes, [run.dense, *points], task)
            axes.set_title("\n".join(textwrap.wrap(way.label, 34)), fontsize=10)
        for axes in panels.flat[len(ways) :]:
            axes.set_visible(False)
        for axes in panels[:, 0]:
            axes.set_ylabel("answers (%)")
        handles, labels = panels.flat[0].get_legend_handles_labels()
        figure.tight_layout(rect=(0, 0.35 / figure.get_figheight(), 1, 1), h_pad=1.6)
        figure.legend(handles, labels, loc="lower center", ncols=len(_KINDS))
        return svg(figure)


def _stack(axes: Axes, points: Sequence[Pooled], task: str) -> None:
    names = ["dense", *(f"{100 * p.sparsity:.0f}" for p in points[1:])]
    bottom = np.zeros(len(points))
    for kind, colour in zip(_KINDS, SERIES, strict=False):
        answers = [sum(map(len, p.correct[task])) for p in points]
        share = [
            100 * p.failures[task].get(kind, 0) / n for p, n in zip(points, answers, strict=True)
        ]
        axes.bar(range(len(points)), share, bottom=bottom, color=colour, width=0.75, label=kind)
        bottom += share
    axes.set_xticks(range(len(points)), names, fontsize=8)
    axes.set_ylim(0, 100)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("neurons removed (%)", fontsize=9)


def recovery(run: Run, task: str | None) -> str:
    """Before and after training, with intervals; "" where nothing was trained."""
    rows = []
    for way, points in run.ways.items():
        before = {
            p.asked: p for p in run.ways.get(Way(way.strategy, way.criterion, way.compensate), ())
        }
        rows += [(way, before[p.asked], p) for p in points if way.recovery and p.asked in before]
    if not rows:
        return ""
    with drawing(7.2, 0.42 * len(rows) + 1.5) as figure:
        axes = figure.add_subplot()
        for y, (_, before, after) in enumerate(reversed(rows)):
            for point, colour, face in ((before, SERIES[1], PAPER), (after, SERIES[0], SERIES[0])):
                found = point.accuracy[task] if task else point.loss[TARGET]
                if found is not None:
                    spread = [[found.value - found.low], [found.high - found.value]]
                    options = {"color": colour, "markerfacecolor": face, "capsize": 2.5}
                    label = ("before" if point is before else "after") if y == 0 else None
                    axes.errorbar(found.value, y, xerr=spread, marker="o", label=label, **options)
        dense = run.dense.accuracy[task] if task else run.dense.loss[TARGET]
        axes.axvline(dense.value, color=INK, linestyle="--", linewidth=1, label="dense")
        names = [f"{way.label}, {100 * p.sparsity:.0f} %" for way, p, _ in reversed(rows)]
        axes.set_yticks(range(len(rows)), names, fontsize=9)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("held-out loss (nats/token)")
        if task:
            axes.set_xlabel(f"accuracy on {task} (% of problems)")
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.5 / len(rows) - 0.12), ncols=3)
        return svg(figure)


def quality_by_cost(run: Run, task: str | None, of: str) -> str:
    """Accuracy, or loss without a task, against what was measured: "speed" or "memory"."""
    measured = {
        int(width): cost
        for width, each in run.speed.items()
        if (cost := _cost(each, of)) is not None
    }
    if len(measured) < 2:
        return ""
    with drawing(7.2, 4.6) as figure:
        axes = figure.add_subplot()
        losses = []
        for way, points, colour, marker, _ in _styles(run):
            known = [
                (measured[p.widths[0]], i)
                for p in points
                if p.widths[0] in measured
                and (i := p.accuracy[task] if task else p.loss[TARGET]) is not None
            ]
            losses += [i.value for _, i in known]
            values = [i.value for _, i in known]
            spread = [[i.value - i.low for _, i in known], [i.high - i.value for _, i in known]]
            options = {"color": colour, "marker": marker, "linestyle": "none", "linewidth": 1}
            axes.errorbar([x for x, _ in known], values, yerr=spread, label=way.label, **options)
        dense = run.dense.accuracy[task] if task else run.dense.loss[TARGET]
        place = [measured[run.dense.widths[0]]], [dense.value]
        axes.scatter(*place, marker="*", s=140, color=INK, label="dense", zorder=3)
        if task:
            axes.set_ylim(-0.02, 1.02)
            axes.set_ylabel(f"accuracy on {task} (% of problems)")
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        else:
            loss_axis(axes, [dense.value, *losses])
        axes.set_xlabel(
            "decode speed, batch 1 (tokens/s, measured)"
            if of == "speed"
            else "peak memory of loading and running, batch 1 (MB, measured)"
        )
        legend_below(axes)
        removed = {int(width): each["sparsity"] for width, each in run.speed.items()}
        mark(axes, {cost: f"{100 * removed[width]:.0f} %" for width, cost in measured.items()})
        return svg(figure)


def _cost(each: dict, of: str) -> float | None:
    if of == "speed":
        return each["tg"]["tokens_per_s"] if "tg" in each else None
    return each["memory"]["peak_bytes"] / 1e6 if "memory" in each else None


def widths_by_layer(run: Run) -> str:
    """The neurons that each MLP keeps, a line a sparsity."""
    found = {p.widths: p.sparsity for points in run.ways.values() for p in points}
    with drawing(7.2, 3.6) as figure:
        axes = figure.add_subplot()
        layers = range(len(run.dense.widths))
        axes.step(layers, run.dense.widths, where="mid", color=INK, linestyle="--", label="dense")
        for i, (widths, sparsity) in enumerate(sorted(found.items(), key=lambda item: item[1])):
            colour, label = SERIES[i % len(SERIES)], f"{100 * sparsity:.1f} % removed"
            axes.step(layers, widths, where="mid", color=colour, label=label)
        axes.set_xlabel("MLP (number, from the input on)")
        axes.set_ylabel("width (neurons)")
        axes.set_ylim(bottom=0)
        legend_below(axes, columns=4)
        return svg(figure)


def scores_by_layer(run: Run, criterion: str) -> str:
    """How a criterion's scores are spread in each MLP: median, middle half, 5 to 95 %."""
    table = np.asarray(run.scores[criterion])
    low, first, middle, third, high = (table[:, i] for i in range(1, 6))
    with drawing(7.2, 3.6) as figure:
        axes = figure.add_subplot()
        layers = np.arange(len(table))
        options = {"color": SERIES[0], "linewidth": 0}
        axes.fill_between(layers, low, high, alpha=0.2, label="5 to 95 % of neurons", **options)
        axes.fill_between(layers, first, third, alpha=0.4, label="middle half", **options)
        axes.plot(layers, middle, color=SERIES[0], label="median")
        if (low > 0).all() and high.max() > 30 * low.min():
            axes.set_yscale("log")
        axes.set_xlabel("MLP (number, from the input on)")
        axes.set_ylabel(f"score by {criterion}\n(its own unit; higher stays)")
        legend_below(axes, columns=3)
        return svg(figure)
