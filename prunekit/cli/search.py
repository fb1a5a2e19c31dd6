"""`prunekit search`: the smallest model within a stated rise of the loss."""

from __future__ import annotations

from prunekit.checkpoint import save, weight_bytes
from prunekit.cli.output import Output, count, megabytes
from prunekit.cli.sources import corpora, joined
from prunekit.cli.widths import check_multiple_of, resolved_multiple
from prunekit.config import SearchConfig
from prunekit.criteria.registry import get_criterion
from prunekit.errors import InputError
from prunekit.experiment.search import Step, check_bound, search
from prunekit.files import check_output_folder
from prunekit.integrations.loading import load, load_tokenizer
from prunekit.measure.memory import parameter_count

CONFIG = SearchConfig
EXAMPLES = """  prunekit search demo --target task.jsonl --max-loss-rise 0.05 -o small
  prunekit search demo --target task.jsonl --max-loss-rise 0.02 --multiple-of 128 -o small"""


def run(config: SearchConfig, output: Output) -> int:
    """Search, print every model tried, and save the smallest that fits; 1 where none does."""
    _check(config)
    tokenizer = load_tokenizer(config.model)
    target = joined(corpora(config.target, tokenizer, config.limit))
    multiple = resolved_multiple(config.multiple_of, config.model, config.dtype, output)
    model = load(config.model, dtype=config.dtype)
    output.line("repair      removed    rise of the held-out loss, nats/token")
    found = search(
        model,
        tokenizer,
        target,
        max_loss_rise=config.max_loss_rise,
        criterion=config.criterion,
        multiple_of=multiple,
        max_length=config.max_length,
        batch_tokens=config.batch_tokens,
        quiet=config.quiet,
        report=lambda step: output.line(_line(step)),
    )
    facts = {"model": config.model, "max_loss_rise": config.max_loss_rise, **found.as_dict()}
    if found.best is None:
        output.line(f"no model stays within {config.max_loss_rise:g} nats a token; nothing written")
        output.json(facts)
        return 1
    results = {"loss": [found.loss.as_dict()], "search": found.as_dict()}
    folder = save(found.model, tokenizer, config.output, results=results, force=config.force)
    facts |= {
        "widths": found.plan.widths(),
        "parameters": parameter_count(found.model),
        "bytes": weight_bytes(folder),
        "output": str(folder),
    }
    output.line(
        f"smallest that fits: {found.best.sparsity:.2%} removed, loss {found.dense_loss:.4f} "
        f"{found.best.rise:+.4f}\n"
        f"parameters {count(parameter_count(model))} -> {count(facts['parameters'])}, "
        f"{megabytes(facts['bytes'])} on disk\n"
        f"saved {folder}: loads with transformers' AutoModelForCausalLM.from_pretrained"
    )
    output.json(facts)
    return 0


def _check(config: SearchConfig) -> None:
    if not config.target or not config.output:
        raise InputError("needs --target FILE and -o OUT; see `prunekit search --help`")
    check_bound(config.max_loss_rise)
    check_output_folder(config.output, force=config.force)
    check_multiple_of(config.multiple_of)
    if "distractor" in get_criterion(config.criterion).needs:
        raise InputError(f"criterion {config.criterion}: needs distractors, which a search lacks")


def _line(step: Step) -> str:
    verdict = "fits" if step.fits else "too much"
    return f"{step.repair:<11} {step.sparsity:7.2%}    {step.rise:+.4f}  {verdict}"
