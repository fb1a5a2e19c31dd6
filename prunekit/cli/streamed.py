"""`prunekit prune --no-load` and `--offload`: a checkpoint pruned on disk, tensor by tensor."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil

from prunekit.checkpoint import weight_bytes
from prunekit.checkpoint.stream import Checkpoint, check_streamed, stream_prune
from prunekit.checkpoint.widths import differ, loader
from prunekit.cli.output import Output, megabytes
from prunekit.config import PruneConfig
from prunekit.contrast import weigh
from prunekit.errors import InputError
from prunekit.integrations.loading import load_shape, weights_folder
from prunekit.plan import PrunePlan
from prunekit.stats import NeuronStats

SHARE = 0.5  # of the free memory: a model that takes more is pruned on disk


def streamed(config: PruneConfig, *, drawn: bool) -> bool:
    """Whether to prune on disk: where it is asked for, or possible and the model is too large."""
    if config.dry_run:
        return False
    runs = "--target" if config.target else "--target-speedup" if config.target_speedup else ""
    if config.offload == "disk":
        if config.target_speedup:
            raise InputError("--offload: --target-speedup runs the whole model; give a sparsity")
        check_streamed(config.compensate or "none", "--offload")
        return True
    if config.no_load:
        if runs:
            raise InputError(f"--no-load: {runs} runs the model; give --stats and a sparsity")
        if not config.stats and not drawn:
            raise InputError("--no-load: needs --stats STATS, --plan PLAN or --strategy random")
        check_streamed(config.compensate or "none")
        return True
    if runs or not (config.stats or drawn) or config.compensate not in ("", "none", "lstsq"):
        return False
    folder = Path(config.model)
    return folder.is_dir() and weight_bytes(folder) > SHARE * psutil.virtual_memory().available


def stream(
    config: PruneConfig,
    output: Output,
    choose: Callable[..., PrunePlan],
    stats: NeuronStats | None = None,
) -> int:
    """Prune on disk, with these statistics or those the config names, and say what was written."""
    begun = time.perf_counter()
    folder = weights_folder(config.model)
    checkpoint = Checkpoint(folder, load_shape(config.model))
    if config.stats:
        stats = NeuronStats.load(config.stats)
    solvable = stats is not None and stats.target[0].held("gram") is not None
    method = config.compensate or ("lstsq" if solvable else "none")
    if stats is not None:
        stats = weigh(stats, config.keep_off_task)
    chosen = choose(config, output, checkpoint, stats, method)
    stream_prune(
        checkpoint,
        chosen,
        config.output,
        stats=stats,
        compensate=method,
        force=config.force,
        quiet=config.quiet,
    )
    facts = {
        "model": config.model,
        "sparsity": chosen.sparsity,
        "widths": chosen.widths(),
        "dense_widths": list(chosen.dense_widths),
        "compensate": method,
        "bytes_dense": weight_bytes(folder),
        "bytes": weight_bytes(config.output),
        "prune_seconds": time.perf_counter() - begun,
        "output": config.output,
    }
    output.line(
        f"pruned on disk: {chosen.sparsity:.2%} of the neurons removed; repair: {method}\n"
        f"{megabytes(facts['bytes_dense'])} -> {megabytes(facts['bytes'])} "
        f"in {facts['prune_seconds']:.1f} s\n"
        f"saved {config.output}: loads with "
        f"{loader(differ(chosen.dense_widths, chosen.widths()))}"
    )
    output.json(facts)
    return 0
