"""What the off-task ability costs: the loss on both tasks by --keep-off-task, and of the rivals.

TARGET and OFF are files as `bench.quality` takes them. The knob is turned for two criteria with the
quick repair; the paper's metric, which contrasts by itself, and wanda stand beside them.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path

from bench.quality import contrasted, split, statistics
from prunekit.evaluate import evaluate_loss
from prunekit.experiment.off_task import Spent, off_task_spent
from prunekit.experiment.variants import Variant, run_variants
from prunekit.integrations.loading import load, load_tokenizer
from prunekit.report.plots import loss_off_task

KNOBS = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
KNOBBED = ("reconstruction_fisher", "wanda")


def variants(sparsity: float, knobs: list[float], repair: str) -> list[Variant]:
    """The knob's positions, one criterion after the other, then what it is compared with."""
    found = [
        Variant(f"{name} + {repair}", sparsity, name, compensate=repair, keep_off_task=knob)
        for name in KNOBBED
        for knob in knobs
    ]
    plain = (("selectivity", "none"), ("selectivity", "lstsq"), ("wanda", "none"))
    return found + [Variant(f"{n} + {r}", sparsity, n, compensate=r) for n, r in plain]


def table(spent: list[Spent]) -> str:
    """Markdown, a row a model."""
    lines = ["| criterion + repair | keep off task | target | off task |", "|---|---|---|---|"]
    for s in spent:
        lines.append(f"| {s.name} | {s.keep_off_task:g} | {s.target:.3f} | {s.off_task:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", required=True, metavar="NAME=FILE")
    parser.add_argument("--off-task", required=True, metavar="NAME=FILE")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--out", type=Path, default=Path("contrast"))
    parser.add_argument("--knob", nargs="+", type=float, default=list(KNOBS))
    parser.add_argument("--compensate", default="lstsq", choices=("lstsq", "sequential"))
    parser.add_argument("--sparsity", type=float, default=0.35)
    parser.add_argument("--calibration", type=int, default=192, help="rows")
    parser.add_argument("--held-out", type=int, default=80, help="rows")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("prunekit").setLevel(logging.ERROR)
    model, tokenizer = load(options.model, dtype="bf16"), load_tokenizer(options.model)
    found, held_out = {}, []
    for task in (options.target, options.off_task):
        name, _, source = task.partition("=")
        calibration, rest = split(source, options.calibration, options.held_out)
        found[name] = statistics(model, tokenizer, calibration, options.out / f"{name}.stats")
        held_out.append(rest)
    stats = contrasted(options.target.partition("=")[0], found)
    dense = evaluate_loss(model, tokenizer, held_out[0], quiet=True)
    spent = []
    ways = variants(options.sparsity, options.knob, options.compensate)
    outcomes = run_variants(model, tokenizer, stats, held_out[0], ways, quiet=True)
    for s in off_task_spent(model, dense, tokenizer, held_out[1], outcomes):
        spent.append(s)
        print(table([s]).splitlines()[2], flush=True)
    (options.out / "contrast.json").write_text(json.dumps([asdict(s) for s in spent], indent=1))
    (options.out / "contrast.md").write_text(table(spent))
    (options.out / "contrast.svg").write_text(loss_off_task(spent))


if __name__ == "__main__":
    main()
