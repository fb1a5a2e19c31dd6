"""The demo's plots, as SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from prunekit.experiment.off_task import Spent
from prunekit.report.theme import INK, MARKERS, drawing, legend_below, mark, svg


@dataclass(frozen=True)
class Point:
    """A model on a plot: sparsity reached, held-out loss, and decode speed where measured."""

    sparsity: float
    loss: float
    tokens_per_s: float | None = None


def loss_axis(axes: Axes, losses: Sequence[float]) -> None:
    """Name the axis of a loss, and make it logarithmic where the losses lie far apart."""
    axes.set_ylabel("held-out loss (nats/token)")
    if max(losses) > 2.5 * min(losses):
        axes.set_yscale("log")
        low, high = min(losses), max(losses)
        steps = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16)
        axes.set_yticks([t for t in steps if low * 0.9 <= t <= high * 1.1])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def loss_by_sparsity(lines: Mapping[str, Sequence[Point]], dense: Point) -> str:
    """Held-out loss against the sparsity reached, one line a way of pruning."""
    with drawing() as figure:
        axes = figure.add_subplot()
        losses = [dense.loss]
        for (name, points), marker in zip(lines.items(), MARKERS, strict=False):
            joined = [dense, *sorted(points, key=lambda p: p.sparsity)]
            losses += [p.loss for p in joined]
            places = [p.sparsity for p in joined], [p.loss for p in joined]
            axes.plot(*places, marker=marker, label=name)
        axes.axhline(dense.loss, color=INK, linestyle="--", linewidth=1, label="dense")
        axes.set_xlabel("MLP neurons removed")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        loss_axis(axes, losses)
        legend_below(axes)
        return svg(figure)


def loss_off_task(spent: Sequence[Spent]) -> str:
    """The target's rise against the off-task rise: down is better, left keeps more of the rest.

    The models of one way, told apart by how much of the off-task ability they were to keep, are
    joined and labelled by that.
    """
    ways: dict[str, list[Spent]] = {}
    for s in sorted(spent, key=lambda s: s.keep_off_task):
        ways.setdefault(s.name, []).append(s)
    with drawing() as figure:
        axes = figure.add_subplot()
        for (name, points), marker in zip(ways.items(), MARKERS, strict=False):
            places = [p.off_task for p in points], [p.target for p in points]
            axes.plot(*places, marker=marker, label=name)
            for p in points if len(points) > 1 else ():
                place = {"textcoords": "offset points", "xytext": (6, 4), "fontsize": 8}
                axes.annotate(f"{p.keep_off_task:g}", (p.off_task, p.target), **place)
        axes.set_xlabel("rise of the off-task loss (nats/token)")
        axes.set_ylabel("rise of the target's loss (nats/token)")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        legend_below(axes)
        return svg(figure)


def loss_by_speed(lines: Mapping[str, Sequence[Point]], dense: Point) -> str:
    """Held-out loss against measured decode speed: down and to the right is better.

    Speed is a matter of the width, so what was removed is written once above each speed.
    """
    with drawing() as figure:
        axes = figure.add_subplot()
        losses, widths = [dense.loss], {}
        for (name, points), marker in zip(lines.items(), MARKERS, strict=False):
            known = [p for p in points if p.tokens_per_s is not None]
            losses += [p.loss for p in known]
            places = [p.tokens_per_s for p in known], [p.loss for p in known]
            axes.scatter(*places, marker=marker, label=name)
            widths |= {p.tokens_per_s: f"{p.sparsity:.0%}" for p in known}
        place = [dense.tokens_per_s], [dense.loss]
        axes.scatter(*place, marker="*", s=140, color=INK, label="dense")
        axes.set_xlabel("decode speed, batch 1 (tokens/s, measured)")
        loss_axis(axes, losses)
        legend_below(axes)
        mark(axes, widths)
        return svg(figure)
