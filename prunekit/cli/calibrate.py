"""`prunekit calibrate`: statistics of a model over corpora, saved for every later plan."""

from __future__ import annotations

from math import prod
from pathlib import Path

from prunekit.calibrate import calibrate
from prunekit.cli.offload import calibrated_on_disk
from prunekit.cli.output import Output, count, megabytes
from prunekit.cli.sources import corpora, joined
from prunekit.config import CalibrateConfig
from prunekit.errors import InputError
from prunekit.files import check_output_file
from prunekit.integrations.loading import load, load_tokenizer
from prunekit.ranks import meeting, started
from prunekit.stats import NeuronStats

CONFIG = CalibrateConfig
EXAMPLES = """  prunekit calibrate demo --target task.jsonl --gram -o task.stats
  prunekit calibrate Qwen/Qwen2.5-Math-1.5B-Instruct --target gsm8k.jsonl \\
      --distractor squad.jsonl --distractor chat.jsonl -o math.stats
  prunekit prune demo --stats task.stats --sparsity 0.2 -o small
  prunekit calibrate large-model --target task.jsonl --gram --offload disk -o large.stats
  torchrun --nproc-per-node 4 -m prunekit calibrate large --target task.jsonl -o large.stats"""


def run(config: CalibrateConfig, output: Output) -> int:
    """Calibrate, save, and say what was seen; under torchrun, each process its share."""
    if not config.target or not config.output:
        raise InputError("needs --target FILE and -o STATS; see `prunekit calibrate --help`")
    if config.off_task and not config.distractor:
        raise InputError("--off-task: needs --distractor FILE")
    alone = started() == 1
    if config.resume and not alone:
        raise InputError("--resume: only one process keeps what it did; leave torchrun out")
    check_output_file(config.output)
    if config.offload == "disk":
        return _on_disk(config, output, alone=alone)
    unfinished = Path(f"{config.output}.unfinished")
    tokenizer = load_tokenizer(config.model)
    target = joined(corpora(config.target, tokenizer, config.limit))
    distractors = corpora(config.distractor, tokenizer, config.limit)
    with meeting() as rank:
        model = load(config.model, dtype=config.dtype)
        stats = calibrate(
            model,
            tokenizer,
            target,
            distractors,
            gram=config.gram,
            gradients=config.gradients,
            taylor=config.taylor,
            off_task=config.off_task,
            max_length=config.max_length,
            batch_tokens=config.batch_tokens,
            unfinished=unfinished if alone else None,
            resume=config.resume,
            quiet=config.quiet or rank > 0,
        )
        if rank > 0:
            return 0
    stats.save(config.output)
    unfinished.unlink(missing_ok=True)
    return _tell(config, stats, output)


def _on_disk(config: CalibrateConfig, output: Output, *, alone: bool) -> int:
    """The same with one layer in memory at a time."""
    if not alone:
        raise InputError("--offload: runs in one process; leave torchrun out")
    if config.resume:
        raise InputError("--resume: not with --offload, which keeps nothing between two runs")
    names = ("gram", "gradients", "taylor", "off_task")
    with calibrated_on_disk(config, output, **{n: getattr(config, n) for n in names}) as stats:
        stats.save(config.output)
        return _tell(config, stats, output)


def _tell(config: CalibrateConfig, stats: NeuronStats, output: Output) -> int:
    """Say what was seen, and where it is."""
    describe_stats(stats, output)
    output.line(f"saved {config.output}")
    output.json({"output": config.output, **summary(stats)})
    return 0


def summary(stats: NeuronStats) -> dict:
    """What the statistics hold, as plain values."""
    return {
        "mlps": len(stats.names),
        "neurons": sum(sums.token_sum.numel() for sums in stats.target),
        "gram": stats.target[0].held("gram") is not None,
        "gradients": stats.target[0].held("gradient_gram") is not None,
        "hash": stats.hash,
        **stats.provenance,
    }


def describe_stats(stats: NeuronStats, output: Output) -> None:
    """Print what the statistics hold."""
    facts = summary(stats)
    rows = [
        (c["class"], c["name"], count(c["prompts"]), count(c["tokens"]), c["hash"])
        for c in facts.get("corpora", [])
    ]
    title = f"{facts['mlps']} MLPs, {count(facts['neurons'])} neurons of {facts.get('model', '?')}"
    output.table(title, ("class", "corpus", "prompts", "tokens", "sha256"), rows)
    for name, what in (("gram", "Gram matrices"), ("gradient_gram", "loss gradients")):
        shapes = [held.shape for s in stats.target if (held := s.held(name)) is not None]
        if shapes:
            output.line(f"{what}: {megabytes(4 * sum(map(prod, shapes)))}")
