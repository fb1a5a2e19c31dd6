"""Every criterion with every repair at several sparsities: the rise of the held-out loss.

A task is a JSONL file of `prompt` + `completion`: its first rows calibrate, its last are held out.
One calibration a task serves every cell; the other tasks' are its distractors. Cells go to
OUT/results.jsonl as they are measured, and a second run goes on where the first stopped;
OUT/quality.md and one plot a task are made from it, and put into the docs by --docs FOLDER.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import reduce
from itertools import product
from pathlib import Path
from statistics import mean

from bench.markers import rewrite
from prunekit.calibrate import calibrate
from prunekit.contrast import against
from prunekit.corpus import Corpus, read_corpus
from prunekit.criteria import CRITERIA
from prunekit.evaluate import evaluate_loss
from prunekit.experiment.knee import shown
from prunekit.experiment.variants import Variant, run_variants
from prunekit.integrations.loading import load, load_tokenizer
from prunekit.report.plots import Point, loss_by_sparsity
from prunekit.stats import NeuronStats

SPARSITIES = (0.2, 0.35, 0.5)
SEEDS = (33, 42, 7)  # of random
KNEES = ("selectivity + none", "fluctuation + bias", "reconstruction_fisher + sequential")
NOT_HERE = ("auto",)  # another's name
SLOW = ("sequential", "distill")  # minutes a cell: only for the criteria that come close
CLOSE = ("reconstruction_fisher", "reconstruction", "wanda")
BUDGETED = "reconstruction_fisher"  # the criterion that says what a layer's width costs the loss
RESULTS = Path(__file__).parent / "results" / "quality"  # what was measured so far
MARKERS = "quality"  # of docs/quality.md
PLOTTED = (
    ("reconstruction_fisher", "sequential"),
    ("wanda", "lstsq"),
    ("fluctuation", "bias"),
    ("minitron", "none"),
    ("taylor", "none"),
    ("random", "none"),
)


def variants(
    criteria: list[str],
    repairs: list[str],
    sparsities: list[float],
    allocations: Sequence[str] = ("uniform",),
    steps: int | None = None,
) -> list[Variant]:
    """Every cell, the quick ones first; distill takes so many steps."""
    found = []
    for repair in repairs:
        for criterion in criteria:
            if repair in SLOW and criterion not in CLOSE:
                continue
            strategy = "random" if criterion == "random" else "selective"
            seeds = SEEDS if criterion == "random" else (0,)
            for seed, allocation in product(seeds, allocations):
                if allocation == "budget" and criterion != BUDGETED:
                    continue
                name = f"{criterion} + {repair}" + " (budget)" * (allocation == "budget")
                options = {"seed": seed, "allocation": allocation}
                options |= {"steps": steps} if repair == "distill" else {}
                found += [
                    Variant(name, s, criterion, strategy, repair, **options) for s in sparsities
                ]
    return found


def split(path: str, calibration: int, held_out: int) -> tuple[Corpus, Corpus]:
    """The first rows and the last of a corpus, which must not meet."""
    whole = read_corpus(path)
    if len(whole.examples) < calibration + held_out:
        raise SystemExit(f"{path}: {len(whole.examples)} rows, needs {calibration + held_out}")
    first, last = whole.examples[:calibration], whole.examples[-held_out:]
    return Corpus(f"{whole.name} (first)", first), Corpus(f"{whole.name} (last)", last)


def statistics(model, tokenizer, corpus: Corpus, path: Path) -> NeuronStats:
    """The calibration of a task, kept beside the results."""
    if path.exists():
        stats = NeuronStats.load(path)
        if stats.provenance["corpora"][0]["hash"] == corpus.hash:
            return stats
    stats = calibrate(model, tokenizer, corpus, gram=True, taylor=True)
    stats.save(path)
    return stats


def contrasted(task: str, found: dict[str, NeuronStats]) -> NeuronStats:
    """The statistics of a task, with those of all the others as its distractor."""
    others = [stats for name, stats in found.items() if name != task]
    if not others:
        return found[task]
    return against(found[task], reduce(NeuronStats.merge, others))


def measured(path: Path) -> Iterator[dict]:
    """The cells on record."""
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


def missing(task: str, data: dict[str, str], options: argparse.Namespace) -> list[Variant]:
    """The cells of a task that are not on record for these rows."""
    done = {
        (c["name"], c["seed"], c["sparsity"], c["steps"])
        for c in measured(options.out / "results.jsonl")
        if c["task"] == task and c["data"] == data
    }
    every = variants(
        options.criterion,
        options.compensate,
        options.sparsity,
        options.allocation,
        options.distill_steps,
    )
    return [v for v in every if (v.name, v.seed, v.sparsity, v.steps) not in done]


def measure(tasks: dict[str, str], options: argparse.Namespace) -> None:
    """Measure the cells that are not on record."""
    rows = {t: split(f, options.calibration, options.held_out) for t, f in tasks.items()}
    data = {t: {"calibration": c.hash, "held_out": h.hash} for t, (c, h) in rows.items()}
    todo = {task: missing(task, data[task], options) for task in tasks}
    if not any(todo.values()):
        return
    model, tokenizer = load(options.model, dtype="bf16"), load_tokenizer(options.model)
    found = {
        task: statistics(model, tokenizer, calibration, options.out / f"{task}.stats")
        for task, (calibration, _) in rows.items()
    }
    for task, (_, held_out) in rows.items():
        stats = contrasted(task, found)
        dense = evaluate_loss(model, tokenizer, held_out, quiet=True).loss
        for outcome in run_variants(model, tokenizer, stats, held_out, todo[task], quiet=True):
            variant, loss = outcome.variant, outcome.loss.loss
            facts = {"reached": outcome.sparsity, "dense": dense, "loss": loss}
            cell = {"task": task, "data": data[task], **asdict(variant), **facts}
            cell |= {"rise": loss - dense, "seconds": round(outcome.seconds, 1)}
            with (options.out / "results.jsonl").open("a") as lines:
                lines.write(json.dumps(cell) + "\n")
            print(
                f"{task:6} {variant.name:36} {variant.sparsity:4.0%} {loss - dense:+8.4f}",
                flush=True,
            )


def table(cells: list[dict]) -> str:
    """Markdown: the rise by way and sparsity, a task a column group, the mean last."""
    tasks = sorted({c["task"] for c in cells})
    sparsities = sorted({c["sparsity"] for c in cells})
    rises: dict[tuple[str, str, float], list[float]] = {}
    for c in cells:
        rises.setdefault((c["name"], c["task"], c["sparsity"]), []).append(c["rise"])
    columns = [(t, s) for t in tasks for s in sparsities] + [("mean", s) for s in sparsities]
    lines = [
        "| criterion + repair | " + " | ".join(f"{t} {s:.0%}" for t, s in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    rows = []
    for name in {c["name"] for c in cells}:
        by_task = {(t, s): rises.get((name, t, s)) for t in tasks for s in sparsities}
        means = {
            s: mean(mean(by_task[t, s]) for t in tasks)
            for s in sparsities
            if all(by_task[t, s] for t in tasks)
        }
        shown = [_rise(v) for v in by_task.values()]
        shown += [_rise([means[s]] if s in means else None) for s in sparsities]
        rows.append((means.get(sparsities[-1], float("inf")), name, shown))
    lines += [f"| {name} | " + " | ".join(shown) + " |" for _, name, shown in sorted(rows)]
    return "\n".join(lines) + "\n"


def _rise(values: list[float] | None) -> str:
    if not values:
        return ""
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def knees(cells: list[dict]) -> str:
    """Markdown: the robustness knee of three ways, by task and on average."""
    tasks = sorted({c["task"] for c in cells})
    lines = ["| criterion + repair | " + " | ".join([*tasks, "mean"]) + " |"]
    lines.append("|---" * (len(tasks) + 2) + "|")
    for way in KNEES:
        points: dict[str, dict[float, float]] = {t: {} for t in tasks}
        for c in cells:
            if c["name"] == way:
                points[c["task"]][c["reached"]] = c["rise"]
        if not all(points.values()):
            continue
        shared = set.intersection(*(set(found) for found in points.values()))
        average = [(s, mean(found[s] for found in points.values())) for s in shared]
        found = [shown(list(points[t].items())) for t in tasks] + [shown(average)]
        lines.append(f"| {way} | " + " | ".join(found) + " |")
    return "\n".join(lines) + "\n"


def plot(cells: list[dict]) -> str:
    """SVG of one task: held-out loss by the sparsity reached, for the ways that tell the story."""
    dense = Point(0.0, cells[0]["dense"])
    lines = {
        f"{criterion} + {repair}": [
            Point(c["reached"], c["loss"])
            for c in cells
            if c["name"] == f"{criterion} + {repair}" and c["seed"] in (0, SEEDS[0])
        ]
        for criterion, repair in PLOTTED
    }
    return loss_by_sparsity({name: points for name, points in lines.items() if points}, dense)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    every = [name for name in sorted(CRITERIA) if name not in NOT_HERE]
    repairs = ["none", "bias", "lstsq", "sequential", "distill"]
    parser.add_argument("--task", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--criterion", nargs="+", choices=every, default=every)
    parser.add_argument("--compensate", nargs="+", choices=repairs, default=repairs[:-1])
    parser.add_argument(
        "--allocation", nargs="+", choices=["uniform", "budget"], default=["uniform"]
    )
    parser.add_argument("--distill-steps", type=int, help="instead of its usual minutes")
    parser.add_argument("--sparsity", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--calibration", type=int, default=192, help="rows")
    parser.add_argument("--held-out", type=int, default=80, help="rows")
    parser.add_argument("--docs", type=Path, help="folder of quality.md, whose table is replaced")
    options = parser.parse_args()
    if len(options.task) < 2:  # nothing to contrast with
        options.criterion = [c for c in options.criterion if "distractor" not in CRITERIA[c].needs]
    options.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("prunekit").setLevel(logging.ERROR)
    tasks = dict(pair.split("=", 1) for pair in options.task)
    measure(tasks, options)
    cells = list(measured(options.out / "results.jsonl"))
    text = table([c for c in cells if c["sparsity"] in options.sparsity])
    text += "\nMost neurons removed before perplexity rises by 5 %:\n\n" + knees(cells)
    (options.out / "quality.md").write_text(text)
    for task in tasks:
        (options.out / f"{task}.svg").write_text(plot([c for c in cells if c["task"] == task]))
    if options.docs:
        rewrite(options.docs / "quality.md", MARKERS, text)
        for task in tasks:
            shutil.copy(options.out / f"{task}.svg", options.docs / f"quality-{task}.svg")
    print(text)


if __name__ == "__main__":
    main()
