"""prunekit beside others, on the embedded model: what calibrating, pruning and saving cost.

Every way runs in a process of its own, which says what it took after loading the model and how high
its memory rose; the ways take turns. All remove 20.8 % of the neurons and write a folder. optipfair
(arXiv 2512.22671) takes `pip install --no-deps optipfair`; without it its rows are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from prunekit.calibrate import calibrate
from prunekit.checkpoint import save, weight_bytes
from prunekit.compact import prune
from prunekit.corpus import Corpus
from prunekit.criteria import score
from prunekit.integrations.loading import load, load_tokenizer
from prunekit.measure.memory import peak_rss
from prunekit.measure.provenance import provenance
from prunekit.measure.timing import summarise
from prunekit.plan import plan
from prunekit.tasks.embedded import humaneval

SPARSITY = 0.2
BATCH = 8  # prompts at once, of those who pad
Way = Callable[[Any, Any, Corpus, Path], None]


def _weights(model, tokenizer, corpus: Corpus, folder: Path) -> None:
    scores = score(None, model, "magnitude_ppm")
    save(prune(model, plan(scores, SPARSITY), compensate="none"), tokenizer, folder)


def _activations(model, tokenizer, corpus: Corpus, folder: Path) -> None:
    stats = calibrate(model, tokenizer, corpus, quiet=True)
    chosen = plan(score(stats, model, "wanda"), SPARSITY)
    save(prune(model, chosen, compensate="none"), tokenizer, folder)


def _repaired(model, tokenizer, corpus: Corpus, folder: Path) -> None:
    stats = calibrate(model, tokenizer, corpus, gram=True, quiet=True)
    chosen = plan(score(stats, model, "wanda"), SPARSITY)
    save(prune(model, chosen, stats=stats, compensate="lstsq"), tokenizer, folder)


def _optipfair(model, tokenizer, folder: Path, **options) -> None:
    from optipfair import prune_model_mlp_glu

    wanted = {"pruning_percentage": 100 * SPARSITY, "expansion_divisor": 64}
    smaller = prune_model_mlp_glu(model, "MAW", **wanted, show_progress=False, **options)
    smaller.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _optipfair_weights(model, tokenizer, corpus: Corpus, folder: Path) -> None:
    _optipfair(model, tokenizer, folder)


def _optipfair_activations(model, tokenizer, corpus: Corpus, folder: Path) -> None:
    texts = [example.text for example in corpus.examples]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def padded(batch: list[str]) -> dict[str, torch.Tensor]:
        return dict(tokenizer(batch, return_tensors="pt", padding=True))

    loader = DataLoader(texts, batch_size=BATCH, collate_fn=padded)
    _optipfair(model, tokenizer, folder, dataloader=loader)


WAYS: dict[str, Way] = {
    "optipfair, weights alone (PPM)": _optipfair_weights,
    "prunekit, weights alone (magnitude_ppm)": _weights,
    "optipfair, with activations (hybrid)": _optipfair_activations,
    "prunekit, with activations (wanda)": _activations,
    "prunekit, and repaired (wanda + lstsq)": _repaired,
}


def child(name: str, prompts: int) -> dict[str, float]:
    """Prune in this process: seconds, and the peak of its memory above what loading left."""
    model, tokenizer = load("demo"), load_tokenizer("demo")
    corpus = Corpus("HumanEval", humaneval()[0].examples[:prompts])
    loaded = peak_rss()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "out"
        begun = time.perf_counter()
        WAYS[name](model, tokenizer, corpus, folder)
        seconds = time.perf_counter() - begun
        size = weight_bytes(folder)
    return {"seconds": seconds, "loaded": loaded, "peak": peak_rss(), "bytes": size}


def measured(name: str, prompts: int) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.peers", "--child", name, "--prompts", str(prompts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument(
        "--prompts", type=int, default=32, help="HumanEval problems to calibrate on"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.prompts)))
        return
    here = importlib.util.find_spec("optipfair") is not None
    ways = [name for name in WAYS if here or not name.startswith("optipfair")]
    if not here:
        print("optipfair is not installed (pip install --no-deps optipfair): left out")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name in ways:
            found[name].append(measured(name, options.prompts))
    facts = provenance()
    print(f"{facts['device']}; torch {facts['versions']['torch']}; {options.prompts} prompts")
    print(
        f"{'':42}{'seconds':>9}{'quartiles':>16}{'peak, MB':>10}{'loaded, MB':>12}{'disk, MB':>10}"
    )
    for name, rows in found.items():
        s = summarise([row["seconds"] for row in rows])
        peak, loaded, size = (
            summarise([row[key] / 1e6 for row in rows]).median
            for key in ("peak", "loaded", "bytes")
        )
        spread = f"{s.low:.1f} – {s.high:.1f}"
        print(f"{name:42}{s.median:9.1f}{spread:>16}{peak:10.0f}{loaded:12.0f}{size:10.0f}")


if __name__ == "__main__":
    main()
