"""`prunekit export`: one file for every sparsity, or a model that loads anywhere."""

from __future__ import annotations

from prunekit.arch import find_mlps, fingerprint
from prunekit.checkpoint import save, weight_bytes
from prunekit.checkpoint.nested import NESTED, save_nested
from prunekit.checkpoint.padded import pad
from prunekit.cli.gguf import export_gguf
from prunekit.cli.output import Output, megabytes
from prunekit.compensate import default_method
from prunekit.config import ExportConfig
from prunekit.criteria import score
from prunekit.criteria.auto import resolved
from prunekit.errors import InputError
from prunekit.files import check_output_folder
from prunekit.integrations.loading import load, load_tokenizer
from prunekit.plan import check_sparsity
from prunekit.stats import NeuronStats

CONFIG = ExportConfig
EXAMPLES = """  prunekit export demo --stats task.stats --anchor 0.2 0.35 0.5 -o nested
  prunekit export uneven --format padded -o anywhere
  prunekit export small --format gguf --outtype q8_0 -o small.gguf"""


def run(config: ExportConfig, output: Output) -> int:
    """Check, load, write, and say what was written."""
    if not config.output:
        raise InputError("needs -o OUT; see `prunekit export --help`")
    if config.format == "gguf":
        return export_gguf(config, output)
    check_output_folder(config.output, force=config.force)
    if config.format == "nested":
        return _nested(config, output)
    model, tokenizer = load(config.model, dtype=config.dtype), load_tokenizer(config.model)
    widths = [view.width for view in find_mlps(model)]
    folder = save(pad(model), tokenizer, config.output, force=config.force)
    facts = {"output": str(folder), "width": max(widths), "bytes": weight_bytes(folder)}
    output.line(
        f"{len(widths)} MLPs of {min(widths)} to {max(widths)} neurons, all {max(widths)} wide now"
        f", {megabytes(facts['bytes'])} on disk\n"
        f"saved {folder}: loads with transformers' AutoModelForCausalLM.from_pretrained, no faster "
        "than its widest MLP allows"
    )
    output.json(facts)
    return 0


def _nested(config: ExportConfig, output: Output) -> int:
    if not config.stats:
        raise InputError("--format nested: needs --stats STATS; see `prunekit export --help`")
    if config.multiple_of < 1:
        raise InputError(f"--multiple-of: got {config.multiple_of}; expected at least 1")
    for sparsity in config.anchor:
        check_sparsity(sparsity)
    stats = NeuronStats.load(config.stats)
    method = config.compensate or (default_method(stats) if config.anchor else "none")
    model, tokenizer = load(config.model, dtype=config.dtype), load_tokenizer(config.model)
    criterion = resolved(config.criterion, stats, repaired=method != "none")
    scores = score(stats, model, criterion)
    recipe = {"criterion": criterion, "stats": stats.hash}
    recipe["fingerprint"] = fingerprint(find_mlps(model, verify=False))
    folder = save_nested(
        model,
        tokenizer,
        config.output,
        scores,
        stats=stats,
        anchors=config.anchor,
        compensate=method,
        multiple_of=config.multiple_of,
        recipe=recipe,
        force=config.force,
        quiet=config.quiet,
    )
    size = (folder / NESTED).stat().st_size
    repaired = ", ".join(f"{s:.0%}" for s in config.anchor)
    output.line(
        f"neurons in the order of {criterion}"
        + (f"; repaired by {method} for {repaired}" if repaired else "")
        + f"; {megabytes(size)} on disk\n"
        f'saved {folder}: loads with prunekit.load("{folder}", sparsity=S)'
    )
    output.json(
        {
            "output": str(folder),
            "criterion": criterion,
            "compensate": method,
            "anchors": list(config.anchor),
            "bytes": size,
        }
    )
    return 0
