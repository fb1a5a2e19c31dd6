"""Plots as SVG text, drawn by matplotlib without a display."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from prunekit.experiment.off_task import Spent

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "prunekit",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}
_MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Point:
    """A model on a plot: sparsity reached, held-out loss, and decode speed where measured."""

    sparsity: float
    loss: float
    tokens_per_s: float | None = None


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _loss_axis(axes: Axes, losses: Sequence[float]) -> None:
    axes.set_ylabel("held-out loss (nats/token)")
    if max(losses) > 2.5 * min(losses):
        axes.set_yscale("log")
        low, high = min(losses), max(losses)
        ticks = [t for t in (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16) if low * 0.9 <= t <= high * 1.1]
        axes.set_yticks(ticks)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def loss_by_sparsity(lines: Mapping[str, Sequence[Point]], dense: Point) -> str:
    """Held-out loss against the sparsity reached, one line a way of pruning."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.2))
        axes = figure.add_subplot()
        losses = [dense.loss]
        for (name, points), marker in zip(lines.items(), _MARKERS, strict=False):
            joined = [dense, *sorted(points, key=lambda p: p.sparsity)]
            losses += [p.loss for p in joined]
            axes.plot(
                [p.sparsity for p in joined], [p.loss for p in joined], marker=marker, label=name
            )
        axes.axhline(dense.loss, color="0.4", linestyle="--", linewidth=1, label="dense")
        axes.set_xlabel("MLP neurons removed")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _loss_axis(axes, losses)
        axes.legend(frameon=False, fontsize=9)
        return _svg(figure)


def loss_off_task(spent: Sequence[Spent]) -> str:
    """The target's rise against the off-task rise: down is better, left keeps more of the rest.

    The models of one way, told apart by how much of the off-task ability they were to keep, are
    joined and labelled by that.
    """
    ways: dict[str, list[Spent]] = {}
    for s in sorted(spent, key=lambda s: s.keep_off_task):
        ways.setdefault(s.name, []).append(s)
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.2))
        axes = figure.add_subplot()
        for (name, points), marker in zip(ways.items(), _MARKERS, strict=False):
            places = [p.off_task for p in points], [p.target for p in points]
            axes.plot(*places, marker=marker, label=name)
            for p in points if len(points) > 1 else ():
                place = {"textcoords": "offset points", "xytext": (6, 4), "fontsize": 8}
                axes.annotate(f"{p.keep_off_task:g}", (p.off_task, p.target), **place)
        axes.set_xlabel("rise of the off-task loss (nats/token)")
        axes.set_ylabel("rise of the target's loss (nats/token)")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=9)
        return _svg(figure)


def loss_by_speed(lines: Mapping[str, Sequence[Point]], dense: Point) -> str:
    """Held-out loss against measured decode speed: down and to the right is better."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.2))
        axes = figure.add_subplot()
        losses = [dense.loss]
        for (name, points), marker in zip(lines.items(), _MARKERS, strict=False):
            known = [p for p in points if p.tokens_per_s is not None]
            losses += [p.loss for p in known]
            axes.scatter(
                [p.tokens_per_s for p in known], [p.loss for p in known], marker=marker, label=name
            )
            for p in known:
                place = {"textcoords": "offset points", "xytext": (6, 4), "fontsize": 8}
                axes.annotate(f"{p.sparsity:.0%}", (p.tokens_per_s, p.loss), **place)
        axes.scatter(
            [dense.tokens_per_s], [dense.loss], marker="*", s=140, color="0.2", label="dense"
        )
        axes.set_xlabel("decode speed, batch 1 (tokens/s, measured)")
        _loss_axis(axes, losses)
        axes.legend(frameon=False, fontsize=9)
        return _svg(figure)
