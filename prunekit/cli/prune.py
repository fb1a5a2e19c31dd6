"""`prunekit prune`: a smaller model from a model and a task, in one command."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable

import torch

from prunekit.allocation import sensitivity
from prunekit.arch import find_mlps, fingerprint
from prunekit.batching import Tokens
from prunekit.calibrate import calibrate
from prunekit.checkpoint import save, weight_bytes
from prunekit.checkpoint.widths import differ, loadable, loader, refuse_differing_widths
from prunekit.choose import REHEARSED, planned
from prunekit.cli import search
from prunekit.cli.forecast import LENGTH, PROMPTS, counted, forecast
from prunekit.cli.offload import calibrated_on_disk
from prunekit.cli.output import Output, count, megabytes
from prunekit.cli.sources import corpora, joined
from prunekit.cli.streamed import stream, streamed
from prunekit.cli.widths import check_multiple_of, resolved_multiple
from prunekit.compact import prune
from prunekit.compensate import check_budget, check_method, default_method
from prunekit.config import PruneConfig, SearchConfig
from prunekit.contrast import check_keep_off_task, weigh
from prunekit.criteria import CRITERIA, score
from prunekit.criteria.auto import gathered_for, resolved
from prunekit.criteria.reconstruction import FISHER
from prunekit.criteria.registry import Criterion, get_criterion
from prunekit.errors import InputError
from prunekit.experiment.goals import (
    check_speedup,
    measure_speed,
    parse_bytes,
    sparsities,
    sparsity_for_bytes,
)
from prunekit.files import check_output_folder
from prunekit.integrations.loading import load, load_shape, load_tokenizer
from prunekit.measure.cost import Work
from prunekit.measure.memory import parameter_count
from prunekit.plan import PrunePlan, check_sparsity, kept_width
from prunekit.stats import NeuronStats

logger = logging.getLogger(__name__)

CONFIG = PruneConfig
EXAMPLES = """  prunekit prune demo --target task.jsonl --sparsity 0.2 -o small
  prunekit prune demo --stats task.stats --sparsity 0.35 -o smaller
  prunekit prune demo --target math.jsonl --distractor chat.jsonl \\
      --criterion selectivity --compensate none --sparsity 0.1 -o paper
  prunekit prune demo --target math.jsonl --distractor chat.jsonl --keep-off-task 0.25 \\
      --sparsity 0.2 -o still-chats
  prunekit prune demo --target task.jsonl --target-bytes 200MB -o fits
  prunekit prune demo --strategy random --seed 33 --sparsity 0.1 -o control
  prunekit prune large-model --stats large.stats --sparsity 0.35 --no-load -o smaller
  prunekit prune large-model --target task.jsonl --sparsity 0.35 --offload disk -o smaller"""


def run(config: PruneConfig, output: Output) -> int:
    """Check everything that can be checked, then load, plan, prune and save."""
    _check(config)
    if config.max_loss_rise:
        return _search(config, output)
    if not config.plan:
        multiple = resolved_multiple(config.multiple_of, config.model, config.dtype, output)
        config = dataclasses.replace(config, multiple_of=multiple)
    needs_more = config.stats or config.plan or config.target_speedup or _shares(config)
    if config.dry_run and not needs_more:
        return _dry_run(config, output)
    if streamed(config, drawn=_drawn(config)):
        if not config.target:
            return stream(config, output, _chosen_on_disk)
        wanted = _wanted(config, _method(config, has_target=True))
        with calibrated_on_disk(config, output, **wanted) as stats:
            return stream(config, output, _chosen_on_disk, stats)
    given = PrunePlan.load(config.plan) if config.plan else None
    stats = NeuronStats.load(config.stats) if config.stats else None
    tokenizer = load_tokenizer(config.model)
    target = corpora(config.target, tokenizer, config.limit)
    distractors = corpora(config.distractor, tokenizer, config.limit)
    model = load(config.model, dtype=config.dtype)
    _check_savable(config, model, given)
    sparsity = 0.0 if given else _sparsity(config, model, output)
    if target:
        method = _method(config, has_target=True)
        if not config.quiet:
            work = _work(config, *counted(config, tokenizer, target, distractors))
            output.note(forecast(model, work, _uniform(config, model, sparsity)).line())
        stats = calibrate(
            model,
            tokenizer,
            joined(target),
            distractors,
            **_wanted(config, method),
            max_length=config.max_length,
            batch_tokens=config.batch_tokens,
            quiet=config.quiet,
        )
    begun = time.perf_counter()
    if stats is not None:
        stats = weigh(stats, config.keep_off_task)
    method = config.compensate or default_method(stats)
    chosen = given or _choose(config, sparsity, model, stats, method)
    if stats is not None and method == "none" and not config.compensate:
        logger.warning(
            "nothing is repaired: %s has no Gram matrices (calibrate --gram)", config.stats
        )
    facts = _facts(config, model, chosen, method)
    if config.dry_run:
        chosen.check_model(find_mlps(model, verify=False))
        prompts = (stats.prompts if stats else None) or []
        work = dataclasses.replace(_work(config, prompts, []), calibrates=False, method=method)
        return _show(output, model, chosen, work, facts)
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
        f"kept {_widths(chosen)}; repair: {method}\n{_rehearsed(chosen)}"
        f"parameters {count(facts['parameters_dense'])} -> {count(after)}, "
        f"{megabytes(facts['bytes'])} on disk, pruned in {seconds:.1f} s\n"
        f"saved {folder}: loads with {loader(differ(chosen.dense_widths, chosen.widths()))}"
    )
    if config.distractor or config.keep_off_task:
        output.line(
            "what both tasks lost, on rows held out: "
            f"prunekit eval {folder} --baseline {config.model} --data TASK OTHER"
        )
    output.json(facts)
    return 0


def _dry_run(config: PruneConfig, output: Output) -> int:
    """Say what a run would keep and take, from the model's shape and the number of tokens."""
    tokenizer = load_tokenizer(config.model) if config.target else None
    files = config.target, config.distractor
    given = [corpora(many, tokenizer, config.limit) if config.target else [] for many in files]
    work = _work(config, *counted(config, tokenizer, *given))
    model = load_shape(config.model, dtype=config.dtype)
    sparsity = _sparsity(config, model, output)
    kept = [torch.arange(w, dtype=torch.int32) for w in _uniform(config, model, sparsity)]
    dense = [view.width for view in find_mlps(model, verify=False)]
    chosen = PrunePlan(tuple(kept), tuple(dense), {"sparsity": sparsity})
    facts = _facts(config, model, chosen, work.method)
    if not config.target and work.gram:
        output.line(f"no --target: taken to be {PROMPTS} prompts of {LENGTH} tokens")
    return _show(output, model, chosen, work, facts)


def _facts(config: PruneConfig, model, chosen: PrunePlan, method: str) -> dict:
    """What a dense model is to become, as plain values for JSON."""
    return {
        "model": config.model,
        "sparsity_asked": chosen.recipe.get("sparsity"),
        "sparsity": chosen.sparsity,
        "widths": chosen.widths(),
        "dense_widths": list(chosen.dense_widths),
        "keep_off_task": config.keep_off_task,
        "compensate": method,
        "rehearsed": chosen.recipe.get("rehearsed"),
        "parameters_dense": parameter_count(model),
    }


def _show(output: Output, model, chosen: PrunePlan, work: Work, facts: dict) -> int:
    """End a dry run: what would stay and what the work would take."""
    output.line(f"would keep {_widths(chosen)}; nothing written (--dry-run)")
    found = forecast(model, work, chosen.widths())
    found.show(output)
    if len(set(chosen.widths())) > 1:
        output.line(f"widths by layer: {' '.join(map(str, chosen.widths()))}")
        if work.rehearsals:
            output.line("unless the rehearsal says that uniform ones are worth more")
    output.json(facts | {"forecast": found.facts()})
    return 0


def _uniform(config: PruneConfig, model, sparsity: float) -> list[int]:
    """The widths that stay, as far as they are known without statistics."""
    views = find_mlps(model, verify=False)
    if not sparsity:  # a plan's own
        return [kept.numel() for kept in PrunePlan.load(config.plan).kept]
    return [kept_width(view.width, sparsity, config.multiple_of) for view in views]


def _work(config: PruneConfig, target: list[Tokens], distractors: list[Tokens]) -> Work:
    """What a run of these options does for prompts of a target and of its distractors."""
    drawn = _drawn(config)
    method = _method(config, has_target=bool(config.target) or not drawn)
    gathers = _gathers(config, method)
    both = target + distractors if config.keep_off_task else target
    return Work(
        tokens=sum(len(p.ids) for p in both),
        prompts=len(both),
        gram=_solves(method) or "gram" in gathers,
        gradients="gradient_gram" in gathers or "taylor" in gathers,
        eliminates="gram" in gathers,
        method=method,
        calibrates=bool(config.target) or not drawn,
        scored=sum(max(len(p.ids) - max(p.scored, 1), 0) for p in both),
        others=0 if config.keep_off_task else sum(len(p.ids) for p in distractors),
        minutes=config.minutes,
        steps=config.steps,
        rehearsals=2 if _shares(config) and method in REHEARSED else 0,
        offloaded=config.offload == "disk",
    )


def _drawn(config: PruneConfig) -> bool:
    """Whether the neurons are chosen without statistics."""
    needs = get_criterion(config.criterion).needs
    return config.strategy == "random" or not needs or bool(config.plan)


def _gathers(config: PruneConfig, method: str) -> tuple[str, ...]:
    """What choosing the neurons needs beyond a calibration's plain sums."""
    gathers = () if _drawn(config) else gathered_for(config.criterion, repaired=_solves(method))
    return (*gathers, *CRITERIA[FISHER].gathers) if _shares(config) else gathers


def _wanted(config: PruneConfig, method: str) -> dict[str, bool]:
    """What a calibration is to gather for a repair, and for choosing the neurons."""
    gathers = _gathers(config, method)
    return {
        "gram": _solves(method) or "gram" in gathers,
        "gradients": "gradient_gram" in gathers,
        "taylor": "taylor" in gathers,
        "off_task": config.keep_off_task > 0,
    }


def _check(config: PruneConfig) -> None:
    if not config.output and not config.dry_run:
        raise InputError("needs -o OUT (or --dry-run); see `prunekit prune --help`")
    if config.output:
        check_output_folder(config.output, force=config.force)
    _check_goal(config)
    check_multiple_of(config.multiple_of)
    if config.compensate:
        check_method(config.compensate)
        check_budget(config.minutes, config.steps or None)
    criterion = get_criterion(config.criterion)
    _check_contrast(config, criterion)
    if config.stats and config.target:
        raise InputError("give --stats or --target, not both")
    informed = config.stats or config.target or config.dry_run
    if _shares(config) and not (config.stats or config.target):
        raise InputError("--allocation budget: needs --target FILE or --stats STATS")
    drawn = _drawn(config)
    if not informed and (not drawn or _method(config, has_target=False) != "none"):
        raise InputError("needs --target FILE or --stats STATS; see `prunekit prune --help`")
    if config.target and "distractor" in criterion.needs and not config.distractor and not drawn:
        raise InputError(f"criterion {config.criterion}: needs --distractor FILE")


def _check_contrast(config: PruneConfig, criterion: Criterion) -> None:
    check_keep_off_task(config.keep_off_task)
    if config.keep_off_task == 0:
        return
    if "distractor" in criterion.needs:
        raise InputError(
            f"--keep-off-task: criterion {criterion.name} contrasts by itself; use another, or 0"
        )
    if not config.stats and not config.distractor:
        raise InputError("--keep-off-task: needs --distractor FILE, or --stats with one")


def _check_savable(config: PruneConfig, model, given: PrunePlan | None) -> None:
    """Refuse before the work what could not be saved after it."""
    if config.dry_run or loadable(model):
        return
    if _shares(config):
        refuse_differing_widths("--allocation budget: its widths differ by layer")
    if given and differ(given.dense_widths, given.widths()):
        refuse_differing_widths("--plan: its widths differ by layer")


def _shares(config: PruneConfig) -> bool:
    return config.allocation == "budget" and not config.plan


_GOALS = ("sparsity", "target_bytes", "target_speedup", "max_loss_rise", "plan")
_OF_PRUNE = ("distractor", "stats", "strategy", "allocation", "compensate", "seed", "offload")
_OF_PRUNE += ("dry_run",)


def _check_goal(config: PruneConfig) -> None:
    """One goal, and one that is possible as far as can be said without the model."""
    given = ["--" + name.replace("_", "-") for name in _GOALS if getattr(config, name)]
    if len(given) > 1:
        raise InputError(f"got {' and '.join(given)}; expected one of them")
    if not given:
        names = ", ".join("--" + name.replace("_", "-") for name in _GOALS)
        raise InputError(f"needs a goal: one of {names}")
    if config.sparsity:
        check_sparsity(config.sparsity)
    if config.target_bytes:
        parse_bytes(config.target_bytes)
    if config.target_speedup:
        check_speedup(config.target_speedup)
    if config.max_loss_rise:
        plain = {f.name: f.default for f in dataclasses.fields(config)}
        for name in _OF_PRUNE:
            if getattr(config, name) != plain[name]:
                raise InputError(
                    f"--max-loss-rise: takes no --{name.replace('_', '-')}; it searches with the "
                    "defaults, as `prunekit search` does"
                )


def _method(config: PruneConfig, *, has_target: bool) -> str:
    best = "lstsq" if config.offload == "disk" else "sequential"
    return config.compensate or (best if has_target else "none")


def _solves(method: str) -> bool:
    return method not in ("none", "bias")


def _sparsity(config: PruneConfig, model, output: Output) -> float:
    """The sparsity asked for, or the least that reaches the goal given instead."""
    multiple = config.multiple_of
    if config.target_bytes:
        size = parse_bytes(config.target_bytes)
        return sparsity_for_bytes(model, size, multiple_of=multiple)
    if not config.target_speedup:
        return config.sparsity
    speed = measure_speed(model, multiple_of=multiple)
    points = zip(speed.sparsity, speed.speedup, strict=True)
    output.line(
        "decode speed-up measured here: "
        + ", ".join(f"{faster:.2f} × at {removed:.0%}" for removed, faster in points)
    )
    steps = sparsities([view.width for view in find_mlps(model, verify=False)], multiple)
    found = speed.sparsity_for(config.target_speedup, steps)
    output.line(f"{config.target_speedup:g} × needs {found:.2%}, interpolated between these")
    return found


def _search(config: PruneConfig, output: Output) -> int:
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(SearchConfig)}
    return search.run(SearchConfig(**options), output)


def _chosen_on_disk(config: PruneConfig, output: Output, checkpoint, stats, method) -> PrunePlan:
    """The plan of a model that is not loaded."""
    if config.plan:
        return PrunePlan.load(config.plan)

    def scored(stats, model, criterion: str, *, seed: int = 0) -> list[torch.Tensor]:
        return checkpoint.score(stats, criterion, seed=seed)

    sparsity = _sparsity(config, checkpoint.shape, output)
    return _choose(config, sparsity, checkpoint.shape, stats, method, scored)


def _choose(
    config: PruneConfig,
    sparsity: float,
    model,
    stats: NeuronStats | None,
    method: str,
    score: Callable[..., list[torch.Tensor]] = score,
) -> PrunePlan:
    criterion = resolved(config.criterion, stats, repaired=_solves(method))
    criterion = "random" if config.strategy == "random" else criterion
    scores = score(stats, model, criterion, seed=config.seed)
    costs = None
    if _shares(config):
        fisher = scores if criterion == FISHER else score(stats, model, FISHER)
        costs = sensitivity(fisher, model)
    recipe = {
        "criterion": criterion,
        "fingerprint": fingerprint(find_mlps(model, verify=False)),
        "stats": stats.hash if stats else None,
        "keep_off_task": config.keep_off_task,
    }
    goals = {name: getattr(config, name) for name in ("target_bytes", "target_speedup")}
    recipe |= {name: goal for name, goal in goals.items() if goal}
    chosen = planned(
        model,
        stats,
        scores,
        sparsity,
        compensate="none" if config.dry_run else method,  # a dry run rehearses nothing
        strategy=config.strategy,
        allocation=config.allocation,
        sensitivity=costs,
        quiet=config.quiet,
        multiple_of=config.multiple_of,
        seed=config.seed,
        recipe=recipe,
    )
    if sparsity and chosen.sparsity == 0:
        raise InputError(
            f"--multiple-of {config.multiple_of}: {sparsity:.2%} of {max(chosen.dense_widths)} "
            "neurons rounds to none removed; take a smaller multiple, or a higher sparsity"
        )
    return chosen


def _rehearsed(chosen: PrunePlan) -> str:
    """What budget and uniform widths were worth, where that was tried."""
    if "rehearsed" not in chosen.recipe:
        return ""
    said = chosen.recipe["rehearsed"]
    each = "; ".join(
        f"{name} {verdict['loss']:.4f}, {verdict['divergence']:.4f} from the dense model"
        for name, verdict in said.items()
    )
    best = min(said, key=lambda name: sum(said[name].values()))
    return f"loss on prompts left out, in nats a token: {each}; took {best}\n"


def _widths(chosen: PrunePlan) -> str:
    pairs = sorted(set(zip(chosen.dense_widths, chosen.widths(), strict=True)))
    shown = ", ".join(f"{kept} of {dense}" for dense, kept in pairs)
    if len(pairs) > 4:
        shown = f"{min(chosen.widths())} to {max(chosen.widths())} of {max(chosen.dense_widths)}"
    asked = chosen.recipe.get("sparsity")
    wish = f", {asked:.2%} asked for" if asked else ""
    return f"{shown} neurons a layer ({chosen.sparsity:.2%} removed{wish})"
