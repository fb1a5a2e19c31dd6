"""The report of a sweep: one page, with everything in it, and its data beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunekit.experiment.analysis import TOLERATED, Pooled, Run, Way, tolerated
from prunekit.experiment.claims import claims
from prunekit.experiment.words import percent, share
from prunekit.report import run_plots as plots
from prunekit.report.page import render
from prunekit.report.run_table import records, table, write_beside

_SHOWN_AT, _REVERSE_AT = 0.35, 0.1  # the sparsities nearest to which models speak
_SPEAKERS = 4  # beside the dense model


@dataclass(frozen=True)
class Section:
    """Plots under a heading, by caption; those in ``whole`` take the page's width."""

    plots: dict[str, str]
    note: str = ""
    whole: tuple[str, ...] = field(default=())


def write_run_report(run: Run, path: str | Path) -> Path:
    """Write the page, and CSV, JSON and Markdown of the same name beside it.

    Args:
        run: from `read_run`, finished or not.
        path: of the page.

    Raises:
        InputError: a file cannot be written.
    """
    path, found, said = Path(path), records(run), claims(run)
    render(
        path,
        "run.html.j2",
        title=run.protocol["name"],
        about=run.protocol["about"],
        headline=headline(run),
        warnings=_warnings(run),
        claims=said,
        sections=_sections(run),
        table=table(run, found),
        samples=_samples(run),
        facts=_facts(run),
        protocol=json.dumps(run.protocol, indent=2, ensure_ascii=False),
    )
    write_beside(path, run, found, said)
    return path


def headline(run: Run) -> str:
    """What the run found, in two or three sentences."""
    task = run.tasks[0] if run.tasks else None
    selective = {w: p for w, p in plots.plain_ways(run).items() if w.strategy == "selective"}
    start = (
        f"The dense model solves {percent(run.dense.accuracy[task].value)} of {task}."
        if task
        else f"The dense model's loss is {run.dense.loss['target'].value:.3f} nats a token."
    )
    if not selective:
        return start
    way, points = max(selective.items(), key=lambda item: _worth(item[1], task))
    last, _ = tolerated(run, points, task)
    kept = f"{share(TOLERATED)} of that" if task else "its perplexity within 5 %"
    name = way.label[0].upper() + way.label[1:]
    text = f"{start} {name} keeps {kept} with up to {percent(last)} of its MLP neurons removed"
    third = min(points, key=lambda p: abs(p.sparsity - _SHOWN_AT))
    text += f", and {_quality(run, third, task)} with {percent(third.sparsity)} removed"
    for other, controls in plots.plain_ways(run).items():
        same = [p for p in controls if p.asked == third.asked]
        if other.strategy == "random" and same:
            text += f", where {other.label} {_quality(run, same[0], task)}"
            break
    return f"{text}."


def _worth(points: Sequence[Pooled], task: str | None) -> float:
    """Mean quality over a way's sparsities."""
    if task:
        return sum(p.accuracy[task].value for p in points) / len(points)
    losses = [p.loss["target"] for p in points]
    return -sum(i.value if i else float("inf") for i in losses) / len(points)


def _quality(run: Run, point: Pooled, task: str | None) -> str:
    if task:
        return f"solves {percent(point.accuracy[task].value)}"
    rise = point.rise(run.dense)
    return "has no finite loss" if rise is None else f"loses {rise:.3f} nats a token"


def _warnings(run: Run) -> list[str]:
    found = []
    if run.missing:
        found.append(f"{run.missing} cells have not been run yet: prunekit sweep ... --resume")
    for cell, error in run.errors:
        place = f"{cell['strategy']}, {cell['criterion']}, {cell['compensate']}"
        found.append(f"No result for {place}, {cell['sparsity']:.1%}: {error}")
    return found


def _sections(run: Run) -> dict[str, Section]:
    task = run.tasks[0] if run.tasks else None
    quality = {f"Accuracy on {t}": plots.accuracy_by_sparsity(run, t) for t in run.tasks}
    quality |= {f"Loss on {_of(c)}": plots.loss_by_sparsity(run, c) for c in run.corpora}
    failing = {f"Answers to {t} that fail, by kind": plots.failures(run, t) for t in run.tasks}
    trained = {"Before and after training": plots.recovery(run, task)}
    cost = {
        "Quality by measured speed": plots.quality_by_cost(run, task, "speed"),
        "Quality by measured memory": plots.quality_by_cost(run, task, "memory"),
    }
    inside = {"Widths by layer": plots.widths_by_layer(run)}
    for criterion in run.scores:
        if criterion != "quantiles":
            inside[f"Scores by layer, {criterion}"] = plots.scores_by_layer(run, criterion)
    sections = {
        "Quality by sparsity": Section(
            quality,
            "Bars: 95 % intervals. Hollow: collapsed, under a fifth of the dense accuracy (the "
            "shaded band), or a loss that has risen by ln 5. Dotted: the knee of the best fit by "
            "two lines, up to the first collapse.",
        ),
        "How they fail": Section(failing, whole=tuple(failing)),
        "Recovery": Section(trained),
        "Quality against what it costs": Section(
            cost,
            "Above each speed and size: the share of the neurons that is removed.",
        ),
        "Inside": Section(inside),
    }
    whole = {}
    for title, section in sections.items():
        drawn = {caption: svg for caption, svg in section.plots.items() if svg}
        if drawn:
            whole[title] = Section(drawn, section.note, section.whole)
    return whole


def _of(corpus: str) -> str:
    return "the target" if corpus == "target" else corpus


def _samples(run: Run) -> list[dict[str, Any]]:
    """Problems of the first task, and the answers of several models side by side."""
    if not run.tasks:
        return []
    task = run.tasks[0]
    speakers = [("dense", run.dense)]
    for way, points in {**plots.plain_ways(run), **_recovered(run)}.items():
        wanted = _REVERSE_AT if way.strategy == "reverse" else _SHOWN_AT
        point = min(points, key=lambda p: abs(p.sparsity - wanted))
        speakers.append((f"{way.label}, {percent(point.sparsity)}", point))
    speakers = speakers[: _SPEAKERS + 1]
    found = []
    for i, first in enumerate(run.dense.generations[task]):
        answers = [{"name": name, **p.generations[task][i]} for name, p in speakers]
        found.append({"prompt": first["prompt"], "answers": answers})
    return found


def _recovered(run: Run) -> dict[Way, Sequence[Pooled]]:
    return {way: points for way, points in run.ways.items() if way.recovery}


def _facts(run: Run) -> dict[str, Any]:
    """Where it was run, a line a fact; what differs between starts is named with its number."""
    last = run.runs[-1]
    facts = {"model": run.protocol["model"], "starts": len(run.runs)}
    facts |= {name: value for name, value in last.items() if name != "versions"}
    facts["versions"] = ", ".join(f"{k} {v}" for k, v in last["versions"].items() if v)
    for number, before in enumerate(run.runs[:-1], 1):
        changed = {k: v for k, v in before.items() if last.get(k) != v and k != "command"}
        if changed:
            facts[f"start {number} differed in"] = ", ".join(
                f"{k}: {v}" for k, v in changed.items()
            )
    return facts
