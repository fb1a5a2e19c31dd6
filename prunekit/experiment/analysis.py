"""A run's rows, pooled: by way of pruning, sparsity by sparsity, seeds together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunekit.errors import InputError
from prunekit.experiment import statistics
from prunekit.experiment.cells import DENSE
from prunekit.experiment.knee import knee, within
from prunekit.experiment.ledger import NAME, read_rows
from prunekit.experiment.statistics import Interval
from prunekit.files import read_json

COLLAPSED = 1 / 5  # of the dense accuracy
COLLAPSE_RISE = math.log(5)  # nats a token: five times the perplexity
TOLERATED = 0.95  # of the dense accuracy, below which a knee is behind
TARGET = "target"


@dataclass(frozen=True, order=True)
class Way:
    """One way of pruning; all its sparsities and seeds are one line of a plot."""

    strategy: str
    criterion: str
    compensate: str
    recovery: str = ""

    @property
    def label(self) -> str:
        """As people read it: "selective (auto + sequential)"."""
        repair = "" if self.compensate == "none" else self.compensate
        chosen = "" if self.strategy == "random" else self.criterion
        inside = " + ".join(filter(None, (chosen, repair)))
        if not chosen and repair:
            inside = f"+ {repair}"
        text = f"{self.strategy} ({inside})" if inside else self.strategy
        return f"{text}, then {self.recovery}" if self.recovery else text


@dataclass(frozen=True)
class Pooled:
    """One way at one sparsity, its seeds together.

    Attributes:
        asked, sparsity: of the neurons, asked for and reached.
        widths: F' of each MLP.
        loss: by corpus: mean over the seeds; None where one seed's is not finite.
        correct: by task: 0 or 1 by problem, a row a seed.
        accuracy: by task.
        failures: by task: the number of answers by kind, over all seeds.
        generations: by task: a few of the first seed's answers.
        rows: the rows that were pooled.
    """

    asked: float
    sparsity: float
    widths: tuple[int, ...]
    loss: Mapping[str, Interval | None]
    correct: Mapping[str, Sequence[Sequence[int]]]
    accuracy: Mapping[str, Interval]
    failures: Mapping[str, Mapping[str, int]]
    generations: Mapping[str, Sequence[Mapping[str, Any]]]
    rows: Sequence[Mapping[str, Any]] = field(repr=False)

    def rise(self, dense: Pooled, corpus: str = TARGET) -> float | None:
        """Of the mean loss over the dense model's; None where one of them is not finite."""
        mine, theirs = self.loss.get(corpus), dense.loss.get(corpus)
        return None if mine is None or theirs is None else mine.value - theirs.value


@dataclass(frozen=True)
class Run:
    """A sweep's results.

    Attributes:
        protocol: as it was run; runs: where, one provenance a start.
        dense: the dense model; ways: the others, ascending by sparsity.
        errors: (cell, why) of those that have no result.
        missing: how many cells have not been run.
        speed: by width: what RUN/speed.json has; scores: what RUN/scores.json has.
    """

    protocol: Mapping[str, Any]
    runs: Sequence[Mapping[str, Any]]
    dense: Pooled
    ways: Mapping[Way, Sequence[Pooled]]
    errors: Sequence[tuple[Mapping[str, Any], str]] = ()
    missing: int = 0
    speed: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks."""
        return list(self.dense.accuracy)

    @property
    def corpora(self) -> list[str]:
        """The names of the corpora whose loss was measured; the target is the first."""
        return list(self.dense.loss)


def read_run(folder: str | Path) -> Run:
    """Read a run's folder, finished or not.

    Raises:
        InputError: it is none, a file is broken, or the dense model has no row yet.
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise InputError(f"{folder}: no run.json; expected a folder that `prunekit sweep` wrote")
    facts = read_json(folder / "run.json")
    rows = {row["key"]: row for row in read_rows(folder / NAME)}
    known = [rows[key] for key in facts["keys"] if key in rows]
    more = {
        name: read_json(folder / f"{name}.json") if (folder / f"{name}.json").is_file() else {}
        for name in ("speed", "scores")
    }
    dense, ways = pool(known)
    return Run(
        protocol=facts["protocol"],
        runs=facts["runs"],
        dense=dense,
        ways=ways,
        errors=[(row["cell"], row["error"]) for row in known if row["error"]],
        missing=len(facts["keys"]) - len(known),
        speed=more["speed"].get("widths", {}),
        scores=more["scores"],
    )


def pool(rows: Iterable[Mapping[str, Any]]) -> tuple[Pooled, dict[Way, list[Pooled]]]:
    """The dense model, and every way of pruning with its seeds together, by sparsity.

    Raises:
        InputError: there is no dense row.
    """
    cells: dict[tuple[Way, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        if not row["error"]:
            c = row["cell"]
            way = Way(c["strategy"], c["criterion"], c["compensate"], c["recovery"])
            cells.setdefault((way, c["sparsity"]), []).append(row)
    ways: dict[Way, list[Pooled]] = {}
    for (way, asked), many in cells.items():
        ways.setdefault(way, []).append(_pooled(asked, many))
    dense = next((points for way, points in ways.items() if way.strategy == DENSE), None)
    if dense is None:
        raise InputError("the run has no result of the dense model yet; let it run on")
    found = {w: sorted(p, key=lambda p: p.sparsity) for w, p in ways.items() if w.strategy != DENSE}
    return dense[0], found


def _pooled(asked: float, rows: Sequence[Mapping[str, Any]]) -> Pooled:
    first = rows[0]
    correct = {t: [row["tasks"][t]["correct"] for row in rows] for t in first["tasks"]}
    failures: dict[str, dict[str, int]] = {t: {} for t in first["tasks"]}
    for row in rows:
        for task, found in row["tasks"].items():
            for kind, count in found["failures"].items():
                if kind:
                    failures[task][kind] = failures[task].get(kind, 0) + count
    return Pooled(
        asked=asked,
        sparsity=first["sparsity"],
        widths=tuple(first["widths"]),
        loss={name: _loss([row["losses"][name] for row in rows]) for name in first["losses"]},
        correct=correct,
        accuracy={task: statistics.accuracy(table) for task, table in correct.items()},
        failures=failures,
        generations={t: first["tasks"][t]["generations"] for t in first["tasks"]},
        rows=rows,
    )


def _loss(found: Sequence[Mapping[str, float] | None]) -> Interval | None:
    if any(each is None for each in found):
        return None
    return statistics.loss([f["loss"] for f in found], [f["stderr"] for f in found])


def collapsed(point: Pooled, dense: Pooled, task: str | None) -> bool:
    """Whether a model is destroyed: under a fifth of the dense accuracy, or, where no task was
    solved, a loss that has risen by ln 5 (five times the perplexity) or is not finite."""
    if task is not None:
        return point.accuracy[task].value < COLLAPSED * dense.accuracy[task].value
    rise = point.rise(dense)
    return rise is None or rise > COLLAPSE_RISE


def curve(run: Run, points: Sequence[Pooled], task: str | None) -> list[tuple[float, float]]:
    """(sparsity, accuracy), or the rise of the loss without a task, from the dense model to the
    first collapse: beyond it a curve is flat again, which is no knee."""
    found = [(0.0, run.dense.accuracy[task].value if task else 0.0)]
    for point in points:
        value = point.accuracy[task].value if task else point.rise(run.dense)
        if value is None:
            break
        found.append((point.sparsity, value))
        if collapsed(point, run.dense, task):
            break
    return found


def tolerated(run: Run, points: Sequence[Pooled], task: str | None) -> tuple[float, float | None]:
    """The sparsities between which the curve leaves what is tolerated: at least 95 % of the dense
    accuracy, or, without a task, a rise of the perplexity of 5 %; None: it never does."""
    found = curve(run, points, task)[1:]
    if task:
        floor = TOLERATED * run.dense.accuracy[task].value
        return within([(p.sparsity, p.accuracy[task].value) for p in points], floor)
    if not found:
        return 0.0, points[0].sparsity
    at = knee(found)
    beyond = [s for s, _ in found if s > at or at < found[-1][0]]
    return (at, at) if beyond else (at, None)
