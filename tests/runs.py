"""A sweep's folder as a whole study would leave it, made up: smooth curves, no model."""

import json
import math
import random
from dataclasses import asdict

from prunekit.experiment.cells import Cell

PROBLEMS, DENSE_WIDTH, LAYERS = 200, 1536, 30
SPARSITIES = (0.0833, 0.1667, 0.2083, 0.25, 0.2917, 0.3333, 0.5)
# way: (strategy, criterion, compensate), sparsity at which half is lost, steepness
WAYS = {
    ("selective", "auto", "sequential"): (0.55, 14),
    ("selective", "selectivity", "none"): (0.14, 40),
    ("random", "random", "none"): (0.12, 45),
    ("reverse", "selectivity", "none"): (0.03, 120),
}


def _row(cell, accuracy, draw):
    correct = [int(draw.random() < accuracy) for _ in range(PROBLEMS)]
    wrong = PROBLEMS - sum(correct)
    traps = round(wrong * max(0.0, 0.8 - 2 * accuracy))
    failures = {"wrong": wrong - traps - traps // 3, "repetition": traps // 3, "trap": traps}
    kept = round(DENSE_WIDTH * (1 - cell.sparsity))
    loss = 0.2 + 6 * (1 - accuracy) ** 2
    answers = ["42", "41\n", "12 12 12 12 12 12 12 12 12 12", ""]
    kinds = ["", "wrong", "repetition", "empty"]
    shown = [
        {"prompt": f"{17 + i} + 25 =", "text": answers[k], "correct": k == 0, "failure": kinds[k]}
        for i in range(4)
        for k in [0 if correct[i] else draw.randrange(1, 4)]
    ]
    losses = {
        name: {"loss": loss * times, "stderr": 0.02 * loss, "tokens": 900, "prompts": 64}
        for name, times in (("target", 1), ("word-problems", 1.3))
    }
    return {
        "key": "-".join(str(v) for v in asdict(cell).values()),
        "cell": asdict(cell),
        "criterion": cell.criterion,
        "sparsity": cell.sparsity,
        "widths": [kept] * LAYERS,
        "parameters": 134_000_000 - 3 * 576 * 30 * (DENSE_WIDTH - kept),
        "bytes": 2 * (134_000_000 - 3 * 576 * 30 * (DENSE_WIDTH - kept)),
        "losses": losses,
        "tasks": {
            "arithmetic": {
                "accuracy": sum(correct) / PROBLEMS,
                "stderr": 0.02,
                "correct": correct,
                "failures": {kind: n for kind, n in failures.items() if n},
                "generations": shown,
            }
        },
        "seconds": {"prune": 1.0, "recover": 0.0, "evaluate": 9.0},
        "error": "",
    }


def write_run(folder):
    """Write run.json, results.jsonl, speed.json and scores.json; return the folder."""
    draw = random.Random(0)
    rows = [_row(Cell("dense"), 0.94, draw)]
    for (strategy, criterion, compensate), (middle, steep) in WAYS.items():
        for sparsity in SPARSITIES[:2] if strategy == "reverse" else SPARSITIES:
            for seed in (33, 42) if strategy == "random" else (0,):
                cell = Cell(strategy, sparsity, criterion, compensate, seed)
                lost = 1 / (1 + math.exp(-steep * (sparsity - middle)))
                rows.append(_row(cell, 0.94 * (1 - lost), draw))
                if strategy == "selective" and sparsity > 0.32:
                    after = Cell(strategy, sparsity, criterion, compensate, seed, "full")
                    rows.append(_row(after, 0.9, draw))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = {"device": "made up, 2 threads", "versions": {"torch": "2.13"}, "command": "made up"}
    measure = {"prompt": 256, "generate": 32, "rounds": 3}
    protocol = {"name": "made-up", "about": "Nothing of this was measured.", "model": "none"}
    protocol |= {"measure": measure}
    keys = [row["key"] for row in rows]
    run = {"protocol": protocol, "facts": {}, "keys": keys, "runs": [facts]}
    (folder / "run.json").write_text(json.dumps(run))
    widths = {}
    for sparsity in (0.0, *SPARSITIES):
        rate = 20.0 * (1 + 0.3 * sparsity)
        test = {"tokens_per_s": rate, "low": rate - 0.2, "high": rate + 0.2}
        test["speedup"] = rate / 20
        peak = {"peak_bytes": 6e8 - 3e8 * sparsity, "kind": "rss"}
        width = str(round(DENSE_WIDTH * (1 - sparsity)))
        widths[width] = {"sparsity": sparsity, "tg": test, "pp": test, "memory": peak}
    (folder / "speed.json").write_text(json.dumps({"widths": widths}))
    spread = (-3.0, -1.0, -0.3, 0.0, 0.4, 1.5, 5.0)
    scores = {"quantiles": [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]}
    scores["selectivity"] = [[q * (1 + layer / 30) for q in spread] for layer in range(LAYERS)]
    scores["wanda"] = [[10 ** (q + layer / 20) for q in spread] for layer in range(LAYERS)]
    (folder / "scores.json").write_text(json.dumps(scores))
    return folder
