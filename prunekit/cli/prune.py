"""`prunekit prune`: a smaller model from a model and a task, in one command."""

from __future__ import annotations

import logging
import time

from prunekit.arch import find_mlps, fingerprint
from prunekit.calibrate import calibrate
from prunekit.checkpoint import save, weight_bytes
from prunekit.cli.output import Output, count, megabytes
from prunekit.cli.sources import corpora, joined
from prunekit.compact import prune
from prunekit.compensate import check_budget, check_method, default_method
from prunekit.config import PruneConfig
from prunekit.criteria import score
from prunekit.criteria.auto import gathered_for, resolved
from prunekit.criteria.registry import get_criterion
from prunekit.errors import InputError
from prunekit.files import check_output_folder
from prunekit.integrations.transformers import load, load_tokenizer
from prunekit.measure.memory import parameter_count
from prunekit.plan import PrunePlan, check_sparsity, plan
from prunekit.stats import NeuronStats

logger = logging.getLogger(__name__)

CONFIG = PruneConfig
EXAMPLES = """  prunekit prune demo --target task.jsonl --sparsity 0.2 -o small
  prunekit prune demo --stats task.stats --sparsity 0.35 -o smaller
  prunekit prune demo --target math.jsonl --distractor chat.jsonl \\
      --criterion selectivity --compensate none --sparsity 0.1 -o paper
  prunekit prune demo --strategy random --seed 33 --sparsity 0.1 -o control"""


def run(config: PruneConfig, output: Output) -> int:
    """Check everything that can be checked, then load, plan, prune and save."""
    _check(config)
    given = PrunePlan.load(config.plan) if config.plan else None
    stats = NeuronStats.load(config.stats) if config.stats else None
    tokenizer = load_tokenizer(config.model)
    target = corpora(config.target, tokenizer, config.limit)
    distractors = corpora(config.distractor, tokenizer, config.limit)
    model = load(config.model, dtype=config.dtype)
    if target:
        scored = config.strategy != "random" and not config.plan
        repaired = _solves(_method(config, has_target=True))
        gathers = gathered_for(config.criterion, repaired=repaired) if scored else ()
        stats = calibrate(
            model,
            tokenizer,
            joined(target),
            distractors,
            gram=repaired or "gram" in gathers,
            gradients="taylor" in gathers or "gradient_gram" in gathers,
            max_length=config.max_length,
            batch_tokens=config.batch_tokens,
            quiet=config.quiet,
        )
    begun = time.perf_counter()
    method = config.compensate or default_method(stats)
    chosen = given or _choose(config, model, stats, method)
    if stats is not None and method == "none" and not config.compensate:
        logger.warning(
            "nothing is repaired: %s has no Gram matrices (calibrate --gram)", config.stats
        )
    before = parameter_count(model)
    facts = {
        "model": config.model,
        "sparsity_asked": chosen.recipe.get("sparsity"),
        "sparsity": chosen.sparsity,
        "widths": chosen.widths(),
        "dense_widths": list(chosen.dense_widths),
        "compensate": method,
        "parameters_dense": before,
    }
    if config.dry_run:
        chosen.check_model(find_mlps(model, verify=False))
        output.line(f"would keep {_widths(chosen)}; nothing written (--dry-run)")
        output.json(facts)
        return 0
    prune(
        model,
        chosen,
        stats=stats,
        compensate=method,
        minutes=config.minutes,
        steps=config.steps or None,
        quiet=config.quiet,
    )
    seconds = time.perf_counter() - begun
    folder = save(model, tokenizer, config.output, force=config.force)
    after = parameter_count(model)
    facts |= {
        "parameters": after,
        "bytes": weight_bytes(folder),
        "prune_seconds": seconds,
        "output": str(folder),
    }
    output.line(
        f"kept {_widths(chosen)}; repair: {method}\n"
        f"parameters {count(before)} -> {count(after)}, {megabytes(facts['bytes'])} on disk, "
        f"pruned in {seconds:.1f} s\n"
        f"saved {folder}: loads with transformers' AutoModelForCausalLM.from_pretrained"
    )
    output.json(facts)
    return 0


def _check(config: PruneConfig) -> None:
    if not config.output and not config.dry_run:
        raise InputError("needs -o OUT (or --dry-run); see `prunekit prune --help`")
    if config.output:
        check_output_folder(config.output, force=config.force)
    if not config.plan:
        check_sparsity(config.sparsity)
    if config.multiple_of < 1:
        raise InputError(f"--multiple-of: got {config.multiple_of}; expected at least 1")
    if config.compensate:
        check_method(config.compensate)
        check_budget(config.minutes, config.steps or None)
    criterion = get_criterion(config.criterion)
    if config.stats and config.target:
        raise InputError("give --stats or --target, not both")
    informed = config.stats or config.target
    drawn = config.strategy == "random" or not criterion.needs or config.plan
    if not informed and (not drawn or _method(config, has_target=False) != "none"):
        raise InputError("needs --target FILE or --stats STATS; see `prunekit prune --help`")
    if config.target and "distractor" in criterion.needs and not config.distractor and not drawn:
        raise InputError(f"criterion {config.criterion}: needs --distractor FILE")


def _method(config: PruneConfig, *, has_target: bool) -> str:
    return config.compensate or ("sequential" if has_target else "none")


def _solves(method: str) -> bool:
    return method not in ("none", "bias")


def _choose(config: PruneConfig, model, stats: NeuronStats | None, method: str) -> PrunePlan:
    criterion = resolved(config.criterion, stats, repaired=_solves(method))
    criterion = "random" if config.strategy == "random" else criterion
    scores = score(stats, model, criterion, seed=config.seed)
    recipe = {
        "criterion": criterion,
        "fingerprint": fingerprint(find_mlps(model, verify=False)),
        "stats": stats.hash if stats else None,
    }
    return plan(
        scores,
        config.sparsity,
        strategy=config.strategy,
        allocation=config.allocation,
        multiple_of=config.multiple_of,
        seed=config.seed,
        recipe=recipe,
    )


def _widths(chosen: PrunePlan) -> str:
    pairs = sorted(set(zip(chosen.dense_widths, chosen.widths(), strict=True)))
    shown = ", ".join(f"{kept} of {dense}" for dense, kept in pairs[:4])
    asked = chosen.recipe.get("sparsity")
    wish = f", {asked:.2%} asked for" if asked else ""
    return f"{shown} neurons a layer ({chosen.sparsity:.2%} removed{wish})"
