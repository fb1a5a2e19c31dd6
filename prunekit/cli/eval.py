"""`prunekit eval`: the mean loss of a model on held-out corpora, what it lost, and samples."""

from __future__ import annotations

from prunekit.cli.output import Output, count
from prunekit.cli.sources import corpora
from prunekit.config import EvalConfig
from prunekit.errors import InputError
from prunekit.evaluate import evaluate
from prunekit.integrations.loading import load, load_tokenizer
from prunekit.measure.provenance import provenance

CONFIG = EvalConfig
EXAMPLES = """  prunekit eval small --data held_out.jsonl
  prunekit eval small --data held_out.jsonl other.jsonl --samples 2
  prunekit eval small --baseline demo --data target.jsonl off_task.jsonl
  prunekit eval small --data held_out.jsonl --limit 100 --json"""


def run(config: EvalConfig, output: Output) -> int:
    """Measure and print the loss on every corpus."""
    if not config.data:
        raise InputError("needs --data FILE; see `prunekit eval --help`")
    tokenizer = load_tokenizer(config.model)
    data = corpora(config.data, tokenizer, config.limit)
    options = {
        "max_length": config.max_length,
        "batch_tokens": config.batch_tokens,
        "quiet": config.quiet,
    }
    model = load(config.model, dtype=config.dtype)
    result = evaluate(model, tokenizer, data, samples=config.samples, **options)
    rows = [
        (r["corpus"], f"{r['loss']:.4f}", f"{r['stderr']:.4f}", count(r["tokens"]), r["prompts"])
        for r in result["loss"]
    ]
    columns = ("corpus", "loss (nats/token)", "± stderr", "tokens", "prompts")
    if config.baseline:
        dense = evaluate(load(config.baseline, dtype=config.dtype), tokenizer, data, **options)
        for mine, theirs in zip(result["loss"], dense["loss"], strict=True):
            mine |= {"dense": theirs["loss"], "rise": mine["loss"] - theirs["loss"]}
        columns += ("dense", "rise")
        rows = [
            (*row, f"{r['dense']:.4f}", f"{r['rise']:+.4f}")
            for row, r in zip(rows, result["loss"], strict=True)
        ]
    output.table(config.model, columns, rows)
    for sample in result["samples"]:
        output.line(f"\n--- prompt\n{sample['prompt']}\n--- completion\n{sample['completion']}")
    output.json({"model": config.model, **result, "provenance": provenance()})
    return 0
